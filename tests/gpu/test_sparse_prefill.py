"""Tile-skipping attention on a GPU, against its reference and dense attention."""

from __future__ import annotations

import math

import pytest
import torch

from alaya_hf.kernels.exact.plain import Plain
from alaya_hf.kernels.sparse_prefill import Q_TILE, TileRule, sparse_attention

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf.kernels.sparse_prefill import checks  # noqa: E402

RULES = pytest.mark.parametrize("relative", [False, True], ids=["bsfa", "blasst"])


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


def cases(dtype):
    generator = torch.Generator().manual_seed(0)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for head_dim in (64, 80, 96, 128, 256):
        for _ in range(6):
            m, more = pick(1, 60, 128, 300, 513), pick(0, 17, 64, 128, 1000)
            yield checks.Case(
                head_dim, pick(1, 2), pick(1, 3, 8), m, m + more, pick(True, False), dtype, pick(1, 2), "cuda"
            )
    yield checks.Case(64, 1, 1, 150, 90, True, dtype, 1, "cuda")


@RULES
def test_skipping(dtype, relative):
    for case in cases(dtype):
        checks.check_skipping(case, relative)


@RULES
def test_nothing_skipped(dtype, relative):
    for case in cases(dtype):
        checks.check_nothing_skipped(case, relative)


@RULES
def test_blocks(dtype, relative):
    for head_dim in (64, 80, 128):
        checks.check_blocks(checks.Case(head_dim, 2, 2, 140, 500, True, dtype, 2, "cuda"), relative)


def test_poisoned_outputs_and_maxima(dtype):
    for case in cases(dtype):
        checks.check_poison(case)
        checks.check_maxima(case)


def test_far_strides(dtype):
    """Offsets beyond 31 bits: keys and values of many heads side by side, as one projection leaves them."""
    n, heads, dim = 1 << 15, 512, 128
    kv = torch.empty(n, 2, heads, dim, dtype=dtype, device="cuda")
    kv[:, :, -1] = torch.randn(n, 2, dim, device="cuda")
    k, v = (kv[:, side, -1:].transpose(0, 1)[None] for side in (0, 1))
    assert n * k.stride(2) > 1 << 31
    q = torch.randn(1, 4, 200, dim, device="cuda").to(dtype)
    rule = TileRule(torch.full((4, 2), -math.inf, device="cuda"))
    found = sparse_attention(q, k, v, rule, dim**-0.5, causal=True)
    wanted = Plain().run(q, k, v, dim**-0.5, True, None, None)
    torch.testing.assert_close(found.partial.out, wanted.out, atol=2e-3, rtol=2e-2)
    torch.testing.assert_close(found.partial.lse, wanted.lse, atol=1e-3, rtol=1e-4)


def test_operator(dtype):
    checks.check_operator(checks.Case(64, 1, 2, 2 * Q_TILE, 300, True, dtype, 1, "cuda"))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_every_cut(dtype, head_dim):
    for causal in (True, False):
        checks.check_cuts(checks.Case(head_dim, 2, 4, 700, 1800, causal, dtype, 1, "cuda"))


def test_layouts(dtype):
    checks.check_layouts(checks.Case(128, 2, 4, 300, 900, True, dtype, 2, "cuda"))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_long_chunk_against_sdpa(dtype, head_dim):
    """As long as what is timed: many tiles per program, heads that share keys, a chunk behind a prefix."""
    m, n, group = 8192, 12288, 4
    q = torch.randn(1, 2 * group, m, head_dim, device="cuda").to(dtype)
    k, v = torch.randn(2, 1, 2, n, head_dim, device="cuda").to(dtype).unbind(0)
    for part_k, part_v, causal in (
        (k[:, :, n - m :], v[:, :, n - m :], True),
        (k[:, :, : n - m], v[:, :, : n - m], False),
    ):
        wanted = torch.nn.functional.scaled_dot_product_attention(q, part_k, part_v, is_causal=causal, enable_gqa=True)
        dense = sparse_attention(q, part_k, part_v, None, head_dim**-0.5, causal).partial.out
        torch.testing.assert_close(dense, wanted.float(), atol=8 * torch.finfo(dtype).eps, rtol=0)
        # A mass of at most lambda per token may be missing: next to nothing at this lambda.
        limits = torch.full((2 * group, m // Q_TILE), math.log(1e-7) * head_dim**0.5, device="cuda")
        top = torch.full((1, 2 * group, m), -math.inf, device="cuda")
        found = sparse_attention(q, part_k, part_v, TileRule(limits, True), head_dim**-0.5, causal, top).partial.out
        torch.testing.assert_close(found, wanted.float(), atol=8 * torch.finfo(dtype).eps, rtol=0)
