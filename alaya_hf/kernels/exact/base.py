"""What an implementation of dense attention says of itself, and what it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from alaya_hf.kernels.partial import Partial

HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int]:
    # ROCm builds call their devices "cuda" too; their capabilities mean something else.
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.cuda else (0, 0)


@dataclass(frozen=True)
class Request:
    """One call, as far as the choice of an implementation depends on it.

    Attributes
    ----------
    device : str
        Type, for example ``"cuda"``.
    capability : (int, int)
        Of a CUDA device, else ``(0, 0)``.
    dtype : torch.dtype
        Of queries, keys and values; None if they differ.
    head_dim : int
        Of all three; 0 if they differ.
    q_len, n : int
        Queries and keys.
    causal, masked, capped : bool
        Whether there is a causal mask, a mask and a cap on the logits.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype | None
    head_dim: int
    q_len: int
    n: int
    causal: bool = False
    masked: bool = False
    capped: bool = False

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, softcap: float | None) -> Request:
        """The request that a call makes; arguments as for :meth:`Backend.run`."""
        return Request(
            device=q.device.type,
            capability=_capability(q.device),
            dtype=q.dtype if q.dtype == k.dtype == v.dtype else None,
            head_dim=q.shape[-1] if q.shape[-1] == k.shape[-1] == v.shape[-1] else 0,
            q_len=q.shape[2],
            n=k.shape[2],
            causal=causal,
            masked=mask is not None,
            capped=softcap is not None,
        )


class Backend(ABC):
    """An implementation of dense attention.

    Attributes
    ----------
    name : str
        For people.
    """

    name: str

    def missing(self) -> str | None:
        """Why it cannot be used in this process at all; None: it can."""
        return None

    @abstractmethod
    def refuses(self, request: Request) -> str | None:
        """Why it does not serve a request; None: it does."""

    @abstractmethod
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
    ) -> Partial:
        """See :func:`~alaya_hf.kernels.attention.exact_attention`. Called only for what is not refused, with ``n > 0``."""


def refuse_unlike_flash(request: Request, oldest: tuple[int, int] = (8, 0)) -> str | None:
    """What no FlashAttention for GPUs serves.

    Notes
    -----
    All of them align causal masks bottom-right (FlashAttention 2.1 and newer) and read grouped KV heads as they are. A query
    that sees no key would get a log-sum-exp of plus infinity, hence no causal mask over fewer keys than queries.
    """
    if request.device != "cuda" or request.capability < oldest:
        return f"needs a CUDA device of compute capability {oldest[0]}.{oldest[1]} or newer"
    if request.dtype not in HALF:
        return "needs float16 or bfloat16"
    if not 0 < request.head_dim <= 256 or request.head_dim % 8:
        return "needs a head dimension up to 256, a multiple of 8"
    if request.masked:
        return "takes no mask"
    if request.causal and request.q_len > request.n:
        return "some queries would see no key"
    return None


def tokens_first(*tensors: Tensor) -> list[Tensor]:
    """``[batch, heads, tokens, head_dim]`` as FlashAttention reads it: ``[batch, tokens, heads, head_dim]``, views."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]


def partial_of(out: Tensor, lse: Tensor) -> Partial:
    """From FlashAttention's ``[batch, tokens, heads, head_dim]`` and ``[batch, heads, tokens]``."""
    return Partial(out.transpose(1, 2).float(), lse.float())
