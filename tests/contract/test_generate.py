"""Every cache through every way of generating."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from torch import Tensor

from alaya_hf.cache_argument import cache_argument
from tests.contract.caches import EXACT, NEVER_OFFLOADS, SPARSE, make
from tests.contract.models import CONFIGS, DENSE, VOCABULARY, build, prompt
from tests.contract.modes import MODES, NEW, ROWS, generate, padded

# Every cache on Llama; these few on the other architectures.
OTHER_CACHES = ["full_streams_prefix", "topk_all_per_head"]
# Transformers' own caches fail there before that version.
SLIDING = ("mistral", "gemma2", "gemma3_text", "gpt_oss")
SLIDING_DRAFTS = version.parse("5.23")
OTHER_MODELS = [name for name in CONFIGS if name != "llama"]


@functools.cache
def _dense_model(name: str) -> Any:
    return build(name, DENSE.get(name, "sdpa"))


@functools.cache
def _expected(name: str, mode: str) -> list[Tensor]:
    """Tokens of dense attention."""
    model = _dense_model(name)
    if (
        mode == "assisted"
        and model.config.model_type in SLIDING
        and version.parse(transformers.__version__) < SLIDING_DRAFTS
    ):
        pytest.skip(f"Transformers {transformers.__version__} cannot draft with a model that has sliding layers")
    return MODES[mode](model, lambda: make("dynamic", model))


def _assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", ["dynamic", *EXACT])
def test_tokens_equal_dense(get_model: Any, cache: str, mode: str) -> None:
    model = get_model("llama", "alaya")
    made = []

    def new() -> Any:
        made.append(make(cache, model))
        return made[-1]

    _assert_same(MODES[mode](model, new), _expected("llama", mode))
    if cache not in NEVER_OFFLOADS and cache != "dynamic":
        # Otherwise the test would say nothing about offloading.
        assert all(one.stats()["offloaded_bytes"] > 0 for one in made)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", OTHER_CACHES)
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_tokens_equal_dense_other_models(get_model: Any, name: str, cache: str, mode: str) -> None:
    expected, model = _expected(name, mode), get_model(name, "alaya")
    _assert_same(MODES[mode](model, lambda: make(cache, model)), expected)


@pytest.mark.parametrize("attn", ["sdpa", None])
@pytest.mark.parametrize("mode", ["unequal_lengths", "chunked_prefill", "turns_batch", "beams", "assisted"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral"])
def test_routed_models_equal_dense(get_model: Any, name: str, mode: str, attn: str | None) -> None:
    """An unmodified model: sdpa, and whatever Transformers chooses by itself."""
    expected, model = _expected(name, mode), get_model(name, attn)
    _assert_same(MODES[mode](model, lambda: make("full", model)), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cache", SPARSE)
def test_sparse_generates(get_model: Any, cache: str, mode: str) -> None:
    model = get_model("llama", "alaya")
    made = []

    def new() -> Any:
        made.append(make(cache, model))
        return made[-1]

    actual, expected = MODES[mode](model, new), _expected("llama", mode)
    assert [tuple(tokens.shape) for tokens in actual] == [tuple(tokens.shape) for tokens in expected]
    assert all(bool(((tokens >= 0) & (tokens < VOCABULARY)).all()) for tokens in actual)
    assert all(one.stats()["offloaded_bytes"] > 0 for one in made)


@pytest.mark.parametrize("cache", SPARSE)
class TestSparseConsistency:
    """What must hold whatever a preset leaves out."""

    def test_padding_changes_nothing(self, get_model: Any, cache: str) -> None:
        model = get_model("llama", "alaya")
        alone = [generate(model, make(cache, model), row[None])[0, len(row) :].tolist() for row in ROWS]
        assert padded(model, make(cache, model)).tolist() == alone
        assert padded(model, make(cache, model), extra=9).tolist() == alone

    def test_padding_changes_nothing_of_a_long_prompt(self, get_model: Any, cache: str) -> None:
        model = get_model("llama", "alaya")
        rows = [prompt(260, 6)[0], prompt(171, 7)[0]]
        alone = [generate(model, make(cache, model), row[None], max_new_tokens=12)[0, len(row) :] for row in rows]
        assert padded(model, make(cache, model), rows=rows, max_new_tokens=12).tolist() == [a.tolist() for a in alone]

    def test_copies_answer_like_fresh_caches(self, get_model: Any, cache: str) -> None:
        model = get_model("llama", "alaya")
        prefix, questions = ROWS[1][:30], (ROWS[0][:5], ROWS[2][:9])

        def fresh() -> Any:
            started = make(cache, model)
            with torch.no_grad():
                model(prefix[None], **cache_argument(started))
            return started

        shared = fresh()
        for question in questions:
            ids = torch.cat([prefix, question])[None]
            assert generate(model, copy.deepcopy(shared), ids).tolist() == generate(model, fresh(), ids).tolist()
        ids = torch.cat([prefix, questions[0]])[None]
        assert generate(model, shared, ids).tolist() == generate(model, fresh(), ids).tolist()

    def test_repeated_rows_stay_equal(self, get_model: Any, cache: str) -> None:
        """Rows of one text, moved around between steps, go on as if each were alone."""
        model = get_model("llama", "alaya")
        ids = ROWS[1][None]
        expected = generate(model, make(cache, model), ids)[:, len(ROWS[1]) :]
        moved = make(cache, model)
        order = torch.tensor([2, 0, 1])
        with torch.no_grad():
            logits = model(ids, **cache_argument(moved)).logits[:, -1]
            moved.batch_repeat_interleave(3)
            tokens = logits.argmax(-1).repeat(3)
            seen = [tokens]
            for _ in range(NEW - 1):
                moved.reorder_cache(order)
                tokens = model(tokens[:, None], **cache_argument(moved)).logits[:, -1].argmax(-1)
                seen.append(tokens)
        assert torch.stack(seen, dim=1).tolist() == expected.repeat(3, 1).tolist()
        assert moved.stats()["offloaded_bytes"] > 0
