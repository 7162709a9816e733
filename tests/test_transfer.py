"""Transfers between pools of every two allocators."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from alaya_hf.errors import AlayaError, PoolFullError
from alaya_hf.storage.allocators import KVShape, Paged, Segmented
from alaya_hf.storage.transfer import transfer
from tests.allocators import ALLOCATORS, BLOCK, CAPACITY, SHAPE, fill, read, rows_of


def worn(name):
    """A pool with holes of many sizes."""
    pool = ALLOCATORS[name].open(SHAPE, CAPACITY, "cpu")
    made = [pool.allocate(1) for _ in range(3)]
    for size in (9, 2, 14, 5):
        for sequence in made:
            if sequence in pool.sequences:
                pool.extend(sequence, size)
        if size == 2:
            pool.free(made[1])
    pool.free(made[0])
    return pool


def counted(source, sequence, target, copy):
    """Maximal runs contiguous on both sides, row by row."""
    pairs = []
    for layer in range(SHAPE.layers):
        sides = []
        for pool, number in ((source, sequence), (target, copy)):
            runs = pool.token_runs(number, layer)
            sides.append([offset + i * SHAPE.row_bytes for offset, tokens in runs for i in range(tokens)])
        pairs += zip(*sides, strict=True)
    pairs.sort()
    step = SHAPE.row_bytes
    return 1 + sum(b != (a[0] + step, a[1] + step) for a, b in zip(pairs, pairs[1:], strict=False))


@pytest.mark.parametrize("tokens", [0, 1, 32, 51])
@pytest.mark.parametrize("to", ALLOCATORS)
@pytest.mark.parametrize("source", ALLOCATORS)
def test_every_way(source, to, tokens):
    pool, other = worn(source), worn(to)
    sequence = pool.allocate(tokens)
    fill(pool, sequence, 0, np.arange(tokens))
    copy, report = transfer(pool, sequence, other)
    again, apart = transfer(pool, sequence, other, join=False)
    for layer in range(SHAPE.layers):
        for number in (copy, again):
            assert torch.equal(read(other, number, layer), rows_of(np.arange(tokens), layer))
    if tokens and tokens % BLOCK == 0:
        assert report.calls == counted(pool, sequence, other, copy) and report.bytes == tokens * SHAPE.token_bytes
        assert report.calls <= apart.calls and report.bytes == apart.bytes


def test_calls_of_fresh_pools():
    """A block-wise layout needs a copy per layer and block; FlowKV's one for all, the half-full last block included."""
    tokens = 10 * BLOCK - 1
    calls = {}
    for allocator in (Paged(block=BLOCK), Segmented(block=BLOCK)):
        pool, other = (allocator.open(SHAPE, CAPACITY) for _ in range(2))
        sequence = pool.allocate(tokens)
        for join in (True, False):
            calls[allocator.kind, join] = transfer(pool, sequence, other, join)[1].calls
    assert calls == {
        ("paged", False): 10 * SHAPE.layers,
        ("paged", True): SHAPE.layers,
        ("segment", False): 10 * SHAPE.layers,
        ("segment", True): 1,
    }


def test_a_full_target_stays_as_it_was():
    pool, other = worn("paged"), ALLOCATORS["segment"].open(SHAPE, 6 * BLOCK * SHAPE.token_bytes, "cpu")
    held = other.allocate(BLOCK)
    before = other.stats
    sequence = pool.allocate(6 * BLOCK)
    with pytest.raises(PoolFullError):
        transfer(pool, sequence, other)
    assert other.stats == before and other.sequences == [held]


def test_pools_have_to_match():
    pool = worn("paged")
    sequence = pool.allocate(3)
    for other, message in (
        (Paged().open(KVShape(3, 2, 24, torch.float32), CAPACITY, "cpu"), "same shape"),
        (Paged().open(SHAPE, CAPACITY), "Open both alike"),
    ):
        with pytest.raises(AlayaError, match=message):
            transfer(pool, sequence, other)
        assert not other.sequences
