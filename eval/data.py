"""Contracts cut to a number of tokens, for the speed and recall commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.legal.sources import Source


def contracts(data_dir: Path) -> Iterator[dict[str, Any]]:
    """CUAD contracts (``id``, ``text``, ``labels``) from ``cuad.jsonl.gz`` in a folder, in file order.

    Raises
    ------
    DataError
        If the folder has no such file (`MissingData`) or a row is malformed.
    """
    yield from Source(data_dir).contracts()


def long_contracts(data_dir: Path, tokenizer: Any, tokens: int, count: int) -> list[tuple[str, list[int]]]:
    """The first ``count`` contracts of at least ``tokens`` tokens: pairs of name and exactly ``tokens`` token ids.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    found: list[tuple[str, list[int]]] = []
    for contract in contracts(data_dir):
        # Three characters a token is on the safe side of legal English.
        if len(contract["text"]) < 3 * tokens:
            continue
        ids = tokenizer(contract["text"], add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= tokens:
            found.append((contract["id"], ids[:tokens]))
        if len(found) == count:
            return found
    raise ValueError(f"asked for {count} contracts of {tokens} tokens, but {data_dir} has {len(found)}. Ask for fewer.")
