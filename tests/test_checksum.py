"""Checksums of blocks against the xxHash library, where it is installed, and against plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from alaya_hf.kernels.cpu.checksum import BLOCK, block_checksums, block_checksums_reference, first_damaged


def test_equals_xxhash():
    data = np.random.default_rng(0).integers(0, 256, 3 * BLOCK, dtype=np.uint8)
    sums = block_checksums(data, 7)
    assert np.array_equal(sums, block_checksums_reference(data, 7))
    xxhash = pytest.importorskip("xxhash", reason="compares with the xxHash library")
    blocks = [data[i * BLOCK : (i + 1) * BLOCK].tobytes() for i in range(3)]
    assert sums.tolist() == [xxhash.xxh64(block, seed=7 + i).intdigest() for i, block in enumerate(blocks)]


def test_finds_the_damaged_block():
    random = np.random.default_rng(1)
    data = random.integers(0, 256, 8 * BLOCK, dtype=np.uint8)
    sums = block_checksums(data)
    everything = np.arange(8)
    assert first_damaged(data, everything, sums) == -1
    for _ in range(50):
        at, bit = int(random.integers(data.size)), int(random.integers(8))
        data[at] ^= 1 << bit
        assert first_damaged(data, everything, sums) == at // BLOCK
        assert first_damaged(data, everything[everything != at // BLOCK], sums) == -1
        data[at] ^= 1 << bit
    with pytest.raises(ValueError, match="whole"):
        block_checksums(data[:100])
