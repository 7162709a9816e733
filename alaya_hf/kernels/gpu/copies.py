"""Copies between host and device of runs that lie at even distances, many in one call."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from alaya_hf.kernels.gpu.nvrtc import check_driver, driver

_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE_HOST, CU_MEMORYTYPE_DEVICE
_LARGEST_PITCH = (1 << 31) - 1  # bytes; CU_DEVICE_ATTRIBUTE_MAX_PITCH of every device


class Rectangle(ctypes.Structure):
    """CUDA_MEMCPY2D: what the driver calls rows are our runs."""

    _fields_ = [
        (side + name, kind)
        for side in ("src", "dst")
        for name, kind in (
            ("XInBytes", ctypes.c_size_t),
            ("Y", ctypes.c_size_t),
            ("MemoryType", ctypes.c_int),
            ("Host", ctypes.c_void_p),
            ("Device", ctypes.c_uint64),
            ("Array", ctypes.c_void_p),
            ("Pitch", ctypes.c_size_t),
        )
    ] + [("WidthInBytes", ctypes.c_size_t), ("Height", ctypes.c_size_t)]


def rectangle(target: Tensor, source: Tensor) -> Rectangle:
    """The copy of ``[parts, ...]``, each part contiguous on both sides."""
    wanted = Rectangle(WidthInBytes=source[0].numel() * source.element_size(), Height=len(source))
    for side, tensor in (("src", source), ("dst", target)):
        setattr(wanted, side + "MemoryType", _DEVICE if tensor.is_cuda else _HOST)
        setattr(wanted, side + ("Device" if tensor.is_cuda else "Host"), tensor.data_ptr())
        setattr(wanted, side + "Pitch", tensor.stride(0) * tensor.element_size())
    return wanted


def copy_parts(target: Tensor, source: Tensor) -> None:
    """Copy ``[parts, ...]`` between host and device, in the order of the current stream, without waiting for it.

    Parameters
    ----------
    target, source : Tensor
        Of one shape and dtype, each part contiguous. The one on the host is pinned if the other is on a GPU.

    Notes
    -----
    One call of the driver, however many parts there are. Torch has none: a strided copy goes through a buffer on the host,
    which would be read before its turn, and a copy per part costs a call each, which at a block of 16 tokens takes several times
    as long as the bytes do.
    """
    whole = target.is_contiguous() and source.is_contiguous()
    if whole or target.device == source.device or len(source) == 1:
        target.copy_(source, non_blocking=True)
    elif _even(target) and _even(source) and target.dtype == source.dtype and _has_rectangles():
        _copy_rectangle(target, source)
    else:
        for to, part in zip(target, source, strict=True):
            to.copy_(part, non_blocking=True)


def _even(parts: Tensor) -> bool:
    """Whether the driver can express where the parts lie."""
    pitch = parts.stride(0) * parts.element_size()
    return parts[0].is_contiguous() and parts[0].numel() <= parts.stride(0) and pitch <= _LARGEST_PITCH


@lru_cache(maxsize=1)
def _has_rectangles() -> bool:
    if torch.version.cuda is None:
        return False
    try:
        driver()
    except OSError:
        return False
    return True


def _copy_rectangle(target: Tensor, source: Tensor) -> None:
    device = target.device if target.is_cuda else source.device
    with torch.cuda.device(device):
        stream, context = torch.cuda.current_stream(), ctypes.c_void_p()
        check_driver(driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context.value:
            stream.synchronize()  # makes the device's primary context that of a new thread, too
        wanted = rectangle(target, source)
        handle = ctypes.c_void_p(stream.cuda_stream)
        check_driver(driver().cuMemcpy2DAsync_v2(ctypes.byref(wanted), handle), "cuMemcpy2DAsync")
