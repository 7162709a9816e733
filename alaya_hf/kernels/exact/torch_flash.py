"""The FlashAttention 2 that CUDA builds of torch bring along."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request, partial_of, refuse_unlike_flash, tokens_first
from alaya_hf.kernels.partial import Partial


class TorchFlash(Backend):
    """``aten::_flash_attention_forward``.

    Notes
    -----
    What ``scaled_dot_product_attention`` and ``torch.nn.attention.varlen`` run underneath. Asked directly it returns the
    log-sum-exp, reads grouped KV heads without a copy and aligns causal masks bottom-right (``mha_fwd`` in torch's
    ``flash_api.cpp``).
    """

    name = "torch flash (FlashAttention 2)"

    def missing(self) -> str | None:
        """Without CUDA."""
        return None if torch.cuda.is_available() else "no CUDA device"

    def refuses(self, request: Request) -> str | None:
        """See :func:`~alaya_hf.kernels.exact.base.refuse_unlike_flash`; caps too."""
        return "takes no cap on the logits" if request.capped else refuse_unlike_flash(request)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """Returns in the model's precision first: the error of the values is that of FlashAttention."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *tokens_first(q, k, v), None, None, q.shape[2], k.shape[2], 0.0, causal, False, scale=scaling
        )
        return partial_of(out, lse)
