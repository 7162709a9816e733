"""What the layers of a cache have in common on a device: buffers of a step, and how many tokens there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from alaya_hf.engine.device.stored import FetchBuffers
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.store_format import StoreFormat

if TYPE_CHECKING:
    from alaya_hf.engine.device.store import LayerPools
    from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace
    from alaya_hf.kernels.gpu.step import Workspace


class Counters:
    """Tokens held and tokens in the low-bit copy, per row, on the device, mirrored on the host.

    A step's kernels read the device's numbers; nobody ever reads them back. Every layer says where it stands before its
    step: the first layer of a pass finds the numbers behind by what the last pass took in and lets the device count on, the
    others find them right.

    Parameters
    ----------
    batch : int
    device : torch.device

    Attributes
    ----------
    total, low : Tensor ``[batch]`` int32
        See :func:`~alaya_hf.kernels.gpu.window.window_attention`.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        self.total = torch.zeros(batch, dtype=torch.int32, device=device)
        self.low = torch.zeros(batch, dtype=torch.int32, device=device)
        self._totals: list[int] | None = [0] * batch
        self._lows = [0] * batch

    def bring_to(self, totals: list[int], lows: list[int], init: int, local: int, capacity: int) -> None:
        """Make the device's numbers `totals` and `lows`; the other arguments as for `advance`."""
        if (self._totals, self._lows) == (totals, lows):
            return
        from alaya_hf.kernels.gpu.window import advance

        known = self._totals if self._totals is not None else [-2] * len(totals)
        tokens = totals[0] - known[0]
        stepped = [count + tokens for count in known]
        moved = [after_pass(count, low, init, local, tokens) for count, low in zip(known, self._lows, strict=True)]
        if tokens > 0 and self._totals is not None and (stepped, moved) == (totals, lows):
            advance(self.total, self.low, init, local, capacity, tokens)
        else:
            for tensor, numbers in ((self.total, totals), (self.low, lows)):
                if len(set(numbers)) == 1:
                    tensor.fill_(numbers[0])
                else:
                    tensor.copy_(torch.tensor(numbers, dtype=torch.int32))
        self._totals, self._lows = list(totals), list(lows)

    def count_on_device(self, init: int, local: int, capacity: int, tokens: int = 1) -> None:
        """Let the device count a pass; the host follows with :meth:`counted`. Capturable in a CUDA graph."""
        from alaya_hf.kernels.gpu.window import advance

        advance(self.total, self.low, init, local, capacity, tokens)

    def forget(self) -> None:
        """The device is about to count: until :meth:`counted`, an interruption would leave the host behind it."""
        self._totals = None

    def counted(self, totals: list[int], lows: list[int]) -> None:
        """Note what :meth:`count_on_device` made of the device's numbers."""
        self._totals, self._lows = list(totals), list(lows)


def after_pass(count: int, low: int, init: int, local: int, tokens: int) -> int:
    """Tokens in the low-bit copy after a pass over `count` tokens: the rule of `extend_lowbit`, `append_tokens`, `advance`."""
    return low + TILE * min(max(0, count + tokens - init - low - local) // TILE, -(-tokens // TILE))


class DeviceShared:
    """Workspaces and counters of one cache. A copy of the cache starts with none: they hold nothing between steps."""

    def __init__(self) -> None:
        self._workspaces: dict[Any, Workspace | CoarseWorkspace] = {}
        self._counters: dict[Any, Counters] = {}
        self.fetch_buffers = FetchBuffers()
        self._pools: LayerPools | None = None

    @property
    def pools(self) -> LayerPools:
        """Of the layers whose store an allocator manages."""
        from alaya_hf.engine.device.store import LayerPools

        if self._pools is None:
            self._pools = LayerPools()
        return self._pools

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceShared:
        memo[id(self)] = copy = DeviceShared()
        return copy

    def workspace(
        self, batch: int, kv_heads: int, group: int, layout: Layout | BlockLayout, tokens: int, slots: int, cap: int,
        device: torch.device, dtype: torch.dtype, hot: StoreFormat | None = None, new: int = 1,
    ) -> Workspace | CoarseWorkspace:  # fmt: skip
        """The buffers for steps of these sizes, see :class:`~alaya_hf.kernels.gpu.step.Workspace`.

        Those for passes of several tokens are kept for the last number of tokens only. With blocks,
        :class:`~alaya_hf.kernels.gpu.coarse_step.CoarseWorkspace`, for one token and without a hot set.
        """
        from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace
        from alaya_hf.kernels.gpu.short_pass import positions_at_a_time
        from alaya_hf.kernels.gpu.step import Workspace

        key = (kv_heads, group, layout, slots, cap, device, dtype, hot, new > 1)
        work = self._workspaces.get(key)
        if work is None or (work.batch, work.tokens, work.new) != (batch, tokens, new):
            # The old one goes first: layers grow together, so nobody needs it any more.
            self._workspaces.pop(key, None)
            work = None
            sizes = (slots, cap, device, dtype)
            if isinstance(layout, BlockLayout):
                work = CoarseWorkspace(batch, kv_heads, group, layout, tokens, *sizes)
            else:
                share = positions_at_a_time(batch, kv_heads * group, tokens, new)
                work = Workspace(batch, kv_heads, group, layout, tokens, *sizes, hot, new, share)
            self._workspaces[key] = work
        return work

    def counters(self, batch: int, device: torch.device, rule: tuple[int, ...]) -> Counters:
        """The counters of the layers that share a window's `rule` (its sizes), so that all of them count alike."""
        counters = self._counters.get((device, rule))
        if counters is None or len(counters.total) != batch:
            counters = self._counters[device, rule] = Counters(batch, device)
        return counters

    @property
    def workspaces(self) -> list[Workspace | CoarseWorkspace]:
        """All buffers there are."""
        return list(self._workspaces.values())

    @property
    def nbytes(self) -> int:
        """Bytes on the devices."""
        return sum(work.nbytes for work in self._workspaces.values())


def constant(value: int, device: torch.device) -> Tensor:
    """``[1]`` int32, made on the device."""
    return torch.full((1,), value, dtype=torch.int32, device=device)
