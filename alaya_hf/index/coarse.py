"""Blocks of tokens, found by what represents them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError
from alaya_hf.index.base import Hits, Index, Searcher
from alaya_hf.kernels import host
from alaya_hf.kernels.state import expect_tensors
from alaya_hf.query.base import Query
from alaya_hf.query.dipr import DIPR
from alaya_hf.query.topk import TopK
from alaya_hf.registry import INDEXES

STRATEGIES = ("representatives", "bounds", "mean")


@INDEXES.register("coarse")
@dataclass(frozen=True)
class Coarse(Index):
    """Retrieve whole blocks of consecutive tokens by a cheap score per block.

    Parameters
    ----------
    block : int
        Tokens per block.
    strategy : {"representatives", "bounds", "mean"}
        What stands for a block.

        ``"representatives"``: its ``count`` keys that receive most attention from the queries sampled during prefill (without
        samples, the keys with the largest norms); the block's score is the mean of their scores. InfLLM (arXiv
        2402.04617, section 3.2) scores a key by the queries of the ``local`` tokens that follow it; a sample over the
        prompt stands in for those.

        ``"bounds"``: the smallest and largest key per channel; the score is the upper bound of any inner product. Quest
        (arXiv 2406.10774, section 3.2).

        ``"mean"``: the mean key.
    count : int
        Representatives per block.

    Notes
    -----
    :class:`~alaya_hf.TopK` asks for ``k`` tokens and gets ``ceil(k / block)`` blocks; :class:`~alaya_hf.DIPR` gets every
    block whose score is within ``beta`` of the best one, at most ``ceil(cap / block)`` where it has a cap. ``Recovery`` needs the
    score of every token and is refused.

    With ``engine="device"`` blocks hold 16 to 512 tokens, a power of two, with at most 64 representatives; a step takes at most
    512 blocks per query head, and 16 where a ``DIPR`` has no cap. What stands for a block is kept in float16, representatives
    (there always the keys with the largest norms) as their mean: at head dimension 128 and blocks of 128, 2 bytes per token
    and KV head against 512 for keys and values.
    """

    block: int = 128
    strategy: str = "representatives"
    count: int = 4

    def __post_init__(self) -> None:
        for name in ("block", "count"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"index.{name} must be an integer of at least 1, but got {value!r}.")
        if self.count > self.block:
            raise ConfigError(f"index.count must be at most index.block ({self.block}), but got {self.count}.")
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"index.strategy must be one of {', '.join(STRATEGIES)}, but got {self.strategy!r}.")

    def check(self, query: Query) -> None:
        """See :meth:`Index.check`."""
        if query.needs_all_scores:
            raise ConfigError(
                f"query {query.kind!r} needs the score of every token, which the index 'coarse' does not compute. Use the index "
                "'flat' or 'quantized'."
            )

    def open(self, segment: object) -> CoarseSearcher:
        """See :meth:`Index.open`."""
        return CoarseSearcher(self)


def per_block(query: Query, block: int) -> Query:
    """A query over tokens as one over blocks: numbers of tokens become those of the blocks that hold as many."""
    if isinstance(query, TopK):
        return TopK(-(-query.k // block))
    if isinstance(query, DIPR) and query.cap is not None:
        return replace(query, cap=-(-query.cap // block))
    return query


class CoarseSearcher(Searcher):
    """What represents each block; the last block may be incomplete and is represented as far as it goes."""

    def __init__(self, index: Coarse) -> None:
        self.index = index
        self._summaries: Tensor | None = None
        self._rest: Tensor | None = None

    def _summarise(self, keys: Tensor, queries: Tensor | None) -> Tensor:
        """``[kv_heads, blocks, tokens, d]`` to ``[kv_heads, blocks, summaries, d]``."""
        if self.index.strategy == "bounds":
            return torch.stack([keys.amin(dim=2), keys.amax(dim=2)], dim=2)
        if self.index.strategy == "mean":
            return keys.mean(dim=2, keepdim=True)
        if queries is None:
            weight = keys.norm(dim=-1)
        else:
            weight = torch.einsum("hbtd,hd->hbt", keys, queries.mean(dim=1))
        best = weight.topk(min(self.index.count, keys.shape[2]), dim=-1).indices
        chosen = torch.gather(keys, 2, best.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1]))
        # An incomplete block may have fewer keys than representatives: repeating some keeps the mean a mean.
        repeats = -(-self.index.count // chosen.shape[2])
        return chosen.repeat(1, 1, repeats, 1)[:, :, : self.index.count]

    def extend(self, kv: Tensor, queries: Tensor | None = None) -> None:
        """See :meth:`Searcher.extend`."""
        keys = kv[:, :, 0].float()
        block = self.index.block
        complete = self.num_tokens // block
        if self._rest is not None:
            keys = torch.cat([self._rest, keys], dim=1)
        full = keys.shape[1] // block
        parts = [] if self._summaries is None else [self._summaries[:, :complete]]
        if full:
            parts.append(self._summarise(keys[:, : full * block].unflatten(1, (full, block)), queries))
        rest = keys[:, full * block :]
        if rest.shape[1]:
            parts.append(self._summarise(rest.unsqueeze(1), queries))
        self._rest = rest.clone()
        self._summaries = torch.cat(parts, dim=1) if parts else None
        self.num_tokens += kv.shape[1]

    def state(self) -> dict[str, Tensor]:
        """The representatives, and the keys of the incomplete last block."""
        assert self._summaries is not None and self._rest is not None
        return {"summaries": self._summaries, "rest": self._rest}

    def restore(self, state: dict[str, Tensor], tokens: int) -> None:
        """See :meth:`Searcher.restore`."""
        summaries, rest = expect_tensors(state, {"summaries": torch.float32, "rest": torch.float32})
        count = {"bounds": 2, "mean": 1}.get(self.index.strategy, self.index.count)
        blocks = -(-tokens // self.index.block)
        if summaries.ndim != 4 or tuple(summaries.shape[1:3]) != (blocks, count):
            raise ValueError(
                f"expected [kv_heads, {blocks}, {count}, head_dim] representatives of {tokens} tokens, but got "
                f"{tuple(summaries.shape)}."
            )
        self._summaries, self._rest, self.num_tokens = summaries, rest, tokens

    def _scores(self, q: Tensor, blocks: int) -> Tensor:
        assert self._summaries is not None
        summaries = self._summaries[:, :blocks]
        if self.index.strategy == "bounds":
            low, high = summaries[:, :, 0], summaries[:, :, 1]
            positive, negative = q.clamp(min=0), q.clamp(max=0)
            return positive @ high.transpose(1, 2) + negative @ low.transpose(1, 2)
        return q @ summaries.mean(dim=2).transpose(1, 2)

    def search(self, q: Tensor, kv: Tensor, query: Query, best: Tensor, scaling: float, window_lse: Tensor) -> Hits:
        """See :meth:`Searcher.search`."""
        n, block = kv.shape[1], self.index.block
        blocks = -(-n // block)
        scores = self._scores(q, blocks)
        rule = per_block(query, block)
        threshold = rule.threshold(scores, best, scaling, window_lse)
        ids, offsets, mask = host.select_threshold(scores, threshold)
        found = Hits(ids, offsets, mask, touched=kv.shape[0] * blocks)
        block_scores = scores[found.kv_head, :, ids.long()].T
        tokens = ids.long().unsqueeze(1) * block + torch.arange(block)
        inside = (tokens < n).flatten()
        heads = found.kv_head.repeat_interleave(block)[inside]
        counts = torch.bincount(heads, minlength=q.shape[0])
        return Hits(
            ids=tokens.flatten()[inside].to(torch.int32),
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
            mask=mask.repeat_interleave(block, dim=1)[:, inside],
            scores=block_scores.repeat_interleave(block, dim=1)[:, inside],
            touched=found.touched,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the representatives."""
        return 0 if self._summaries is None else self._summaries.numel() * self._summaries.element_size()
