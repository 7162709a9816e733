"""A layer's exact tokens in one tensor of pinned memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from alaya_hf.engine.device.store.base import LayerStore
from alaya_hf.errors import AlayaError
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.storage.pinned import pinned_pool


class TensorStore(LayerStore):
    """``[batch, kv_heads, capacity, *form.tail]``; growing and taking rows copy all lines.

    Parameters
    ----------
    batch, kv_heads : int
    form : StoreFormat
    device : torch.device
    tensor : Tensor, optional
        Default: without room.

    Attributes
    ----------
    tensor : Tensor
        Host memory, pinned if the device is a GPU.
    """

    def __init__(
        self, batch: int, kv_heads: int, form: StoreFormat, device: torch.device, tensor: Tensor | None = None
    ) -> None:
        super().__init__(kv_heads, form, device)
        self._set(self._make(batch, 0) if tensor is None else tensor)

    @property
    def lines(self) -> int:
        """See :attr:`LayerStore.lines`."""
        return self.tensor.shape[2]

    @property
    def view(self) -> Tensor:
        """See :attr:`LayerStore.view`."""
        return self._view

    def grow(self, lines: int, capacity: int, used: Sequence[int], layers: int, wait: Callable[[], None]) -> None:
        """See :meth:`LayerStore.grow`."""
        batch = self.tensor.shape[0]
        self._set(self._copied(list(range(batch)), used, capacity, layers, wait))

    def take(self, rows: Sequence[int], used: Sequence[int], wait: Callable[[], None]) -> TensorStore:
        """See :meth:`LayerStore.take`."""
        tensor = self._copied(rows, used, self.lines, 1, wait)
        return TensorStore(len(rows), self.kv_heads, self.form, self.device, tensor)

    def pieces(self, row: int, start: int, stop: int) -> list[Tensor]:
        """See :meth:`LayerStore.pieces`."""
        return [self.tensor[row, :, None, start:stop]] if start < stop else []

    def buffer(self, tokens: int) -> Tensor:
        """See :meth:`LayerStore.buffer`."""
        return torch.empty(self.kv_heads, tokens, *self.form.tail, dtype=self.form.dtype, device=self.device)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """See :meth:`LayerStore.pack`."""
        return self.form.pack(keys, values)

    def _make(self, batch: int, capacity: int, layers: int = 1, given_back: int = 0) -> Tensor:
        """Pinned host memory for `capacity` tokens, checked for `layers` such layers, which give places back one by one."""
        token_bytes = self.kv_heads * self.form.row_bytes
        places = layers * batch * (capacity - given_back) + batch * given_back
        with self._there():
            pinned_pool().check_room(places * token_bytes, "the offloaded context")
            if layers > 1 and self.device.type == "cuda":
                # Made while the device works on the layers before.
                pinned_pool().prepare(batch * (capacity - given_back) * token_bytes, layers)
            return pinned_pool().allocate((batch, self.kv_heads, capacity, *self.form.tail), self.form.dtype)

    def _set(self, tensor: Tensor) -> None:
        self.tensor = tensor
        with self._there():
            self._view = seen_by(tensor, self.device)

    def _copied(
        self, rows: Sequence[int], used: Sequence[int], capacity: int, layers: int, wait: Callable[[], None]
    ) -> Tensor:
        tensor = self._make(len(rows), capacity, layers, min(self.lines, capacity))
        if any(used[source] for source in rows):
            wait()
        for row, source in enumerate(rows):
            tensor[row, :, : used[source]] = self.tensor[source, :, : used[source]]
        return tensor

    def _there(self) -> AbstractContextManager[object]:
        """Pinned memory is made for the current device: let that be the layer's."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def seen_by(memory: Tensor, device: torch.device) -> Tensor:
    """The same host memory as kernels of a device see it.

    Raises
    ------
    AlayaError
        If they would see a copy.
    """
    view = device_view(memory, device) if memory.is_pinned() else memory
    if view.data_ptr() != memory.data_ptr():
        raise AlayaError(
            f"{device} sees pinned host memory only as a copy, but engine='device' needs unified addressing. Use "
            "engine='host'."
        )
    return view
