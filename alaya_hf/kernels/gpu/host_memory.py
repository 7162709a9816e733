"""Host memory as kernels see it."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class _Interface:
    def __init__(self, tensor: Tensor) -> None:
        # Whatever the dtype, integers of its size: the interface does not know bfloat16.
        self.held = tensor
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": f"<i{tensor.element_size()}" if tensor.element_size() > 1 else "|u1",
            "data": (tensor.data_ptr(), False),
            "version": 3,
            "strides": None,
        }


def device_view(tensor: Tensor, device: torch.device | str = "cuda") -> Tensor:
    """A tensor of `device` over the same bytes of pinned (or registered) host memory, for kernels to read and write.

    Unified addressing gives host memory that CUDA knows the same address on the device; every access crosses the bus.

    Parameters
    ----------
    tensor : Tensor
        Contiguous, in memory from ``pin_memory`` or registered with ``cudaHostRegister``. Kept alive by the view.

    Raises
    ------
    ValueError
        Memory that is not contiguous or that CUDA does not know.
    """
    if tensor.is_cuda:
        return tensor
    if not tensor.is_contiguous() or not tensor.is_pinned():
        raise ValueError(
            f"expected contiguous host memory that is pinned or registered with CUDA, got a tensor of shape "
            f"{list(tensor.shape)} (pinned: {tensor.is_pinned()}); use pin_memory() or cudaHostRegister"
        )
    device = torch.device(device)
    # Some releases of torch ask CUDA for the device, which names the one that registered the memory, and copy to another.
    first = tensor.view(-1)[:1]
    if first.numel() and torch.as_tensor(_Interface(first), device=device).data_ptr() != first.data_ptr():
        return _on_device(tensor, device)
    return torch.as_tensor(_Interface(tensor), device=device).view(tensor.dtype)


def _on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same, told which device it is."""
    size = tensor.numel() * tensor.element_size()
    storage = torch._C._construct_storage_from_data_pointer(tensor.data_ptr(), device, size)
    # The storage knows nothing of who owns the memory.
    weakref.finalize(storage, _Interface, tensor).atexit = False
    view = torch.empty(0, dtype=tensor.dtype, device=device)
    return view.set_(storage, 0, tensor.shape, tensor.stride())
