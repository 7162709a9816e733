"""All partials of a step become its output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.op import LN2, check, next_power_of_2, operator


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    acc,
    ml,
    out,
    lse,
    best,
    partials: tl.constexpr,
    D: tl.constexpr,
    DP2: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, PARTS)
    e = tl.load(ml + (row * partials + x) * 2, mask=x < partials, other=float("-inf"))
    w = tl.load(ml + (row * partials + x) * 2 + 1, mask=x < partials, other=0.0)
    top = tl.max(e, 0)
    some = tl.where(top > float("-inf"), top, 0.0)
    total = tl.sum(tl.where(e > float("-inf"), w * tl.exp2(e - some), 0.0), 0)
    c = tl.arange(0, DP2)
    sums = tl.zeros([BLOCK, DP2], tl.float32)
    for begin in range(0, partials, BLOCK):
        y = begin + tl.arange(0, BLOCK)
        exponent = tl.load(ml + (row * partials + y) * 2, mask=y < partials, other=float("-inf"))
        there = exponent > float("-inf")  # what an empty partial holds is not defined
        a = tl.load(
            acc + (row * partials + y)[:, None] * D + c[None, :], mask=there[:, None] & (c < D)[None, :], other=0.0
        )
        sums += a * tl.exp2(exponent - some)[:, None]
    good = total > 0
    value = tl.where(good, tl.sum(sums, 0) / tl.where(good, total, 1.0), 0.0)
    tl.store(out + row * D + c, value.to(out.dtype.element_ty), mask=c < D)
    tl.store(
        lse + row, tl.where(good, (some + tl.log2(tl.where(good, total, 1.0))) * 0.6931471805599453, float("-inf"))
    )
    tl.store(best + row, float("-inf"))


@operator("merge_partials", mutates=["out", "lse", "best"])
def merge_partials(acc: Tensor, ml: Tensor, out: Tensor, lse: Tensor, best: Tensor) -> None:
    """Merge the partials of a step, and make `best` ready for the next one.

    Parameters
    ----------
    acc : Tensor ``[batch, kv_heads, group, partials, head_dim]`` float32
        Weighted sums of values, relative to their exponent.
    ml : Tensor ``[batch, kv_heads, group, partials, 2]`` float32
        Base-2 exponent (``-inf``: empty) and sum of weights.
    out : Tensor ``[batch, heads, head_dim]``
        Zero where nothing was attended to.
    lse : Tensor ``[batch, heads]`` float32
        Natural log-sum-exp of the logits.
    best : Tensor ``[batch, kv_heads, group]`` float32
        Set to ``-inf``.
    """
    batch, heads, group, partials, d = acc.shape
    check(out, "out", (batch, heads * group, d))
    check(lse, "lse", (batch, heads * group), torch.float32)
    _merge[(batch * heads * group,)](
        acc,
        ml,
        out,
        lse,
        best,
        partials,
        D=d,
        DP2=next_power_of_2(d),
        PARTS=next_power_of_2(partials),
        BLOCK=16,
        num_warps=4,
    )


def merge_partials_reference(acc: Tensor, ml: Tensor, out: Tensor, lse: Tensor, best: Tensor) -> None:
    """:func:`merge_partials` in plain torch."""
    empty = torch.isneginf(ml[..., 0])
    top = ml[..., 0].amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    scale = torch.where(empty, 0.0, torch.exp2(ml[..., 0] - top))
    total = torch.where(empty, 0.0, ml[..., 1] * scale).sum(-1)
    sums = (torch.where(empty[..., None], 0.0, acc) * scale[..., None]).sum(-2)
    good = total > 0
    out.copy_(torch.where(good[..., None], sums / total.clamp_min(1e-30)[..., None], 0.0).flatten(1, 2).to(out.dtype))
    lse.copy_(torch.where(good, top.squeeze(-1) * LN2 + total.clamp_min(1e-30).log(), float("-inf")).flatten(1, 2))
    best.fill_(float("-inf"))
