"""Dense attention: nothing is left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alaya_hf.engine.prefill.base import Chunk, Prefill, PrefillPass
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.partial import Partial
from alaya_hf.registry import PREFILLS
from alaya_hf.storage import Window


@PREFILLS.register("exact")
@dataclass(frozen=True)
class Exact(Prefill):
    """Every token attends to every token before it."""

    def begin(self, chunk: Chunk) -> ExactPass:
        """See :meth:`Prefill.begin`."""
        return ExactPass(chunk)


class ExactPass(PrefillPass):
    """By the fastest implementation of dense attention there is."""

    def new(self, k: Tensor, v: Tensor) -> Partial:
        """See :func:`attend_new`."""
        chunk = self.chunk
        return attend_new(chunk.q, k, v, chunk.valid, chunk.scaling, chunk.softcap)

    def window(self, window: Window) -> Partial:
        """See :meth:`PrefillPass.window`."""
        keys, values, mask = window.view()
        mask = None if mask is None else mask[:, None, None, :]
        return exact_attention(self.chunk.q, keys, values, self.chunk.scaling, mask=mask, softcap=self.chunk.softcap)

    def block(self, row: int, k: Tensor, v: Tensor) -> Partial:
        """See :meth:`PrefillPass.block`."""
        return exact_attention(self.chunk.q[row : row + 1], k, v, self.chunk.scaling, softcap=self.chunk.softcap)


def attend_new(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, scaling: float, softcap: float | None) -> Partial:
    """New tokens among themselves, causally.

    Parameters
    ----------
    q : Tensor
        ``[batch, heads, m, head_dim]``.
    k, v : Tensor
        ``[batch, kv_heads, m, head_dim]``.
    valid : Tensor or None
        ``[batch, m]`` bool on the host, false where padding. Queries there see nothing.
    """
    causal = q.shape[2] > 1
    if valid is None:
        return exact_attention(q, k, v, scaling, causal=causal, softcap=softcap)
    # Row by row without its padding: no mask, which the fastest implementations do not take.
    total = Partial.empty(q.shape[:3], v.shape[-1], q.device)
    for row in range(q.shape[0]):
        tokens = valid[row].nonzero().flatten().to(q.device)
        if tokens.numel():
            queries, keys, values = (x[row : row + 1].index_select(2, tokens) for x in (q, k, v))
            part = exact_attention(queries, keys, values, scaling, causal=causal, softcap=softcap)
            total.out[row].index_copy_(1, tokens, part.out[0])
            total.lse[row].index_copy_(1, tokens, part.lse[0])
    return total
