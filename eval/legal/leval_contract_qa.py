"""L-Eval's ``legal_contract_qa``: expert questions to long contracts."""

from __future__ import annotations

import re
from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, finished, shuffled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import token_f1
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, Span, truncate_middle

NAME = "legal_leval_contract_qa"
MAX_NEW_TOKENS = 96
QUESTION = "\n\nQuestion: {instruction}\nAnswer:"


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """L-Eval's contracts, up to six of the questions of each.

    A contract longer than ``length`` loses its middle, as in L-Eval, and with it perhaps the answer: the label
    ``evidence`` says whether the answer is still in the context. A shorter contract stays as it is. Evidence: where the
    gold answer stands in the contract, if it is a quotation.

    Raises
    ------
    ValueError
        If ``length`` has no room for the questions.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    for row in shuffled(source.leval_contract_qa(), Random(f"{seed}/{NAME}")):
        pairs = list(zip(row["instructions"], row["outputs"], strict=True))[:QUESTIONS]
        asked = [QUESTION.format(instruction=instruction.strip()) for instruction, _ in pairs]
        spans = [span for n, (_, answer) in enumerate(pairs) for span in _find(row["input"], answer, str(n))]
        room = encoder.room(length, asked, MAX_NEW_TOKENS)
        text = truncate_middle(Passage(row["input"], tuple(spans)), encoder, room)
        for number, ((instruction, answer), question) in enumerate(zip(pairs, asked, strict=True)):
            category = re.search(r'related to "([^"]+)"', instruction)
            found.append(
                Item(
                    id=f"{row['id']}/{number}",
                    document=row["id"],
                    context=text.text,
                    question=question,
                    answers=(answer,),
                    spans=text.of(str(number)),
                    labels={
                        "category": category[1] if category else "",
                        "evidence": bool(text.of(str(number))),
                    },
                )
            )
        if len(found) >= items:
            break
    return finished(found, items, NAME, length)


def _find(text: str, quotation: str, key: str) -> list[Span]:
    """Where a quotation stands in a text, white space aside."""
    words = quotation.split()
    if not words:
        return []
    return [Span(*match.span(), key) for match in re.finditer(r"\s+".join(map(re.escape, words)), text)]


def score(item: Item, output: Output) -> dict[str, float]:
    """Token F1, L-Eval's measure for this task."""
    return {"token_f1": token_f1(output.text, item.answers)}


TASK = Task(NAME, "generate", build, score, metric="token_f1", max_new_tokens=MAX_NEW_TOKENS)
