"""The planner with the device engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import BudgetError
from alaya_hf.planner import ModelShape, Planner

pytestmark = pytest.mark.gpu


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()


@pytest.mark.parametrize("mebibytes", [1, 4, 6, 12, 40])
def test_the_budget_is_kept(mebibytes: int) -> None:
    model = small_model()
    cache = AlayaCache.for_model(model, AlayaConfig(gpu_memory=f"{mebibytes}MiB"))
    ids = torch.randint(1, 128, (1, 8000), device="cuda")
    try:
        model.generate(input_ids=ids, **cache_argument(cache), max_new_tokens=40, min_new_tokens=40, do_sample=False)
    except BudgetError:
        assert mebibytes < 4
        return
    assert cache.stats()["device_bytes"] <= mebibytes << 20
    assert "gpu_memory" in str(cache.explain(analyze=True))


def test_plenty_of_memory_is_used_by_the_device_engine() -> None:
    model = small_model()
    cache = AlayaCache.for_model(model, AlayaConfig(planner="cost", min_context=0))
    model.generate(
        input_ids=torch.randint(1, 128, (1, 8000), device="cuda"), **cache_argument(cache), max_new_tokens=20
    )
    assert cache.keeper is not None and cache.keeper.plan is not None
    assert cache.keeper.plan.device_bytes >= cache.stats()["device_bytes"]
    assert {plan.engine for plan, _ in cache.keeper.plan.layers} == {"device"}


def test_calibration() -> None:
    """Costs of every stage, from which whole steps follow."""
    from alaya_hf.cli.calibrate import calibrate

    shape = ModelShape(2, 16, 4, 128, torch.bfloat16, "cuda")
    made = calibrate(shape, quick=True)
    assert made.device and made.median_error is not None
    plan = Planner(AlayaConfig(planner="cost"), replace(shape, parameters=10**6), made).plan(100_000)
    assert 0 < plan.seconds < 1
