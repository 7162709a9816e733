"""Every allocator of KV memory against a list of tokens per sequence."""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from alaya_hf.errors import (
    AlayaError,
    ConfigError,
    HostMemoryError,
    PoolFullError,
    UnavailableError,
    UnknownSequenceError,
)
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.partial import merge
from alaya_hf.registry import ALLOCATORS as REGISTRY
from alaya_hf.storage import memory
from alaya_hf.storage.allocators import Contiguous, KVShape, Paged, Segmented, Virtual, block_table, host_pages, virtual
from alaya_hf.storage.transfer import transfer
from tests.allocators import (
    ALLOCATORS,
    BLOCK,
    CAPACITY,
    MOST,
    PAGE,
    SHAPE,
    SHARING,
    UNIT,
    Watched,
    fill,
    physical,
    read,
    rows_of,
)

TOKENS = st.integers(0, 40)


def opened(name, capacity=CAPACITY):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virtual, "HostPages", Watched)
        return ALLOCATORS[name].open(SHAPE, capacity, "cpu")


class Machine(RuleBasedStateMachine):
    """Any order of operations; whatever does not fit has to leave everything as it was."""

    name: str
    sequences = Bundle("sequences")

    def __init__(self):
        super().__init__()
        self.pool, self.other = opened(self.name), opened(self.name)
        self.texts: dict[int, np.ndarray] = {}
        self.next = 1

    def fresh(self, count):
        self.next += count
        return np.arange(self.next - count, self.next)

    def attempt(self, operation):
        """The operation's result; None if it was refused, which has to change nothing."""
        before = self.pool.stats, copy.deepcopy(self.places())
        try:
            return operation()
        except PoolFullError as error:
            assert re.search(r"Free sequences|Shorten it", str(error))
            after = self.pool.stats
            assert before == (after, self.places())
            return None

    def places(self):
        return {sequence: physical(self.pool, sequence) for sequence in self.texts}

    @rule(target=sequences, tokens=TOKENS)
    def allocate(self, tokens):
        free = CAPACITY - self.pool.stats.reserved
        sequence = self.attempt(lambda: self.pool.allocate(tokens))
        if self.name in ("paged", "segment"):
            assert (sequence is None) == (-(-tokens // BLOCK) * BLOCK * SHAPE.token_bytes > free)
        elif self.name == "virtual":
            pages = SHAPE.layers * -(-tokens * SHAPE.row_bytes // PAGE)
            assert (sequence is None) == (pages * PAGE > free // PAGE * PAGE)
        if sequence is None:
            return multiple()
        assert sequence not in self.texts
        self.texts[sequence] = self.fresh(tokens)
        fill(self.pool, sequence, 0, self.texts[sequence])
        return sequence

    @rule(sequence=sequences, tokens=TOKENS)
    def extend(self, sequence, tokens):
        before = self.pool.length(sequence)
        if self.attempt(lambda: self.pool.extend(sequence, tokens) or True):
            new = self.fresh(tokens)
            # New tokens are the sequence's own: no copy is needed to write them.
            copies = self.pool.stats.copies
            fill(self.pool, sequence, before, new)
            assert self.pool.stats.copies == copies
            self.texts[sequence] = np.concatenate([self.texts[sequence], new])

    @rule(target=sequences, sequence=sequences, data=st.data())
    def fork(self, sequence, data):
        tokens = data.draw(st.one_of(st.none(), st.integers(0, len(self.texts[sequence]))))
        reserved = self.pool.stats.reserved
        fork = self.attempt(lambda: self.pool.fork(sequence, tokens))
        if fork is None:
            assert self.name not in SHARING
            return multiple()
        assert fork not in self.texts
        self.texts[fork] = self.texts[sequence][:tokens].copy()
        if self.name in SHARING:
            assert self.pool.stats.reserved == reserved
        return fork

    @rule(sequence=sequences, data=st.data())
    def overwrite(self, sequence, data):
        length = len(self.texts[sequence])
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        new = self.fresh(stop - start)
        if self.attempt(lambda: fill(self.pool, sequence, start, new) or True):
            self.texts[sequence][start:stop] = new

    @rule(sequence=consumes(sequences))
    def free(self, sequence):
        self.pool.free(sequence)
        del self.texts[sequence]
        with pytest.raises(UnknownSequenceError, match="freed"):
            self.pool.length(sequence)

    @rule(sequence=sequences)
    def move(self, sequence):
        moved, report = transfer(self.pool, sequence, self.other)
        for layer in range(SHAPE.layers):
            assert torch.equal(read(self.other, moved, layer), rows_of(self.texts[sequence], layer))
        size = len(self.texts[sequence]) * SHAPE.token_bytes
        assert size <= report.bytes < size + BLOCK * SHAPE.token_bytes and (report.calls == 0) == (size == 0)
        self.other.free(moved)

    @invariant()
    def contents(self):
        assert sorted(self.pool.sequences) == sorted(self.texts)
        for sequence, text in self.texts.items():
            assert self.pool.length(sequence) == len(text)
            for layer in range(SHAPE.layers):
                assert torch.equal(read(self.pool, sequence, layer), rows_of(text, layer))
                even = self.pool.even_runs(sequence, layer)
                apart = [(at + i * step, tokens) for at, tokens, runs, step in even for i in range(runs)]
                assert apart == self.pool.token_runs(sequence, layer)

    @invariant()
    def accounts(self):
        stats = self.pool.stats
        lengths = [len(text) for text in self.texts.values()]
        places = set().union(*self.places().values())
        assert stats.sequences == len(lengths) and stats.used == UNIT * len(places)
        assert stats.wasted == stats.reserved - stats.used >= 0
        assert stats.reserved <= stats.peak_reserved <= stats.capacity <= CAPACITY
        if self.name == "contiguous":
            reserved = len(lengths) * MOST * SHAPE.token_bytes
        elif self.name == "dynamic":
            reserved = SHAPE.layers * sum(-(-n * SHAPE.row_bytes // 512) * 512 for n in lengths)
        elif self.name == "virtual":
            reserved = PAGE * len(set(self.pool.arena.behind.values()))
        else:
            tables = [self.pool.block_table(sequence) for sequence in self.texts]
            reserved = BLOCK * SHAPE.token_bytes * len(np.unique(np.concatenate([*tables, np.zeros(0, np.int64)])))
        assert stats.reserved == reserved
        if self.name not in SHARING:
            assert stats.used == sum(lengths) * SHAPE.token_bytes

    def teardown(self):
        for sequence in list(self.texts):
            self.pool.free(sequence)
        assert self.pool.stats.reserved == self.pool.stats.used == 0
        if self.name != "virtual":
            assert self.pool.stats.fragmentation == 0
        else:
            assert not self.pool.arena.behind


for _name in ALLOCATORS:
    _machine = type(f"Machine_{_name}", (Machine,), {"name": _name})
    _machine.TestCase.settings = settings(max_examples=25, stateful_step_count=25)
    globals()[f"Test_{_name}"] = _machine.TestCase


def test_the_registry_knows_them_all():
    assert set(REGISTRY.names()) == set(ALLOCATORS)
    assert REGISTRY.build({"kind": "paged", "block": 32}) == Paged(block=32)
    assert REGISTRY.spec(Virtual(page=PAGE)) == {"kind": "virtual", "page": PAGE}


@pytest.mark.parametrize("name", ALLOCATORS)
def test_attention_reads_through(name):
    """Partials over the runs, merged, are attention to the whole sequence, after others came, grew, forked and went."""
    pool = opened(name)
    sequences = [pool.allocate(11), pool.allocate(7)]
    for _ in range(3):
        for sequence in sequences:
            pool.extend(sequence, 5)
    data = torch.randn(SHAPE.layers, SHAPE.kv_heads, 26, 2, SHAPE.head_dim)
    for layer in range(SHAPE.layers):
        pool.write(sequences[0], layer, 0, data[layer])
    fork = pool.fork(sequences[0], 22)
    pool.free(sequences[0])
    pool.extend(fork, 9)
    new = torch.randn(SHAPE.layers, SHAPE.kv_heads, 9, 2, SHAPE.head_dim)
    q = torch.randn(1, 4, 1, SHAPE.head_dim)
    for layer in range(SHAPE.layers):
        pool.write(fork, layer, 22, new[layer])
        whole = torch.cat([data[layer, :, :22], new[layer]], 1)
        parts = [exact_attention(q, *rows[None].unbind(3), 0.2) for rows in pool.rows(fork, layer)]
        k, v = whole[None].repeat_interleave(2, 1).unbind(3)
        truth = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.2)
        torch.testing.assert_close(merge(parts).out, truth)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_block_tables_lead_to_every_row(name):
    pool = ALLOCATORS[name].open(SHAPE, CAPACITY, "cpu")
    one, other = pool.allocate(5), pool.allocate(9)
    for sequence, more in ((one, 7), (other, 3), (one, 14), (other, 1)):  # in turns: neighbours are no neighbours
        pool.extend(sequence, more)
    fork = pool.fork(one, 11)
    pool.extend(fork, 6)
    sequences = [one, other, fork]
    for i, sequence in enumerate(sequences):
        fill(pool, sequence, 0, np.arange(pool.length(sequence)) + 100 * i)
    for layer in range(SHAPE.layers):
        table = block_table(pool, sequences, layer)
        for i, sequence in enumerate(sequences):
            for token in range(pool.length(sequence)):
                which, within = divmod(token, table.block) if table.block else (0, token)
                # By address, as kernels do.
                address = (
                    table.pool.data_ptr()
                    + int(table.offsets[i, which]) * SHAPE.dtype.itemsize
                    + within * SHAPE.row_bytes
                )
                row = (ctypes.c_uint8 * SHAPE.row_bytes).from_address(address)
                found = torch.frombuffer(row, dtype=SHAPE.dtype).view(SHAPE.kv_heads, 2, SHAPE.head_dim)
                assert torch.equal(found, rows_of(np.array([token + 100 * i]), layer)[:, 0])


@pytest.mark.parametrize("name", ALLOCATORS)
def test_accounts_alone_count_the_same(name):
    """A pool without memory goes through the same states."""
    stats = []
    for device in ("cpu", None):
        pool = ALLOCATORS[name].open(SHAPE, CAPACITY, device)
        first, second = pool.allocate(20), pool.allocate(3)
        pool.extend(first, 13)
        fork = pool.fork(first, 30)
        pool.free(first)
        for _ in range(5):
            pool.extend(fork, 1)
            pool.extend(second, 1)
        stats.append(pool.stats)
    assert stats[0] == stats[1]
    with pytest.raises(UnavailableError, match="only keeps accounts"):
        pool.rows(fork, 0)


def test_segments_grow_in_place_and_fill_the_smallest_hole():
    pool = Segmented(block=BLOCK).open(SHAPE, 20 * BLOCK * SHAPE.token_bytes)
    sizes = [3, 1, 2, 1, 4, 1]
    made = [pool.allocate(size * BLOCK) for size in sizes]  # blocks 0-2 | 3 | 4-5 | 6 | 7-10 | 11, free from 12 on
    for place in (0, 2, 4):
        pool.free(made[place])
    assert pool.block_table(pool.allocate(2 * BLOCK)).tolist() == [4, 5]
    pool.extend(made[3], 5 * BLOCK)  # the four behind it, then the smallest that is large enough
    assert pool.block_table(made[3]).tolist() == [6, 7, 8, 9, 10, 0]
    pool.extend(made[5], 3 * BLOCK)
    assert pool.block_table(made[5]).tolist() == [11, 12, 13, 14]
    # No run holds seven: the largest, then the next.
    assert pool.block_table(pool.allocate(7 * BLOCK)).tolist() == [15, 16, 17, 18, 19, 1, 2]


def test_a_segment_is_one_run_of_blocks_in_every_layer():
    """However long it is; its last block, where it is not full, and what lies elsewhere are others."""
    pool = Segmented(block=BLOCK).open(SHAPE, 20 * BLOCK * SHAPE.token_bytes)
    first = pool.allocate(9 * BLOCK)
    second = pool.allocate(2 * BLOCK)
    block, row = BLOCK * SHAPE.token_bytes, BLOCK * SHAPE.row_bytes
    for layer in range(SHAPE.layers):
        assert pool.even_runs(first, layer) == [(layer * row, BLOCK, 9, block)]
    pool.extend(first, 3 * BLOCK + 1)
    assert pool.even_runs(first, 1) == [
        (row, BLOCK, 9, block),
        (11 * block + row, BLOCK, 3, block),
        (14 * block + row, 1, 1, 0),
    ]
    pool.free(second)
    assert pool.even_runs(pool.allocate(0), 0) == []


def test_paged_blocks_return_to_the_end_of_the_queue():
    pool = Paged(block=BLOCK).open(SHAPE, 6 * BLOCK * SHAPE.token_bytes)
    first, second = pool.allocate(3 * BLOCK), pool.allocate(BLOCK)
    pool.free(first)
    assert pool.block_table(pool.allocate(4 * BLOCK)).tolist() == [4, 5, 2, 1]
    assert pool.block_table(second).tolist() == [3]


def test_growing_by_copying_holds_old_and_new_of_one_layer():
    pool = ALLOCATORS["dynamic"].open(SHAPE, CAPACITY)
    sequence = pool.allocate(16)
    layer = 16 * SHAPE.row_bytes
    pool.extend(sequence, 16)
    assert (
        pool.stats.peak_reserved == (2 + 1 + 2) * layer
    )  # the second layer's turn: the first's new run, its own old and new one
    assert (pool.stats.copies, pool.stats.bytes_copied) == (SHAPE.layers, SHAPE.layers * layer)


def test_what_is_longer_than_the_reservation_says_so():
    for name in ("contiguous", "virtual"):
        pool = opened(name)
        with pytest.raises(PoolFullError, match="max_tokens"):
            pool.allocate(MOST + 1)
        sequence = pool.allocate(MOST)
        with pytest.raises(PoolFullError, match="max_tokens"):
            pool.extend(sequence, 1)
        assert pool.length(sequence) == MOST


def test_bad_input_is_refused():
    pool = opened("paged")
    sequence = pool.allocate(8)
    kv = torch.zeros(SHAPE.kv_heads, 4, 2, SHAPE.head_dim)
    refused = {
        "Ask for fewer": lambda: pool.fork(sequence, 9),
        "at least 0": lambda: pool.allocate(-1),
        "Extend it first": lambda: pool.write(sequence, 0, 5, kv),
        "side by side": lambda: pool.write(sequence, 0, 0, kv[:, :, 0]),
        "a layer from 0 to 1": lambda: pool.write(sequence, 2, 0, kv),
        "another pool's|another pool": lambda: pool.free(sequence + 1),
        "block must be": lambda: Paged(block=0),
        "max_tokens must be": lambda: Contiguous(max_tokens=-1),
        "layers must be": lambda: KVShape(0, 1, 1),
        "multiple of": lambda: Virtual(page=5000).open(SHAPE, CAPACITY, "cpu"),
        "cannot be pinned": lambda: Virtual().open(SHAPE, CAPACITY, "cpu", pinned=True),
        "pinned memory is host memory": lambda: Paged().open(SHAPE, CAPACITY, "cuda", pinned=True),
    }
    for message, call in refused.items():
        with pytest.raises(AlayaError, match=message):
            call()
    with pytest.raises(ConfigError, match="no parameter 'size'"):
        REGISTRY.build({"kind": "paged", "size": 3})


def test_the_host_is_asked_first(monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: CAPACITY - 1)
    for allocator in ALLOCATORS.values():
        with pytest.raises(HostMemoryError, match="KV pool"):
            allocator.open(SHAPE, CAPACITY, "cpu")


def test_pinned_pools_take_part():
    pool = Segmented(block=BLOCK).open(SHAPE, CAPACITY, "cpu", pinned=True)
    numbers = np.arange(30)
    sequence = pool.allocate(30)
    fill(pool, sequence, 0, numbers)
    assert torch.equal(read(pool, sequence, 1), rows_of(numbers, 1))


class TestVirtual:
    """What only memory mapped on demand does."""

    def test_addresses_stay_while_a_sequence_grows(self):
        pool = opened("virtual")
        sequence = pool.allocate(1)
        before = pool.token_runs(sequence, 1)
        pool.extend(sequence, 50)
        assert pool.token_runs(sequence, 1) == [(before[0].offset, 51)] and pool.stats.copies == 0

    def test_memory_goes_back_to_the_system(self):
        pool = opened("virtual")
        sequence = pool.allocate(MOST)
        fill(pool, sequence, 0, np.arange(MOST))
        used = pool.stats.reserved
        pool.free(sequence)
        assert pool.arena.trim() == used and pool.arena.trim() == 0
        again = pool.allocate(MOST)
        assert not read(pool, again, 1).any()  # holes of the file read as zeros
        assert pool.stats.reserved == used

    @pytest.mark.parametrize("after", range(6))
    def test_a_refusal_of_the_system_changes_nothing(self, after, monkeypatch):
        """Whichever mapping of a growth with copy-on-write is refused."""
        pool = opened("virtual")
        sequence = pool.allocate(12)
        fill(pool, sequence, 0, np.arange(12))
        fork = pool.fork(sequence)
        before, original, calls = pool.stats, host_pages._map, []

        def refuse(address, size, protection, flags, file, offset):
            if file >= 0:
                calls.append(address)
                if len(calls) == after + 1:
                    raise PoolFullError("the system refused. Free sequences.")
            return original(address, size, protection, flags, file, offset)

        with monkeypatch.context() as patch:
            patch.setattr(host_pages, "_map", refuse)
            with pytest.raises(PoolFullError, match="refused"):
                pool.extend(fork, 30)
        assert len(calls) >= after + 1
        for layer in range(SHAPE.layers):
            for held in (sequence, fork):
                assert torch.equal(read(pool, held, layer), rows_of(np.arange(12), layer))
        pool.extend(fork, 30)
        fill(pool, fork, 12, np.arange(12, 42))
        assert torch.equal(read(pool, fork, 1), rows_of(np.arange(42), 1))
        pool.free(fork)
        assert pool.stats.reserved == before.reserved and len(pool.arena.behind) == before.reserved // PAGE

    def test_views_keep_the_memory(self):
        pool = opened("virtual")
        sequence = pool.allocate(20)
        fill(pool, sequence, 0, np.arange(20))
        rows = pool.rows(sequence, 1)[0]
        del pool
        gc.collect()
        assert torch.equal(rows, rows_of(np.arange(20), 1))

    def test_a_gpu_needs_cuda_python(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "cuda", None)
        with pytest.raises(UnavailableError, match="pip install cuda-bindings"):
            Virtual().open(SHAPE, CAPACITY, "cuda")
