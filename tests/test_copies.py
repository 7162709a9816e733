"""Copies of parts at even distances: what the driver is told, and what happens where there is none."""

from __future__ import annotations

import ctypes

import torch
from hypothesis import given
from hypothesis import strategies as st

from alaya_hf.kernels.gpu.copies import Rectangle, _even, copy_parts, rectangle


def obeyed(wanted: Rectangle) -> None:
    """Do as the driver does."""
    for i in range(wanted.Height):
        source, target = wanted.srcHost + i * wanted.srcPitch, wanted.dstHost + i * wanted.dstPitch
        ctypes.memmove(target, source, wanted.WidthInBytes)


@given(
    parts=st.integers(1, 9),
    size=st.integers(1, 33),
    gaps=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    dtype=st.sampled_from([torch.int8, torch.int16, torch.float32]),
)
def test_the_driver_is_told_where_parts_lie(parts, size, gaps, dtype):
    whole = [torch.arange(7 + parts * (size + gap)).to(dtype) + i for i, gap in enumerate(gaps)]
    source, target = (x[7:].view(parts, size + gap)[:, :size] for x, gap in zip(whole, gaps, strict=True))
    before, wanted = whole[1].clone(), source.clone()
    assert _even(source) and _even(target)
    obeyed(rectangle(target, source))
    assert torch.equal(target, wanted)
    before[7:].view(parts, size + gaps[1])[:, :size] = wanted
    assert torch.equal(whole[1], before)
    target.zero_()
    copy_parts(target, source)
    assert torch.equal(target, wanted)


def test_the_structure_is_the_drivers():
    """CUDA_MEMCPY2D on a machine of 64 bits."""
    assert ctypes.sizeof(Rectangle) == 128
    assert [getattr(Rectangle, name).offset for name in ("srcHost", "srcPitch", "dstDevice", "dstPitch", "Height")] == [
        24, 48, 88, 104, 120,
    ]  # fmt: skip


def test_what_the_driver_cannot_express_goes_part_by_part():
    assert not _even(torch.zeros(4).expand(3, 4))
    assert not _even(torch.zeros(3, 4, 5).transpose(1, 2))
    assert not _even(torch.empty(2, 1 << 31, dtype=torch.int8, device="meta")[:, :10])
