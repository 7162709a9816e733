"""What a cache will take, from the code that takes it: buffers made on torch's meta device, which has sizes and no memory."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from alaya_hf.attention import NAME
from alaya_hf.cache import AlayaCache
from alaya_hf.cache_argument import cache_argument
from alaya_hf.config import AlayaConfig
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device.plan import device_plan
from alaya_hf.engine.device.shared import DeviceShared
from alaya_hf.errors import UnsupportedModelError
from alaya_hf.handle import KVHandle
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.partial import Partial, merge, merge_into
from alaya_hf.layer import AlayaLayer
from alaya_hf.storage.blocks import block_bytes

META = torch.device("meta")
#: Offloaded tokens of the small layer that says what a token takes in the host engine's indexes.
_SAMPLE = 1024


@dataclass(frozen=True)
class LayerFootprint:
    """Bytes of one layer's cache.

    Attributes
    ----------
    device : int
        On the layer's device: window, low-bit copy or what stands for blocks, hot set.
    growth : int
        More while its low-bit copy or that grows, when the old one and the new one are both there; one layer at a time.
    host : int
        In host memory: the store (pinned with ``engine="device"``), and the host engine's indexes.
    workspace : dict of tuple to int
        Buffers of a step, and of a pass of a few tokens, by what they are made for: layers of one device share those with the
        same key.
    """

    device: int
    growth: int
    host: int
    workspace: dict[Any, int]


def layer_footprints(
    config: PreTrainedConfig, settings: AlayaConfig, batch: int, context: int, dtype: torch.dtype, ranks: int = 1
) -> list[LayerFootprint]:
    """What every layer of a model's cache takes.

    Parameters
    ----------
    config : PreTrainedConfig
        Of the model; nothing else of it is needed.
    settings : AlayaConfig
    batch, context : int
        Rows, and tokens of each, those to be generated included.
    dtype : torch.dtype
        Of the model's keys and values.
    ranks : int
        Processes among which tensor parallelism divides the heads: the result is one's share.

    Raises
    ------
    UnsupportedModelError
        For KV heads that do not divide among the ranks, and for layers that keep something else than keys and values.
    ConfigError
        For settings that ``engine="device"`` does not serve.

    Notes
    -----
    With ``engine="host"`` the indexes are built once over 1,024 random tokens, a second or two, and scaled.
    """
    decoder = config.get_text_config(decoder=True)
    heads = decoder.num_attention_heads
    kv_heads = getattr(decoder, "num_key_value_heads", None) or heads
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // heads
    if kv_heads % ranks or heads % ranks:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} has {heads} query heads and {kv_heads} KV heads, which do not divide among {ranks} ranks. "
            f"Use a number of ranks that divides {kv_heads}."
        )
    cache = AlayaCache(settings, config=config)
    share, known, found = len(cache.alaya_layers), {}, []
    for idx, layer in enumerate(cache.layers):
        key = settings.for_layer(idx) if isinstance(layer, AlayaLayer) else type(layer)
        dense = isinstance(layer, AlayaLayer) and idx in layer.config.dense_layers
        name = (repr(key), dense)
        if name not in known:
            kv = torch.empty(batch, kv_heads // ranks, context, head_dim, dtype=dtype, device=META)
            known[name] = _layer(layer, kv, heads // kv_heads, share)
        found.append(known[name])
    return found


def _layer(layer: Any, kv: Tensor, group: int, share: int) -> LayerFootprint:
    batch, kv_heads, context, head_dim = kv.shape
    with torch.inference_mode(False):
        if isinstance(layer, DeviceLayer):
            return _device_layer(layer, kv, group, share)
        if isinstance(layer, AlayaLayer):
            layer.lazy_initialization(kv, kv)
            window, config = layer.window, layer.config
            assert window is not None
            # As the window grows while decoding: columns that come when it is full.
            whole = context <= config.min_context
            recent = context if whole else config.window.local + config.window.overflow + 1
            window.append(kv[:, :, :recent], kv[:, :, :recent], None)
            held = 2 * window._keys.numel() * window._keys.element_size()
            offloaded = 0 if whole else max(0, context - config.window.init - config.window.local)
            per_token = _host_bytes(config, head_dim, kv.dtype) if offloaded else 0
            return LayerFootprint(held, 0, math.ceil(batch * kv_heads * offloaded * per_token), {})
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedModelError(
                f"a {type(layer).__name__} keeps something else than keys and values, whose bytes are not known. Give its "
                "device's share of memory through max_memory, and a device_map of your own."
            )
        layer.update(kv, kv)
        return LayerFootprint(2 * layer.keys.numel() * layer.keys.element_size(), 0, 0, {})


def _device_layer(layer: DeviceLayer, kv: Tensor, group: int, share: int) -> LayerFootprint:
    batch, kv_heads, context, head_dim = kv.shape
    layer.lazy_initialization(kv, kv)
    tokens, plan = layer.tokens, device_plan(layer.config, layer.layer_idx)
    assert tokens is not None
    host = tokens.make_room(context)
    from alaya_hf.kernels.gpu.hot_set import HotSet

    budget = layer.config.hot_bytes // max(1, share)
    hot = HotSet.within(budget, batch, kv_heads, tokens.form, META) if budget and plan.cap else None
    slots, works = tokens.init + tokens.ring, {}
    # A step of one token; unless blocks are the index, also the longest pass that retrieves.
    for new in {1, 1 if isinstance(tokens.layout, BlockLayout) else layer.config.max_sparse_queries}:
        form = None if hot is None or new > 1 else tokens.form
        sizes = (batch, kv_heads, group, tokens.layout, tokens.room, slots, plan.cap, META, tokens.dtype, form, new)
        key = (*sizes[3:10], new)
        works[key] = DeviceShared().workspace(*sizes).nbytes
    copies = tokens.lowbit_bytes + tokens.index_bytes
    held = tokens.window_bytes + copies + (0 if hot is None else hot.nbytes)
    return LayerFootprint(held, copies, block_bytes(host) if host else 0, works)


def _host_bytes(config: AlayaConfig, head_dim: int, dtype: torch.dtype) -> float:
    """Bytes of host memory per token and KV head under ``engine="host"``: the vectors and what is built on them."""
    window, count = config.window, _SAMPLE
    changes: dict[str, Any] = {"min_context": 0, "sample_queries": None}
    layer = AlayaLayer(config.replace(**changes))
    kv = torch.randn(1, 1, window.init + window.local + count, head_dim, generator=torch.Generator().manual_seed(0))
    kv = kv.to(dtype)
    layer.fill(kv, kv)
    one = kv[:, :, :1]
    layer.update(one, one)
    layer.attend(one, head_dim**-0.5)
    assert layer.store is not None
    return (layer.offloaded_bytes + layer.index_bytes + layer.lowbit_bytes) / sum(layer.store.lengths)


# What a forward pass works with -----------------------------------------------------------------------------------------


class _LivePeak(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, of those made while this lasts: not of `before`, nor views of them."""

    def __init__(self, before: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._before = [tensor.untyped_storage() for tensor in before]
        self._known = {id(storage) for storage in self._before}

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if id(storage) not in self._known:
                    self._known.add(id(storage))
                    size = storage.nbytes()
                    weakref.finalize(storage, self._gone, id(storage), size)
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out


class _Pass:
    """Stands in for a layer in a pass over the meta device: what prefill makes, without computing it."""

    layer_idx = 0

    def __init__(self, keys: Tensor, form: StoreFormat | None, offloaded: int, rows: int) -> None:
        self.keys, self.form, self.offloaded, self.rows = keys, form, offloaded, rows

    def attend(self, query: Tensor, scaling: float, **kwargs: Any) -> Tensor:
        """As :meth:`AlayaLayer.attend`: the chunk among itself, offloaded blocks one after the other, their merge."""
        batch, _, _, head_dim = query.shape
        parts = [Partial.empty(query.shape[:3], head_dim, META)]
        if self.offloaded:
            heads = self.keys.shape[1]
            rows = [Partial.empty((1, *query.shape[1:3]), head_dim, META) for _ in range(batch)]
            tail, dtype = (self.form.tail, self.form.dtype) if self.form else ((2, head_dim), query.dtype)
            # Two buffers, so that a block travels while the other is read.
            buffers = [torch.empty(heads, self.offloaded, *tail, dtype=dtype, device=META) for _ in range(2)]
            for row in rows:
                kv = self.form.unpack(buffers[0], query.dtype) if self.form else buffers[0]
                merge_into(row, Partial.empty((1, *query.shape[1:3]), head_dim, META))
                del kv
            parts.append(Partial(torch.cat([row.out for row in rows]), torch.cat([row.lse for row in rows])))
            del rows, buffers
        kept = [torch.cat([side, side[:, :, : self.rows]], dim=2) for side in (self.keys, self.keys)]
        out = merge(parts).out
        del kept
        return out.to(query.dtype).transpose(1, 2).contiguous()


class _PassCache(AlayaCache):
    """Hands out handles of :class:`_Pass`."""

    def prepare(self, form: StoreFormat | None, offloaded: int, rows: int) -> None:
        self._what = (form, offloaded, rows)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer = _Pass(key_states, *self._what)
        return KVHandle.wrap(key_states, layer), KVHandle.wrap(value_states, layer)


def working_bytes(
    config: PreTrainedConfig, settings: AlayaConfig, batch: int, context: int, chunk: int, dtype: torch.dtype
) -> int:
    """Most bytes that a prefill chunk has in use at a time on a device, beside weights and cache.

    Parameters
    ----------
    chunk : int
        Tokens of a forward pass (``generate``'s `prefill_chunk_size`), at most `context`.

    Raises
    ------
    UnsupportedModelError
        For a model whose first layer cannot be run by itself.

    Notes
    -----
    The model's first layer runs on the meta device, with every tensor counted while it lives; attention, whose kernels there
    are none of, is replaced by the tensors that it makes. Blocks of one model are taken to be alike.
    """
    small = copy.deepcopy(config)
    decoder = small.get_text_config(decoder=True)
    decoder.num_hidden_layers = 1
    if getattr(decoder, "layer_types", None):
        # A layer with full attention: it works with the most.
        decoder.layer_types = ["full_attention"]
    rope = getattr(decoder, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):
        # Their frequencies depend on numbers that a pass without numbers does not have.
        decoder.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    chunk = min(chunk, context)
    layer = DeviceLayer(settings, 0) if settings.engine == "device" else None
    form = None
    if layer is not None:
        probe = torch.empty(batch, 1, 0, head_dim, dtype=dtype, device=META)
        layer.lazy_initialization(probe, probe)
        assert layer.tokens is not None
        form = layer.tokens.form
    try:
        with META:
            model = AutoModelForCausalLM.from_config(small, dtype=dtype, attn_implementation=NAME).eval()
            # Thresholds of a sparse prefill are those of all layers; nothing is attended to here.
            cache = _PassCache(settings.replace(layers={}, cuda_graphs="none", prefill="exact"), config=small)
            cache.prepare(form, min(settings.prefill_block, max(0, context - chunk)), settings.window.local)
            ids = torch.empty(batch, chunk, dtype=torch.int64)
            positions = torch.empty(batch, chunk, dtype=torch.int64)
            with torch.no_grad(), _LivePeak([*model.parameters(), *model.buffers()]) as live:
                model(input_ids=ids, position_ids=positions, **cache_argument(cache), logits_to_keep=1)
    except Exception as error:
        raise UnsupportedModelError(
            f"the first layer of {type(config).__name__} cannot be run by itself to see what a pass works with ({error}). Give "
            "`working`, the bytes that a prefill chunk takes on a device."
        ) from error
    return live.peak
