"""What the kernels of the device engine are asked for, from a layer's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from alaya_hf.config import AlayaConfig
from alaya_hf.engine.residual import BlockMean, LowBit
from alaya_hf.errors import ConfigError
from alaya_hf.index.coarse import Coarse, per_block
from alaya_hf.index.quantized import Quantized
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.layout import MEAN_BLOCK, Layout
from alaya_hf.query import DIPR, Query, Recovery, TopK
from alaya_hf.storage.allocators import Allocator

SUPPORTED = (
    "engine='device' serves the queries dipr, topk and recovery on the index 'quantized' (margin 0) with the residual "
    f"'low_bit' of as many key bits, or 'block_means' of {MEAN_BLOCK} tokens; and dipr and topk on the index 'coarse' without a "
    "residual or, with strategy 'mean', with 'block_means' of its blocks"
)
#: Cap of a query that brings none. A range may hold half the context, and a step has to fetch all of it over the bus; what
#: is beyond the cap is estimated.
DEFAULT_CAP = 256
#: The same in blocks of the index ``coarse``: as many as InfLLM takes.
DEFAULT_BLOCKS = 16
#: What the selection kernel can hold at a time, tokens or blocks.
MAX_CAP = 512
ADVICE = "Change the setting, or use engine='host' (for one layer: layers={number: {'engine': 'host'}})."


@dataclass(frozen=True)
class DevicePlan:
    """What one layer asks of the kernels in every decode step.

    Attributes
    ----------
    key_bits, value_bits : int
        Of the low-bit copy; no value bits: block means of the values.
    cap : int
        Most offloaded tokens (with `coarse`, blocks) per query head that get exact attention, highest scores first;
        :data:`DEFAULT_CAP` (:data:`DEFAULT_BLOCKS`) where the query has none.
    ratio : float
        Share of the attention mass that window and exact tokens have to hold; 1: not asked for.
    union : bool
        The query heads of a KV head share what each of them selected.
    dipr : DIPR or None
        Where the range comes from; None: no range.
    coarse : Coarse or None
        The index in place of the low-bit copy.
    means : bool
        With `coarse`: whether mean values answer for the blocks left out.
    """

    key_bits: int
    value_bits: int
    cap: int
    ratio: float
    union: bool
    dipr: DIPR | None
    coarse: Coarse | None = None
    means: bool = False

    def layout(self, head_dim: int) -> Layout | BlockLayout:
        """How what the index keeps lies on the device.

        Raises
        ------
        ValueError
            For a head dimension that the kernels do not serve.
        """
        if self.coarse is None:
            return Layout(head_dim, self.key_bits, self.value_bits)
        return block_layout(self.coarse, head_dim, self.means)

    def beta(self, scaling: float) -> float:
        """The range below the best score, in units of scores."""
        return math.inf if self.dipr is None else self.dipr.range(scaling)


def device_plan(config: AlayaConfig, layer_idx: int) -> DevicePlan:
    """The plan of a layer.

    Parameters
    ----------
    config : AlayaConfig
        Of this layer (:meth:`AlayaConfig.for_layer`).
    layer_idx : int

    Raises
    ------
    ConfigError
        For anything that the kernels cannot do.
    """
    query, index, residual = config.query, config.index, config.residual

    def refuse(what: str) -> ConfigError:
        return ConfigError(f"{SUPPORTED}, but got {what}. {ADVICE}")

    if layer_idx in config.dense_layers:
        raise refuse(f"dense_layers with layer {layer_idx}, which would attend to the whole context")
    if isinstance(index, Coarse):
        return _coarse_plan(config, index, refuse)
    ratio, dipr = 1.0, None
    if isinstance(query, TopK):
        cap = query.k
    elif isinstance(query, (DIPR, Recovery)):
        cap = DEFAULT_CAP if query.cap is None else query.cap
        if isinstance(query, DIPR):
            dipr = query
        else:
            ratio = float(query.ratio)
    else:
        raise refuse(f"the query {query.kind!r}")
    if cap > MAX_CAP:
        raise refuse(f"{query.kind} with {'k' if isinstance(query, TopK) else 'cap'}={cap} (at most {MAX_CAP})")
    if not isinstance(index, Quantized):
        raise refuse(f"the index {index.kind!r}")
    if index.margin:
        raise refuse(f"index.margin={index.margin} (nothing is re-scored)")
    if isinstance(residual, LowBit):
        if residual.key_bits != index.bits:
            raise refuse(f"residual.key_bits={residual.key_bits} beside index.bits={index.bits}")
        value_bits = residual.value_bits
    elif isinstance(residual, BlockMean):
        if residual.block != MEAN_BLOCK or residual.keys is True:
            raise refuse(f"block_means with block={residual.block}, keys={residual.keys!r}")
        value_bits = 0
    else:
        raise refuse(f"the residual {residual.kind!r}")
    return DevicePlan(index.bits, value_bits, cap, ratio, config.group_mode == "union", dipr)


def block_layout(index: Coarse, head_dim: int, means: bool) -> BlockLayout:
    """How what stands for the blocks of an index lies on the device, with mean values if `means`.

    Raises
    ------
    ValueError
        For sizes that the kernels do not serve.
    """
    count = index.count if index.strategy == "representatives" else 1
    return BlockLayout(head_dim, index.block, index.strategy, count, means)


def block_cap(query: Query, block: int) -> int:
    """Most blocks per query head that a ``TopK`` or ``DIPR`` over tokens takes; :data:`DEFAULT_BLOCKS` where it has no cap."""
    asked = per_block(query, block)
    cap = getattr(asked, "k", getattr(asked, "cap", None))
    return DEFAULT_BLOCKS if cap is None else int(cap)


def _coarse_plan(config: AlayaConfig, index: Coarse, refuse: Callable[[str], ConfigError]) -> DevicePlan:
    query, residual = config.query, config.residual
    if not isinstance(query, (TopK, DIPR)):
        raise refuse(f"the query {query.kind!r} on the index 'coarse'")
    cap, dipr = block_cap(query, index.block), query if isinstance(query, DIPR) else None
    if cap > MAX_CAP:
        raise refuse(f"{query.kind} that may take {cap} blocks of {index.block} tokens (at most {MAX_CAP} blocks)")
    means = isinstance(residual, BlockMean)
    if isinstance(residual, BlockMean):
        if index.strategy != "mean" or residual.block != index.block:
            raise refuse(
                f"block_means with block={residual.block} beside index.strategy={index.strategy!r} and index.block={index.block}"
            )
    elif not residual.is_none:
        raise refuse(f"the residual {residual.kind!r} on the index 'coarse'")
    if config.hot_bytes:
        raise refuse(f"hot_bytes={config.hot_bytes} on the index 'coarse' (a hot set keeps single tokens)")
    plan = DevicePlan(0, 0, cap, 1.0, config.group_mode == "union", dipr, index, means)
    try:
        plan.layout(16)
    except ValueError as error:
        raise refuse(f"index.block={index.block} and index.count={index.count}: {error}") from error
    return plan


def check_device(settings: AlayaConfig) -> None:
    """Check every layer with ``engine="device"`` before there is one.

    Raises
    ------
    ConfigError
    """
    named = {key for key in settings.layers if isinstance(key, int)} | set(settings.dense_layers)
    for layer_idx in [-1, *sorted(named)]:  # -1: those that are not named
        config = settings.for_layer(layer_idx)
        if config.engine == "device":
            device_plan(config, layer_idx)
    kinds: set[tuple[Allocator | None, int | None, str, int]] = {
        (config.allocator, config.pool_size, config.store_dtype, config.window.init)
        for config in settings.all_layers
        if config.engine == "device"
    }
    if len(kinds) > 1 and any(allocator is not None for allocator, _, _, _ in kinds):
        raise ConfigError(
            "an allocator manages layers that are alike, but allocator, pool_bytes, store_dtype and window.init of the layers "
            f"are {sorted(map(str, kinds))}. Set them for all layers, or leave allocator out."
        )
