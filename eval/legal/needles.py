"""Needles in contract text: sentences with random numbers, written between the sentences of contracts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from eval.legal.corpus import fillers
from eval.legal.items import Item, Output
from eval.legal.metrics import contained
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, Span, fitted, join, surround

PARTIES = (
    "Harrow Whitlock Penrose Calloway Ashdown Merrick Thornbury Lockwood Fairfax Stanhope Bexley Ridgeway Covington "
    "Marlow Prescott Winslow Hartwell Kingsley Aldridge Bramwell Cranford Dunmore Ellsworth Farnham Granger Holloway"
).split()
"""Names of the accounts and matters that needles are about."""

_BOUNDARY = re.compile(r"(?<=[.;:])\s+(?=[A-Z(\"“])")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide.

    Attributes
    ----------
    lead : str
        The sentence up to its number; also the question, which the model completes.
    value : str
    depth : float
        Where it goes: 0 is the beginning of the text, 1 its end.
    """

    lead: str
    value: str
    depth: float

    @property
    def sentence(self) -> str:
        return f"{self.lead} {self.value}."


def depths(count: int) -> list[float]:
    """``count`` depths evenly from 0 to 1."""
    return [round(index / max(count - 1, 1), 3) for index in range(count)]


def numbers(count: int, rng: Random) -> list[str]:
    """Different random numbers of seven digits, as in RULER."""
    return [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]


def hide(needles: Sequence[Needle], source: Source, encoder: Encoder, tokens: int, rng: Random) -> Passage:
    """Contracts of ``tokens`` tokens with each needle at the sentence boundary nearest to its depth.

    Spans are marked with the needles' values. Depths are shares of the characters of the contract text.

    Raises
    ------
    ValueError
        If the needles leave no room for contract text.
    """
    sentences = sum(encoder.count(f" {needle.sentence} ") for needle in needles)
    if 2 * sentences > tokens:
        raise ValueError(
            f"{len(needles)} needles take {sentences} of the {tokens} tokens left for the context, more than half. "
            f"Ask for a larger length."
        )
    contracts = list(fillers(source, rng))

    def make(budget: int) -> Passage:
        hay = surround(Passage(""), contracts, encoder, budget - sentences, Random(0)).text.strip()
        places = [0, *(match.end() for match in _BOUNDARY.finditer(hay)), len(hay)]
        parts: list[Passage | str] = []
        at = 0
        for needle in sorted(needles, key=lambda needle: needle.depth):
            place = max(min(places, key=lambda p: abs(p - needle.depth * len(hay))), at)
            parts.append(hay[at:place])
            if place == len(hay) and not parts[-1][-1:].isspace():
                parts.append(" ")
            parts += [Passage(needle.sentence, (Span(0, len(needle.sentence), needle.value),)), " "]
            at = place
        parts.append(hay[at:])
        whole = join(parts)
        return whole.slice(0, len(whole.text.rstrip()))

    return fitted(make, encoder, tokens)


def item(key: str, document: str, text: Passage, lead: str, needles: Sequence[Needle]) -> Item:
    """The question for the values of these needles, which share a lead. ``depth`` is their mean depth."""
    return Item(
        id=f"{document}/{key}",
        document=document,
        context=text.text,
        question=f"\n\n{lead}",
        answers=tuple(needle.value for needle in needles),
        spans=tuple(sorted(span for needle in needles for span in text.of(needle.value))),
        labels={"depth": round(sum(needle.depth for needle in needles) / len(needles), 3), "key": key},
    )


def score(item: Item, output: Output) -> dict[str, float]:
    """Share of the expected numbers that the answer contains."""
    return {"score": contained(output.text, item.answers)}
