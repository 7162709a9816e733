"""Each chunk attends to what it retrieves of the offloaded prefix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.config import _check_int
from alaya_hf.engine.prefill.base import Chunk, Prefill
from alaya_hf.engine.prefill.exact import ExactPass
from alaya_hf.errors import ConfigError
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.partial import Partial
from alaya_hf.registry import PREFILLS
from alaya_hf.storage import HostStore, Piece


@PREFILLS.register("retrieval")
@dataclass(frozen=True)
class Retrieval(Prefill):
    """Attend to the window and the chunk exactly, and to the blocks of the offloaded prefix that score best. Approximate.

    Parameters
    ----------
    tokens : int
        Offloaded tokens that each block of queries attends to per KV head, in whole blocks; a shorter prefix is
        attended to as a whole.
    block : int
        Tokens of a block.
    queries : int
        Neighbouring new tokens that retrieve together.

    Notes
    -----
    The cost of a chunk grows with its length and hardly with that of the context: scores of block means, instead of
    scores of keys. A prompt that comes in one pass has no offloaded prefix: use ``generate``'s ``prefill_chunk_size``,
    or nothing is saved. Chunked encoding by retrieved blocks is InfLLM's (arXiv 2402.04617, section 3; one lookup per
    512 tokens, scores summed over the chunk's queries); mean keys stand for blocks as in MInference's block-sparse
    estimate (arXiv 2407.02490, section 3.2). The query heads of a KV head retrieve together: blocks are ordered by the
    mean over the group of the softmax of their scores, after NSA (arXiv 2502.11089, section 3.3).
    """

    tokens: int = 4096
    block: int = 64
    queries: int = 512

    def __post_init__(self) -> None:
        for name in ("tokens", "block", "queries"):
            _check_int(f"prefill.{name}", getattr(self, name), 1)

    def check(self, engine: str) -> None:
        """See :meth:`Prefill.check`."""
        if engine != "host":
            raise ConfigError(
                f"prefill 'retrieval' needs engine='host', but got engine={engine!r}. Use prefill 'blasst' or 'bsfa', or "
                "the host engine."
            )

    def begin(self, chunk: Chunk) -> RetrievalPass:
        """See :meth:`Prefill.begin`."""
        return RetrievalPass(chunk, self)


class RetrievalPass(ExactPass):
    """Exact among the new tokens and to the window."""

    def __init__(self, chunk: Chunk, settings: Retrieval) -> None:
        super().__init__(chunk)
        self.settings = settings

    def offloaded(self, store: HostStore, size: int) -> tuple[Partial, int]:
        """See :meth:`PrefillPass.offloaded`; reads what is retrieved, `size` does not matter unless that is everything."""
        if max(store.lengths) <= self.settings.tokens:
            return super().offloaded(store, size)
        q = self.chunk.q
        total = Partial.empty(q.shape[:3], q.shape[3], q.device)
        moved = 0
        for row in range(q.shape[0]):
            pieces = [piece for piece in store.rows[row] if piece.length]
            for start in range(0, q.shape[2] if pieces else 0, self.settings.queries):
                part = slice(start, min(q.shape[2], start + self.settings.queries))
                pooled = self._pooled(row, part)
                if pooled is not None:
                    moved += self._attend(row, part, pieces, self._choose(pooled, pieces), total)
        return total, moved

    def _pooled(self, row: int, part: slice) -> Tensor | None:
        """``[kv_heads, group, head_dim]`` float32 on the host, the mean of the tokens' queries; None: all padding."""
        queries = self.chunk.q[row, :, part]
        if self.chunk.valid is not None:
            kept = self.chunk.valid[row, part].nonzero().flatten().to(queries.device)
            if not kept.numel():
                return None
            queries = queries.index_select(1, kept)
        return queries.float().mean(dim=1).to("cpu").unflatten(0, (self.chunk.kv_heads, -1))

    def _choose(self, pooled: Tensor, pieces: list[Piece]) -> Tensor:
        """Which blocks, counted through the pieces: ``[kv_heads, count]`` ascending."""
        keys = []
        for piece in pieces:
            means = piece.segment.means(self.settings.block, True, piece.length)
            assert means.key_means is not None
            keys.append(means.key_means[:, : means.num_blocks].float())
        scores = (pooled @ torch.cat(keys, dim=1).transpose(1, 2)) * self.chunk.scaling
        count = min(scores.shape[2], -(-self.settings.tokens // self.settings.block))
        return scores.softmax(dim=-1).mean(dim=1).topk(count, dim=-1).indices.sort(dim=-1).values

    def _attend(self, row: int, part: slice, pieces: list[Piece], chosen: Tensor, total: Partial) -> int:
        chunk, block = self.chunk, self.settings.block
        group, moved, first = chunk.q.shape[1] // chunk.kv_heads, 0, 0
        found: list[list[Tensor]] = [[] for _ in range(chunk.kv_heads)]
        for piece in pieces:
            blocks = -(-piece.length // block)
            here = [mine[(mine >= first) & (mine < first + blocks)] - first for mine in chosen]
            tokens = [(mine.unsqueeze(1) * block + torch.arange(block)).flatten() for mine in here]
            tokens = [mine[mine < piece.length] for mine in tokens]
            offsets = torch.tensor([0, *(mine.numel() for mine in tokens)]).cumsum(0)
            piece.segment.check(torch.cat(tokens).to(torch.int32), offsets)
            for kept, vectors, mine in zip(found, piece.view, tokens, strict=True):
                kept.append(vectors.index_select(0, mine))
            first += blocks
        for kv_head in range(chunk.kv_heads):
            kv = torch.cat(found[kv_head])
            moved += kv.numel() * kv.element_size()
            kv = kv.to(chunk.q.device, chunk.q.dtype)[None, None]
            heads = slice(kv_head * group, (kv_head + 1) * group)
            attended = exact_attention(
                chunk.q[row : row + 1, heads, part],
                kv[:, :, :, 0],
                kv[:, :, :, 1],
                chunk.scaling,
                softcap=chunk.softcap,
            )
            total.out[row, heads, part], total.lse[row, heads, part] = attended.out[0], attended.lse[0]
        return moved
