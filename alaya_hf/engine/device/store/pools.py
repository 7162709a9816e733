"""Which layers of a cache share a pool."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch

from alaya_hf.engine.device.store.group import Group
from alaya_hf.engine.device.store.pooled import PooledStore
from alaya_hf.errors import UnsupportedModelError
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.storage.allocators import Allocator, KVShape


class _Kind(NamedTuple):
    """What layers of one pool have in common."""

    allocator: Allocator
    kv_heads: int
    form: StoreFormat
    fixed: int | None


class LayerPools:
    """Hands the layers of a cache their places in a pool, as they come."""

    def __init__(self) -> None:
        self._kind: _Kind | None = None
        self._slots: dict[int, int] = {}
        self._groups: list[weakref.ref[Group]] = []

    def store(
        self, layer: int, layers: int, allocator: Allocator, fixed: int | None, batch: int, kv_heads: int, form: StoreFormat,
        device: torch.device,
    ) -> PooledStore:  # fmt: skip
        """An empty store of a layer.

        Parameters
        ----------
        layer : int
            Its number in the model.
        layers : int
            Of the cache, as far as one knows: so many share a pool.
        allocator : Allocator
        fixed : int, optional
            Bytes of the pool.
        batch, kv_heads : int
        form : StoreFormat
        device : torch.device

        Raises
        ------
        UnsupportedModelError
            If the cache has layers of another kind.
        """
        kind = _Kind(allocator, kv_heads, form, fixed)
        if self._kind not in (None, kind):
            raise UnsupportedModelError(
                f"layer {layer} keeps {kv_heads} KV heads of {form.head_dim} in {form.dtype}, but earlier layers of the cache "
                f"{self._kind}: an allocator manages layers that are alike. Leave the setting allocator out."
            )
        self._kind = kind
        slot = self._slots.setdefault(layer, len(self._slots)) % max(1, layers)
        for known in self._groups:
            group = known()
            if group is None or group.batch != batch or group.shared or group.shape.layers <= slot:
                continue
            if slot not in group.claimed:
                break
        else:
            # A row of the pool is a line of all heads; its two halves are a key and a value only without scales.
            shape = KVShape(max(1, layers), kv_heads, form.row // 2, form.dtype)
            group = Group(allocator, shape, form, batch, fixed)
            self._groups = [known for known in self._groups if known() is not None] + [weakref.ref(group)]
        group.claimed.add(slot)
        return PooledStore(group, slot, kv_heads, form, device)
