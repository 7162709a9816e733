"""Where a layer's exact tokens lie in host memory: in a tensor of its own, or in a pool that an allocator manages."""

from alaya_hf.engine.device.store.base import LayerStore
from alaya_hf.engine.device.store.pooled import PooledStore
from alaya_hf.engine.device.store.pools import LayerPools
from alaya_hf.engine.device.store.tensor import TensorStore

__all__ = ["LayerPools", "LayerStore", "PooledStore", "TensorStore"]
