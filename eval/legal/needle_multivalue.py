"""Several needles under one name, all asked for: RULER's ``niah_multivalue`` in contract text."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import finished
from eval.legal.items import Item, Task
from eval.legal.needles import PARTIES, Needle, depths, hide, item, numbers, score
from eval.legal.sources import Source
from eval.legal.text import Encoder

NAME = "legal_needle_multivalue"
MAX_NEW_TOKENS = 64
KEYS = 4
VALUES = 4
LEAD = "Invoice to {name}: number"
QUESTION = "All four invoices to {name}:\nInvoice to {name}: number"


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Contracts of ``length`` tokens, each with the numbers of four invoices to each of four parties, in turn, at depths
    0 to 1.

    A question asks for a party's four numbers, as a list whose first line is begun; its label ``depth`` is the mean of
    theirs.

    Raises
    ------
    ValueError
        If ``length`` is too small for the sixteen needles.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    asked = {name: QUESTION.format(name=name) for name in PARTIES}
    room = encoder.room(length, (f"\n\n{text}" for text in asked.values()), MAX_NEW_TOKENS)
    while len(found) < items:
        document = f"{NAME}-{len(found) // KEYS}"
        rng = Random(f"{seed}/{document}")
        names = rng.sample(PARTIES, KEYS)
        drawn = zip(names * VALUES, numbers(KEYS * VALUES, rng), depths(KEYS * VALUES), strict=True)
        needles = {name: [] for name in names}
        for name, value, depth in drawn:
            needles[name].append(Needle(LEAD.format(name=name), value, depth))
        text = hide([n for group in needles.values() for n in group], source, encoder, room, rng)
        found += [item(name, document, text, asked[name], needles[name]) for name in names]
    return finished(found, items, NAME, length)


TASK = Task(NAME, "generate", build, score, metric="score", max_new_tokens=MAX_NEW_TOKENS, stop=("\n\n",))
