"""The device engine's store in pools of allocators: kernels in Triton's interpreter, stores alone on the CPU.

The same checks, and whole generations, run on a GPU in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.errors import ConfigError, PoolFullError
from tests.gpu import allocator_cases as cases
from tests.interpreted import INTERPRETED, run_cases

inside = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_interpreter")
OPERATIONS = ["grow", "grow", "crop", "select", "copy", "join"]


@pytest.fixture
def tight(monkeypatch):
    """Sequences grow often, pools are full early."""
    from alaya_hf.engine.device import tokens
    from alaya_hf.engine.device.store import group

    monkeypatch.setattr(tokens, "_STORE_STEP", 8)
    monkeypatch.setattr(group, "STEP", 8)


@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="is inside, or a GPU runs the kernels themselves")
def test_in_interpreter():
    """Every test of this file that needs the interpreter."""
    pytest.importorskip("triton")
    run_cases(__file__)


@inside
@pytest.mark.parametrize(("store_dtype", "names"), [("auto", ["dynamic", "segment"]), ("int8", ["paged"])])
def test_case_passes_equal_the_default(store_dtype, names, tight):
    cases.check_passes("cpu", store_dtype, names)


@pytest.mark.parametrize("name", cases.ALLOCATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_lines_are_those_of_plain_tensors(name, dtype):
    """Two layers of several caches, which grow, are written, cropped, reordered and copied one layer after the other."""
    pytest.importorskip("triton")
    from alaya_hf.engine.device.store import LayerPools, group
    from alaya_hf.kernels.gpu.store_format import StoreFormat
    from alaya_hf.registry import ALLOCATORS

    allocator, form, cpu = ALLOCATORS.build(cases.ALLOCATORS[name]), StoreFormat(16, dtype), torch.device("cpu")

    @settings(max_examples=100, deadline=None)
    @given(
        fixed=st.sampled_from([None, 32 << 20]),
        plan=st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 40)), max_size=12),
        seed=st.integers(0, 99),
    )
    def run(fixed, plan, seed):
        generator = torch.Generator().manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(group, "STEP", 8)
            pools = LayerPools()
            # Of each cache: the stores of its layers, and what they hold, [kv_heads, n, *tail] per row.
            caches = [
                ([pools.store(idx, 2, allocator, fixed, 2, 3, form, cpu) for idx in range(2)], [[[], []], [[], []]])
            ]
            for what, number in [("grow", 20), *plan]:
                place = number % len(caches)
                stores, held = caches[place]
                counts = [sum(part.shape[1] for part in row) for row in held[0]]
                if what == "grow":
                    for store, rows in zip(stores, held, strict=True):
                        store.grow(max(counts) + number, max(counts) + number, counts, 2, lambda: None)
                        for row, parts in enumerate(rows):
                            # Rows of unequal length.
                            keys, values = torch.randn(
                                2, 3, number - min(row, number - 1), 16, generator=generator
                            ).half()
                            lines = store.pack(keys, values)
                            store.write(row, counts[row], lines)
                            parts.append(lines.clone())
                elif what == "crop":
                    kept = [max(0, count - number) for count in counts]
                    for idx, store in enumerate(stores):
                        held[idx] = [
                            [torch.cat(row, 1)[:, :n]] if row else [] for row, n in zip(held[idx], kept, strict=True)
                        ]
                        store.open(kept)
                elif what == "select":
                    rows = torch.randint(len(counts), (number % 3 + 1,), generator=generator).tolist()
                    taken = [store.take(rows, counts, lambda: None) for store in stores]
                    caches[place] = taken, [[list(layer[row]) for row in rows] for layer in held]
                elif what == "copy" and len(caches) < 3:
                    taken = [store.take(range(len(counts)), counts, lambda: None) for store in stores]
                    caches.append((taken, [[list(row) for row in layer] for layer in held]))
                elif what == "join" and len(caches) < 3:  # the cache is used anew while copies of it live
                    stores = [pools.store(idx, 2, allocator, fixed, 1, 3, form, cpu) for idx in range(2)]
                    caches.append((stores, [[[]], [[]]]))
                for stores, held in caches:
                    for store, rows in zip(stores, held, strict=True):
                        for row, parts in enumerate(rows):
                            wanted = torch.cat(parts, 1) if parts else torch.empty(3, 0, *form.tail, dtype=dtype)
                            pieces = store.pieces(row, 0, wanted.shape[1])
                            found = torch.cat([x.flatten(1, 2) for x in pieces], 1) if pieces else wanted[:, :0]
                            assert torch.equal(found, wanted)
                            if wanted.shape[1]:
                                last = wanted.shape[1] - 1
                                assert torch.equal(_through_table(store, row, last), wanted[:, last])

    run()


def _through_table(store, row, place):
    """A line where a kernel finds it."""
    rows, blocks, size = store.view
    which, within = divmod(place, size) if size else (0, place)
    at = int(blocks[row, which]) + within * store.kv_heads * store.form.row
    return rows[at : at + store.kv_heads * store.form.row].view(store.kv_heads, *store.form.tail)


@pytest.mark.parametrize("kind", ["paged", "segment"])
def test_work_goes_with_the_pieces_of_memory_and_not_with_the_blocks(kind, monkeypatch):
    """A chunk of a row is a copy, however many blocks it fills; all layers share one walk over a row's table; nothing moves."""
    pytest.importorskip("triton")
    from alaya_hf.engine.device.store import LayerPools, base
    from alaya_hf.kernels.gpu.store_format import StoreFormat
    from alaya_hf.registry import ALLOCATORS
    from alaya_hf.storage.allocators import KVPool

    layers, batch, chunk, chunks, cpu = 5, 2, 2048, 3, torch.device("cpu")
    done = {"copies": 0, "walks": 0}

    def counted(name, of):
        def run(*arguments):
            done[name] += 1
            return of(*arguments)

        return run

    monkeypatch.setattr(base, "copy_parts", counted("copies", base.copy_parts))
    monkeypatch.setattr(KVPool, "_runs", counted("walks", KVPool._runs))
    pools, form, allocator = LayerPools(), StoreFormat(16, torch.float16), ALLOCATORS.build(kind)
    stores = [pools.store(idx, layers, allocator, None, batch, 2, form, cpu) for idx in range(layers)]
    rows = stores[0].pack(*torch.randn(2, 2, chunk, 16).half())
    for start in range(0, chunks * chunk, chunk):
        for store in stores:
            store.grow(start + chunk, chunks * chunk, [start] * batch, layers, lambda: None)
            for row in range(batch):
                store.write(row, start, rows)
    assert done == {"copies": chunks * layers * batch, "walks": chunks * batch}
    stats = stores[0].group.pool.pool.stats
    assert stats.copies == stats.bytes_copied == 0
    for store in stores:  # rows grew in turns, so that each of their chunks lies by itself
        pieces = store.pieces(1, 0, chunks * chunk)
        assert len(pieces) == chunks and torch.equal(
            torch.cat([x.flatten(1, 2) for x in pieces], 1), rows.repeat(1, 3, 1, 1)
        )
        assert [list(x.shape[1:3]) for x in store.pieces(0, 40, 104)] == {
            "paged": [[1, 64]], "segment": [[1, 8], [3, 16], [1, 8]]
        }[kind]  # fmt: skip


def test_a_pool_of_a_given_size_refuses_what_does_not_fit():
    pytest.importorskip("triton")
    from alaya_hf.engine.device.store import LayerPools
    from alaya_hf.kernels.gpu.store_format import StoreFormat
    from alaya_hf.storage.allocators import Paged

    form, size = StoreFormat(16, torch.float16), 2 * 2048 * 3 * 64
    store = LayerPools().store(0, 2, Paged(), size, 1, 3, form, torch.device("cpu"))
    store.grow(100, 100, [0], 1, lambda: None)
    rows = store.pack(*torch.randn(2, 3, 100, 16).half())
    store.write(0, 0, rows)
    with pytest.raises(PoolFullError, match="larger pool"):
        store.grow(2049, 4096, [100], 1, lambda: None)
    assert torch.equal(torch.cat([x.flatten(1, 2) for x in store.pieces(0, 0, 100)], 1), rows)
    store.grow(2048, 4096, [100], 1, lambda: None)


REFUSED = {
    "host engine": {"engine": "host"},
    "virtual": {"allocator": "virtual"},
    "coarse": {"index": "coarse", "residual": "none"},
    "hot set": {"hot_bytes": 1 << 20},
    "target": {"slo": "50ms/token"},
    "layers": {"layers": {1: {"store_dtype": "int8"}}},
    "some layers": {"layers": {1: {"allocator": None}}},
    "size alone": {"allocator": None, "pool_bytes": "1GiB"},
}


@pytest.mark.parametrize("changes", REFUSED.values(), ids=REFUSED)
def test_combinations_are_refused_before_there_is_a_model(changes):
    with pytest.raises(ConfigError, match="allocator"):
        AlayaCache(AlayaConfig(**{"engine": "device", "allocator": "paged", **changes}))


def test_settings_survive_yaml():
    config = AlayaConfig(engine="device", allocator={"kind": "segment", "block": 32}, pool_bytes="2GiB")
    assert AlayaConfig.from_dict(config.to_dict()) == config and config.pool_size == 2 << 30
