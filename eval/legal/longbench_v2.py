"""LongBench v2, the legal questions: multiple choice over one or several long documents."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import finished, shuffled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import accuracy
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, truncate_middle

NAME = "legal_longbench_v2"
LETTERS = "ABCD"
CHOICES = tuple(f" {letter}" for letter in LETTERS)


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """The questions of the sub-domain Legal (about 33 in all), each with its own context.

    A context longer than ``length`` loses its middle, as in LongBench. A shorter one stays as it is. There are no
    evidence spans.

    Raises
    ------
    ValueError
        If ``length`` has no room for a question.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    for row in shuffled(source.longbench_v2_legal(), Random(f"{seed}/{NAME}"))[:items]:
        options = "\n".join(f"({letter}) {text.strip()}" for letter, text in zip(LETTERS, row["choices"], strict=True))
        question = f"\n\nQuestion: {row['question'].strip()}\n{options}\nThe correct answer is option"
        room = encoder.room(length, [question], 2)
        text = truncate_middle(Passage(row["context"]), encoder, room)
        found.append(
            Item(
                id=row["id"],
                document=row["id"],
                context=text.text,
                question=question,
                answers=(f" {row['answer']}",),
                choices=CHOICES,
                labels={"domain": row["domain"]},
            )
        )
    return finished(found, items, NAME, length)


def score(item: Item, output: Output) -> dict[str, float]:
    """Accuracy of the likeliest letter."""
    return {"accuracy": accuracy(item, output)}


TASK = Task(NAME, "choices", build, score, metric="accuracy")
