"""Pinned memory and blocks on their way to a CUDA device."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from alaya_hf import AlayaConfig
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device.stream import copy_waits, stream_blocks
from alaya_hf.errors import HostMemoryError
from alaya_hf.kernels.gpu import copies
from alaya_hf.kernels.gpu.host_memory import device_view
from alaya_hf.storage import memory
from alaya_hf.storage.pinned import PinnedPool, pinned_pool

pytestmark = pytest.mark.gpu
MIB = 1 << 20


@pytest.fixture
def pool():
    return PinnedPool()


def test_the_device_reads_and_writes_the_pool(pool):
    host = pool.allocate((3, 1 << 20), torch.float16).fill_(1)
    assert host.is_pinned() and host[1:, 5:].is_pinned()
    view = device_view(host, "cuda")
    assert view.data_ptr() == host.data_ptr() and bool((view == 1).all())
    view[1] = 2
    torch.cuda.synchronize()
    assert host[1].eq(2).all() and host[0].eq(1).all()


def test_a_view_of_the_device_keeps_the_block(pool):
    view = device_view(pool.allocate((MIB,), torch.int16).fill_(3), "cuda")
    assert pool.stats.used == 2 * MIB
    pool.allocate((MIB,), torch.int16).fill_(4)
    assert bool((view == 3).all())
    del view
    assert pool.stats.used == 0


def test_memory_goes_to_others_only_when_the_device_is_done(pool):
    """A copy that is still under way when its target dies must not write into the next tensor."""
    source = torch.full((64 * MIB,), 9, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        busy = torch.randn(8192, 8192, device="cuda")
        host = pool.allocate((64 * MIB,), torch.uint8)
        address = host.data_ptr()
        for _ in range(10):
            busy = busy @ busy * 1e-4
        host.copy_(source, non_blocking=True)
        del host
        other = pool.allocate((64 * MIB,), torch.uint8).fill_(1)
        torch.cuda.synchronize()
        assert other.data_ptr() == address and bool((other == 1).all())
        del other


def test_trim_unregisters(pool):
    before = pool.allocate((MIB,), torch.uint8)
    address = before.data_ptr()
    del before
    assert pool.trim() >= MIB and pool.stats.held == 0
    again = pool.allocate((MIB,), torch.uint8)
    assert again.is_pinned() and address
    torch.ones(1, device="cuda").add_(1)  # no error was left behind


def test_too_much_leaves_no_error_behind(pool, monkeypatch):
    monkeypatch.setattr(memory, "available_host_memory", lambda: 1 << 50)
    with pytest.raises(HostMemoryError, match="Shorten the context"):
        pool.allocate((1 << 48,), torch.uint8)
    assert torch.ones(4, device="cuda").sum().item() == 4
    assert pool.allocate((10,), torch.uint8).is_pinned()


@pytest.mark.parametrize("sizes", [[], [3], [64, 64, 64, 64, 64, 64, 7], [5, 300, 1, 200]])
def test_blocks_arrive_whole_and_in_order(pool, sizes):
    """Work on a block is slower than its copy: one that does not wait for the work on the block two before it shows."""
    sources = [pool.allocate((4, n, 2, 512), torch.float32).copy_(torch.randn(4, n, 2, 512)) for n in sizes]
    found, filler = [], torch.randn(2048, 2048, device="cuda")
    for block in stream_blocks([[x[:, None]] for x in sources], torch.device("cuda", 0)):
        filler = filler @ filler * 1e-3
        found.append(block.clone())
    assert len(found) == len(sources)
    for block, source in zip(found, sources, strict=True):
        assert torch.equal(block.cpu(), source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("threads", [False, True])
def test_parts_at_even_distances_cross_in_one_call(pool, dtype, threads, monkeypatch):
    """Both ways, in the stream's order, also from a thread that CUDA does not know; what lies between stays."""
    calls, real = [], copies._copy_rectangle
    monkeypatch.setattr(copies, "_copy_rectangle", lambda *pair: calls.append(pair[0].shape) or real(*pair))
    host = pool.allocate((300, 5, 16, 64), dtype).fill_(1)
    data = torch.randint(-100, 100, (300, 16, 64), device="cuda").to(dtype)
    back, filler = torch.zeros_like(data), torch.randn(4096, 4096, device="cuda")
    wanted = data.clone()

    def run():
        nonlocal filler
        for _ in range(10):
            filler = filler @ filler * 1e-3
        data.add_(1)  # late: a copy that does not wait for it takes the old numbers
        copies.copy_parts(host[:, 3], data)
        copies.copy_parts(back, host[:, 3])

    torch.cuda.synchronize()
    if threads:
        worker = threading.Thread(target=run)
        worker.start()
        worker.join()
    else:
        run()
    torch.cuda.synchronize()
    assert len(calls) == 2 and torch.equal(back, wanted + 1) and torch.equal(host[:, 3], back.cpu())
    assert bool((host[:, [0, 1, 2, 4]] == 1).all())


def test_a_captured_copy_of_parts_is_replayed(pool):
    host, data = pool.allocate((40, 3, 512), torch.float16).fill_(0), torch.ones(40, 512, device="cuda").half()
    copies.copy_parts(host[:, 1], data)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        copies.copy_parts(host[:, 1], data)
    data.fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((host[:, 1] == 2).all()) and not bool(host[:, ::2].any())


def test_blocks_wait_for_what_the_device_still_writes(pool):
    host = pool.allocate((2, 4096, 2, 128), torch.float32).fill_(0)
    filler = torch.randn(4096, 4096, device="cuda")
    for _ in range(10):
        filler = filler @ filler * 1e-3
    host.copy_(torch.ones(host.shape, device="cuda"), non_blocking=True)
    (block,) = stream_blocks([[host[:, None]]], torch.device("cuda", 0))
    assert bool((block == 1).all())


def test_giving_up_half_way_spoils_nothing(pool):
    sources = [pool.allocate((1, 65536, 2, 128), torch.float32).fill_(5) for _ in range(3)]
    blocks = stream_blocks([[x[:, None]] for x in sources], torch.device("cuda", 0))
    next(blocks)
    del blocks
    mine = [torch.zeros(1, 65536, 2, 128, device="cuda") for _ in range(6)]
    torch.cuda.synchronize()
    assert not any(bool(x.any()) for x in mine)


def test_a_chunked_prefill_never_holds_a_layer_at_full_precision():
    """Four layers, chunk by chunk: beyond what stays, less on the device than one layer's keys and values; the right answer."""
    pytest.importorskip("triton")
    torch.manual_seed(0)
    tokens, chunk, kv_heads, dim, layers = 65536, 2048, 8, 128, 4
    # Two blocks of the default size are as much as this context.
    config = AlayaConfig(engine="device", min_context=0, prefill_block=8192)
    made = [DeviceLayer(config, i) for i in range(layers)]
    keys, values = torch.randn(2, kv_heads, tokens, dim).bfloat16()  # on the host, for the reference
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for start in range(0, tokens, chunk):
        k, v = (x[None, :, start : start + chunk].cuda() for x in (keys, values))
        q = (3 * torch.randn(1, kv_heads, chunk, dim, device="cuda")).bfloat16()
        for layer in made:
            layer.update(k, v)
            out = layer.attend(q, dim**-0.5)
    stays = sum(layer.window_bytes + layer.lowbit_bytes for layer in made)
    assert torch.cuda.max_memory_allocated() - before - stays < 2 * keys.numel() * 2
    assert pinned_pool().stats.used >= layers * 2 * (tokens - 128) * kv_heads * dim * 2
    query = q[0, :, -1].float().cpu()
    scores = torch.einsum("hd,hnd->hn", query, keys.float()) * dim**-0.5
    truth = torch.einsum("hn,hnd->hd", scores.softmax(-1), values.float())
    torch.testing.assert_close(out[0, -1].float().cpu(), truth, atol=2e-2, rtol=2e-2)


def test_waits_for_copies_are_measured(pool):
    """Nobody but the copies works here, so nearly all of the time is waiting; nothing is recorded unasked."""
    host = pool.allocate((2, 2, 64 * MIB), torch.uint8).fill_(3)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with copy_waits() as waits:
        begin.record()
        for block in stream_blocks([[x[:, None]] for x in host], torch.device("cuda")):
            assert block.shape == (2, 64 * MIB)
        end.record()
    assert len(waits.pairs) == 2 and 0 < waits.seconds() <= begin.elapsed_time(end) / 1e3
    for _ in stream_blocks([[x[:, None]] for x in host], torch.device("cuda")):
        pass
    assert len(waits.pairs) == 2
