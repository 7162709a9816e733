"""Bytes that a layer's plan holds: upper bounds of what the engines allocate, room to grow included."""

from __future__ import annotations

from alaya_hf.engine.residual import BlockMean, LowBit
from alaya_hf.index import Coarse, Graph, Quantized
from alaya_hf.kernels.gpu.block_layout import GROUPED, BlockLayout
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.store_format import EIGHT_BIT, StoreFormat
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.shape import ModelShape

#: Partials per query head that fill a GPU, at most: programs in flight over all KV heads. Bounds the workspace.
_PROGRAMS = 4096
#: Bytes of scores that a pass of several tokens keeps at a time, see `alaya_hf.kernels.gpu.short_pass`.
_SCORES = 1 << 29


def window_bytes(plan: LayerPlan, shape: ModelShape, context: int, batch: int, passes: int = 64) -> int:
    """Bytes of a layer's window on its device.

    Parameters
    ----------
    plan : LayerPlan
    shape : ModelShape
    context : int
        Columns, with those that are still to come.
    batch : int
    passes : int
        Tokens of the longest pass that decodes, ``max_sparse_queries``: they join the window before it is cut.
    """
    window = plan.window
    if plan.engine == "device":
        slack = max(TILE, _layout(plan, shape).tokens)
        slots = window.local + slack
        # The ring doubles while the context lies in it as a whole.
        while slots < min(context, plan.min_context) + 2 - window.init + slack - TILE:
            slots *= 2
    else:
        needed = max(window.local + window.overflow, min(context, plan.min_context)) + passes
        # Window.append reserves a quarter more.
        slots = needed + max(64, needed // 4)
    return batch * shape.token_bytes * (window.init + slots)


def device_bytes(plan: LayerPlan, shape: ModelShape, context: int, batch: int, passes: int = 64) -> int:
    """Bytes of a layer on its device: window, and with ``engine="device"`` the low-bit copy or what stands for blocks.

    Arguments as for `window_bytes`.
    """
    held = window_bytes(plan, shape, context, batch, passes)
    if plan.engine != "device":
        return held
    layout = _layout(plan, shape)
    return held + int(batch * shape.kv_heads * _records(plan, layout, context) * layout.tokens * layout.bytes_per_token)


def workspace_bytes(plan: LayerPlan, shape: ModelShape, context: int, batch: int, passes: int = 1) -> int:
    """Bytes of the buffers that the layers of one device share in a step; 0 on the host engine.

    Arguments as for :func:`window_bytes`.

    Notes
    -----
    A bound on :class:`alaya_hf.kernels.gpu.step.Workspace`, of steps and, where passes of more tokens retrieve, of those: scores
    of all tokens in float16, partials of every program in flight, lists of ids.
    """
    if plan.engine != "device":
        return 0
    layout, cap = _layout(plan, shape), exact_cap(plan)
    records = _records(plan, layout, context)
    slots = plan.window.init + plan.window.local + max(TILE, layout.tokens) + min(context, plan.min_context) * 2
    lists = 16 * (cap + 1) + 8 * 16
    if isinstance(layout, BlockLayout):
        groups = -(-records // GROUPED)
        partials = slots // 16 + 2 + max(2, groups) + shape.group * min(cap, 64)
        per_row = 2 * groups * (GROUPED + 1) + (partials + 1) * (shape.head_dim + 3) * 4 + lists
        return batch * shape.heads * per_row + 8 * batch
    tokens = records * TILE
    gathered = shape.group * -(-cap // 16)

    def buffers(new: int) -> int:
        # As many positions at a time as `positions_at_a_time` allows.
        positions = max(1, min(new, _SCORES // max(1, 2 * batch * shape.heads * tokens)))
        partials = (slots + new) // 16 + 2 + max(2, _PROGRAMS // (batch * shape.kv_heads)) + gathered
        per_row = tokens * 2 + tokens // TILE * 2 + partials * (shape.head_dim + 2) * 4 + lists + shape.head_dim * 4
        left = -(-new // TILE) * TILE * batch * shape.token_bytes if new > 1 else 0
        return batch * shape.heads * positions * per_row + left + 8 * batch

    return buffers(1) + (buffers(passes) if passes > 1 else 0)


def _records(plan: LayerPlan, layout: Layout | BlockLayout, context: int) -> int:
    """Tiles or blocks that there is room for: 1/128 and 8 more than needed, each time it grows (`DeviceTokens.reserve`)."""
    records = 0 if context <= plan.min_context else -(-max(0, context - plan.window.local) // layout.tokens)
    return records + records // 128 + 9


def host_bytes(plan: LayerPlan, shape: ModelShape, context: int, batch: int) -> int:
    """Bytes of a layer in host memory: the store, indexes and what the residual reads there."""
    offloaded = 0 if context <= plan.min_context else max(0, context - plan.window.init)
    vectors = 2 * shape.kv_heads * shape.head_dim
    if plan.engine == "device":
        eight = EIGHT_BIT.get(plan.store_dtype)
        row = StoreFormat(shape.head_dim, eight).row_bytes if eight else 2 * shape.head_dim * shape.dtype.itemsize
        return batch * offloaded * shape.kv_heads * row
    width = {"float32": 4, "float16": 2, "bfloat16": 2}.get(plan.store_dtype, shape.dtype.itemsize)
    per_token = float(vectors * width)
    if plan.query.keeps_all:
        return int(batch * offloaded * per_token)
    index, residual = plan.index, plan.residual
    keys = index.bits if isinstance(index, Quantized) else 0
    if isinstance(residual, LowBit):
        per_token += shape.kv_heads * _low_bytes(shape.head_dim, residual.key_bits, residual.value_bits)
        keys = 0 if keys == residual.key_bits else keys
    if keys:
        per_token += shape.kv_heads * _low_bytes(shape.head_dim, keys, 0)
    if isinstance(residual, BlockMean):
        sides = 1 if residual.keys is not True and index.scores_all else 2
        per_token += sides * shape.kv_heads * shape.head_dim * 2 / residual.block
    if isinstance(index, Graph):
        per_token += 4 * shape.kv_heads * 32
    return int(batch * offloaded * per_token)


def exact_cap(plan: LayerPlan) -> int:
    """Most exact tokens, or blocks of the index ``coarse``, per query head of a plan for the device."""
    from alaya_hf.engine.device.plan import DEFAULT_CAP, block_cap

    if isinstance(plan.index, Coarse):
        return block_cap(plan.query, plan.index.block)
    cap = getattr(plan.query, "k", getattr(plan.query, "cap", None))
    return DEFAULT_CAP if cap is None else int(cap)


def _layout(plan: LayerPlan, shape: ModelShape) -> Layout | BlockLayout:
    if isinstance(plan.index, Coarse):
        from alaya_hf.engine.device.plan import block_layout

        return block_layout(plan.index, shape.head_dim, isinstance(plan.residual, BlockMean))
    bits = plan.residual.value_bits if isinstance(plan.residual, LowBit) else 0
    return Layout(shape.head_dim, plan.index.bits, bits)


def _low_bytes(head_dim: int, key_bits: int, value_bits: int) -> float:
    """Bytes of a token in :class:`alaya_hf.kernels.cpu.lowbit.LowBitKV`, per KV head."""
    keys = head_dim * (key_bits / 8 + 4 / 64)
    return keys + (head_dim * value_bits / 8 + 4 * -(-head_dim // 32) if value_bits else 0)
