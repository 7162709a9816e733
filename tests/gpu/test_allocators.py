"""KV pools in device memory, transfers over the bus, and memory mapped on demand through CUDA's driver."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from alaya_hf.errors import ConfigError, PoolFullError
from alaya_hf.storage.allocators import Contiguous, Dynamic, KVShape, Paged, Segmented, Virtual
from alaya_hf.storage.blocks import LARGE
from alaya_hf.storage.transfer import transfer

pytestmark = pytest.mark.gpu
SHAPE = KVShape(layers=3, kv_heads=8, head_dim=128, dtype=torch.bfloat16)  # a row of 4 KiB
MOST = 4096
CAPACITY = 320 << 20
ALLOCATORS = {
    "contiguous": Contiguous(max_tokens=MOST),
    "dynamic": Dynamic(),
    "paged": Paged(),
    "segment": Segmented(),
    "virtual": Virtual(max_tokens=MOST),
}


def opened(name, capacity=CAPACITY):
    if name == "virtual":
        pytest.importorskip("cuda.bindings.driver")
    return ALLOCATORS[name].open(SHAPE, capacity, "cuda")


def random(tokens):
    return torch.randn(SHAPE.layers, SHAPE.kv_heads, tokens, 2, SHAPE.head_dim).bfloat16().cuda()


def check(pool, sequence, data):
    for layer in range(SHAPE.layers):
        assert torch.equal(
            torch.cat(pool.rows(sequence, layer), 1), data[layer].to(pool.rows(sequence, layer)[0].device)
        )


def write(pool, sequence, start, data):
    for layer in range(SHAPE.layers):
        pool.write(sequence, layer, start, data[layer])


@pytest.mark.parametrize("name", ALLOCATORS)
def test_contents_survive_growth_forks_and_frees(name):
    pool, whole = opened(name), random(1500)
    sequence = pool.allocate(1000)
    write(pool, sequence, 0, whole[:, :, :1000])
    other = pool.allocate(300)
    write(pool, other, 0, random(300))
    pool.extend(sequence, 211)
    write(pool, sequence, 1000, whole[:, :, 1000:1211])
    fork = pool.fork(sequence)
    pool.extend(fork, 100)
    write(pool, fork, 1211, random(100))
    pool.extend(sequence, 289)
    write(pool, sequence, 1211, whole[:, :, 1211:])
    check(pool, sequence, whole)
    pool.free(sequence)
    pool.free(other)
    again = pool.allocate(1500)
    write(pool, again, 0, random(1500))
    for layer in range(SHAPE.layers):
        assert torch.equal(torch.cat(pool.rows(fork, layer), 1)[:, :1211], whole[layer, :, :1211])
    pool.free(fork)
    pool.free(again)
    assert pool.stats.reserved == 0
    torch.ones(1, device="cuda").add_(1)  # no error was left behind


@pytest.mark.parametrize("name", ALLOCATORS)
def test_to_the_host_and_back(name):
    pool = opened(name)
    host = Segmented().open(SHAPE, CAPACITY, "cpu", pinned=True)
    data = random(777)
    sequence = pool.allocate(777)
    write(pool, sequence, 0, data)
    away, _ = transfer(pool, sequence, host)
    check(host, away, data)
    pool.free(sequence)
    back, report = transfer(host, away, pool)
    check(pool, back, data)
    assert report.bytes >= 777 * SHAPE.token_bytes
    if name == "segment":
        assert report.calls == 1


#: The device's free memory is everybody's: other test processes would be counted in.
alone = pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="counts the device's free memory, so it wants no other test beside it"
)


class TestVirtual:
    def test_work_in_flight_ends_before_pages_go(self):
        """A slow kernel still reads what is freed and mapped elsewhere at once."""
        pool, data = opened("virtual"), random(2048)
        sequence = pool.allocate(2048)
        write(pool, sequence, 0, data)
        filler = torch.randn(8192, 8192, device="cuda")
        for _ in range(10):
            filler = filler @ filler * 1e-3
        found = [pool.rows(sequence, layer)[0].clone() for layer in range(SHAPE.layers)]
        pool.free(sequence)
        write(pool, pool.allocate(2048), 0, torch.zeros_like(data))
        assert all(torch.equal(x, y) for x, y in zip(found, data, strict=True))

    @alone
    def test_memory_is_mapped_on_demand_and_given_back(self):
        pool = opened("virtual")
        torch.cuda.synchronize()
        before = torch.cuda.mem_get_info()[0]
        sequence = pool.allocate(1)
        first = before - torch.cuda.mem_get_info()[0]
        pool.extend(sequence, MOST - 1)
        full = before - torch.cuda.mem_get_info()[0]
        assert first == pool.shape.layers * LARGE and full == pool.stats.reserved == MOST * SHAPE.token_bytes
        fork = pool.fork(sequence)
        assert before - torch.cuda.mem_get_info()[0] == full
        pool.free(sequence)
        pool.free(fork)
        assert pool.arena.trim() == full
        assert torch.cuda.mem_get_info()[0] == before

    def test_one_range_of_addresses_for_kernels(self):
        pool, data = opened("virtual"), random(MOST)
        sequence = pool.allocate(MOST)
        write(pool, sequence, 0, data)
        (rows,) = pool.rows(sequence, 1)
        q = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
        k, v = rows[None].unbind(3)
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        k, v = data[1][None].contiguous().unbind(3)
        torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(q, k, v))

    @alone
    def test_a_pool_that_dies_leaves_nothing(self):
        pool = opened("virtual")
        pool.rows(pool.allocate(10), 0)[0].fill_(1)  # what the first pool and the kernel leave in the driver
        del pool
        gc.collect()
        before = torch.cuda.mem_get_info()[0]
        pool = opened("virtual")
        rows = pool.rows(pool.allocate(MOST), 0)[0]
        del pool
        gc.collect()
        rows.fill_(1)  # views keep the memory
        assert torch.cuda.mem_get_info()[0] < before
        del rows
        gc.collect()
        assert torch.cuda.mem_get_info()[0] == before

    def test_too_much_says_so(self):
        pool = opened("virtual", 8 * LARGE)
        sequence = pool.allocate(1000)
        with pytest.raises(PoolFullError, match="Free sequences"):
            pool.extend(sequence, 1000)
        assert pool.length(sequence) == 1000
        with pytest.raises(ConfigError, match="multiple of"):
            Virtual(page=4096).open(SHAPE, CAPACITY, "cuda")
