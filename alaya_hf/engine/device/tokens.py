"""The tokens of one layer under the device engine: window, low-bit copy and exact store."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alaya_hf.config import WindowConfig
from alaya_hf.engine.device.loader import Loader, Needed
from alaya_hf.engine.device.plan import DevicePlan
from alaya_hf.engine.device.shared import Counters, DeviceShared, after_pass, constant
from alaya_hf.engine.device.store import LayerStore, TensorStore
from alaya_hf.engine.device.store.base import copy_lines, zip_pieces
from alaya_hf.engine.device.stored import StoredRun
from alaya_hf.engine.device.stream import side_stream, stream_blocks, wait_for_copy
from alaya_hf.engine.prefill import PrefillPass
from alaya_hf.errors import NonFiniteError
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace, coarse_step
from alaya_hf.kernels.gpu.hot_set import HotSet
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.prefix import Prefix
from alaya_hf.kernels.gpu.quantise import quantise_tokens
from alaya_hf.kernels.gpu.short_pass import short_pass
from alaya_hf.kernels.gpu.step import Workspace, decode_step
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.summarise import summarise_blocks
from alaya_hf.kernels.partial import Partial, merge_into
from alaya_hf.storage.db.reader import StoredLayer
from alaya_hf.storage.db.records import RecordFormat, find_records, missing
from alaya_hf.storage.db.registered import RegisteredFile

_STORE_STEP = 1024  # tokens; the store grows by half, rounded up to this
_STORE_SLACK = 4096  # tokens that it has room for beyond those of a prefill
_PACK_BLOCK = 16384  # tokens quantised at a time
_TILE_STEP = 8  # records; the low-bit copy grows by 1/128 and this


def store_capacity(places: int, held: int = 0, expected: int = 0) -> int:
    """Places that a store of `held` grows to when it has to hold `places`, and `expected` as far as one knows."""
    places = max(places, expected)
    capacity = max(places + (_STORE_SLACK if places > _STORE_SLACK else 0), held + held // 2)
    return -(-capacity // _STORE_STEP) * _STORE_STEP


def _on_its_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels start on the current device, and pinned memory is made for it: let that be the layer's."""

    @functools.wraps(method)
    def run(self: DeviceTokens, *args: Any, **kwargs: Any) -> Any:
        if self.device.type != "cuda":
            return method(self, *args, **kwargs)
        with torch.cuda.device(self.device):
            return method(self, *args, **kwargs)

    return run


@dataclass
class OffloadedBlocks:
    """Blocks of a layer's store on their way to the device: the row of each, the blocks, and their bytes together."""

    rows: list[int]
    arriving: Iterator[Tensor]
    nbytes: int


@dataclass
class Arrival:
    """New tokens of a layer, padding left out: keys and values ``[kv_heads, n, head_dim]`` of each row.

    `finite` waits until the device has looked at them, not for what it was given to do since.
    """

    rows: list[tuple[Tensor, Tensor]]
    finite: Callable[[], bool]


class DeviceTokens:
    """Every token of a layer in host memory, exactly or in 8 bits, and what a decode step reads on the device.

    The first `init` tokens of a row lie in the window's first slots. The others have places 0, 1, ... in the store. A row's
    first `low` places, whole tiles of 64, are in the low-bit copy; those behind them, ``local`` to ``local + 63``, lie in the
    window's ring too. How many are in the low-bit copy depends on the number of tokens alone, not on how they came in. A
    context of up to `min_context` columns lies in the ring as a whole. After :meth:`attach` a run of places stays in a
    mapped file, and the store has the other places side by side.

    With blocks as the index, what stands for each takes the low-bit copy's place, and `low` counts the tokens in blocks. The
    last block may be short by whole tiles. Until it is full its tokens stay in the ring, where a step that takes a tile into it
    finds them, although the window does not attend to them any more.

    Parameters
    ----------
    batch, kv_heads : int
    layout : Layout or BlockLayout
        Of the low-bit copy, or of what stands for blocks.
    window : WindowConfig
        `overflow` is not used: the window gives 64 tokens at a time.
    min_context : int
    dtype : torch.dtype
        Of the model.
    device : torch.device
    form : StoreFormat, optional
        Of the store; default: the model's dtype.
    hot_budget : int
        Most bytes of the hot set on the device; 0: none.
    exact : LayerStore, optional
        Where the exact tokens go; default: a tensor of the layer's own.

    Attributes
    ----------
    window_k, window_v : Tensor ``[batch, kv_heads, init + ring, head_dim]``
        See :func:`~alaya_hf.kernels.gpu.window.window_attention`.
    records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
        With blocks ``[batch, kv_heads, blocks, vectors, head_dim]`` float16.
    slack : int
        Slots of the ring beyond those for `local` tokens.
    exact : LayerStore
        The exact tokens in host memory.
    hot : HotSet or None
        Made at the first step that can use one.
    counts, lows : list of int
        Tokens of each row, and its places in the low-bit copy.
    stored : StoredRun or None
        Places that lie in a file, shared by all rows.
    lasts : list of int
        Where each row's places in the file end: ``stored.last``, or earlier once it was cropped.
    bounds : Tensor or None
        ``[batch, 3]`` int64 on the device: the same for kernels, see :class:`~alaya_hf.kernels.gpu.prefix.Prefix`.
    """

    def __init__(
        self, batch: int, kv_heads: int, layout: Layout | BlockLayout, window: WindowConfig, min_context: int,
        dtype: torch.dtype, device: torch.device, form: StoreFormat | None = None, hot_budget: int = 0,
        exact: LayerStore | None = None,
    ) -> None:  # fmt: skip
        self.form = StoreFormat(layout.head_dim, dtype) if form is None else form
        self.hot: HotSet | None = None
        self.hot_budget = hot_budget
        self.kv_heads, self.layout, self.dtype, self.device = kv_heads, layout, dtype, device
        self.init, self.local, self.min_context = window.init, window.local, min_context
        self.counts, self.lows = [0] * batch, [0] * batch
        self.slack = max(TILE, layout.tokens)
        self.stored: StoredRun | None = None
        self.lasts: list[int] = []
        self.bounds: Tensor | None = None
        self.window_k, self.window_v = self._make_window(self._ring_for(0))
        self.records = layout.allocate(batch, kv_heads, TILE, device)
        # When the copies to the store will be done that the current stream does not know of.
        self._written: torch.cuda.Event | None = None
        self.exact = TensorStore(batch, kv_heads, self.form, device) if exact is None else exact

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTokens:
        self.settle()
        copy = object.__new__(DeviceTokens)
        copy.__dict__.update(self.__dict__)
        copy.counts, copy.lows, copy.hot, copy._written = list(self.counts), list(self.lows), None, None
        with torch.inference_mode(False):  # what is made in inference mode could not be written to later
            copy.lasts, copy.bounds = list(self.lasts), None if self.bounds is None else self.bounds.clone()
            copy.window_k, copy.window_v = self.window_k.clone(), self.window_v.clone()
            copy.records = self.records.clone()
            copy.exact = self._taken(list(range(len(self.counts))))
        return copy

    # Sizes ------------------------------------------------------------------------------------------------------------

    @property
    def ring(self) -> int:
        """Slots for recent tokens."""
        return self.window_k.shape[2] - self.init

    def _ring_for(self, columns: int) -> int:
        ring = self.local + self.slack
        if columns <= self.min_context:
            while ring < columns + 2 - self.init + self.slack - TILE:
                ring *= 2
        return ring

    def _held_from(self, low: int) -> int:
        """First place that the ring holds: the first one that is not in a full record."""
        return low - low % self.layout.tokens

    def _low_for(self, count: int, columns: int) -> int:
        if columns <= self.min_context:
            return 0
        return TILE * max(0, (count - self.init - self.local) // TILE)

    def _places(self, count: int) -> int:
        return max(0, count - self.init)

    def _own(self, row: int, places: int) -> int:
        """How many of a row's first `places` places lie in the store; a place outside the file is this line of it."""
        if self.stored is None:
            return places
        first, last = self.stored.first, self.lasts[row]
        return places - (last - first) if places >= last else min(places, first)

    def _lines(self, counts: list[int]) -> int:
        """Room in the store that so many tokens of the rows need."""
        return max(self._own(row, self._places(count)) for row, count in enumerate(counts))

    @property
    def rule(self) -> tuple[int, ...]:
        """What the numbers of a step depend on: layers with the same rule share counters."""
        return self.init, self.local, self.min_context, self.layout.tokens

    @property
    def keeps(self) -> int:
        """Recent tokens that the window keeps at least."""
        return self.ring - self.slack

    @property
    def room(self) -> int:
        """Tokens that the low-bit copy, or the index of blocks, has room for."""
        return self.records.shape[2] * self.layout.tokens

    @property
    def capacity(self) -> int:
        """Places that the store has room for."""
        return self.exact.lines

    @property
    def store(self) -> Tensor:
        """The store where it is one tensor ``[batch, kv_heads, capacity, *form.tail]``, pinned if the device is a GPU."""
        assert isinstance(self.exact, TensorStore)
        return self.exact.tensor

    @property
    def on_device(self) -> Any:
        """The store as kernels take it: a tensor, or a :class:`~alaya_hf.kernels.gpu.store_table.StoreTable`."""
        return self.exact.view

    @property
    def buffers(self) -> tuple[Any, ...]:
        """What a step reads and writes; a captured step is one over these very objects."""
        view = None if self.stored is None else self.stored.view
        return self.window_k, self.window_v, self.on_device, self.records, self.hot, view, self.bounds

    def after(self, tokens: int = 1) -> tuple[list[int], list[int]]:
        """`counts` and `lows` after so many more tokens."""
        lows = [
            after_pass(count, low, self.init, self.keeps, tokens)
            for count, low in zip(self.counts, self.lows, strict=True)
        ]
        return [count + tokens for count in self.counts], lows

    def retrieves(self, columns: int) -> bool:
        """Whether a pass of several tokens over so many columns has offloaded tokens to retrieve from; never from blocks."""
        if isinstance(self.layout, BlockLayout):
            return False
        return any(self._low_for(count, columns) for count in self.counts)

    def settled(self, columns: int, tokens: int = 1) -> bool:
        """Whether a pass over so many columns changes no buffer and follows the rule of :meth:`after`."""
        if tokens > 1 and not self.retrieves(columns):
            return False
        if self.ring != self._ring_for(columns) or self.lows != [self._low_for(c, columns) for c in self.counts]:
            return False
        if self.stored is not None and self.stored.view is None:
            return False
        counts, lows = self.after(tokens)
        return self._lines(counts) <= self.capacity and max(lows) <= self.room

    @property
    def window_bytes(self) -> int:
        """Bytes of the window on the device, free slots included."""
        return 2 * self.window_k.numel() * self.window_k.element_size()

    @property
    def lowbit_bytes(self) -> int:
        """Bytes of the low-bit copy on the device, room to grow included."""
        return 0 if isinstance(self.layout, BlockLayout) else self.records.numel() * self.records.element_size()

    @property
    def index_bytes(self) -> int:
        """Bytes of what stands for blocks on the device, room to grow included."""
        return self.records.numel() * self.records.element_size() if isinstance(self.layout, BlockLayout) else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in the store."""
        return self.kv_heads * self.form.row_bytes

    @property
    def hot_bytes(self) -> int:
        """Bytes of the hot set on the device."""
        return 0 if self.hot is None else self.hot.nbytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of the exact tokens in host memory, mapped or pinned, room to grow not included."""
        return sum(self._places(count) for count in self.counts) * self.token_bytes

    # Memory -----------------------------------------------------------------------------------------------------------

    def _make_window(self, ring: int) -> tuple[Tensor, Tensor]:
        shape = (len(self.counts), self.kv_heads, self.init + ring, self.layout.head_dim)
        return (
            torch.zeros(shape, dtype=self.dtype, device=self.device),
            torch.zeros(shape, dtype=self.dtype, device=self.device),
        )

    def _used(self) -> list[int]:
        """Lines of the store that hold a token, per row."""
        return [self._own(row, self._places(count)) for row, count in enumerate(self.counts)]

    @_on_its_device
    def _taken(self, rows: list[int]) -> LayerStore:
        """A new store whose row ``i`` holds what row ``rows[i]`` does."""
        return self.exact.take(rows, self._used(), self._wait)

    def settle(self, vectors: bool = True) -> None:
        """Wait for what was attached, and let the current stream wait for the copies to the store.

        Everything that reads store, file or low-bit copy comes after this; without `vectors` what does not read the file.
        """
        if self.stored is not None:
            self.stored.arrive(self.device, vectors)
        if self._written is not None:
            wait_for_copy(torch.cuda.current_stream(self.device), self._written)
            self._written = None

    def _wait(self) -> None:
        """Until the device has written what the host is about to read."""
        if self.device.type == "cuda":
            self.settle()
            torch.cuda.current_stream(self.device).synchronize()

    @_on_its_device
    def reserve(self, places: int, low: int, layers: int = 1, expected: int = 0) -> None:
        """Make room for `places` lines in the store and `low` in the low-bit copy.

        Parameters
        ----------
        layers : int
            Layers that are about to need as much: refuse now if the host cannot hold them all.
        expected : int
            Places that will be needed as far as one knows: what has to grow grows as far as that.

        Raises
        ------
        HostMemoryError, PoolFullError
            Before anything has changed.
        """
        batch = len(self.counts)
        if places > self.capacity:
            room = store_capacity(places, self.capacity, expected)
            self.exact.grow(places, room, self._used(), layers, self._wait)
        size = self.layout.tokens
        records = -(-low // size)
        if records > self.records.shape[2]:
            records = max(records, (expected - self.local) // size)
            grown = self.layout.allocate(
                batch, self.kv_heads, size * (records + records // 128 + _TILE_STEP), self.device
            )
            grown[:, :, : self.records.shape[2]] = self.records
            self.records = grown

    def extend(self, tokens: int) -> None:
        """Make room for the next tokens where that changes no buffer: in a pool. Does nothing else.

        Raises
        ------
        HostMemoryError, PoolFullError
            Before anything has changed.
        """
        if self.exact.table:
            self.reserve(self._lines(self.after(tokens)[0]), 0)

    def make_room(self, columns: int) -> int:
        """Make the device's buffers for rows of `columns` tokens, empty, and nothing on the host: for plans, on the meta device.

        Returns
        -------
        int
            Bytes of host memory that the store of such rows takes.
        """
        if self._ring_for(columns) != self.ring:
            self._resize_ring(self._ring_for(columns))
        self.reserve(0, self._low_for(columns, columns))
        places = self._places(columns)
        return len(self.counts) * (store_capacity(places) if places else 0) * self.token_bytes

    # Host memory to and fro: one copy per KV head, each contiguous on both sides, ordered by the stream -----------------

    def _write_store(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        # In blocks: quantising takes twice the model's bytes of working memory.
        for begin in range(0, keys.shape[1], _PACK_BLOCK):
            here = slice(begin, begin + _PACK_BLOCK)
            rows = self.exact.pack(keys[:, here], values[:, here])
            place = self._own(row, start + begin)
            if self.device.type != "cuda":
                self.exact.write(row, place, rows)
                continue
            # Beside what the device goes on with: the next layers'.
            main, side = torch.cuda.current_stream(self.device), side_stream(self.device, "write")
            side.wait_stream(main)
            rows.record_stream(side)
            with torch.cuda.stream(side):
                self.exact.write(row, place, rows)
                self._written = torch.cuda.Event()
                self._written.record(side)

    def _pieces(self, row: int, start: int, stop: int) -> list[Tensor]:
        """Places of a row where they lie in host memory, in order: ``[kv_heads, parts, n, *form.tail]`` each, views."""
        if self.stored is None:
            return self.exact.pieces(row, start, stop) if start < stop else []
        first, last = self.stored.first, self.lasts[row]
        pieces = []
        for begin, end in ((0, first), (first, last), (last, stop)):
            begin, end = max(begin, start), min(end, stop)
            if begin >= end:
                continue
            if first <= begin < last:
                pieces.append(self.stored.places(begin, end)[:, None])
            else:
                line = self._own(row, begin)
                pieces += self.exact.pieces(row, line, line + end - begin)
        return pieces

    def read_store(self, row: int, start: int, stop: int) -> Tensor:
        """Places of a row on the device: ``[kv_heads, stop - start, 2, head_dim]`` in the model's dtype."""
        self.settle()
        rows = self.exact.buffer(max(0, stop - start))
        for piece, part in zip_pieces(self._pieces(row, start, stop), rows):
            copy_lines(part, piece)
        return self.form.unpack(rows, self.dtype)

    # The ring ---------------------------------------------------------------------------------------------------------

    def _slots(self, start: int, stop: int) -> Tensor:
        return self.init + torch.arange(start, max(start, stop), device=self.device) % self.ring

    def _recent(self, row: int, start: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the ring from place `start` on, in order: two ``[kv_heads, n, head_dim]``, copies."""
        slots = self._slots(start, self._places(self.counts[row]))
        return self.window_k[row].index_select(1, slots), self.window_v[row].index_select(1, slots)

    def _write_ring(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        slots = self._slots(start, start + keys.shape[1])
        self.window_k[row].index_copy_(1, slots, keys)
        self.window_v[row].index_copy_(1, slots, values)

    def _resize_ring(self, ring: int) -> None:
        """Another ring, empty; the first tokens stay."""
        keys, values = self._make_window(ring)
        keys[:, :, : self.init], values[:, :, : self.init] = (
            self.window_k[:, :, : self.init],
            self.window_v[:, :, : self.init],
        )
        self.window_k, self.window_v = keys, values

    # Taking tokens in -------------------------------------------------------------------------------------------------

    @_on_its_device
    def arrive(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> Arrival:
        """New columns for :meth:`append`; the device begins to look whether they are finite.

        Parameters
        ----------
        keys, values : Tensor
            ``[batch, kv_heads, m, head_dim]``.
        valid : Tensor or None
            ``[batch, m]`` bool on the host, false where padding.
        """
        rows = []
        for row in range(len(self.counts)):
            k, v = keys[row], values[row]
            if valid is not None:
                chosen = valid[row].nonzero().flatten().to(self.device)
                k, v = k.index_select(1, chosen), v.index_select(1, chosen)
            rows.append((k, v))
        seen = [torch.isfinite(x).all() for pair in rows for x in pair if x.numel()]
        if not seen:
            return Arrival(rows, lambda: True)
        answer = torch.stack(seen).all()
        if self.device.type != "cuda":
            return Arrival(rows, lambda: bool(answer))
        told, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        told.copy_(answer, non_blocking=True)
        event.record()

        def finite() -> bool:
            event.synchronize()
            return bool(told)

        return Arrival(rows, finite)

    @_on_its_device
    def append(self, arrival: Arrival, columns: int, layers: int = 1, expected: int = 0) -> int:
        """Take in new columns; the oldest recent tokens go to the low-bit copy in whole tiles.

        Parameters
        ----------
        arrival : Arrival
            From :meth:`arrive`.
        columns : int
            Columns with the new ones.
        layers : int
            See :meth:`reserve`.
        expected : int
            Columns that there will be, as far as one knows; 0: nothing is known.

        Returns
        -------
        int
            Bytes that went to the store.

        Raises
        ------
        NonFiniteError
        HostMemoryError
            Both before anything but room has changed.
        """
        self.settle()
        new = arrival.rows
        counts = [count + k.shape[1] for count, (k, _) in zip(self.counts, new, strict=True)]
        lows = [self._low_for(count, columns) for count in counts]
        # Before the host waits for the device: memory is made meanwhile.
        self.reserve(self._lines(counts), max(lows), layers, self._lines([expected] * len(counts)) if expected else 0)
        if not arrival.finite():
            raise NonFiniteError(
                f"{max(k.shape[1] for k, _ in new)} new tokens have keys or values that are infinite or not a number, which "
                "would spoil every later answer. Expected finite vectors: check the model's precision (float16 overflows; try "
                "bfloat16)."
            )
        recent, moved = [], 0
        for row, (k, v) in enumerate(new):
            count = self.counts[row]
            first = min(max(0, self.init - count), k.shape[1])
            self.window_k[row, :, count : count + first] = k[:, :first]
            self.window_v[row, :, count : count + first] = v[:, :first]
            k, v = k[:, first:], v[:, first:]
            if k.shape[1]:
                self._write_store(row, self._places(count), k, v)
                moved += k.shape[1] * self.token_bytes
            old_k, old_v = self._recent(row, self._held_from(self.lows[row]))
            recent.append((torch.cat([old_k, k], dim=1), torch.cat([old_v, v], dim=1)))
        if self._ring_for(columns) != self.ring:
            self._resize_ring(self._ring_for(columns))
        for row, (k, v) in enumerate(recent):
            start, stop = self._held_from(self.lows[row]), self._held_from(lows[row])
            if lows[row] > self.lows[row]:
                leaving = lows[row] - start
                self._quantise(row, start, k[:, :leaving], v[:, :leaving])
            self._write_ring(row, stop, k[:, stop - start :], v[:, stop - start :])
        self.counts, self.lows = counts, lows
        return moved

    def _quantise(self, row: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Write whole tiles to a row's low-bit copy, or to its blocks, from place `start` on, where a record begins."""
        layout, records = self.layout, self.records[row : row + 1]
        if not isinstance(layout, BlockLayout):
            self._quantise_at(row, start // TILE, keys, values, self.records)
            return
        first, count = constant(start // layout.tokens, self.device), constant(keys.shape[1], self.device)
        how = (layout.tokens, layout.strategy, layout.count, layout.values)
        summarise_blocks(keys[None], values[None], records, first, count, *how)

    def _quantise_at(self, row: int, tile: int, keys: Tensor, values: Tensor, records: Tensor) -> None:
        layout = self.layout
        assert not isinstance(layout, BlockLayout)
        first, count = constant(tile, self.device), constant(keys.shape[1], self.device)
        quantise_tokens(
            keys[None], values[None], records[row : row + 1], first, count, layout.key_bits, layout.value_bits
        )

    # Stored contexts ---------------------------------------------------------------------------------------------------

    @property
    def record_format(self) -> RecordFormat:
        """What the low-bit copy depends on besides the tokens."""
        layout = self.layout
        if isinstance(layout, BlockLayout):
            return RecordFormat(self.init, 0, 0, 0)
        return RecordFormat(self.init, layout.key_bits, layout.value_bits, layout.record // 4)

    def prefix(self, shared: DeviceShared) -> Prefix | None:
        """The places in a file, for kernels: where they lie, or fetched through the host while the device cannot read them."""
        if self.stored is None:
            return None
        assert self.bounds is not None
        if self.stored.view is not None:
            return Prefix(self.stored.view, self.bounds)
        fetch = functools.partial(self.stored.fetch, lasts=self.lasts, buffers=shared.fetch_buffers)
        return Prefix(None, self.bounds, fetch)

    def can_attach(self, layer: StoredLayer) -> bool:
        """Whether :meth:`attach` serves: vectors as the store has them, more of them than window and ring hold."""
        if isinstance(self.layout, BlockLayout):
            return False
        return not self.form.scaled and layer.dtype == self.form.dtype and self._low_for(layer.tokens, layer.tokens) > 0

    def read_window(self, layer: StoredLayer, loader: Loader) -> Future[list[Tensor]]:
        """Start to read what :meth:`attach` puts into the window."""
        total = layer.tokens
        spans = [(0, self.init), (self.init + self._low_for(total, total), total)]
        return loader.read(layer, spans, self.device.type == "cuda")

    @_on_its_device
    def attach(self, layer: StoredLayer, loader: Loader, window: Future[list[Tensor]]) -> None:
        """Take a stored context into empty tokens of one row, to be attended where it lies.

        Parameters
        ----------
        layer : StoredLayer
            In the store's dtype, which has no scales; longer than window and ring hold.
        loader : Loader
            Brings the records, and the file when it is asked to; the first use of this layer waits for it.
        window : Future
            From :meth:`read_window`.

        Notes
        -----
        Reads the window's tokens, and copies to the store what lies in other files than the longest run. Tiles that were not
        stored, or were for another window or other bits, are quantised now, which reads their vectors.
        """
        total, init = layer.tokens, self.init
        low = self._low_for(total, total)
        tiles = range(low // TILE)
        runs = layer.files()
        longest = max(runs, key=lambda run: run.stop - max(run.start, init))
        registered = RegisteredFile.of(longest.file)
        first, last = max(0, longest.start - init), longest.stop - init
        if self._ring_for(total) != self.ring:
            self._resize_ring(self._ring_for(total))
        self.records = self.layout.allocate(
            1, self.kv_heads, TILE * (len(tiles) + len(tiles) // 128 + _TILE_STEP), self.device
        )
        found = []
        for run in runs:
            within = self.record_format.tiles(run.start, run.stop)
            within = range(within.start, min(within.stop, tiles.stop))
            file = registered.file if run is longest else run.file
            piece = find_records(file, self.record_format, within)
            if piece is not None:
                found.append(piece)
        needed = Needed(registered, 0, longest.stop - longest.start)
        arrival = loader.bring(needed, found, self.records[0], self.device)
        self.stored = StoredRun(registered, first, last, init - longest.start, arrival)
        self.lasts = [last]
        # From pinned memory, not to wait for what else crosses the bus.
        bounds = self.stored.bounds(self.lasts)
        self.bounds = (bounds.pin_memory() if self.device.type == "cuda" else bounds).to(self.device, non_blocking=True)
        self.reserve(self._lines([total]) + 1, 0)  # with room for what comes next: growing waits for the device
        self.counts, self.lows = [total], [low]
        for begin, end in ((init, longest.start), (longest.stop, total)):
            if begin < end:
                kv, line = layer.read(begin, end), self._own(0, begin - init)
                self.store[0, :, line : line + end - begin] = kv
        first_kv, recent_kv = (rows.to(self.device, non_blocking=True) for rows in window.result())
        self.window_k[0, :, :init], self.window_v[0, :, :init] = first_kv[:, :, 0], first_kv[:, :, 1]
        self._write_ring(0, low, recent_kv[:, :, 0], recent_kv[:, :, 1])
        for gap in missing(tiles, found):
            self.settle()
            for tile in range(gap.start, gap.stop, _PACK_BLOCK // TILE):
                stop = min(gap.stop, tile + _PACK_BLOCK // TILE)
                kv = self.read_store(0, TILE * tile, TILE * stop)
                self._quantise_at(0, tile, kv[:, :, 0], kv[:, :, 1], self.records)

    @_on_its_device
    def host_rows(self, start: int, stop: int) -> list[Tensor]:
        """Tokens of the only row on the host, in order: ``[kv_heads, n, 2, head_dim]`` each, in the model's dtype.

        Views of store and file where nothing has to be unpacked: valid while nothing changes.
        """
        self.settle()
        self._wait()
        pieces = []
        if start < self.init:
            first = slice(start, min(stop, self.init))
            window = torch.stack([self.window_k[0, :, first], self.window_v[0, :, first]], dim=2)
            pieces.append(window.to("cpu"))
        rows = self._pieces(0, self._places(start), self._places(stop))
        # Part by part: joined, they would be a copy.
        return pieces + [self.form.unpack(part, self.dtype) for piece in rows for part in piece.unbind(1)]

    @_on_its_device
    def host_records(self, tiles: range) -> Tensor:
        """Tiles of the only row on the host, ``[kv_heads, n, words]`` int32: those of the low-bit copy, and of the window."""
        self.settle()
        low = self.lows[0] // TILE
        quantised = self.records[0, :, tiles.start : min(tiles.stop, low)]
        begin = max(tiles.start, low)
        if begin >= tiles.stop:
            return quantised.to("cpu")
        keys, values = self._recent(0, self.lows[0])
        chosen = slice(TILE * (begin - low), TILE * (tiles.stop - low))
        window = self.layout.allocate(1, self.kv_heads, TILE * (tiles.stop - begin), self.device)
        self._quantise_at(0, 0, keys[:, chosen], values[:, chosen], window)
        return torch.cat([quantised, window[0]], dim=1).to("cpu")

    # Attention --------------------------------------------------------------------------------------------------------

    @_on_its_device
    def blocks(self, size: int) -> OffloadedBlocks:
        """What :meth:`attend` reads: the places in the low-bit copy on their way to the device, `size` tokens at a time.

        The first block starts at once, while the device does something else.
        """
        self.settle()
        rows: list[int] = []
        sources: list[list[Tensor]] = []
        for row, low in enumerate(self.lows):
            for start in range(0, low, size):
                pieces = self._pieces(row, start, min(low, start + size))
                # The runs of a pool together, file and store apart.
                sources += [pieces] if self.exact.table else [[piece] for piece in pieces]
                rows += [row] * (len(sources) - len(rows))
        arriving = stream_blocks(sources, self.device)
        return OffloadedBlocks(rows, arriving, sum(self.lows) * self.token_bytes)

    @_on_its_device
    def attend(self, attention: PrefillPass, blocks: OffloadedBlocks) -> tuple[Partial, int]:
        """Attention of new tokens to everything held.

        Parameters
        ----------
        attention : PrefillPass
            Of the new tokens.
        blocks : OffloadedBlocks
            From :meth:`blocks`, since when nothing has changed.

        Returns
        -------
        partial : Partial
        bytes_moved : int
            Bytes of keys and values read from the store.
        """
        rows = []
        for row in range(len(self.lows)):
            first = min(self.counts[row], self.init)
            k, v = self._recent(row, self.lows[row])
            k = torch.cat([self.window_k[row, :, :first], k], dim=1)[None]
            v = torch.cat([self.window_v[row, :, :first], v], dim=1)[None]
            rows.append(attention.block(row, k, v))
        for row, block in zip(blocks.rows, blocks.arriving, strict=True):
            kv = self.form.unpack(block, self.dtype)[None]
            merge_into(rows[row], attention.block(row, kv[:, :, :, 0], kv[:, :, :, 1]))
        return Partial(torch.cat([part.out for part in rows]), torch.cat([part.lse for part in rows])), blocks.nbytes

    @_on_its_device
    def step(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, plan: DevicePlan, shared: DeviceShared, columns: int,
        layers: int = 1,
    ) -> Workspace | CoarseWorkspace:  # fmt: skip
        """Take in one token of every row and attend with it: no synchronisation with the host unless the store grows.

        Parameters
        ----------
        q : Tensor ``[batch, heads, head_dim]``
        k, v : Tensor ``[batch, kv_heads, head_dim]``
        columns : int
            Columns before this one.
        layers : int
            See :meth:`reserve`.

        Returns
        -------
        Workspace or CoarseWorkspace
            Its ``out`` is the result, until the next step overwrites it.

        Raises
        ------
        HostMemoryError
            Before anything has changed.
        """
        self.settle(vectors=False)
        hot = self._hot_set(plan)
        work, counters = self._prepare(q.shape[1], 1, plan, shared, columns, layers, hot)
        new = (q.contiguous(), k.contiguous(), v.contiguous())
        state = (self.window_k, self.window_v, self.on_device, self.records, counters.total, counters.low)
        beta = plan.beta(scaling)
        if isinstance(work, CoarseWorkspace):
            coarse_step(work, *new, *state, self.init, self.keeps, scaling, beta, plan.union)
        else:
            decode_step(
                work,
                *new,
                *state,
                self.init,
                self.keeps,
                scaling,
                beta,
                plan.ratio,
                plan.union,
                hot,
                self.prefix(shared),
            )
        self.counts, self.lows = self.after()
        return work

    @_on_its_device
    def short_pass(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, plan: DevicePlan, shared: DeviceShared, columns: int,
        layers: int = 1, watch: Callable[[Workspace, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Take in several tokens of every row and attend with each: like :meth:`step`, without the hot set.

        Parameters
        ----------
        q : Tensor ``[batch, heads, new, head_dim]``
        k, v : Tensor ``[batch, kv_heads, new, head_dim]``
        columns : int
            Columns before the first of them, for which :meth:`retrieves` holds.
        layers : int
            See :meth:`reserve`.
        watch : callable, optional
            See :func:`~alaya_hf.kernels.gpu.short_pass.short_pass`.

        Returns
        -------
        out : Tensor ``[batch, heads, new, head_dim]``
        lse : Tensor ``[batch, heads, new]`` float32

        Raises
        ------
        HostMemoryError
            Before anything has changed.
        """
        new = q.shape[2]
        work, counters = self._prepare(q.shape[1], new, plan, shared, columns, layers, None)
        assert not isinstance(work, CoarseWorkspace)
        found = short_pass(
            work, q, k.contiguous(), v.contiguous(), self.window_k, self.window_v, self.on_device, self.records,
            counters.total, counters.low, self.init, self.keeps, scaling, plan.beta(scaling), plan.ratio, plan.union, watch,
            self.prefix(shared),
        )  # fmt: skip
        self.counts, self.lows = self.after(new)
        return found

    def _prepare(
        self, heads: int, new: int, plan: DevicePlan, shared: DeviceShared, columns: int, layers: int, hot: HotSet | None
    ) -> tuple[Workspace | CoarseWorkspace, Counters]:  # fmt: skip
        """Room for new tokens, the buffers to work in, and the device's numbers brought to where this layer stands."""
        self.settle(vectors=False)
        batch = len(self.counts)
        if self.ring != self._ring_for(columns) or self.lows != [self._low_for(c, columns) for c in self.counts]:
            # The context has outgrown `min_context`, or the ring.
            nothing = torch.empty(batch, self.kv_heads, 0, self.layout.head_dim, dtype=self.dtype, device=self.device)
            self.append(self.arrive(nothing, nothing, None), columns)
        counts, lows = self.after(new)
        self.reserve(max(1, self._lines(counts)), max(lows), layers)
        work = shared.workspace(
            batch, self.kv_heads, heads // self.kv_heads, self.layout, self.room, self.init + self.ring, plan.cap,
            self.device, self.dtype, None if hot is None else self.form, new,
        )  # fmt: skip
        counters = shared.counters(batch, self.device, self.rule)
        counters.bring_to(self.counts, self.lows, self.init, self.keeps, self.room)
        return work, counters

    def _hot_set(self, plan: DevicePlan) -> HotSet | None:
        """The hot set, made when it is first wanted; None without a budget, or one that holds not even one set per KV head."""
        if self.stored is not None and self.stored.view is None:
            return None
        if self.hot is None and self.hot_budget and plan.cap:
            self.hot = HotSet.within(self.hot_budget, len(self.counts), self.kv_heads, self.form, self.device)
        return self.hot

    # Other operations -------------------------------------------------------------------------------------------------

    def truncate(self, counts: list[int], columns: int) -> None:
        """Keep the first `counts` tokens of the rows, `columns` in all; what becomes recent again is read from the store."""
        self.settle(vectors=False)
        lows = [min(low, self._low_for(count, columns)) for low, count in zip(self.lows, counts, strict=True)]
        places = [self._places(count) for count in counts]
        stops = [min(self._held_from(low), place) for low, place in zip(self.lows, places, strict=True)]
        if any(place - self._held_from(low) + 1 > self.ring for place, low in zip(places, lows, strict=True)):
            self._resize_ring(self._ring_for(columns))
            stops = places
        for row, (low, stop) in enumerate(zip(lows, stops, strict=True)):
            start = self._held_from(low)
            if start < stop:
                kv = self.read_store(row, start, stop)
                self._write_ring(row, start, kv[:, :, 0], kv[:, :, 1])
            if start < low < self.lows[row]:
                # A block that has become short.
                kv = self.read_store(row, start, low)
                self._quantise(row, start, kv[:, :, 0], kv[:, :, 1])
        self.counts, self.lows = list(counts), lows
        if self.exact.table:
            self._wait()
            self.exact.open(self._used())
        if self.stored is not None and self.bounds is not None:
            # What comes after a place of the file goes to the store. In place: graphs stay valid.
            first = self.stored.first
            self.lasts = [max(first, min(last, place)) for last, place in zip(self.lasts, places, strict=True)]
            self.bounds.copy_(self.stored.bounds(self.lasts))
        if self.hot is not None:  # other tokens will take the places that are free now
            self.hot.clear()

    def select(self, rows: list[int]) -> None:
        """Row ``i`` becomes what row ``rows[i]`` was. Copies everything but what lies in a file, in host memory too unless an
        allocator shares it."""
        if rows == list(range(len(self.counts))):
            return
        self.settle()
        store = self._taken(rows)
        index = torch.tensor(rows, device=self.device)
        self.window_k, self.window_v = self.window_k.index_select(0, index), self.window_v.index_select(0, index)
        self.records = self.records.index_select(0, index)
        self.counts, self.lows = [self.counts[row] for row in rows], [self.lows[row] for row in rows]
        if self.bounds is not None:
            self.lasts, self.bounds = [self.lasts[row] for row in rows], self.bounds.index_select(0, index)
        self.exact = store
        if self.hot is not None and self.hot.batch == len(rows):
            self.hot.clear()
        else:
            self.hot = None

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Everything held of a row, in order: two ``[kv_heads, tokens, head_dim]`` on the device, copies."""
        self.settle()
        count = self.counts[row]
        first = slice(0, min(count, self.init))
        kv = self.read_store(row, 0, self._places(count))
        return (
            torch.cat([self.window_k[row, :, first], kv[:, :, 0]], dim=1),
            torch.cat([self.window_v[row, :, first], kv[:, :, 1]], dim=1),
        )
