"""One layer's context on a GPU, several times over, and decode steps on it, timed as CUDA graphs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import cut, gather, lowbit, merge, quantise, window
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.step import Workspace, decode_step
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.planner.measure_host import sample_layer
from alaya_hf.planner.shape import ModelShape
from alaya_hf.storage.pinned import pinned_pool

INIT, LOCAL = 128, 512
RING = LOCAL + TILE
#: Bytes that the turns together read, more than any device's cache holds.
_BEYOND_CACHE = 160 << 20


def graph_times(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> list[float]:
    """Seconds of one of several calls that a CUDA graph runs one after the other: one number per replay.

    Parameters
    ----------
    calls : sequence of callable
        Over different memory, so that the cache of the device does not hold what the next one reads.
    repeats : int
        Replays, after two that do not count.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return times[2:]


def graph_seconds(calls: Sequence[Callable[[], Any]], repeats: int = 11) -> float:
    """Median of :func:`graph_times`."""
    return statistics.median(graph_times(calls, repeats))


class DeviceContext:
    """Keys and values of one layer as the device engine holds them, `turns` times.

    Parameters
    ----------
    keys, values : Tensor ``[1, kv_heads, tokens, head_dim]``
        On the device, in a half precision; more than 704 tokens.
    q : Tensor ``[1, heads, head_dim]``
    form : StoreFormat
        Of the store.
    turns : int, optional
        Default: as many as it takes to read more than a GPU's cache holds, 3 to 12.

    Notes
    -----
    Every turn has a low-bit copy and a window of its own. They share one store in pinned memory, each shifted by 64 rows, so that
    no two fetch the same rows: what a later turn fetches is another token's row, which takes as long. The first turn alone is
    right, see :meth:`error`.
    """

    def __init__(self, keys: Tensor, values: Tensor, q: Tensor, form: StoreFormat, turns: int | None = None) -> None:
        self.q, self.dtype, self.device = q, keys.dtype, keys.device
        self.kv_heads, self.head_dim = keys.shape[1], keys.shape[3]
        self.group = q.shape[1] // self.kv_heads
        self.low_tokens = (keys.shape[2] - INIT - LOCAL) // TILE * TILE
        if self.low_tokens <= 0:
            raise ValueError(f"expected more than {INIT + LOCAL + TILE} tokens, got {keys.shape[2]}")
        self.total_tokens = INIT + self.low_tokens + LOCAL
        self.keys, self.values = keys[:, :, : self.total_tokens], values[:, :, : self.total_tokens]
        self.k, self.v = keys[:, :, 0].clone(), values[:, :, 0].clone()
        if turns is None:
            size = self.kv_heads * self.low_tokens * self.head_dim * 6 // 8
            turns = min(12, max(3, -(-_BEYOND_CACHE // size)))
        self.turns = turns
        self.total = torch.tensor([self.total_tokens], dtype=torch.int32, device=self.device)
        self.low = torch.tensor([self.low_tokens], dtype=torch.int32, device=self.device)
        self.windows = [(self._window(self.keys), self._window(self.values)) for _ in range(turns)]
        self.stores = self._stores(form)
        self._records: dict[tuple[int, int], list[Tensor]] = {}

    def _window(self, x: Tensor) -> Tensor:
        """``[1, kv_heads, INIT + RING, head_dim]``: the first tokens, then the ring with the most recent ones in their slots."""
        made = torch.zeros(*x.shape[:2], INIT + RING, x.shape[3], dtype=x.dtype, device=x.device)
        made[:, :, :INIT] = x[:, :, :INIT]
        recent = torch.arange(self.low_tokens, self.low_tokens + LOCAL, device=x.device)
        made[:, :, INIT + recent % RING] = x[:, :, INIT + recent]
        return made

    def _stores(self, form: StoreFormat) -> list[Tensor]:
        places = self.total_tokens - INIT
        capacity = places + TILE * (self.turns + 1)
        shape = (1, self.kv_heads, capacity, *form.tail)
        size, shift = math.prod(shape), TILE * math.prod(form.tail)
        pinned = pinned_pool().allocate((size + self.turns * shift,), form.dtype)
        whole = pinned[:size].view(shape)
        for head in range(self.kv_heads):
            whole[0, head, :places].copy_(form.pack(self.keys[0, head, INIT:], self.values[0, head, INIT:]))
            whole[0, head, places:] = 0
        seen = device_view(pinned, self.device) if self.device.type == "cuda" else pinned
        return [seen[turn * shift : turn * shift + size].view(shape) for turn in range(self.turns)]

    def records(self, bits: tuple[int, int]) -> list[Tensor]:
        """The low-bit copies, one per turn."""
        if bits not in self._records:
            layout = Layout(self.head_dim, *bits)
            first = layout.allocate(1, self.kv_heads, self.low_tokens + 4 * TILE, self.device)
            zero = torch.zeros(1, dtype=torch.int32, device=self.device)
            span = slice(INIT, INIT + self.low_tokens)
            keys, values = self.keys[:, :, span], self.values[:, :, span]
            quantise.quantise_tokens(keys, values, first, zero, zero + self.low_tokens, *bits)
            self._records[bits] = [first, *(first.clone() for _ in range(self.turns - 1))]
        return self._records[bits]

    def cases(self, bits: tuple[int, int], cap: int, beta: float, ratio: float) -> list[DeviceCase]:
        """A decode step per turn, over buffers that they share as the layers of a model do."""
        records = self.records(bits)
        layout = Layout(self.head_dim, *bits)
        slots = records[0].shape[2] * TILE
        work = Workspace(1, self.kv_heads, self.group, layout, slots, INIT + RING, cap, self.device, self.dtype)
        return [DeviceCase(self, turn, records[turn], work, bits, beta, ratio) for turn in range(self.turns)]

    def exact(self) -> Tensor:
        """``[heads, head_dim]`` float32: attention to all tokens, the step's new one included."""
        found = []
        for head in range(
            self.kv_heads
        ):  # one at a time: float32 copies of all heads would take four times the context
            keys = torch.cat([self.keys[0, head].float(), self.k[0, head, None].float()])
            values = torch.cat([self.values[0, head].float(), self.v[0, head, None].float()])
            q = self.q.view(self.kv_heads, self.group, -1)[head].float()
            found.append(torch.softmax(q @ keys.T * self.head_dim**-0.5, dim=-1) @ values)
        return torch.cat(found)

    def error(self, out: Tensor, exact: Tensor) -> float:
        """Mean over heads of the relative error of a first turn's output; nan or inf where a number is not finite."""
        out = out.reshape(exact.shape).float()
        return float(((out - exact).norm(dim=-1) / exact.norm(dim=-1)).mean())


class DeviceCase:
    """A layer's decode step over one turn's memory."""

    def __init__(
        self, context: DeviceContext, turn: int, records: Tensor, work: Workspace, bits: tuple[int, int], beta: float,
        ratio: float,
    ) -> None:  # fmt: skip
        self.context, self.records, self.work, self.bits = context, records, work, bits
        self.store, (self.window_k, self.window_v) = context.stores[turn], context.windows[turn]
        self.beta, self.ratio, self.scaling = beta, ratio, context.head_dim**-0.5

    def step(self) -> Tensor:
        """A whole step: ``[1, heads, head_dim]``, overwritten by the next one."""
        c = self.context
        return decode_step(
            self.work, c.q, c.k, c.v, self.window_k, self.window_v, self.store, self.records, c.total, c.low, INIT, LOCAL,
            self.scaling, self.beta, self.ratio,
        )  # fmt: skip

    def stages(self) -> dict[str, Callable[[], Any]]:
        """The parts of a step, each on what the ones before it left in the buffers; the merge leaves them as they are."""
        c, work, bits, scaling = self.context, self.work, self.bits, self.scaling
        after = work.window_parts + work.parts
        scratch = torch.empty_like(work.best)  # the merge would reset what the other stages read

        def at_window() -> None:
            window.window_attention(c.q, c.k, c.v, self.window_k, self.window_v, self.store, c.total, c.low, work.best,
                                    work.acc, work.ml, 0, INIT, scaling)  # fmt: skip
            quantise.extend_lowbit(self.window_k, self.window_v, self.records, c.total, c.low, INIT, LOCAL, *bits)

        def scan() -> None:
            beta = self.beta if self.ratio == 1 else math.inf
            lowbit.lowbit_pass(self.records, c.q, c.low, work.best, work.tile_max, work.scores, work.acc, work.ml,
                               work.window_parts, work.parts, scaling, beta, *bits)  # fmt: skip

        def select() -> None:
            cut.cut(work.tile_max, work.scores, work.best, work.ml, c.low, work.ids, work.counts, work.thresholds,
                    work.limits, work.chosen, work.window_parts, work.parts, scaling, self.beta, self.ratio)  # fmt: skip

        def attend() -> None:
            gather.gather_attention(self.store, c.q, work.ids, work.counts, work.thresholds, work.limits, work.scores,
                                    self.records, work.acc, work.ml, work.fetched, after, scaling, *bits, True, True)  # fmt: skip

        def together() -> None:
            merge.merge_partials(work.acc, work.ml, work.out, work.lse, scratch)

        return {"window": at_window, "pass": scan, "cut": select, "gather": attend, "merge": together}

    @property
    def fetched(self) -> float:
        """Tokens that the last step read from the store, per KV head."""
        return float(self.work.fetched.sum(-1).float().mean())


def sample_context(shape: ModelShape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values ``[1, kv_heads, tokens, head_dim]``, queries ``[1, heads, head_dim]`` of :func:`sample_layer`, on a GPU."""
    kv, q = sample_layer(shape, tokens, device="cuda")
    keys, values = (kv[None, :, :, side].contiguous() for side in (0, 1))
    return keys, values, q.reshape(1, -1, shape.head_dim).to(shape.dtype)
