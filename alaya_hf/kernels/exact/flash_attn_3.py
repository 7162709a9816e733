"""FlashAttention 3 for Hopper, the module ``flash_attn_interface``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request, partial_of, refuse_unlike_flash, tokens_first
from alaya_hf.kernels.partial import Partial


@lru_cache(maxsize=1)
def _function() -> tuple[Callable[..., Any], dict[str, bool]] | str:
    """``flash_attn_interface.flash_attn_func`` with what makes it return the log-sum-exp, or why there is none."""
    try:
        from flash_attn_interface import flash_attn_func
    except (ImportError, OSError) as error:
        return f"flash_attn_interface cannot be imported ({error})"
    # Its first versions always returned a pair.
    ask = "return_attn_probs" in inspect.signature(flash_attn_func).parameters
    return flash_attn_func, {"return_attn_probs": True} if ask else {}


class FlashAttention3(Backend):
    """``flash_attn_interface.flash_attn_func``."""

    name = "flash-attn 3"

    def missing(self) -> str | None:
        """Where the module is not installed."""
        found = _function()
        return found if isinstance(found, str) else None

    def refuses(self, request: Request) -> str | None:
        """Other devices than Hopper; see :func:`~alaya_hf.kernels.exact.base.refuse_unlike_flash`."""
        if request.capability[0] != 9:
            return "needs compute capability 9.0"
        return refuse_unlike_flash(request)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Log-sum-exp in natural units, as for version 2."""
        found = _function()
        assert not isinstance(found, str)
        function, options = found
        with torch.cuda.device(q.device):
            out, lse, *_ = function(
                *tokens_first(q, k, v), softmax_scale=scaling, causal=causal, softcap=softcap or 0.0, **options
            )
        return partial_of(out, lse)
