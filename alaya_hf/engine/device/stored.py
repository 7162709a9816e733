"""A stored context's longest run as a layer of the device engine reads it: in place."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.engine.device.loader import Incoming, fetch_lists
from alaya_hf.errors import AlayaError
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.storage.db.registered import RegisteredFile
from alaya_hf.storage.pinned import pinned_pool


class FetchBuffers:
    """Pinned memory that :meth:`StoredRun.fetch` works in, shared by the layers of a cache, which use it one after the other."""

    def __init__(self) -> None:
        self._held: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def of(
        self, ids: Tensor, counts: Tensor, tail: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Buffers for ids, counts and rows ``[*ids.shape, *tail]``, and the rows for kernels; made anew for other shapes."""
        shape = (*ids.shape, *tail)
        if self._held is None or self._held[2].shape != shape or self._held[2].dtype != dtype:
            self._held = None
            pool = pinned_pool()
            # Nothing is read from rows that were not fetched, whatever they hold.
            places, numbers = pool.allocate(ids.shape, ids.dtype), pool.allocate(counts.shape, counts.dtype)
            rows = pool.allocate(shape, dtype)
            self._held = places, numbers, rows, device_view(rows, ids.device) if ids.is_cuda else rows
        return self._held


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
        The vectors ``[kv_heads, tokens, 2, head_dim]`` as kernels see them, once they may be read. Until then :meth:`fetch`
        brings what a pass retrieves, and the second pass that does so asks for all of them.
    """

    def __init__(self, registered: RegisteredFile, first: int, last: int, origin: int, arrival: Incoming) -> None:
        self.registered, self.arrival = registered, arrival
        self.first, self.last, self.origin = first, last, origin
        self.view: Tensor | None = None
        self._fetched = False

    def arrive(self, device: torch.device, vectors: bool = True) -> None:
        """Wait for the layer, and no other, if it is not there yet.

        Parameters
        ----------
        device : torch.device
        vectors : bool
            For its vectors too. Otherwise for its records, and `view` is there if the vectors are.

        Raises
        ------
        CorruptStoreError, HostMemoryError
            See :class:`~alaya_hf.engine.device.loader.Incoming`.
        """
        if self.view is not None:
            return
        self.arrival.wait_for_records()
        if vectors or self.registered.registered:
            self.arrival.bring_vectors().result()
        if not self.arrival.has_vectors:
            return
        kv = self.registered.kv
        view = device_view(kv, device) if device.type == "cuda" else kv
        if view.data_ptr() != kv.data_ptr():
            raise AlayaError(
                f"{device} sees registered host memory only as a copy, but engine='device' needs unified addressing. Use "
                "engine='host'."
            )
        self.view = view

    def fetch(self, ids: Tensor, counts: Tensor, lasts: list[int], buffers: FetchBuffers) -> Tensor:
        """Rows that a pass selected, before the device can read the file: the host waits for the device, then copies them.

        Parameters
        ----------
        ids : Tensor ``[batch, kv_heads, rows, cap]`` int32
            Places; those outside of the run are left out.
        counts : Tensor ``[batch, kv_heads, rows]`` int32
        lasts : list of int
            Where each row's places in the file end.
        buffers : FetchBuffers

        Returns
        -------
        Tensor ``[batch, kv_heads, rows, cap, 2, head_dim]``
            As kernels see it, until the next call with these buffers.

        Raises
        ------
        CorruptStoreError
        """
        if self._fetched:
            self.arrival.bring_vectors()
        else:
            self.registered.file.scattered()
        self._fetched = True
        kv = self.registered.file.tensors["kv"]
        places, numbers, rows, view = buffers.of(ids, counts, kv.shape[2:], kv.dtype)
        places.copy_(ids, non_blocking=True)
        numbers.copy_(counts, non_blocking=True)
        if ids.is_cuda:
            torch.cuda.current_stream(ids.device).synchronize()
        until = torch.tensor(lasts, dtype=torch.int64)
        lists, cap = numbers.numel(), ids.shape[3]
        fetch_lists(
            self.registered.file, places.view(lists, cap), numbers.view(lists), torch.full_like(until, self.first), until,
            self.origin, rows.view(lists, cap, *kv.shape[2:]),
        )  # fmt: skip
        return view

    def places(self, start: int, stop: int) -> Tensor:
        """Some of its places on the host: ``[kv_heads, stop - start, 2, head_dim]``, a view."""
        return self.registered.kv[:, start + self.origin : stop + self.origin]

    def bounds(self, lasts: list[int]) -> Tensor:
        """For rows that have its places up to `lasts`, see :class:`~alaya_hf.kernels.gpu.prefix.Prefix`; on the host."""
        return torch.tensor([[self.first, last, self.origin] for last in lasts], dtype=torch.int64)
