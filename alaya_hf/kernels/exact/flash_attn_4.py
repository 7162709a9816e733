"""FlashAttention 4 for Hopper and Blackwell, the module ``flash_attn.cute``."""

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
def _function() -> Callable[..., Any] | str:
    """``flash_attn.cute.flash_attn_func``, or why there is none."""
    try:
        from flash_attn.cute import flash_attn_func
    except (ImportError, OSError) as error:
        return f"flash_attn.cute cannot be imported ({error})"
    if "return_lse" not in inspect.signature(flash_attn_func).parameters:
        return "this flash_attn.cute is too old to return the log-sum-exp without gradients"
    return flash_attn_func


class FlashAttention4(Backend):
    """``flash_attn.cute.flash_attn_func``, compiled at its first call for each kind of request."""

    name = "flash-attn 4"

    def missing(self) -> str | None:
        """Where the module is not installed."""
        found = _function()
        return found if isinstance(found, str) else None

    def refuses(self, request: Request) -> str | None:
        """Other devices than Hopper and Blackwell, head dimensions it is not made for, caps."""
        if request.capability[0] not in (9, 10, 11):
            return "needs compute capability 9.0 to 11.0"
        if request.head_dim not in (64, 96, 128):
            return "needs a head dimension of 64, 96 or 128"
        return "takes no cap on the logits" if request.capped else refuse_unlike_flash(request)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Log-sum-exp in natural units, as for version 2."""
        function = _function()
        assert not isinstance(function, str)
        with torch.cuda.device(q.device):
            out, lse, *_ = function(*tokens_first(q, k, v), softmax_scale=scaling, causal=causal, return_lse=True)
        return partial_of(out, lse)
