"""The pool of pinned host memory and its block allocator, on memory that CUDA need not know."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from alaya_hf.errors import HostMemoryError
from alaya_hf.storage import memory, pinned
from alaya_hf.storage.blocks import LARGE, SMALL, BlockAllocator, block_bytes
from alaya_hf.storage.pinned import PinnedPool

SIZES = st.one_of(st.integers(1, 3 * SMALL), st.integers(LARGE - SMALL, 3 * LARGE))


def test_prepared_memory_is_waited_for_and_enough():
    """Blocks that were announced fit into what is made for them, however early they are asked for."""
    pool = PinnedPool(cuda=False)
    size, count = 3 * LARGE - 5, 6
    kept = pool.allocate((LARGE,), torch.uint8)
    pool.prepare(size, count)
    pool.prepare(size, count)  # on its way already
    blocks = [pool.allocate((size,), torch.uint8).fill_(i) for i in range(count)]
    assert [int(block[0]) for block in blocks] == list(range(count)) == [int(block[-1]) for block in blocks]
    held = pool.stats.held
    assert held <= block_bytes(size) * (count + 1) + pinned.FIRST
    del blocks, kept
    gc.collect()
    pool.prepare(size, count)  # there already
    assert pool.stats.held == held and pool.trim() == held


def test_what_cannot_be_prepared_is_refused_when_it_is_wanted(monkeypatch):
    def refuse(size, cuda):
        raise OSError("none left")

    monkeypatch.setattr(pinned, "_Region", refuse)
    pool = PinnedPool(cuda=False)
    pool.prepare(LARGE, 4)
    with pytest.raises(HostMemoryError, match="none left"):
        pool.allocate((LARGE,), torch.uint8)


class Blocks(RuleBasedStateMachine):
    """Any order of requests, against a map of the pages."""

    taken = Bundle("taken")

    def __init__(self):
        super().__init__()
        self.blocks, self.owners, self.regions, self.next = BlockAllocator(), {}, {}, 0

    def pages(self, start, size):
        return range(start // SMALL, (start + size) // SMALL)

    @rule(size=st.integers(1, 3), gap=st.integers(0, 1))
    def add(self, size, gap):
        # Without a gap, neighbours: blocks must not span them all the same.
        self.next += gap * LARGE
        self.blocks.add(self.next, size * LARGE)
        self.regions[self.next] = size * LARGE
        self.next += size * LARGE

    def free_runs(self, unit):
        """Bytes of every maximal run of free pages inside one region, from its first multiple of `unit` on."""
        held = {page for start, size in self.owners.items() for page in self.pages(start, size)}
        for region, size in self.regions.items():
            begin = None
            for page in [*self.pages(region, size), None]:
                if page is not None and page not in held:
                    begin = page if begin is None else begin
                elif begin is not None:
                    end = region // SMALL + size // SMALL if page is None else page
                    yield end * SMALL - -(-begin * SMALL // unit) * unit, (end - begin) * SMALL
                    begin = None

    @rule(target=taken, size=SIZES)
    def allocate(self, size):
        rounded = block_bytes(size)
        unit = SMALL if rounded < LARGE else LARGE
        fitting = [whole for fits, whole in self.free_runs(unit) if fits >= rounded]
        start = self.blocks.allocate(size)
        assert (start is None) == (not fitting)
        if start is None:
            return multiple()
        assert rounded >= size and start % unit == 0
        before = self.run_around(start)
        assert before == min(fitting)  # best fit
        mine = set(self.pages(start, rounded))
        assert not any(mine & set(self.pages(*other)) for other in self.owners.items())
        assert any(region <= start and start + rounded <= region + size for region, size in self.regions.items())
        self.owners[start] = rounded
        return start

    def run_around(self, start):
        """Bytes of the maximal free run that holds `start`, before it was taken."""
        held = {page for begin, size in self.owners.items() for page in self.pages(begin, size)}
        region = max(region for region in self.regions if region <= start)
        left = right = start // SMALL
        while left > region // SMALL and left - 1 not in held:
            left -= 1
        while right < (region + self.regions[region]) // SMALL and right not in held:
            right += 1
        return (right - left) * SMALL

    @rule(start=consumes(taken))
    def free(self, start):
        self.blocks.free(start)
        del self.owners[start]
        with pytest.raises(ValueError, match="taken block"):
            self.blocks.free(start)

    @rule(data=st.data())
    def remove(self, data):
        if self.blocks.idle:
            region = data.draw(st.sampled_from(self.blocks.idle))
            assert self.blocks.remove(region) == self.regions.pop(region)

    @invariant()
    def accounts(self):
        assert self.blocks.used == sum(self.owners.values())
        assert self.blocks.held == sum(self.regions.values())
        assert self.blocks.largest == max((whole for _, whole in self.free_runs(SMALL)), default=0)
        busy = {max(region for region in self.regions if region <= start) for start in self.owners}
        assert set(self.blocks.idle) == set(self.regions) - busy


Blocks.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
TestBlocks = Blocks.TestCase


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pinned, "FIRST", 4 * LARGE)
    monkeypatch.setattr(pinned, "MOST", 4 * LARGE)
    return PinnedPool(cuda=torch.cuda.is_available())


def test_tensors_keep_their_data_apart(pool):
    """Shapes and precisions of all sizes at once, also after others have come and gone."""
    made = []
    for i, (shape, dtype) in enumerate(
        [((3, 5), torch.float32), ((1,), torch.bfloat16), ((2, 700, 2, 512), torch.float16), ((9 << 20,), torch.int8)]
        * 3
    ):
        x = pool.allocate(shape, dtype)
        assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
        made.append((x.fill_(i + 1), i + 1))
        if i % 3 == 2:
            made.pop(0)
    for x, value in made:
        assert bool((x == value).all())
    assert pool.allocate((0, 4), torch.float32).shape == (0, 4)
    assert pool.stats.used == sum(block_bytes(x.numel() * x.element_size()) for x, _ in made)


def test_views_keep_their_block(pool):
    x = pool.allocate((4, 1024), torch.float32)
    address, used = x.data_ptr(), pool.stats.used
    view = x.view(torch.int16)[1:, ::2].fill_(7)
    del x
    gc.collect()
    assert pool.stats.used == used
    other = pool.allocate((4, 1024), torch.float32).fill_(0)
    assert other.data_ptr() != address and bool((view == 7).all())
    del view
    again = pool.allocate((4, 1024), torch.float32)
    assert again.data_ptr() == address and pool.stats.peak == 2 * used == pool.stats.used


def test_memory_is_used_again_and_given_back(pool):
    first = pool.allocate((3 * LARGE,), torch.uint8)
    held = pool.stats.held
    assert held == 4 * LARGE and pool.stats.pinned == torch.cuda.is_available()
    for _ in range(5):
        first = None
        first = pool.allocate((3 * LARGE + 1,), torch.uint8)
    assert pool.stats.held == held and pool.stats.regions == 1
    second = pool.allocate((5 * LARGE,), torch.uint8).fill_(3)
    assert pool.stats.regions == 2
    assert pool.trim() == 0
    del first
    assert pool.trim() == held and pool.stats.regions == 1 and bool((second == 3).all())
    del second
    assert pool.trim() == 5 * LARGE and pool.stats.held == 0


def test_what_does_not_fit_says_so_and_leaves_the_pool_usable(pool, monkeypatch):
    x = pool.allocate((LARGE,), torch.uint8).fill_(5)
    monkeypatch.setattr(memory, "available_host_memory", lambda: 10 * LARGE)
    asked = 11 * LARGE
    before = pool.stats
    for refused in (lambda: pool.allocate((asked,), torch.uint8), lambda: pool.check_room(2 * asked, "this")):
        with pytest.raises(HostMemoryError, match=r"(?s)bytes.*free.*Shorten the context") as error:
            refused()
        assert f"{10 * LARGE:,}" in str(error.value) and f"{3 * LARGE:,}" in str(error.value)
    assert pool.stats == before
    pool.check_room(12 * LARGE, "this")  # the pool's own free bytes count
    y = pool.allocate((2 * LARGE,), torch.uint8).fill_(6)
    assert bool((x == 5).all()) and bool((y == 6).all())


def test_the_system_may_refuse(pool, monkeypatch):
    def refuse(size, cuda):
        raise OSError("cannot allocate memory")

    with monkeypatch.context() as patch:
        patch.setattr(pinned, "_Region", refuse)
        with pytest.raises(HostMemoryError, match="cannot allocate memory"):
            pool.allocate((LARGE,), torch.uint8)
    assert pool.allocate((LARGE,), torch.uint8).fill_(1).sum() == LARGE


def test_tensors_made_in_inference_mode_can_be_written_to_later(pool):
    with torch.inference_mode():
        x = pool.allocate((8,), torch.float32)
    x.fill_(1)
    assert not x.is_inference()


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_a_container(tmp_path, version):
    if version == 1:
        limit, used, dropped = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    else:
        limit, used, dropped = "memory.max", "memory.current", "inactive_file"
    folder = tmp_path / "memory" if version == 1 else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / limit).write_text("max\n" if version == 2 else f"{(1 << 63) - 4096}\n")
    (folder / used).write_text("700\n")
    assert memory.control_group_memory(tmp_path) is None
    (folder / limit).write_text("1000\n")
    assert memory.control_group_memory(tmp_path) == (1000, 300)
    (folder / "memory.stat").write_text(f"anon 400\n{dropped} 200\nactive_file 100\n")
    assert memory.control_group_memory(tmp_path) == (1000, 500)
