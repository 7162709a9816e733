"""The operations of a cache between and beside generate calls, against caches that were filled from scratch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from alaya_hf import AlayaCache, AlayaConfig, AlayaLayer, Full
from alaya_hf.cache_argument import cache_argument
from tests.contract.caches import EXACT, NEVER_OFFLOADS, SMALL, SPARSE, make
from tests.contract.models import CONFIGS, DENSE, pad_left, prompt
from tests.contract.modes import ROWS, generate

OFFLOADING = [name for name in EXACT if name not in NEVER_OFFLOADS and name != "default_query_late_offload"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}


def logits(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(ids, **cache_argument(cache), attention_mask=mask, use_cache=True).logits


def segments(cache: AlayaCache) -> list[int]:
    return [id(segment) for layer in cache.alaya_layers for segment in layer.store.segments]


def context(layer: AlayaLayer, row: int) -> Tensor:
    """``[kv_heads, tokens, 2, head_dim]``: everything a layer holds of a row, in order."""
    window, store = layer.window, layer.store
    first = window.init_lengths[row]
    recent = slice(window.init, window.init + window.recent)
    parts = [torch.stack([side[row, :, :first] for side in (window._keys, window._values)], dim=2)]
    parts += [piece.kv for piece in store.rows[row]]
    last = torch.stack([side[row, :, recent] for side in (window._keys, window._values)], dim=2)
    parts.append(last if window._valid is None else last[:, window._valid[row]])
    return torch.cat(parts, dim=1)


@pytest.fixture
def model(get_model: Any) -> Any:
    return get_model("llama", "alaya")


class TestCopies:
    @pytest.mark.parametrize("name", OFFLOADING)
    def test_deepcopy_shares_the_store(self, model: Any, name: str) -> None:
        cache = make(name, model)
        logits(model, prompt(60), cache)
        before = [context(layer, 0).clone() for layer in cache.alaya_layers]
        twin = copy.deepcopy(cache)
        assert segments(twin) == segments(cache) and segments(cache)
        one, other = prompt(30, 1), prompt(30, 2)
        answers = logits(model, one, twin), logits(model, other, cache)
        for held, question, answer in ((twin, one, answers[0]), (cache, other, answers[1])):
            fresh = DynamicCache(config=model.config)
            logits(model, prompt(60), fresh)
            torch.testing.assert_close(answer, logits(model, question, fresh), **CLOSE)
            for layer, kept in zip(held.alaya_layers, before, strict=True):
                assert torch.equal(context(layer, 0)[:, :60], kept)

    def test_deepcopy_twice_and_drop(self, model: Any) -> None:
        cache = make("full", model)
        logits(model, prompt(60), cache)
        offloaded = cache.stats()["offloaded_bytes"]
        twins = [copy.deepcopy(cache) for _ in range(3)]
        assert {tuple(segments(twin)) for twin in twins} == {tuple(segments(cache))}
        assert all(twin.stats()["offloaded_bytes"] == offloaded for twin in twins)


class TestCrop:
    # 60 tokens are cached: crops within the window, past it into the store, into the first tokens, and all of it.
    @pytest.mark.parametrize("keep", [59, 50, 44, 43, 30, 17, 5, 3, 0])
    @pytest.mark.parametrize("name", EXACT)
    def test_crop_then_go_on(self, model: Any, name: str, keep: int) -> None:
        cache, ids = make(name, model), prompt(60)
        logits(model, ids[:, :50], cache)
        logits(model, ids[:, 50:], cache)
        cache.crop(keep - 60)
        assert cache.get_seq_length() == keep
        assert all(layer.token_counts() == [keep] for layer in cache.alaya_layers)
        # Not the tokens that were cropped.
        rest = prompt(26, 9)
        actual = torch.cat([logits(model, part, cache) for part in rest.split([1, 5, 20], dim=1)], dim=1)
        fresh = DynamicCache(config=model.config)
        if keep:
            logits(model, ids[:, :keep], fresh)
        torch.testing.assert_close(actual, logits(model, rest, fresh), **CLOSE)

    @pytest.mark.parametrize("keep", [60, 41, 30, 12])
    @pytest.mark.parametrize("name", OFFLOADING)
    def test_crop_padded_batch(self, model: Any, name: str, keep: int) -> None:
        """``keep`` columns; in the last case less than the padding of the shortest row."""
        rows = [prompt(45, 1)[0], prompt(62, 2)[0], prompt(64, 3)[0]]
        batch = pad_left(rows)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache = make(name, model)
        logits(model, ids, cache, mask)
        cache.crop(keep - 64)
        assert [layer.token_counts() for layer in cache.alaya_layers] == [mask[:, :keep].sum(1).tolist()] * 2
        rest = prompt(9, 9, batch=3)
        mask = torch.cat([mask[:, :keep], mask.new_ones(3, 9)], dim=1)
        actual = logits(model, rest, cache, mask)
        fresh = DynamicCache(config=model.config)
        logits(model, ids[:, :keep], fresh, mask[:, :keep])
        torch.testing.assert_close(actual, logits(model, rest, fresh, mask), **CLOSE)

    @pytest.mark.parametrize("name", OFFLOADING)
    def test_crop_of_a_copy_leaves_the_original(self, model: Any, name: str) -> None:
        cache, ids = make(name, model), prompt(60)
        logits(model, ids, cache)
        twin = copy.deepcopy(cache)
        twin.crop(-40)
        logits(model, prompt(50, 8), twin)
        rest = prompt(6, 9)
        fresh = DynamicCache(config=model.config)
        logits(model, ids, fresh)
        torch.testing.assert_close(logits(model, rest, cache), logits(model, rest, fresh), **CLOSE)

    @pytest.mark.parametrize("name", ["full", "topk2_union", "topk2_tiny_window"])
    def test_crop_and_regenerate(self, model: Any, name: str) -> None:
        """Once an answer is taken back, the cache goes on as if it had never been given."""
        cache, fresh, ids = make(name, model), make(name, model), prompt(60)
        logits(model, ids[:, :50], fresh)
        generate(model, cache, ids)
        cache.crop(50 - cache.get_seq_length())
        assert generate(model, cache, ids).tolist() == generate(model, fresh, ids).tolist()

    def test_tensors_do_not_become_lengths(self, model: Any) -> None:
        """Assisted decoding of Transformers 5.17 crops by a tensor."""
        cache = make("full_tiny_window", model)
        logits(model, prompt(60), cache)
        for _ in range(2):
            cache.crop(torch.tensor(-2))
            cache.crop(torch.tensor(0))
        assert cache.get_seq_length() == 56 and type(cache.get_seq_length()) is int
        logits(model, prompt(1, 3), cache)
        assert cache.get_seq_length() == 57 and cache.alaya_layers[1].token_counts() == [57]

    def test_nothing_to_crop(self, model: Any) -> None:
        cache = make("full", model)
        cache.crop(-5)
        logits(model, prompt(60), cache)
        cache.crop(0)
        assert cache.get_seq_length() == 60
        cache.crop(-1000)
        assert cache.get_seq_length() == 0 and cache.stats()["offloaded_bytes"] == 0


class TestRows:
    @pytest.mark.parametrize("name", OFFLOADING)
    @pytest.mark.parametrize("selected", [[1], [2, 0], [2, 2, 1, 0, 0]])
    def test_select(self, model: Any, name: str, selected: list[int]) -> None:
        batch = pad_left(ROWS)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        cache, dense = make(name, model), DynamicCache(config=model.config)
        for held in (cache, dense):
            logits(model, ids, held, mask)
            held.batch_select_indices(torch.tensor(selected))
        for step in range(8):
            new = prompt(1, 20 + step, batch=len(selected))
            mask = torch.cat([mask[selected] if not step else mask, mask.new_ones(len(selected), 1)], dim=1)
            actual, expected = (logits(model, new, held, mask) for held in (cache, dense))
            torch.testing.assert_close(actual, expected, **CLOSE)

    @pytest.mark.parametrize("name", OFFLOADING)
    def test_repeat(self, model: Any, name: str) -> None:
        cache, dense = make(name, model), DynamicCache(config=model.config)
        for held in (cache, dense):
            logits(model, prompt(50, 1, batch=2), held)
            held.batch_repeat_interleave(3)
        before = cache.stats()["offloaded_bytes"]
        assert before == 2 * 2 * (50 - _window(cache)) * 2 * 16 * 4 * 2
        new = prompt(20, 2, batch=6)
        torch.testing.assert_close(logits(model, new, cache), logits(model, new, dense), **CLOSE)

    @pytest.mark.parametrize("name", ["full", *(name for name in SPARSE if "tiny" not in name)])
    def test_beams_do_not_copy_the_store(self, model: Any, name: str) -> None:
        """What four beams offload of the prompt is what one row offloads."""
        alone, beams = make(name, model), make(name, model)
        generate(model, alone, prompt(60), max_new_tokens=2)
        generate(model, beams, prompt(60), num_beams=4, max_new_tokens=2)
        assert beams.stats()["offloaded_bytes"] == alone.stats()["offloaded_bytes"] > 0

    def test_long_beam_search_copies_only_what_differs(self, model: Any) -> None:
        beams = make("full", model)
        generate(model, beams, prompt(60), num_beams=4, max_new_tokens=28)
        per_token = 2 * 2 * 2 * 16 * 4
        prefix, answer = 60 - 20, 28
        assert beams.stats()["offloaded_bytes"] <= per_token * (prefix + 4 * answer)


def _window(cache: AlayaCache) -> int:
    window = cache.settings.window
    return window.init + window.local


class TestBookkeeping:
    def test_empty(self, model: Any) -> None:
        cache = AlayaCache(EXACT["full"])
        assert len(cache) == 0 and cache.get_seq_length() == 0 and cache.get_max_length() == -1
        assert cache.get_mask_sizes(7, 0) == (7, 0)
        stats = cache.stats()
        assert stats["offloaded_bytes"] == stats["window_bytes"] == stats["total_bytes"] == 0
        assert not cache.is_compileable

    def test_filled(self, model: Any) -> None:
        cache = AlayaCache(EXACT["full"], config=model.config)
        assert len(cache) == 2
        logits(model, prompt(60), cache)
        assert cache.get_seq_length() == 60 and cache.get_max_length() == -1
        assert cache.get_mask_sizes(3, 1) == (63, 0)
        assert cache.is_croppable and cache.is_sliding == [False, False]
        stats = cache.stats()
        per_token = 2 * 2 * 2 * 16 * 4
        assert stats["tokens"] == 60
        assert stats["offloaded_bytes"] == 40 * per_token
        assert stats["window_bytes"] == 20 * per_token
        assert stats["total_bytes"] == 60 * per_token

    def test_reset(self, model: Any) -> None:
        cache = make("full", model)
        first = generate(model, cache, prompt(60))
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.stats()["offloaded_bytes"] == 0
        other = prompt(45, 3, batch=2)
        assert generate(model, cache, other).tolist() == generate(model, make("dynamic", model), other).tolist()
        cache.reset()
        assert generate(model, cache, prompt(60)).tolist() == first.tolist()

    def test_early_initialization(self, model: Any) -> None:
        config = model.config
        cache = AlayaCache(EXACT["full"], config=config)
        cache.early_initialization(2, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
        assert cache.get_seq_length() == 0 and cache.batch_size == 2
        batch = prompt(40, 1, batch=2)
        assert generate(model, cache, batch).tolist() == generate(model, make("dynamic", model), batch).tolist()

    @pytest.mark.parametrize("name", ["mistral", "gemma3", "gpt_oss", "gemma2"])
    def test_layers_are_resolved(self, get_model: Any, name: str) -> None:
        """A plain AlayaCache() finds the sliding layers by itself and leaves them to Transformers."""
        model = get_model(name, "alaya")
        cache = AlayaCache(EXACT["full"])
        generate(model, cache, prompt(40))
        stock = DynamicCache(config=model.config)
        expected = [
            AlayaLayer if not sliding else type(layer)
            for sliding, layer in zip(stock.is_sliding, stock.layers, strict=True)
        ]
        assert [type(layer) for layer in cache.layers] == expected
        assert any(cache.is_sliding)
        # A sliding layer holds its window and no more.
        assert all(layer.keys.shape[2] < 8 for layer in cache.layers if layer.is_sliding)

    def test_probe(self, model: Any) -> None:
        cache = make("full", model, probe_recovery=True)
        generate(model, cache, prompt(60), max_new_tokens=6)
        stats = cache.stats()
        assert stats["steps"] == 5
        assert stats["recovery"] == pytest.approx(1.0, abs=1e-5)
        assert stats["attended"] == pytest.approx(sum(range(61, 66)) / 5)
        cache = make("topk2_union", model, probe_recovery=True)
        generate(model, cache, prompt(60), max_new_tokens=6)
        stats = cache.stats()
        assert stats["retrieved"] == pytest.approx(2.0) and 0 < stats["recovery"] < 1


class TestOtherCaches:
    """The attention implementation without an AlayaCache is sdpa, or the model's eager where sdpa lacks a feature."""

    @pytest.mark.parametrize("padded", [False, True])
    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("name", CONFIGS)
    def test_alaya_equals_stock(self, get_model: Any, dense_model: Any, name: str, static: bool, padded: bool) -> None:
        batch = pad_left(ROWS) if padded else {"input_ids": prompt(40, 1, batch=2), "attention_mask": None}
        ids, mask = batch["input_ids"], batch["attention_mask"]
        seen = []
        for model in (get_model(name, "alaya"), dense_model(name)):
            config = model.config
            cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
            first = logits(model, ids, cache, mask)
            more = None if mask is None else torch.cat([mask, mask.new_ones(len(ids), 3)], dim=1)
            second = logits(model, prompt(3, 7, batch=len(ids)), cache, more)
            kept = first if mask is None else first[mask.bool()]
            seen.append(torch.cat([kept.flatten(0, -2), second.flatten(0, -2)]))
        torch.testing.assert_close(*seen, **CLOSE)

    @pytest.mark.parametrize("name", CONFIGS)
    def test_without_a_cache(self, get_model: Any, dense_model: Any, name: str) -> None:
        with torch.no_grad():
            actual, expected = (
                m(prompt(40), use_cache=False).logits for m in (get_model(name, "alaya"), dense_model(name))
            )
        torch.testing.assert_close(actual, expected, **CLOSE)

    def test_dense_models_know_their_features(self, dense_model: Any) -> None:
        for name, implementation in DENSE.items():
            assert dense_model(name).config._attn_implementation == implementation


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_for_model_and_config(get_model: Any, name: str) -> None:
    model = get_model(name, "alaya")
    settings = AlayaConfig(query=Full(), **SMALL)
    caches = [AlayaCache(settings), AlayaCache(settings, config=model.config), AlayaCache.for_model(model, settings)]
    assert len({str(generate(model, cache, prompt(40)).tolist()) for cache in caches}) == 1
