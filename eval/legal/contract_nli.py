"""ContractNLI: does an agreement entail a statement, contradict it, or not mention it?"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, finished, shuffled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import accuracy
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, Span, evidence, excerpt, surround

NAME = "legal_contract_nli"

CHOICES = {"Entailment": " True", "Contradiction": " False", "NotMentioned": " Neither"}
"""The three classes and the words that stand for them, about equally long in tokens."""

QUESTION = (
    "\n\nStatement about {name}: {hypothesis}\nIs the statement true or false according to {name}, or neither?\nAnswer:"
)


def _name(document: dict[str, Any]) -> str:
    return f"Agreement No. {document['id']}"


def _titled(document: dict[str, Any], hypotheses: list[str]) -> Passage:
    line = _name(document)
    header = f"{line}\n\n"
    annotations, at = document["annotation_sets"][0]["annotations"], len(header)
    spans = [Span(0, len(line), "title")]
    for key in hypotheses:
        for index in annotations[key]["spans"]:
            start, end = document["spans"][index]
            spans.append(Span(start + at, end + at, key))
    return Passage(header + document["text"], tuple(spans))


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Non-disclosure agreements of the test split, six of the seventeen hypotheses each; the classes take turns.

    An agreement longer than ``length`` is cut around its evidence; a shorter one stands between others, each under its
    number. Evidence: the annotated sentences; "not mentioned" has none.

    Raises
    ------
    ValueError
        If ``length`` has no room for the evidence and the question.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    data = source.contract_nli("test")
    documents, statements = data["documents"], {key: label["hypothesis"] for key, label in data["labels"].items()}
    for document in shuffled(documents, Random(f"{seed}/{NAME}")):
        rng = Random(f"{seed}/{NAME}/{document['id']}")
        annotations = document["annotation_sets"][0]["annotations"]
        name = _name(document)
        asked = {key: QUESTION.format(name=name, hypothesis=statements[key]) for key in _balanced(annotations, rng)}
        room = encoder.room(length, asked.values(), 1 + max(encoder.count(choice) for choice in CHOICES.values()))
        marked = _titled(document, list(asked))
        while asked and evidence(marked, encoder) > room // 2:
            asked.popitem()
            marked = _titled(document, list(asked))
        if not asked:
            continue
        text = excerpt(marked, encoder, room, rng)
        text = surround(text, _others(documents, document, rng), encoder, room, rng)
        for key, question in asked.items():
            found.append(
                Item(
                    id=f"{document['id']}/{key}",
                    document=document["id"],
                    context=text.text,
                    question=question,
                    answers=(CHOICES[annotations[key]["choice"]],),
                    choices=tuple(CHOICES.values()),
                    spans=text.of(key),
                    labels={"hypothesis": key, "class": annotations[key]["choice"]},
                )
            )
        if len(found) >= items:
            break
    return finished(found, items, NAME, length)


def _balanced(annotations: dict[str, Any], rng: Random) -> list[str]:
    """Hypotheses, the three classes in turn while each lasts: contradictions are rare."""
    groups: dict[str, list[str]] = {choice: [] for choice in CHOICES}
    for key in shuffled(sorted(annotations), rng):
        groups[annotations[key]["choice"]].append(key)
    chosen: list[str] = []
    while len(chosen) < QUESTIONS and any(groups.values()):
        chosen += [group.pop() for group in groups.values() if group]
    return chosen[:QUESTIONS]


def _others(documents: list[dict[str, Any]], besides: dict[str, Any], rng: Random) -> Iterator[Passage]:
    for document in shuffled(documents, rng):
        if document["id"] != besides["id"]:
            yield _titled(document, [])


def score(item: Item, output: Output) -> dict[str, float]:
    """Three-way accuracy."""
    return {"accuracy": accuracy(item, output)}


TASK = Task(NAME, "choices", build, score, metric="accuracy")
