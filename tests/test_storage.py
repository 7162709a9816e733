"""Window, store and layer against a list of tokens per row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from alaya_hf import AlayaConfig, AlayaLayer, Flat, Full
from alaya_hf.layer import ForwardState
from alaya_hf.storage import HostStore, Segment

KV_HEADS, HEADS, DIM = 2, 4, 4


def vectors(numbers: list[list[int]], side: int) -> Tensor:
    """``[batch, kv_heads, m, head_dim]`` that spell the number of each token; 0 is padding."""
    base = torch.tensor(numbers, dtype=torch.float32).view(len(numbers), 1, -1, 1)
    heads = torch.arange(KV_HEADS, dtype=torch.float32).view(1, -1, 1, 1)
    return (base * 8 + heads * 2 + side).expand(-1, -1, -1, DIM).contiguous()


def held(layer: AlayaLayer, row: int) -> list[int]:
    """The tokens of a row in the order of the context, read back from window and store; checks every vector."""
    window, store = layer.window, layer.store
    assert window is not None and store is not None
    first, last = window.init_lengths[row], slice(window.init, window.init + window.recent)
    recent = torch.stack([window._keys[row, :, last], window._values[row, :, last]], dim=2)
    if window._valid is not None:
        recent = recent[:, window._valid[row]]
    parts = [torch.stack([window._keys[row, :, :first], window._values[row, :, :first]], dim=2)]
    parts += [piece.kv for piece in store.rows[row]] + [recent]
    context = torch.cat(parts, dim=1)
    numbers = ((context[0, :, 0, 0]) / 8).round().to(torch.int64).tolist()
    expected = torch.stack([vectors([numbers], side)[0] for side in (0, 1)], dim=2)
    assert torch.equal(context, expected)
    return numbers


class LayerMachine(RuleBasedStateMachine):
    """Random passes, crops, row operations and copies; every copy has its own list of tokens."""

    @initialize(
        init=st.integers(0, 5),
        local=st.integers(1, 6),
        overflow=st.integers(0, 4),
        min_context=st.sampled_from([0, 0, 12]),
        sparse=st.sampled_from([1, 3, 64]),
        batch=st.integers(1, 3),
    )
    def start(self, init: int, local: int, overflow: int, min_context: int, sparse: int, batch: int) -> None:
        window = {"init": init, "local": local, "overflow": overflow}
        self.config = AlayaConfig(
            index="flat",
            residual="none",
            query=Full(),
            window=window,
            min_context=min_context,
            max_sparse_queries=sparse,
            prefill_block=3,
        )
        # Per cache: the layer, rows of columns (0: padding), and copies of the segments other caches must not change.
        self.caches: list[tuple[AlayaLayer, list[list[int]]]] = [
            (AlayaLayer(self.config, forward=ForwardState()), [[] for _ in range(batch)])
        ]
        self.next = 1

    def _run(self, which: int, new: list[list[int]]) -> None:
        layer, rows = self.caches[which % len(self.caches)]
        valid = torch.tensor(new) != 0
        layer.forward.past = layer.get_seq_length()
        layer.forward.valid = None if bool(valid.all()) else valid
        layer.update(vectors(new, 0), vectors(new, 1))
        out = layer.attend(torch.zeros(len(new), HEADS, len(new[0]), DIM), 1.0)
        for row, columns in zip(rows, new, strict=True):
            row.extend(columns)
        self._check_output(out, rows, new)

    def _check_output(self, out: Tensor, rows: list[list[int]], new: list[list[int]]) -> None:
        # Zero queries weigh all tokens alike: the output is the mean of the values seen.
        for number, row in enumerate(rows):
            for back in range(len(new[0])):
                seen = [token for token in row[: len(row) - back] if token]
                if row[len(row) - 1 - back]:
                    mean = vectors([seen], 1)[0].mean(dim=1).repeat_interleave(HEADS // KV_HEADS, dim=0)
                    torch.testing.assert_close(out[number, -1 - back], mean, rtol=1e-5, atol=1e-4)

    def _fresh(self, count: int) -> list[int]:
        numbers = list(range(self.next, self.next + count))
        self.next += count
        return numbers

    @rule(which=st.integers(0, 5), length=st.integers(1, 14), alike=st.booleans())
    def update(self, which: int, length: int, alike: bool) -> None:
        """Tokens for every row, the same ones for all rows or not."""
        rows = self.caches[which % len(self.caches)][1]
        shared = self._fresh(length)
        self._run(which, [shared if alike else self._fresh(length) for _ in rows])

    @rule(which=st.integers(0, 5), length=st.integers(1, 10), data=st.data())
    def update_padded(self, which: int, length: int, data: st.DataObject) -> None:
        rows = self.caches[which % len(self.caches)][1]
        padding = [data.draw(st.integers(0, length)) for _ in rows]
        if all(count == length for count in padding):
            padding[0] = 0
        self._run(which, [[0] * count + self._fresh(length - count) for count in padding])

    @rule(which=st.integers(0, 5), count=st.integers(0, 30))
    def crop(self, which: int, count: int) -> None:
        layer, rows = self.caches[which % len(self.caches)]
        layer.crop(-count)
        for row in rows:
            del row[max(0, len(row) - count) :]

    @rule(which=st.integers(0, 5), data=st.data())
    def select(self, which: int, data: st.DataObject) -> None:
        which %= len(self.caches)
        layer, rows = self.caches[which]
        indices = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4))
        layer.batch_select_indices(torch.tensor(indices))
        self.caches[which] = (layer, [list(rows[index]) for index in indices] if layer.is_initialized else rows)

    @rule(which=st.integers(0, 5), seed=st.integers(0, 100))
    def reorder(self, which: int, seed: int) -> None:
        which %= len(self.caches)
        layer, rows = self.caches[which]
        order = torch.randint(0, len(rows), (len(rows),), generator=torch.Generator().manual_seed(seed))
        layer.reorder_cache(order)
        self.caches[which] = (layer, [list(rows[index]) for index in order] if layer.is_initialized else rows)

    @precondition(lambda self: all(len(rows) <= 3 for _, rows in self.caches))
    @rule(which=st.integers(0, 5))
    def repeat(self, which: int) -> None:
        which %= len(self.caches)
        layer, rows = self.caches[which]
        layer.batch_repeat_interleave(2)
        if layer.is_initialized:
            self.caches[which] = (layer, [list(row) for row in rows for _ in range(2)])

    @precondition(lambda self: len(self.caches) < 4)
    @rule(which=st.integers(0, 5))
    def deepcopy(self, which: int) -> None:
        layer, rows = self.caches[which % len(self.caches)]
        self.caches.append((copy.deepcopy(layer), [list(row) for row in rows]))

    @invariant()
    def contexts_are_whole(self) -> None:
        for layer, rows in getattr(self, "caches", []):
            assert layer.get_seq_length() == len(rows[0])
            if not layer.is_initialized:
                continue
            for number, row in enumerate(rows):
                assert held(layer, number) == [token for token in row if token]

    @invariant()
    def counts_and_bytes_are_exact(self) -> None:
        for layer, rows in getattr(self, "caches", []):
            if not layer.is_initialized:
                continue
            window, store = layer.window, layer.store
            assert window is not None and store is not None
            counts = [sum(token != 0 for token in row) for row in rows]
            assert layer.token_counts() == counts
            assert [a + b for a, b in zip(window.lengths, store.lengths, strict=True)] == counts
            per_token = KV_HEADS * 2 * DIM * 4
            distinct = {id(segment): segment.used for pieces in store.rows for segment in [p.segment for p in pieces]}
            assert layer.offloaded_bytes == per_token * sum(distinct.values())
            assert all(piece.length <= piece.segment.used for pieces in store.rows for piece in pieces)
            assert layer.window_bytes == per_token * (sum(window.init_lengths) + len(rows) * window.recent)

    @invariant()
    def window_is_bounded(self) -> None:
        for layer, rows in getattr(self, "caches", []):
            if layer.is_initialized and len(rows[0]) > self.config.min_context:
                window = self.config.window
                assert layer.window is not None
                assert layer.window.recent <= max(window.local + window.overflow, self.config.min_context)


LayerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestLayer = LayerMachine.TestCase


def _kv(tokens: int, start: int = 1) -> tuple[Tensor, Tensor]:
    numbers = [list(range(start, start + tokens))]
    return vectors(numbers, 0)[0], vectors(numbers, 1)[0]


class TestHostStore:
    def test_rows_of_one_content_are_stored_once(self) -> None:
        store = HostStore(3, KV_HEADS, DIM, torch.float32)
        keys, values = _kv(10)
        written = store.append([keys] * 3, [values] * 3)
        assert written == store.nbytes == keys.numel() * 2 * 4
        assert len(store.segments) == 1

    def test_divergent_append_leaves_the_shared_segment(self) -> None:
        store = HostStore(1, KV_HEADS, DIM, torch.float32)
        keys, values = _kv(10)
        store.append([keys], [values])
        store.select([0, 0])
        (segment,) = store.segments
        before = segment.kv.clone()
        (k1, v1), (k2, v2) = _kv(3, 100), _kv(5, 200)
        store.append([k1, k2], [v1, v2])
        assert torch.equal(segment.kv, before) and store.lengths == [13, 15]
        assert store.rows[0][0].segment is store.rows[1][0].segment is segment
        assert torch.equal(store.rows[1][1].kv[:, :, 1], v2)

    def test_sole_reader_appends_in_place(self) -> None:
        store = HostStore(1, KV_HEADS, DIM, torch.float32)
        for start in (1, 11, 21):
            keys, values = _kv(10, start)
            store.append([keys], [values])
        assert len(store.segments) == 1 and store.lengths == [30]
        keys, values = _kv(30)
        assert torch.equal(store.rows[0][0].kv, torch.stack([keys, values], dim=2))

    def test_take_last_returns_what_it_removes(self) -> None:
        store = HostStore(2, KV_HEADS, DIM, torch.float32)
        keys, values = _kv(10)
        store.append([keys] * 2, [values] * 2)
        taken = store.take_last(0, 4)
        assert torch.equal(taken, torch.stack([keys, values], dim=2)[:, 6:])
        assert store.lengths == [6, 10]
        # The other row still reads the whole segment.
        assert torch.equal(store.rows[1][0].kv[:, :, 0], keys)

    def test_low_precision_store(self) -> None:
        store = HostStore(1, KV_HEADS, DIM, torch.bfloat16)
        keys, values = torch.randn(2, KV_HEADS, 10, DIM)
        assert store.append([keys], [values]) == store.nbytes == keys.numel() * 2 * 2
        assert torch.equal(store.rows[0][0].kv[:, :, 0], keys.to(torch.bfloat16))


class TestSegment:
    def test_copy_is_the_segment(self) -> None:
        segment = Segment(KV_HEADS, DIM, torch.float32)
        twin = copy.deepcopy({"a": segment})["a"]
        assert twin is segment and segment.shared

    def test_growing_keeps_the_content(self) -> None:
        segment = Segment(KV_HEADS, DIM, torch.float32)
        total = 0
        for tokens in (1, 255, 1, 700, 3):
            segment.append(*_kv(tokens, total + 1))
            total += tokens
        keys, values = _kv(total)
        assert segment.used == total and torch.equal(segment.kv, torch.stack([keys, values], dim=2))

    def test_truncate_forgets_stale_indexes(self) -> None:
        segment = Segment(KV_HEADS, DIM, torch.float32)
        segment.append(*_kv(20))
        searcher = segment.searcher(Flat())
        assert searcher.num_tokens == 20 and segment.searcher(Flat()) is searcher
        segment.truncate(5)
        segment.append(*_kv(4, 50))
        assert segment.searcher(Flat()).num_tokens == 9


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_store_dtype(dtype: str) -> None:
    config: Any = AlayaConfig(
        query=Full(), index="flat", residual="none", window=(0, 1), min_context=0, store_dtype=dtype
    )
    layer = AlayaLayer(config)
    keys = torch.randn(1, KV_HEADS, 20, DIM)
    layer.update(keys, keys)
    layer.attend(torch.randn(1, HEADS, 20, DIM), 1.0)
    assert layer.store is not None and layer.store.dtype == getattr(torch, dtype)
    assert layer.offloaded_bytes == 19 * KV_HEADS * DIM * 2 * layer.store.dtype.itemsize
