"""Multi-LexSum: summaries of civil rights lawsuits from their court documents."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import finished, shuffled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import rouge_l
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, truncate

NAME = "legal_multilexsum"
MAX_NEW_TOKENS = 192

QUESTIONS = {
    "tiny": "\n\nSummary of the case in one sentence:",
    "short": "\n\nSummary of the case in one paragraph:",
}


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Cases of the test split: their documents one after another, cut at the end; a tiny and a short summary of each.

    A case shorter than ``length`` stays as it is. There are no evidence spans.

    Raises
    ------
    ValueError
        If ``length`` has no room for question and summary.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    room = encoder.room(length, QUESTIONS.values(), MAX_NEW_TOKENS)
    for row in shuffled(source.multi_lexsum(), Random(f"{seed}/{NAME}")):
        if not row["sources"]:
            continue
        # Eight characters a token are more than enough, and cases of a hundred documents need not be encoded whole.
        text = truncate(Passage("\n\n".join(row["sources"])[: 8 * room]), encoder, room)
        for size, question in QUESTIONS.items():
            if size in row["summaries"]:
                found.append(
                    Item(
                        id=f"{row['id']}/{size}",
                        document=row["id"],
                        context=text.text,
                        question=question,
                        answers=(row["summaries"][size],),
                        labels={"summary": size},
                    )
                )
        if len(found) >= items:
            break
    return finished(found, items, NAME, length)


def score(item: Item, output: Output) -> dict[str, float]:
    """ROUGE-L F-measure."""
    return {"rouge_l": rouge_l(output.text, item.answers)}


TASK = Task(NAME, "generate", build, score, metric="rouge_l", max_new_tokens=MAX_NEW_TOKENS, stop=("\n\n",))
