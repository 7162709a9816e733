"""CUAD as extraction: who, when, under which law. Short answers in the words of one contract."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, fillers, finished, shuffled, title, titled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import exact_match, token_f1
from eval.legal.sources import Source
from eval.legal.text import Encoder, evidence, excerpt, surround

NAME = "legal_cuad_extract"
MAX_NEW_TOKENS = 64

CLAUSE = 'Question: What does the {{title}} say about {topic}? Quote the sentence.\nAnswer: "'

LEADS = {
    "Governing Law": CLAUSE.format(topic="the governing law"),
    "Expiration Date": CLAUSE.format(topic="the end of its initial term"),
    "Agreement Date": "The date of the {title} is",
    "Effective Date": "The date on which the {title} becomes effective is",
    "Renewal Term": CLAUSE.format(topic="its renewal term"),
    "Notice Period To Terminate Renewal": CLAUSE.format(topic="the notice required to stop its renewal"),
    "Parties": "One of the parties to the {title} is",
}
"""CUAD's categories with short answers, and the text that the answer continues: an opened quotation, where it is a clause."""

LONGEST = 600
"""Clauses of more characters are not asked for: no answer of `MAX_NEW_TOKENS` could match them."""


def questions(contract: dict[str, Any]) -> dict[str, str]:
    """The categories that the contract answers and the questions, at most `QUESTIONS` of them."""
    found = {}
    for category, lead in LEADS.items():
        label = contract["labels"].get(category)
        if label and label["clauses"] and label["spans"] and max(map(len, label["clauses"])) <= LONGEST:
            found[category] = "\n\n" + lead.format(title=title(contract))
    return dict(list(found.items())[:QUESTIONS])


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Contracts cut around the clauses asked for, or between other contracts up to ``length`` tokens.

    All questions to a contract share one context, which holds the clauses of all of them. Evidence: the clauses.

    Raises
    ------
    ValueError
        If ``length`` has no room for any contract's evidence and question.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    for contract in shuffled(source.contracts(), Random(f"{seed}/{NAME}")):
        asked = questions(contract)
        if not asked:
            continue
        room = encoder.room(length, asked.values(), MAX_NEW_TOKENS)
        marked = titled(contract, asked)
        # A quarter of the context may be evidence; in shorter contexts the last questions are left out.
        while asked and evidence(marked, encoder) > room // 4:
            asked.popitem()
            marked = titled(contract, asked)
        if not asked:
            continue
        rng = Random(f"{seed}/{NAME}/{contract['id']}")
        text = excerpt(marked, encoder, room, rng)
        text = surround(text, fillers(source, rng, [contract]), encoder, room, rng)
        for category, question in asked.items():
            found.append(
                Item(
                    id=f"{contract['id']}/{category}",
                    document=contract["id"],
                    context=text.text,
                    question=question,
                    answers=tuple(dict.fromkeys(contract["labels"][category]["clauses"])),
                    spans=text.of(category),
                    labels={"category": category},
                )
            )
        if len(found) >= items:
            break
    return finished(found, items, NAME, length)


def score(item: Item, output: Output) -> dict[str, float]:
    """Token F1 and exact match against the best of the category's clauses."""
    return {
        "token_f1": token_f1(output.text, item.answers),
        "exact_match": exact_match(output.text, item.answers),
    }


TASK = Task(NAME, "generate", build, score, metric="token_f1", max_new_tokens=MAX_NEW_TOKENS)
