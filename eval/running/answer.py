"""One question of one document, answered by one system.

Full attention answers first. Its answer is then the draft that every other system verifies in a single pass, as in
speculative decoding: position by position, the pass gives the system's own distribution (its fidelity) and its own greedy
token. Where all tokens agree, the draft is the system's greedy answer; from the first disagreement on the system goes on by
itself. A pass of several tokens over an :class:`~alaya_hf.AlayaCache` attends as if they came one by one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, QuantizedCache

from alaya_hf import AlayaCache
from alaya_hf.cache_argument import cache_argument
from alaya_hf.index import Coarse
from alaya_hf.probes import Probe
from eval.legal import Item, Output, Task

#: Most tokens of one pass.
PASS = 64


@dataclass
class Scored:
    """What a system said about one continuation.

    Attributes
    ----------
    ids : list of int
        The continuation.
    logprobs : Tensor
        ``[len(ids), vocabulary]`` float32, the distribution at each of its positions.
    """

    ids: list[int]
    logprobs: Tensor

    @property
    def likelihood(self) -> float:
        """Log-likelihood of the continuation in nats."""
        index = torch.tensor(self.ids, device=self.logprobs.device)
        return float(self.logprobs.gather(1, index.unsqueeze(1)).sum())


@dataclass
class Answer:
    """A system's output on one item.

    Attributes
    ----------
    output : Output or None
        What the task scores; None if the answer was not completed.
    scored : list of Scored
        The continuations looked at: the draft, or every choice.
    """

    output: Output | None
    scored: list[Scored] = field(default_factory=list)


def _copied(cache: Cache) -> Cache:
    """A copy of a quantised cache, whose updates replace tensors and never write into them."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def longest_pass(cache: Cache) -> int:
    """Most tokens of a pass that retrieves as single tokens do, up to :data:`PASS`; longer ones would be attended exactly."""
    if not isinstance(cache, AlayaCache):
        return PASS
    configs = [layer.config for layer in cache.alaya_layers]
    # The device engine takes blocks for single tokens alone.
    limits = (1 if c.engine == "device" and isinstance(c.index, Coarse) else c.max_sparse_queries for c in configs)
    return min(PASS, *limits)


class Reader:
    """A cache with a document in it, and the means to ask about it and forget the question again.

    Parameters
    ----------
    model
    cache : Cache
        Holds the document; is used up.
    """

    def __init__(self, model: Any, cache: Cache) -> None:
        self.model, self.cache = model, cache
        # A quantised cache cannot drop tokens: each continuation starts from a copy.
        self._kept = _copied(cache) if isinstance(cache, QuantizedCache) else None
        self._pass = longest_pass(cache)

    @property
    def crops(self) -> bool:
        """Whether the cache can drop its last tokens."""
        return self._kept is None

    @property
    def device(self) -> Any:
        """Where ids go."""
        return self.model.device

    @torch.no_grad()
    def feed(self, ids: list[int]) -> Tensor:
        """Append ``ids`` and return the logits of the last pass, ``[tokens of the pass, vocabulary]``."""
        logits = torch.empty(0)
        for start in range(0, len(ids), self._pass):
            piece = torch.tensor([ids[start : start + self._pass]], device=self.device)
            logits = self.model(input_ids=piece, **cache_argument(self.cache)).logits[0]
        return logits

    def read(self, ids: list[int]) -> None:
        """Append a question."""
        if ids:
            self.feed(ids)
        if self._kept is not None:
            self._kept = _copied(self.cache)

    def score(self, last: int, ids: list[int], forget: bool = True) -> Scored:
        """Distributions over a continuation.

        Parameters
        ----------
        last : int
            The token before it, not yet in the cache.
        ids : list of int
            The continuation.
        forget : bool
            Bring the cache back to where it was.
        """
        fed = [last, *ids[:-1]]
        logprobs = [self.feed(fed[start : start + self._pass]) for start in range(0, len(fed), self._pass)]
        if forget:
            self.forget(len(fed))
        return Scored(ids, torch.cat(logprobs).float().log_softmax(dim=-1))

    def forget(self, tokens: int) -> None:
        """Drop the last tokens."""
        if self._kept is not None:
            self.cache = _copied(self._kept)
        elif tokens:
            self.cache.crop(-tokens)

    def seconds_per_token(self, token: int, repeats: int = 3) -> float:
        """Median time of a one-token pass; the cache is as before."""
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            self.feed([token]).argmax().item()
            times.append(time.perf_counter() - began)
        self.forget(repeats + 1)
        return statistics.median(times[1:])

    def observe(self, watch: Tensor, recovery: bool = True) -> None:
        """Record from here on what is attended, and how much of the watched tokens; the recovery ratio costs a dense pass."""
        if isinstance(self.cache, AlayaCache):
            for layer in self.cache.alaya_layers:
                layer.probe = Probe(recovery=recovery, watch=watch)

    def stop_observing(self) -> None:
        """Drop the records, which cost time to make."""
        if isinstance(self.cache, AlayaCache):
            for layer in self.cache.alaya_layers:
                layer.probe = None


class Decoder:
    """Token ids to text, and where an answer ends."""

    def __init__(self, tokenizer: Any, task: Task) -> None:
        self.tokenizer, self.task = tokenizer, task
        end = tokenizer.eos_token_id
        self.ends = set(end) if isinstance(end, (list, tuple)) else {end}

    def text(self, ids: list[int]) -> str:
        """The answer, cut at the first stop string."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self.task.stop:
            # Completions may open with the line break that follows the prompt.
            cut = text.find(stop, len(text) - len(text.lstrip()))
            text = text if cut < 0 else text[:cut]
        return text.strip()

    def finished(self, ids: list[int]) -> bool:
        """Whether the answer is complete."""
        if len(ids) >= self.task.max_new_tokens or (ids and ids[-1] in self.ends):
            return True
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return any(text.find(stop, len(text) - len(text.lstrip())) >= 0 for stop in self.task.stop)


def go_on(reader: Reader, decoder: Decoder, last: int, begun: list[int]) -> tuple[list[int], list[Tensor]]:
    """Complete an answer greedily, one token a pass.

    Parameters
    ----------
    last : int
        The last token of answer or prompt, the only one that is not in the cache yet.
    begun : list of int
        What there is of the answer, ``last`` included if it is part of it.

    Returns
    -------
    ids : list of int
        The whole answer.
    logprobs : list of Tensor
        ``[vocabulary]`` at every position added.
    """
    ids, found = list(begun), []
    while not decoder.finished(ids):
        logprobs = reader.feed([last])[-1].float().log_softmax(dim=-1)
        found.append(logprobs)
        last = int(logprobs.argmax())
        ids.append(last)
    return ids, found


def draft(reader: Reader, decoder: Decoder, item: Item, last: int) -> Answer:
    """Full attention's own answer to an item: the reference of every other system."""
    if decoder.task.kind != "generate":
        return _compare(reader, decoder, item, last)
    ids, logprobs = go_on(reader, decoder, last, [])
    reader.forget(len(ids))
    return Answer(Output(text=decoder.text(ids)), [Scored(ids, torch.stack(logprobs))])


def verify(
    reader: Reader,
    decoder: Decoder,
    item: Item,
    last: int,
    reference: Answer,
    on_scored: Callable[[], None] | None = None,
    complete: bool = True,
) -> Answer:
    """A system's answer to an item, and its distributions along the reference's.

    Parameters
    ----------
    on_scored : callable, optional
        Called when the reference's tokens have been fed and nothing else has: what was observed until then is about the
        same tokens for every system.
    complete : bool
        Whether to go on where the system disagrees with the reference. Otherwise its own answer stays unknown (None).
    """
    on_scored = on_scored or (lambda: None)
    if decoder.task.kind != "generate":
        answer = _compare(reader, decoder, item, last)
        on_scored()
        return answer
    ids = reference.scored[0].ids
    scored = reader.score(last, ids, forget=False)
    on_scored()
    own = scored.logprobs.argmax(dim=-1).tolist()
    agreed = next((place for place, (a, b) in enumerate(zip(own, ids, strict=True)) if a != b), None)
    if agreed is None:
        return Answer(Output(text=decoder.text(ids)), [scored])
    if not complete:
        return Answer(None, [scored])
    answer = [*ids[:agreed], own[agreed]]
    # In the cache: the last token and the draft but its end. Keep what the answer shares with it.
    shared = [last, *ids[:agreed]]
    if reader.crops:
        reader.forget(len(ids) - len(shared))
    else:
        reader.forget(0)
        reader.feed(shared)
    answer, _ = go_on(reader, decoder, answer[-1], answer)
    return Answer(Output(text=decoder.text(answer)), [scored])


def _compare(reader: Reader, decoder: Decoder, item: Item, last: int) -> Answer:
    texts = item.choices if decoder.task.kind == "choices" else item.answers[:1]
    encoded = [decoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    scored = [reader.score(last, ids) for ids in encoded]
    likelihoods = tuple(one.likelihood for one in scored)
    return Answer(Output(logprobs=likelihoods, tokens=len(encoded[0])), scored)
