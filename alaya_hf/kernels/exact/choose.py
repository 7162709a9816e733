"""Which implementation of dense attention serves a call."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from alaya_hf.kernels.exact.base import Backend, Request
from alaya_hf.kernels.exact.flash_attn_2 import FlashAttention2
from alaya_hf.kernels.exact.flash_attn_3 import FlashAttention3
from alaya_hf.kernels.exact.flash_attn_4 import FlashAttention4
from alaya_hf.kernels.exact.plain import Plain
from alaya_hf.kernels.exact.torch_cpu import TorchCPU
from alaya_hf.kernels.exact.torch_cudnn import TorchCuDNN
from alaya_hf.kernels.exact.torch_flash import TorchFlash
from alaya_hf.kernels.partial import Partial

BACKENDS: tuple[Backend, ...] = (
    # Fastest first. Made for the device: 3 and 4, then cuDNN, which is what torch itself prefers there for large calls.
    FlashAttention3(),
    FlashAttention4(),
    TorchCuDNN(),
    FlashAttention2(),
    TorchFlash(),
    TorchCPU(),
    Plain(),
)

#: What failed on this machine: name, precision, head dimension and capability.
_failed: set[tuple[str, torch.dtype | None, int, tuple[int, int]]] = set()


def _key(backend: Backend, request: Request) -> tuple[str, torch.dtype | None, int, tuple[int, int]]:
    return backend.name, request.dtype, request.head_dim, request.capability


def choose(request: Request) -> Backend:
    """The implementation that serves a request: the first that is there and does not refuse."""
    for backend in BACKENDS[:-1]:
        if backend.refuses(request) is None and backend.missing() is None and _key(backend, request) not in _failed:
            return backend
    return BACKENDS[-1]


def attend(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, causal: bool, mask: Tensor | None, softcap: float | None
) -> Partial:
    """Dense attention by the chosen implementation; see :func:`~alaya_hf.kernels.attention.exact_attention`.

    Warns
    -----
    RuntimeWarning
        Where an implementation fails on a request that it should serve (a build for another torch, say): it is not asked
        again in this process, and the next one answers.
    """
    request = Request.of(q, k, v, causal, mask, softcap)
    while True:
        backend = choose(request)
        try:
            return backend.run(q, k, v, scaling, causal, mask, softcap)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if backend is BACKENDS[-1]:
                raise
            _failed.add(_key(backend, request))
            warnings.warn(
                f"{backend.name} failed on {request} ({error}); another implementation of attention takes over. "
                "Run `alaya-hf doctor` for what this machine has.",
                RuntimeWarning,
                stacklevel=3,
            )
