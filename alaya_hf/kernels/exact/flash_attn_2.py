"""FlashAttention 2, the package ``flash-attn``."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request, partial_of, refuse_unlike_flash, tokens_first
from alaya_hf.kernels.partial import Partial


@lru_cache(maxsize=1)
def _function() -> Callable[..., Any] | str:
    """``flash_attn.flash_attn_func``, or why there is none."""
    try:
        from flash_attn import flash_attn_func
    except (ImportError, OSError) as error:  # a build for another torch fails with undefined symbols
        return f"flash_attn cannot be imported ({error})"
    return flash_attn_func


class FlashAttention2(Backend):
    """``flash_attn.flash_attn_func`` (2.6 or newer)."""

    name = "flash-attn 2"

    def missing(self) -> str | None:
        """Where the package is not installed."""
        found = _function()
        return found if isinstance(found, str) else None

    def refuses(self, request: Request) -> str | None:
        """See :func:`~alaya_hf.kernels.exact.base.refuse_unlike_flash`."""
        return refuse_unlike_flash(request)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Without dropout, `return_attn_probs` adds the log-sum-exp and nothing else."""
        function = _function()
        assert not isinstance(function, str)
        with torch.cuda.device(q.device):
            out, lse, _ = function(
                *tokens_first(q, k, v),
                softmax_scale=scaling,
                causal=causal,
                softcap=softcap or 0.0,
                return_attn_probs=True,
            )
        return partial_of(out, lse)
