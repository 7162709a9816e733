"""Several needles that differ in one name: RULER's ``niah_multikey`` in contract text."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, finished
from eval.legal.items import Item, Task
from eval.legal.needles import PARTIES, Needle, depths, hide, item, numbers, score
from eval.legal.sources import Source
from eval.legal.text import Encoder

NAME = "legal_needle_multikey"
MAX_NEW_TOKENS = 16
LEAD = "The access code of the escrow account {name} is"


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Contracts of ``length`` tokens, each with the codes of six accounts at depths 0 to 1; a question asks for one.

    Raises
    ------
    ValueError
        If ``length`` is too small for six needles.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    room = encoder.room(length, (f"\n\n{LEAD.format(name=name)}" for name in PARTIES), MAX_NEW_TOKENS)
    while len(found) < items:
        document = f"{NAME}-{len(found) // QUESTIONS}"
        rng = Random(f"{seed}/{document}")
        names = rng.sample(PARTIES, QUESTIONS)
        drawn = zip(names, numbers(QUESTIONS, rng), depths(QUESTIONS), strict=True)
        needles = [Needle(LEAD.format(name=name), value, depth) for name, value, depth in drawn]
        text = hide(needles, source, encoder, room, rng)
        found += [item(name, document, text, n.lead, [n]) for name, n in zip(names, needles, strict=True)]
    return finished(found, items, NAME, length)


TASK = Task(NAME, "generate", build, score, metric="score", max_new_tokens=MAX_NEW_TOKENS, stop=("\n", "."))
