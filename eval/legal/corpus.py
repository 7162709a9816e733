"""CUAD contracts as passages: titled, marked with their clauses, and as filler for longer contexts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from random import Random
from typing import Any

from eval.legal.items import Item
from eval.legal.sources import Source
from eval.legal.text import Passage, Span

log = logging.getLogger(__name__)

QUESTIONS = 6
"""Questions to a document: enough to pay for its prefill."""


def title(contract: dict[str, Any]) -> str:
    """A name to ask for, e.g. ``"Hosting Agreement (WEBHELPCOMINC)"``: what the contract calls itself, and who filed it.

    The filer is the first part of CUAD's contract id. The document's name is its first annotated one.
    """
    filer = re.split(r"_| - ", contract["id"], maxsplit=1)[0].strip()
    names = contract["labels"].get("Document Name", {}).get("clauses", [])
    name = " ".join(names[0].split()).title() if names else "Agreement"
    return f"{name} ({filer})"


def titled(contract: dict[str, Any], categories: Iterable[str] = ()) -> Passage:
    """A contract under a line with its title; the spans of these categories are marked with the category's name.

    The title line is marked too, as ``"title"``, so that no excerpt loses it.
    """
    line = f"Contract: {title(contract)}"
    header = f"{line}\n\n"
    labels, at = contract["labels"], len(header)
    spans = [Span(0, len(line), "title")]
    spans += [Span(s + at, e + at, category) for category in categories for s, e in labels[category]["spans"]]
    return Passage(header + contract["text"], tuple(spans))


def shuffled(rows: Sequence[Any], rng: Random) -> list[Any]:
    """The rows in an order drawn from ``rng``."""
    return rng.sample(rows, len(rows))


def fillers(source: Source, rng: Random, besides: Iterable[dict[str, Any]] = ()) -> Iterator[Passage]:
    """Titled contracts in random order, without ``besides`` and without any of the same title."""
    taken = {title(contract) for contract in besides}
    for contract in shuffled(source.contracts(), rng):
        if title(contract) not in taken:
            yield titled(contract)


def finished(found: list[Item], wanted: int, name: str, length: int) -> list[Item]:
    """The first ``wanted`` items, with a warning if there are fewer.

    Raises
    ------
    ValueError
        If there is none.
    """
    if not found:
        raise ValueError(f"{name}: no document of the data fits into {length} tokens. Ask for a larger length.")
    if len(found) < wanted:
        log.warning("%s at %d tokens: the data allow %d items, %d were asked for.", name, length, len(found), wanted)
    return found[:wanted]
