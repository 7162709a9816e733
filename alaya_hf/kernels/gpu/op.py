"""How kernels become custom operators, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453


def operator(name: str, mutates: Sequence[str]) -> Callable[[Callable[..., None]], Any]:
    """Register ``alaya_hf::name``, which writes into the arguments in `mutates` and returns nothing.

    All results go to preallocated buffers, so that a step allocates nothing and a CUDA graph can replay it.
    """

    def register(function: Callable[..., None]) -> Any:
        op = torch.library.custom_op(f"alaya_hf::{name}", mutates_args=tuple(mutates))(function)
        op.register_fake(lambda *args, **kwargs: None)
        return op

    return register


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` and 1."""
    return 1 << max(0, n - 1).bit_length()


def check(tensor: Tensor, name: str, shape: Sequence[int | None], *dtypes: torch.dtype) -> None:
    """Raise where a tensor is not what a kernel was promised (``None`` in `shape`: any size)."""
    fits = tensor.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits or (dtypes and tensor.dtype not in dtypes) or not tensor.is_contiguous():
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"expected contiguous {name} of shape [{wanted}]{' and dtype ' + ' or '.join(map(str, dtypes)) if dtypes else ''}, "
            f"got {list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
        )


@triton.jit
def ordered(bits):
    """The bits of a half (int16) as an int32 that orders as the number does."""
    wide = bits.to(tl.int32)
    return wide ^ ((wide >> 15) & 0x7FFF)


@triton.jit
def unordered(key):
    """Inverse of :func:`ordered`: the number as float32."""
    bits = (key ^ ((key >> 15) & 0x7FFF)).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)
