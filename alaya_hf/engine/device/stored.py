"""A stored context's longest run as a layer of the device engine reads it: in place."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.engine.device.loader import Incoming
from alaya_hf.errors import AlayaError
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.storage.db.registered import RegisteredFile


class StoredRun:
    """Places ``first <= place < last`` of a context, which are token ``place + origin`` of a mapped file.

    Copies of a layer and its rows share one; nobody writes to it.

    Parameters
    ----------
    registered : RegisteredFile
    first, last, origin : int
    arrival : Incoming
        Of the file, and of the layer's records.

    Attributes
    ----------
    view : Tensor or None
        The vectors ``[kv_heads, tokens, 2, head_dim]`` as kernels see them, once they may be read.
    """

    def __init__(self, registered: RegisteredFile, first: int, last: int, origin: int, arrival: Incoming) -> None:
        self.registered, self.arrival = registered, arrival
        self.first, self.last, self.origin = first, last, origin
        self.view: Tensor | None = None

    def arrive(self, device: torch.device) -> None:
        """Wait for the layer, and no other, if it is not there yet; see :meth:`Incoming.wait`."""
        if self.view is not None:
            return
        self.arrival.wait(device)
        kv = self.registered.kv
        view = device_view(kv, device) if device.type == "cuda" else kv
        if view.data_ptr() != kv.data_ptr():
            raise AlayaError(
                f"{device} sees registered host memory only as a copy, but engine='device' needs unified addressing. Use "
                "engine='host'."
            )
        self.view = view

    def places(self, start: int, stop: int) -> Tensor:
        """Some of its places on the host: ``[kv_heads, stop - start, 2, head_dim]``, a view."""
        return self.registered.kv[:, start + self.origin : stop + self.origin]

    def bounds(self, lasts: list[int]) -> Tensor:
        """For rows that have its places up to `lasts`, see :class:`~alaya_hf.kernels.gpu.prefix.Prefix`; on the host."""
        return torch.tensor([[self.first, last, self.origin] for last in lasts], dtype=torch.int64)
