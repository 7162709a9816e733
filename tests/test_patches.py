"""Patches restore what they touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from alaya_hf import AlayaCache
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import IgnoredCacheError
from alaya_hf.patches import Patch, enable_once, prompt_guard, reservation, routing
from tests.contract.caches import EXACT
from tests.contract.models import build, prompt


def state() -> tuple[Any, ...]:
    """Everything the patches may touch."""
    return (
        dict(AttentionInterface._global_mapping),
        dict(AttentionMaskInterface._global_mapping),
        GenerationMixin.prepare_inputs_for_generation,
        GenerationMixin.generate,
    )


@pytest.fixture
def off() -> Any:
    """All patches off while a test runs; the state of upstream."""
    enable_once()  # what the first AlayaCache of the process would do
    for patch in (routing, prompt_guard, reservation):
        patch.disable()
    yield state()
    for patch in (routing, prompt_guard, reservation):
        patch.enable()


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "sdpa")


@pytest.mark.parametrize("patch", [routing, prompt_guard, reservation], ids=["routing", "prompt_guard", "reservation"])
class TestPatch:
    def test_restores(self, off: Any, patch: Patch) -> None:
        with patch:
            assert patch.enabled and state() != off
        assert not patch.enabled and state() == off

    def test_restores_after_an_error(self, off: Any, patch: Patch) -> None:
        with pytest.raises(RuntimeError, match="inside"), patch:
            raise RuntimeError("inside")
        assert not patch.enabled and state() == off

    def test_nesting(self, off: Any, patch: Patch) -> None:
        with patch:
            outer = state()
            with patch, patch:
                assert state() == outer
            assert patch.enabled and state() == outer
        assert state() == off

    def test_enabling_twice_is_enabling_once(self, off: Any, patch: Patch) -> None:
        patch.enable()
        once = state()
        patch.enable()
        assert state() == once
        patch.disable()
        assert state() == off
        patch.disable()
        assert state() == off

    def test_with_inside_enabled_stays_enabled(self, off: Any, patch: Patch) -> None:
        patch.enable()
        with patch:
            pass
        assert patch.enabled


def test_switched_off_by_hand_stays_off(off: Any) -> None:
    """Only the first AlayaCache of a process switches the patches on."""
    AlayaCache(EXACT["full"])
    assert state() == off


def test_other_names_are_not_touched(off: Any) -> None:
    with routing:
        attention, masks, *_ = state()
    changed = {name for name in attention if attention[name] is not off[0].get(name)}
    changed |= {name for name in masks if masks[name] is not off[1].get(name)}
    assert "sdpa" in changed and "alaya" not in changed
    assert changed <= {"sdpa", "eager", "flex_attention", *(f"flash_attention_{n}" for n in (2, 3, 4))}


def test_without_routing_an_sdpa_model_is_refused(off: Any, model: Any) -> None:
    for patches_on in ([], [prompt_guard]):
        for patch in patches_on:
            patch.enable()
        with pytest.raises(IgnoredCacheError, match='set_attn_implementation\\("alaya"\\)'):
            model.generate(prompt(30), **cache_argument(AlayaCache(EXACT["full"])), max_new_tokens=3)


def test_without_routing_alaya_needs_no_patch(
    off: Any,
    model: Any,
) -> None:
    own = build("llama", "alaya")
    kwargs: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}
    actual = own.generate(prompt(30), **cache_argument(AlayaCache(EXACT["full"])), **kwargs)
    expected = model.generate(prompt(30), **cache_argument(DynamicCache(config=model.config)), **kwargs)
    assert actual.tolist() == expected.tolist()


def test_routing_leaves_other_caches_alone(off: Any, model: Any) -> None:
    ids = prompt(30)
    with torch.no_grad():
        before = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
        with routing, prompt_guard:
            after = model(ids, **cache_argument(DynamicCache(config=model.config))).logits
    assert torch.equal(before, after)
