"""Rows of a stored file copied here and there, verified on the way."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alaya_hf.engine.device.loader import fetch_lists
from alaya_hf.errors import CorruptStoreError
from alaya_hf.kernels.cpu.fetch import fetch_rows, fetch_rows_reference
from alaya_hf.storage.db.vector_file import Source, VectorFile, write_vectors


def stored(folder, kv: torch.Tensor) -> tuple[VectorFile, int]:
    path = folder / "layer"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    written = write_vectors(fd, 0, {"kv": Source.of(kv), "beside": Source.of(torch.arange(50))}, {})
    os.close(fd)
    where = os.open(folder, os.O_RDONLY)
    try:
        return VectorFile(where, "layer", written, "the layer"), where
    finally:
        os.close(where)


def selection(rng, kv: torch.Tensor, batch: int, rows: int, cap: int, origin: int):
    places = kv.shape[1] - origin
    ids = torch.from_numpy(rng.integers(0, places, (batch, kv.shape[0], rows, cap)).astype(np.int32))
    counts = torch.from_numpy(rng.integers(0, cap + 1, ids.shape[:3]).astype(np.int32))
    lasts = torch.from_numpy(rng.integers(0, places + 1, batch))
    firsts = torch.from_numpy(rng.integers(0, 1 + int(lasts.min()), 1)).expand(batch).contiguous()
    return ids, counts, firsts, lasts


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9),
    st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([4, 24, 128, 640]),
)  # fmt: skip
def test_fetched_rows_are_those_of_the_file(tmp_path_factory, seed, heads, batch, rows, origin, dtype, head_dim):
    """Whatever is selected, also rows that cross blocks; what lies outside the run is left alone."""
    rng = np.random.default_rng(seed)
    tokens = int(rng.integers(origin + 1, 150))
    kv = torch.from_numpy(rng.standard_normal((heads, tokens, 2, head_dim))).to(dtype)
    file, _ = stored(tmp_path_factory.mktemp("fetch"), kv)
    ids, counts, firsts, lasts = selection(rng, kv, batch, rows, 7, origin)
    out = torch.full((*ids.shape, 2, head_dim), -7, dtype=dtype)
    lists = counts.numel()
    fetch_lists(file, ids.view(lists, 7), counts.view(lists), firsts, lasts, origin, out.view(lists, 7, 2, head_dim))
    for b, h, r, x in np.ndindex(*ids.shape):
        place = int(ids[b, h, r, x])
        wanted = x < counts[b, h, r] and firsts[b] <= place < lasts[b]
        assert torch.equal(out[b, h, r, x], kv[h, place + origin] if wanted else torch.full_like(out[0, 0, 0, 0], -7))


def test_the_kernel_and_its_reference_agree():
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**63, 512 * 6, dtype=np.uint64)
    ids = rng.integers(0, 12, (12, 5)).astype(np.int32)
    counts = rng.integers(0, 6, 12).astype(np.int32)
    where = (ids, counts, np.array([1, 2]), np.array([11, 12]), 0, 3, 12, 64)
    found, wanted = (np.zeros((12, 5, 64), np.uint64) for _ in range(2))
    for run, out in ((fetch_rows, found), (fetch_rows_reference, wanted)):
        assert run(words, np.zeros(6, np.uint64), np.ones(6, np.bool_), *where, out, 0, 12) == -1
    assert (found == wanted).all() and found.any()


def test_a_damaged_block_is_noticed_by_whoever_reads_it(tmp_path):
    kv = torch.randn(2, 300, 2, 64)
    file, _ = stored(tmp_path, kv)
    with (tmp_path / "layer").open("r+b") as handle:
        handle.seek(file.offset + 512 * 100)  # head 0, token 100
        handle.write(b"\xff")
    out = torch.zeros(2, 4, 2, 64)
    first, last = torch.zeros(1, dtype=torch.int64), torch.full((1,), 300)
    harmless = torch.tensor([[0, 60, 200, 299], [0, 100, 200, 299]], dtype=torch.int32)
    fetch_lists(file, harmless, torch.full((2,), 4, dtype=torch.int32), first, last, 0, out)
    assert torch.equal(out[1, 1], kv[1, 100])
    harmless[0, 1] = 100
    for _ in range(2):
        with pytest.raises(CorruptStoreError, match="the layer.*checksum"):
            fetch_lists(file, harmless, torch.full((2,), 4, dtype=torch.int32), first, last, 0, out)
