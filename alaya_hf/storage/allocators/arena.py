"""The bytes that a pool lays its sequences out in."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from alaya_hf.errors import PoolFullError, UnavailableError
from alaya_hf.storage.memory import check_host_memory
from alaya_hf.storage.pinned import pinned_pool


class Arena(ABC):
    """Memory addressed by byte offsets.

    Parameters
    ----------
    capacity : int
        Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity

    @abstractmethod
    def view(self, offset: int, size: int) -> Tensor:
        """``[size]`` uint8 on these bytes; valid until they are freed."""

    def copy(self, source: int, target: int, size: int) -> None:
        """Copy ``size`` bytes inside the arena, in the order of the device's current stream; the two runs are disjoint."""
        self.view(target, size).copy_(self.view(source, size))


class Accounts(Arena):
    """No memory at all: for counting what a workload would take."""

    def view(self, offset: int, size: int) -> Tensor:
        """Not to be had.

        Raises
        ------
        UnavailableError
        """
        raise UnavailableError(
            "this pool only keeps accounts and holds no keys and values. Open it with device='cpu' or device='cuda'."
        )

    def copy(self, source: int, target: int, size: int) -> None:
        """Nothing to copy."""


class Buffer(Arena):
    """One flat tensor.

    Parameters
    ----------
    data : Tensor
        ``[capacity]`` uint8, on any device.
    """

    def __init__(self, data: Tensor) -> None:
        super().__init__(data.numel())
        self.data = data

    def view(self, offset: int, size: int) -> Tensor:
        """See :meth:`Arena.view`."""
        return self.data[offset : offset + size]


def open_arena(capacity: int, device: torch.device | None, pinned: bool) -> Arena:
    """``capacity`` bytes on a device; None only keeps accounts; ``pinned`` takes host memory from the process's pinned pool.

    Raises
    ------
    PoolFullError
        If a CUDA device has no room.
    HostMemoryError
        If the host has no room.
    UnavailableError
        If ``pinned`` goes with anything but the host.
    """
    if pinned and (device is None or device.type != "cpu"):
        raise UnavailableError(
            f"pinned memory is host memory, but the device is {device}. Open the pool with device='cpu'."
        )
    if device is None:
        return Accounts(capacity)
    if device.type == "cpu":
        if pinned:
            return Buffer(pinned_pool().allocate((capacity,), torch.uint8))
        check_host_memory(capacity, "a KV pool")
    try:
        with torch.inference_mode(False):  # what is made in inference mode could not be written to later
            return Buffer(torch.empty(capacity, dtype=torch.uint8, device=device))
    except torch.OutOfMemoryError as error:
        raise PoolFullError(f"a KV pool of {capacity:,} bytes does not fit {device}. Ask for fewer. {error}") from error
