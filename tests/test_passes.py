"""A short pass over a filled cache: the same as its tokens one by one, and an account of what was attended."""

from __future__ import annotations

import pytest
import torch

from alaya_hf import DIPR, AlayaConfig, AlayaLayer, LowBit, NoResidual, TopK
from alaya_hf.probes import Probe

KV_HEADS, GROUP, DIM, CONTEXT, NEW = 2, 3, 32, 300, 5
SCALING = DIM**-0.5


def filled(settings: AlayaConfig, seed: int = 0) -> AlayaLayer:
    torch.manual_seed(seed)
    layer = AlayaLayer(settings)
    keys, values = torch.randn(2, 1, KV_HEADS, CONTEXT, DIM).unbind(0)
    layer.update(2 * keys, values)
    layer.attend(torch.randn(1, KV_HEADS * GROUP, CONTEXT, DIM), SCALING)
    return layer


@pytest.mark.parametrize("group_mode", ["union", "per_head"])
@pytest.mark.parametrize("residual", [NoResidual(), LowBit()], ids=str)
@pytest.mark.parametrize("index", ["flat", "quantized"])
def test_a_pass_equals_its_tokens_one_by_one(index, residual, group_mode):
    settings = AlayaConfig(
        query=TopK(7), index=index, residual=residual, group_mode=group_mode, window=(8, 16), min_context=0
    )
    layer = filled(settings)
    other = layer.with_config(settings)
    layer.probe, other.probe = Probe(), Probe()
    keys, values = torch.randn(2, 1, KV_HEADS, NEW, DIM).unbind(0)
    queries = torch.randn(1, KV_HEADS * GROUP, NEW, DIM)
    layer.update(keys, values)
    together = layer.attend(queries, SCALING)
    single = []
    for i in range(NEW):
        other.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        single.append(other.attend(queries[:, :, i : i + 1], SCALING))
    torch.testing.assert_close(together, torch.cat(single, dim=1), rtol=1e-5, atol=1e-5)
    one, many = layer.probe.summary(), other.probe.summary()
    assert one["retrieved"] == pytest.approx(many["retrieved"])
    # The pass sees its last token's window, the steps their own.
    assert one["attended"] - many["attended"] == pytest.approx((NEW - 1) / 2)


def test_a_pass_that_retrieves_nothing():
    settings = AlayaConfig(query=DIPR(alpha=1.0), index="flat", residual="none", window=(8, 16), min_context=0)
    layer = filled(settings)
    layer.probe = Probe(watch=torch.tensor([3, 100]))
    keys = torch.zeros(1, KV_HEADS, NEW, DIM)
    # Every query's best key is among the pass's own: nothing outside the window is critical.
    queries = torch.randn(1, KV_HEADS * GROUP, NEW, DIM)
    own = 1000 * queries.view(1, KV_HEADS, GROUP, NEW, DIM).sum(dim=2)
    layer.update(own, keys)
    queries = own.repeat_interleave(GROUP, dim=1) / 1000
    layer.attend(queries, SCALING)
    (step,) = layer.probe.steps
    assert step.retrieved == step.fetched == 0 and step.watched == pytest.approx(0.5)


@pytest.mark.parametrize("group_mode", ["union", "per_head"])
def test_watched_tokens_are_counted(group_mode):
    settings = AlayaConfig(
        query=DIPR(alpha=0.2), index="flat", residual="none", group_mode=group_mode, window=(8, 16), min_context=0
    )
    layer = filled(settings)
    watch = torch.tensor([2, 40, 41, 42, 43, 44, 150, 290])
    layer.probe = Probe(watch=watch)
    keys = layer.contents()[0][0].repeat_interleave(GROUP, dim=0)
    queries = torch.randn(1, KV_HEADS * GROUP, NEW, DIM)
    new = torch.randn(2, 1, KV_HEADS, NEW, DIM)
    layer.update(new[0], new[1])
    layer.attend(queries, SCALING)

    scores = queries[0] @ torch.cat([keys, new[0, 0].repeat_interleave(GROUP, dim=0)], dim=1).transpose(1, 2)
    visible = torch.ones(NEW, CONTEXT + NEW, dtype=torch.bool).tril(CONTEXT)
    scores = scores.masked_fill(~visible, -torch.inf)
    attended = scores >= scores.amax(dim=-1, keepdim=True) - settings.query.range(SCALING)
    if group_mode == "union":
        attended = attended.view(KV_HEADS, GROUP, NEW, -1).any(dim=1).repeat_interleave(GROUP, dim=0)
    attended[:, :, :8] = attended[:, :, CONTEXT - 16 :] = True
    (step,) = layer.probe.steps
    assert step.watched == pytest.approx(attended[:, :, watch].float().mean().item())
    assert step.watched_coverage == pytest.approx(attended[:, :, watch].any(dim=0).float().mean().item())
