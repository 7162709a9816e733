"""Numerical error against a float64 reference: at most twice that of a plain implementation in the same precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alaya_hf import DIPR, AlayaConfig, AlayaLayer, Full, TopK
from alaya_hf.kernels.attention import exact_attention, window_attention
from alaya_hf.layer import ForwardState

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 32
SCALING = DIM**-0.5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Besides twice the plain error: rounding of the output alone.
EPSILON = 2.0


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Dense attention in the precision of its inputs, softmax included.

    Returns ``out [batch, heads, m, head_dim]``, zero where nothing is visible, and the log-sum-exp of the logits.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = q @ k.transpose(2, 3) * SCALING
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], dim=-1)
        v = torch.cat([v, torch.zeros_like(v[:, :, :1])], dim=2)
    weights = logits.softmax(dim=-1).nan_to_num(0.0)
    return weights @ v, logits.logsumexp(dim=-1)


def assert_as_good_as_plain(actual: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor, **options: Any) -> None:
    reference = attention(q.double(), k.double(), v.double(), visible, **options)[0]
    plain = attention(q, k, v, visible, **options)[0]
    allowed = 2 * (plain.double() - reference).abs().max() + EPSILON * torch.finfo(q.dtype).eps * reference.abs().max()
    assert actual.shape == reference.shape and bool(actual.isfinite().all())
    assert (actual.double() - reference).abs().max() <= allowed


def inputs(tokens: int, dtype: torch.dtype, seed: int = 0, sharpness: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(BATCH, HEADS, tokens, DIM, generator=generator) * sharpness
    k = torch.randn(BATCH, KV_HEADS, tokens, DIM, generator=generator)
    v = torch.randn(BATCH, KV_HEADS, tokens, DIM, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(layer: AlayaLayer, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
    """One forward pass: ``[batch, heads, m, head_dim]``."""
    layer.forward.past = layer.get_seq_length()
    layer.forward.valid = None if valid is None or bool(valid.all()) else valid
    layer.update(k, v)
    out = layer.attend(q, SCALING, **options)
    assert out.dtype == q.dtype
    return out.transpose(1, 2)


QUERIES = {"full": Full(), "dipr_inf": DIPR(beta=math.inf), "topk_all": TopK(100_000), "dipr_wide": DIPR(beta=1e9)}
# Lengths of the passes over 150 tokens.
PASSES = {
    "prefill": [150],
    "prefill_then_decode": [120] + [1] * 30,
    "several_at_a_time": [100, 3, 5, 7, 5, 30],
    "chunked": [40, 40, 40, 30],
    "from_one_token": [1] * 50 + [100],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("option", ["plain", "padding", "sinks", "softcap", "everything"])
def test_layer(dtype: torch.dtype, query: str, passes: str, option: str) -> None:
    window = {"init": 4, "local": 16, "overflow": 6}
    config = AlayaConfig(query=QUERIES[query], window=window, min_context=0, max_sparse_queries=8, prefill_block=13)
    layer = AlayaLayer(config, forward=ForwardState())
    q, k, v = inputs(150, dtype)
    options: dict[str, Any] = {}
    if option in ("sinks", "everything"):
        options["sinks"] = torch.tensor([0.5, -1.0, 3.0, 2.0])
    if option in ("softcap", "everything"):
        options["softcap"] = 3.0
    valid = torch.ones(BATCH, 150, dtype=torch.bool)
    if option in ("padding", "everything"):
        # More padding than the first pass is long in one case, and some in the middle.
        valid[0, :45] = False
        valid[1, 60:63] = False
    visible = torch.ones(150, 150, dtype=torch.bool).tril() & valid[:, None, None, :]
    outs, start = [], 0
    for length in PASSES[passes]:
        span = slice(start, start + length)
        outs.append(run(layer, q[:, :, span], k[:, :, span], v[:, :, span], valid[:, span], **options))
        start += length
    actual = torch.cat(outs, dim=2)
    assert layer.offloaded_bytes > 0
    for row in range(BATCH):
        rows, seen = valid[row], slice(row, row + 1)
        assert bool(actual[seen][:, :, ~rows].isfinite().all())
        assert_as_good_as_plain(
            actual[seen][:, :, rows], q[seen][:, :, rows], k[seen], v[seen], visible[seen][:, :, rows], **options
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_store(dtype: torch.dtype) -> None:
    """A float32 model with a store of lower precision is as good as a model of that precision."""
    config = AlayaConfig(query=Full(), window=(4, 16), min_context=0, store_dtype=str(dtype).split(".")[1])
    layer = AlayaLayer(config)
    q, k, v = inputs(150, torch.float32)
    run(layer, q[:, :, :149], k[:, :, :149], v[:, :, :149])
    actual = run(layer, q[:, :, 149:], k[:, :, 149:], v[:, :, 149:])
    visible = torch.ones(1, 150, dtype=torch.bool)
    reference = attention(q.double(), k.double(), v.double(), visible)[0][:, :, 149:]
    plain = attention(q.to(dtype), k.to(dtype), v.to(dtype), visible)[0][:, :, 149:]
    assert (actual - reference).abs().max() <= 2 * (plain.double() - reference).abs().max()


def _visible(kind: str, m: int, n: int) -> tuple[bool, Tensor | None, Tensor]:
    """What to pass as ``causal`` and ``mask``, and the mask that both amount to."""
    causal = torch.ones(m, n, dtype=torch.bool).tril(n - m)[None, None].expand(BATCH, 1, m, n)
    padding = torch.ones(BATCH, 1, 1, n, dtype=torch.bool)
    padding[0, :, :, : n // 3] = False
    nothing = torch.rand(BATCH, 1, m, n, generator=torch.Generator().manual_seed(1)) < 0.5
    nothing[0, 0, m // 2] = False
    nothing[1] = False
    return {
        "none": (False, None, torch.ones(BATCH, 1, m, n, dtype=torch.bool)),
        "causal": (True, None, causal),
        "padding": (False, padding, padding.expand(BATCH, 1, m, n)),
        "causal_padding": (True, padding, causal & padding),
        "empty_rows": (False, nothing, nothing),
        "empty_rows_causal": (True, nothing, causal & nothing),
    }[kind]


KINDS = ["none", "causal", "padding", "causal_padding", "empty_rows", "empty_rows_causal"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("m, n", [(1, 70), (7, 70), (70, 70), (40, 40), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_attention(dtype: torch.dtype, softcap: float | None, m: int, n: int, kind: str) -> None:
    q, k, v = inputs(n, dtype, seed=3)
    q = q[:, :, :m]
    causal, mask, visible = _visible(kind, m, n)
    partial = exact_attention(q, k, v, SCALING, causal=causal, mask=mask, softcap=softcap)
    assert partial.out.dtype == partial.lse.dtype == torch.float32
    # The layer rounds the merged result to the model's precision; until then it is float32.
    assert_as_good_as_plain(partial.out, q, k, v, visible, softcap=softcap)
    lse = attention(q.double(), k.double(), v.double(), visible, softcap=softcap)[1]
    empty = ~visible.any(dim=-1).expand_as(lse)
    assert torch.equal(torch.isneginf(partial.lse), empty)
    assert bool((partial.out[empty] == 0).all())
    plain = attention(q, k, v, visible, softcap=softcap)[1].double()
    if not empty.all():
        allowed = 2 * (plain - lse)[~empty].abs().max() + 2 * torch.finfo(dtype).eps * lse[~empty].abs().max()
        assert (partial.lse.double() - lse)[~empty].abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", ["none", "padding", "empty_rows"])
def test_window_attention(dtype: torch.dtype, softcap: float | None, kind: str) -> None:
    q, k, v = inputs(70, dtype, seed=4)
    q = q[:, :, :7]
    _, mask, visible = _visible(kind, 7, 70)
    partial, best = window_attention(q, k, v, SCALING, mask, softcap)
    assert_as_good_as_plain(partial.out, q, k, v, visible, softcap=softcap)
    scores = q.double() @ k.double().repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(2, 3)
    expected = scores.masked_fill(~visible, float("-inf")).amax(dim=-1)
    torch.testing.assert_close(best.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.isneginf(partial.lse), torch.isneginf(expected))


def test_no_keys() -> None:
    q, k, v = inputs(5, torch.float32)
    partial = exact_attention(q, k[:, :, :0], v[:, :, :0], SCALING)
    assert bool((partial.out == 0).all()) and bool(torch.isneginf(partial.lse).all())
    partial, best = window_attention(q, k[:, :, :0], v[:, :, :0], SCALING)
    assert bool((partial.out == 0).all()) and bool(torch.isneginf(best).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(dtype: torch.dtype) -> None:
    """Logits of several hundred, far beyond what exp can take."""
    config = AlayaConfig(query=Full(), window=(2, 8), min_context=0)
    layer = AlayaLayer(config)
    q, k, v = inputs(60, dtype, sharpness=100.0)
    run(layer, q[:, :, :50], k[:, :, :50], v[:, :, :50])
    actual = run(layer, q[:, :, 50:], k[:, :, 50:], v[:, :, 50:])
    visible = torch.ones(60, 60, dtype=torch.bool).tril()[None, None, 50:]
    assert_as_good_as_plain(actual, q[:, :, 50:], k, v, visible)
