"""Legal documents for evaluation."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def contracts(data_dir: Path) -> Iterator[dict[str, Any]]:
    """CUAD contracts (``id``, ``text``, ``labels``) from ``cuad.jsonl.gz`` in a folder, in file order.

    Raises
    ------
    FileNotFoundError
        If the folder has no such file.
    """
    path = Path(data_dir) / "cuad.jsonl.gz"
    if not path.exists():
        raise FileNotFoundError(f"no cuad.jsonl.gz in {data_dir}. Point --data-dir at a folder that has it.")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


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
