"""Perplexity of contract text after a long prefix of it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from eval.legal.corpus import QUESTIONS, fillers, finished, shuffled, titled
from eval.legal.items import Item, Output, Task
from eval.legal.sources import Source
from eval.legal.text import Encoder, Passage, join, truncate

NAME = "legal_ppl"
CHUNK = 32
"""Tokens scored by an item."""


def build(source: Source, tokenizer: Any, length: int, items: int = 60, seed: int = 0) -> list[Item]:
    """The beginning of a contract as context, and the 192 tokens after it in six items of 32.

    Item ``j`` has the chunks before its own as its question (item 0 an empty one). Contracts are taken that are long
    enough; if too few are, contracts precede one another until they fill ``length``. A chunk has 32 tokens of the whole
    text's tokenisation; on its own it may have one or two more or fewer.

    Raises
    ------
    ValueError
        If ``length`` is not at least 64 tokens more than the 192 that are scored.
    DataError
    """
    encoder, found = Encoder(tokenizer), []
    scored = QUESTIONS * CHUNK
    encoder.room(length, (), scored)
    total = length - encoder.special
    for contract in _long_first(shuffled(source.contracts(), Random(f"{seed}/{NAME}")), encoder, total):
        if len(found) >= items:
            break
        text = titled(contract)
        if encoder.count(text.text) < total:
            rng = Random(f"{seed}/{NAME}/{contract['id']}")
            text = _preceded(text, fillers(source, rng, [contract]), encoder, total)
        offsets = encoder.offsets(text.text)
        if len(offsets) < total:
            continue
        first = total - scored
        cuts = [int(offsets[first + CHUNK * j][0]) for j in range(QUESTIONS)]
        cuts.append(int(offsets[first + scored - 1][1]))
        for j in range(QUESTIONS):
            found.append(
                Item(
                    id=f"{contract['id']}/{j}",
                    document=contract["id"],
                    context=text.text[: cuts[0]],
                    question=text.text[cuts[0] : cuts[j]],
                    answers=(text.text[cuts[j] : cuts[j + 1]],),
                    labels={"chunk": j},
                )
            )
    return finished(found, items, NAME, length)


def _long_first(contracts: list[Any], encoder: Encoder, tokens: int) -> Iterator[Any]:
    """The contracts of at least ``tokens`` tokens, then the others that have some more than is scored."""
    short = []
    for contract in contracts:
        # No token is shorter than a character: what cannot be long enough is not encoded.
        if len(contract["text"]) >= tokens and encoder.count(titled(contract).text) >= tokens:
            yield contract
        else:
            short.append(contract)
    yield from (contract for contract in short if encoder.count(titled(contract).text) >= 2 * QUESTIONS * CHUNK)


def _preceded(passage: Passage, others: Any, encoder: Encoder, tokens: int) -> Passage:
    """The passage after the beginnings of other texts, at least ``tokens`` tokens in all."""
    # A few tokens more than asked for, as joints may cost some; what is too much is not used.
    needed = tokens - encoder.count(passage.text) + 16
    before = []
    for other in others:
        if needed <= 0:
            break
        before.append(truncate(other, encoder, needed))
        needed -= encoder.count(before[-1].text)
    return join([*before, passage], "\n\n")


def score(item: Item, output: Output) -> dict[str, float]:
    """Negative log-likelihood in nats per token; the exponential of its mean over items is the perplexity.

    Raises
    ------
    ValueError
        If the output has no log-likelihood or no tokens.
    """
    if len(output.logprobs) != 1 or output.tokens < 1:
        raise ValueError(
            f"item {item.id}: expected one log-likelihood and at least one token, got {len(output.logprobs)} and "
            f"{output.tokens}."
        )
    return {"nll": -output.logprobs[0] / output.tokens}


TASK = Task(NAME, "continuation", build, score, metric="nll", higher_is_better=False)
