"""What a legal task is made of: items to answer, outputs to score, and the task that builds and scores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Item:
    """One question over one context.

    Attributes
    ----------
    id : str
        Unique within a task and length, stable across runs, e.g. ``"<contract id>/<category>"``.
    document : str
        Items with equal ``document`` have the same ``context``, byte for byte, so that its prefill is shared.
    context : str
        What the cache is filled with: an instruction header and the text.
    question : str
        From the end of the context to where the answer starts. Empty for the first item of a perplexity document.
    answers : tuple of str
        Gold answers. For kind ``"continuation"`` exactly one, the text to be scored; for kind ``"choices"`` one of
        ``choices``.
    choices : tuple of str
        Kind ``"choices"``: the continuations compared, each with its leading space.
    spans : tuple of (int, int)
        Evidence: ``[start, end)`` character offsets into ``context``. Empty where a data set names none.
    labels : dict
        Facts to group results by: category, depth, ...
    """

    id: str
    document: str
    context: str
    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    spans: tuple[tuple[int, int], ...] = ()
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Output:
    """What a model made of an item.

    Attributes
    ----------
    text : str
        Kind ``"generate"``: the generated answer, cut at the task's stop strings.
    logprobs : tuple of float
        Kind ``"choices"``: log-likelihood of each choice. Kind ``"continuation"``: one, of the text. Nats.
    tokens : int
        Kind ``"continuation"``: tokens scored.
    """

    text: str = ""
    logprobs: tuple[float, ...] = ()
    tokens: int = 0


@dataclass(frozen=True)
class Task:
    """How items are built and scored.

    Attributes
    ----------
    name : str
    kind : str
        ``"generate"``, ``"choices"`` or ``"continuation"``.
    build : callable
        ``build(source, tokenizer, length, items=60, seed=0)`` returns a list of `Item`, the same one for the same
        arguments. Context, question and answer have at most ``length`` tokens together. Fewer than ``items`` items,
        with a warning in the log, when the data do not allow more.
    score : callable
        ``score(item, output)`` returns metric names and values in [0, 1]; perplexity tasks: ``"nll"`` in nats per token.
    metric : str
        The headline metric, a key of what ``score`` returns.
    higher_is_better : bool
    max_new_tokens : int
        Kind ``"generate"``: tokens an answer may have. Room for them is left within ``length``.
    stop : tuple of str
        Kind ``"generate"``: strings at which an answer ends, themselves excluded.
    """

    name: str
    kind: str
    build: Callable[..., list[Item]]
    score: Callable[[Item, Output], dict[str, float]]
    metric: str
    higher_is_better: bool = True
    max_new_tokens: int = 32
    stop: tuple[str, ...] = ("\n",)
