"""A clause of one contract among many: LegalBench-RAG's question, asked of a concatenated context."""

from __future__ import annotations

from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, fillers, finished, shuffled, title, titled
from eval.legal.items import Item, Output, Task
from eval.legal.metrics import char_precision_recall, quoted_spans, token_f1
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, evidence, excerpt, join, surround

NAME = "legal_cross_contract"
MAX_NEW_TOKENS = 96
SEPARATOR = "\n\n"

TOPICS = {
    "Governing Law": "the governing law",
    "Anti-Assignment": "whether the agreement may be assigned",
    "Termination For Convenience": "termination for convenience",
    "Audit Rights": "the right to audit books and records",
    "Cap On Liability": "the limit of liability",
    "Insurance": "the insurance to be kept",
    "Exclusivity": "exclusivity",
    "License Grant": "the grant of a license",
    "Minimum Commitment": "the minimum commitment",
    "Non-Compete": "non-competition",
    "Post-Termination Services": "obligations after termination",
    "Revenue/Profit Sharing": "the sharing of revenue",
    "Change Of Control": "a change of control",
    "Covenant Not To Sue": "the covenant not to sue",
    "Warranty Duration": "the duration of the warranty",
}
"""CUAD's categories of whole clauses, and what to call them."""

LONGEST = 800
"""Clauses of more characters are not asked for."""

QUESTION = '\n\nQuestion: What does the {title} say about {topic}? Quote the sentence.\nAnswer: "'


def _topics(contract: dict[str, Any]) -> list[str]:
    """The categories with exactly one clause, which is what a question can name."""
    labels = contract["labels"]
    return [
        category
        for category in TOPICS
        if category in labels
        and len(labels[category]["clauses"]) == 1
        and len(labels[category]["spans"]) == 1
        and len(labels[category]["clauses"][0]) <= LONGEST
    ]


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """Several contracts, each under its title, ``length`` tokens in all; a question asks for a clause of one of them.

    Below 8K tokens three contracts are asked about, two questions each, above six with one each. Each is cut around its
    clauses to an equal share of the context; what shorter ones leave is filled with further contracts. Evidence: the
    clause, in the contract that the question names.

    Raises
    ------
    ValueError
        If ``length`` has no room for the evidence and the question.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    per_contract = 2 if length < 8192 else 1
    wanted = QUESTIONS // per_contract
    queue = shuffled([c for c in source.contracts() if len(_topics(c)) >= per_contract], Random(f"{seed}/{NAME}"))
    while len(found) < items and queue:
        document = f"{NAME}-{len(found) // QUESTIONS}"
        rng = Random(f"{seed}/{document}")
        chosen: list[tuple[dict[str, Any], list[str], Passage]] = []
        # How long the questions are is not known yet; half a share for the evidence leaves room enough.
        share = encoder.room(length, (), MAX_NEW_TOKENS) // wanted
        while queue and len(chosen) < wanted:
            contract = queue.pop(0)
            if any(title(contract) == title(other) for other, _, _ in chosen):
                continue
            for topics in _choices(contract, per_contract, rng):
                marked = titled(contract, topics)
                if evidence(marked, encoder) <= share // 2:
                    # Keys name the contract too: the contexts hold several clauses of a category.
                    keyed = Passage(marked.text, tuple((s, e, f"{contract['id']}/{key}") for s, e, key in marked.spans))
                    chosen.append((contract, topics, keyed))
                    break
        if len(chosen) < wanted:
            break
        asked = [(c, t, QUESTION.format(title=title(c), topic=TOPICS[t])) for c, topics, _ in chosen for t in topics]
        room = encoder.room(length, (question for *_, question in asked), MAX_NEW_TOKENS)
        # Two tokens for each joint, where the tokenisation of the whole may differ.
        share = room // wanted - encoder.count(SEPARATOR) - 2
        parts = [excerpt(keyed, encoder, share, rng) for *_, keyed in chosen]
        others = fillers(source, rng, [contract for contract, _, _ in chosen])
        text = surround(join(parts, SEPARATOR), others, encoder, room, rng, SEPARATOR)
        for contract, topic, question in asked:
            found.append(
                Item(
                    id=f"{document}/{contract['id']}/{topic}",
                    document=document,
                    context=text.text,
                    question=question,
                    answers=tuple(contract["labels"][topic]["clauses"]),
                    spans=text.of(f"{contract['id']}/{topic}"),
                    labels={"category": topic, "contracts": text.text.count("Contract: ")},
                )
            )
    return finished(found, items, NAME, length)


def _choices(contract: dict[str, Any], count: int, rng: Random) -> list[list[str]]:
    """Some combinations of topics to try, at random: the spans of the first may not fit."""
    topics = _topics(contract)
    return [rng.sample(topics, count) for _ in range(3)]


def score(item: Item, output: Output) -> dict[str, float]:
    """Characters of the context that the answer quotes against the clause's, and the words' F1.

    ``char_precision``, ``char_recall`` and their harmonic mean ``char_f1``: see `quoted_spans` for what counts as quoted.
    """
    found = quoted_spans(item.context, output.text, prefer=item.spans)
    precision, recall = char_precision_recall(found, item.spans)
    return {
        "char_f1": 2 * precision * recall / (precision + recall) if precision and recall else 0.0,
        "char_precision": precision,
        "char_recall": recall,
        "token_f1": token_f1(output.text, item.answers),
    }


TASK = Task(NAME, "generate", build, score, metric="char_f1", max_new_tokens=MAX_NEW_TOKENS)
