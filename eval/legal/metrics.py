"""Scores of answers: SQuAD's token F1 and exact match, ROUGE-L, and characters quoted from the context."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from eval.legal.items import Item, Output

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)

QUOTE = 20
"""The fewest characters in a row that count as quoted."""


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: SQuAD's ``normalize_answer``."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golds: Iterable[str]) -> float:
    """1 if the answer equals one of the gold answers after `normalise`, else 0."""
    return float(any(normalise(answer) == normalise(gold) for gold in golds))


def token_f1(answer: str, golds: Iterable[str]) -> float:
    """Best F1 of the words shared with a gold answer, after `normalise` (SQuAD 1.1, Rajpurkar et al. 2016).

    An answer and a gold answer without words count as equal.
    """
    return max((_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds), default=0.0)


def _f1(answer: list[str], gold: list[str]) -> float:
    if not answer or not gold:
        return float(answer == gold)
    shared = sum((Counter(answer) & Counter(gold)).values())
    return 2 * shared / (len(answer) + len(gold))


def rouge_l(answer: str, golds: Iterable[str]) -> float:
    """Best ROUGE-L F-measure, with Porter stemming, by the package ``rouge-score``.

    Raises
    ------
    ImportError
        If ``rouge-score`` is not installed.
    """
    scorer = _rouge()
    return max((scorer.score(gold, answer)["rougeL"].fmeasure for gold in golds), default=0.0)


@lru_cache(maxsize=1)
def _rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE-L needs the package rouge-score. Run: pip install 'alaya_hf[eval]'") from error
    return RougeScorer(["rougeL"], use_stemmer=True)


def contained(answer: str, golds: Sequence[str]) -> float:
    """Share of the expected values that the answer contains: RULER's ``string_match_all`` (Hsieh et al. 2024)."""
    return sum(gold.lower() in answer.lower() for gold in golds) / len(golds)


def accuracy(item: Item, output: Output) -> float:
    """1 if the choice of the highest log-likelihood is a gold answer, else 0. The first of equals is chosen.

    Raises
    ------
    ValueError
        If the output has not one log-likelihood per choice.
    """
    if len(output.logprobs) != len(item.choices):
        raise ValueError(f"item {item.id} has {len(item.choices)} choices, the output {len(output.logprobs)} scores.")
    best = max(range(len(item.choices)), key=lambda index: output.logprobs[index])
    return float(item.choices[best] in item.answers)


def char_precision_recall(found: Iterable[tuple[int, int]], gold: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Character-level precision and recall of passages, as in LegalBench-RAG (Pipitone & Alami 2024).

    Parameters
    ----------
    found, gold : iterable of (start, end)
        ``[start, end)`` offsets into one text; overlapping ones count once.

    Returns
    -------
    precision : float
        Share of the found characters that are gold; 0 if none was found.
    recall : float
        Share of the gold characters that were found; 0 if there is none.
    """
    found, gold = _union(found), _union(gold)
    shared = sum(max(min(fe, ge) - max(fs, gs), 0) for fs, fe in found for gs, ge in gold)
    sizes = [sum(end - start for start, end in spans) for spans in (found, gold)]
    return tuple(shared / size if size else 0.0 for size in sizes)  # type: ignore[return-value]


def _union(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def quoted_spans(
    context: str, answer: str, minimum: int = QUOTE, prefer: Sequence[tuple[int, int]] = ()
) -> list[tuple[int, int]]:
    """Where the passages of a context are that an answer quotes.

    From left to right the answer is cut into the longest pieces, of at least ``minimum`` characters, that occur in the
    context; letters' case and runs of white space are ignored. What matches nothing is skipped. A piece that occurs
    several times counts where it overlaps ``prefer`` (the gold spans: contracts share their boilerplate, and a quotation
    does not say which copy it means), else at its first place.

    Returns
    -------
    list of (start, end)
        Offsets into ``context``, in the order of the answer.

    Notes
    -----
    ``difflib`` finds the same pieces, but takes seconds an answer for contexts of 128K tokens; this takes substring
    searches, about ``len(answer)`` of them.
    """
    text, places = _folded(context)
    piece_of, _ = _folded(answer)
    piece_of = piece_of.strip()
    found: list[tuple[int, int]] = []
    at = 0
    while at + minimum <= len(piece_of):
        if piece_of[at] == " " or piece_of[at : at + minimum] not in text:
            at += 1
            continue
        # The longest piece by bisection: every prefix of a piece that occurs occurs as well.
        low, high = minimum, len(piece_of) - at
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if piece_of[at : at + middle] in text else (low, middle - 1)
        piece = piece_of[at : at + low].rstrip()
        spans = [(places[i], places[i + len(piece) - 1] + 1) for i in _occurrences(text, piece)]
        found.append(next((s for s in spans if any(s[0] < e and b < s[1] for b, e in prefer)), spans[0]))
        at += low
    return found


def _occurrences(text: str, piece: str) -> list[int]:
    starts, at = [], text.find(piece)
    while at >= 0:
        starts.append(at)
        at = text.find(piece, at + 1)
    return starts


@lru_cache(maxsize=16)
def _folded(text: str) -> tuple[str, list[int]]:
    """Lower case and single spaces, and for each character its place in the original."""
    characters, places = [], []
    for match in re.finditer(r"\s+|\S", text):
        lower = match[0].lower()
        # A few letters have lower-case forms of two characters; they stay as they are, to keep one place each.
        characters.append(" " if match[0].isspace() else lower if len(lower) == 1 else match[0])
        places.append(match.start())
    return "".join(characters), places
