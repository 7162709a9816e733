"""cuDNN's attention, through torch: what ``scaled_dot_product_attention`` prefers on Hopper and Blackwell."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request, refuse_unlike_flash
from alaya_hf.kernels.partial import Partial

WORTH_IT = 1 << 25
"""Logits per head from which a call pays for the plan that cuDNN makes for each new shape, about 30 ms on the host."""
_OLDEST = 91501  # torch's own limit: before it, lengths that are no multiple of 128 were wrong


class TorchCuDNN(Backend):
    """``aten::_scaled_dot_product_cudnn_attention``, for large calls."""

    name = "torch cuDNN"

    def missing(self) -> str | None:
        """Without CUDA or a recent cuDNN, where it was switched off, or where results have to be reproducible."""
        if not torch.cuda.is_available():
            return "no CUDA device"
        version = torch.backends.cudnn.version() or 0
        if version < _OLDEST:
            return f"needs cuDNN 9.15.1 or newer, found {version}"
        if torch.are_deterministic_algorithms_enabled():
            return "not deterministic"
        return None if torch.backends.cuda.cudnn_sdp_enabled() else "switched off (enable_cudnn_sdp)"

    def refuses(self, request: Request) -> str | None:
        """Small calls, other devices than Hopper and data-centre Blackwell, causal masks that are not square."""
        if request.capability not in ((9, 0), (10, 0), (10, 3)):
            return "needs compute capability 9.0, 10.0 or 10.3"
        if request.capped:
            return "takes no cap on the logits"
        if request.causal and request.q_len != request.n:
            return "aligns causal masks top-left"
        if request.head_dim > 128:
            return "needs a head dimension up to 128"
        if request.q_len * request.n < WORTH_IT:
            return "too small to be worth a plan"
        return refuse_unlike_flash(request)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """A plan per shape: about 30 ms on the host the first time."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scaling
        )
        return Partial(out.float(), lse.float().reshape(q.shape[:3]))  # some versions append a dimension
