"""One needle of its kind: RULER's ``niah_single`` in contract text."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, finished
from eval.legal.items import Item, Task
from eval.legal.needles import Needle, depths, hide, item, numbers, score
from eval.legal.sources import Source
from eval.legal.text import Encoder

NAME = "legal_needle_single"
MAX_NEW_TOKENS = 16

LEADS = {
    "escrow": "The access code of the escrow account is",
    "docket": "The docket number of the arbitration is",
    "vault": "The vault box that holds the original deeds is number",
    "wire": "The reference of the closing wire transfer is",
    "seal": "The registration number of the notary's seal is",
    "policy": "The number of the directors' insurance policy is",
    "permit": "The number of the building permit is",
    "parcel": "The land register lists the parcel under number",
}
"""Kinds of needles, no two alike, and the sentence that states each."""


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Contracts of ``length`` tokens, each with six needles of six different kinds at depths 0 to 1.

    A document holds exactly one needle of each kind, so that every question has one sentence to find and none that
    resembles it, and six questions share a prefill. Which kind lies at which depth changes from document to document.

    Raises
    ------
    ValueError
        If ``length`` is too small for six needles.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    room = encoder.room(length, (f"\n\n{lead}" for lead in LEADS.values()), MAX_NEW_TOKENS)
    while len(found) < items:
        document = f"{NAME}-{len(found) // QUESTIONS}"
        rng = Random(f"{seed}/{document}")
        kinds = rng.sample(sorted(LEADS), QUESTIONS)
        values = numbers(QUESTIONS, rng)
        needles = [Needle(LEADS[k], v, d) for k, v, d in zip(kinds, values, depths(QUESTIONS), strict=True)]
        text = hide(needles, source, encoder, room, rng)
        found += [item(kind, document, text, n.lead, [n]) for kind, n in zip(kinds, needles, strict=True)]
    return finished(found, items, NAME, length)


TASK = Task(NAME, "generate", build, score, metric="score", max_new_tokens=MAX_NEW_TOKENS, stop=("\n", "."))
