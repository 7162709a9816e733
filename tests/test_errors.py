"""Bad input is refused, with a message that says what was given, what was expected and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    T5Config,
    T5ForConditionalGeneration,
)

import alaya_hf.storage.memory
from alaya_hf import DIPR, AlayaCache, AlayaConfig, AlayaError, AlayaLayer, Full, TopK, WindowConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import (
    BatchSizeError,
    ConfigError,
    HostMemoryError,
    IgnoredCacheError,
    PromptMismatchError,
    UnsupportedMaskError,
    UnsupportedModelError,
)
from tests.contract.caches import EXACT
from tests.contract.models import VOCABULARY, build, pad_left, prompt
from tests.contract.modes import ROWS, generate

SETTINGS = EXACT["full"]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "alaya")


def says(error: BaseException, *words: str) -> None:
    """The message holds every word (case does not matter)."""
    message = str(error)
    for word in words:
        assert re.search(re.escape(word), message, re.IGNORECASE), f"{word!r} is not in: {message}"
    assert isinstance(error, ValueError)


def forward(model: Any, cache: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **cache_argument(cache), use_cache=True, **kwargs).logits


def still_works(model: Any, cache: Any, held: torch.Tensor) -> None:
    """The cache goes on from the tokens it holds as if nothing had happened."""
    ids = torch.cat([held, prompt(3, 99)], dim=1)
    fresh = DynamicCache(config=model.config)
    forward(model, fresh, held)
    assert (
        generate(model, cache, ids, max_new_tokens=6).tolist() == generate(model, fresh, ids, max_new_tokens=6).tolist()
    )


class TestPrompts:
    @pytest.fixture
    def used(self, model: Any) -> tuple[AlayaCache, torch.Tensor]:
        cache = AlayaCache(SETTINGS)
        answer = generate(model, cache, prompt(40), max_new_tokens=5)
        return cache, answer[:, : cache.get_seq_length()]

    def test_another_prompt(self, model: Any, used: Any) -> None:
        cache, held = used
        other = torch.cat([held, prompt(4)], dim=1)
        other[0, 7] = (other[0, 7] + 1) % VOCABULARY
        with pytest.raises(PromptMismatchError) as caught:
            generate(model, cache, other)
        says(caught.value, "44 cached", "token 7", str(int(held[0, 7])), str(int(other[0, 7])), "crop", "fresh")
        still_works(model, cache, held)

    def test_same_prompt_again(self, model: Any, used: Any) -> None:
        cache, held = used
        with pytest.raises(PromptMismatchError) as caught:
            generate(model, cache, held)
        says(caught.value, "44 tokens", "at least one new", "crop")
        still_works(model, cache, held)

    def test_shorter_prompt(self, model: Any, used: Any) -> None:
        cache, held = used
        with pytest.raises(PromptMismatchError) as caught:
            generate(model, cache, prompt(40))
        says(caught.value, "40 tokens", "holds 44", "fresh")
        still_works(model, cache, held)

    def test_another_prompt_after_a_crop(self, model: Any, used: Any) -> None:
        cache, held = used
        cache.crop(20 - cache.get_seq_length())
        other = torch.cat([held[:, :20], prompt(9, 5)], dim=1)
        assert (
            generate(model, cache, other).tolist() == generate(model, DynamicCache(config=model.config), other).tolist()
        )

    def test_one_row_of_a_batch_differs(self, model: Any) -> None:
        cache, ids = AlayaCache(SETTINGS), prompt(30, 1, batch=2)
        answer = generate(model, cache, ids, max_new_tokens=3)
        other = answer.clone()
        other[1, 11] = (other[1, 11] + 1) % VOCABULARY
        with pytest.raises(PromptMismatchError, match="token 11"):
            generate(model, cache, other)
        assert generate(model, cache, answer, max_new_tokens=3).shape == (2, 36)


class TestConfiguration:
    @pytest.mark.parametrize(
        "make, words",
        [
            (lambda: DIPR(alpha=0.1, beta=1), ("alpha", "beta", "not both", "0.1")),
            (lambda: DIPR(alpha=1.5), ("alpha", "1.5", "[0, 1]")),
            (lambda: DIPR(beta=-1), ("beta", "-1", "at least 0")),
            (lambda: DIPR(beta=float("nan")), ("beta", "nan")),
            (lambda: TopK(-1), ("k", "-1", "at least 0")),
            (lambda: TopK(1.5), ("k", "1.5", "integer")),  # type: ignore[arg-type]
            (lambda: WindowConfig(init=-1), ("window.init", "-1", "at least 0")),
            (lambda: WindowConfig(local=0), ("window.local", "at least 1")),
            (lambda: WindowConfig(overflow=True), ("window.overflow", "integer")),
            (lambda: AlayaConfig(window=(1, 2, 3)), ("window", "(1, 2, 3)", "pair")),
            (lambda: AlayaConfig(window={"locall": 3}), ("window", "locall", "local")),
            (lambda: AlayaConfig(min_context=-1), ("min_context", "-1")),
            (lambda: AlayaConfig(max_sparse_queries=0), ("max_sparse_queries", "at least 1")),
            (lambda: AlayaConfig(prefill_block="8"), ("prefill_block", "'8'")),  # type: ignore[arg-type]
            (lambda: AlayaConfig(group_mode="all"), ("group_mode", "'all'", "union", "per_head")),
            (lambda: AlayaConfig(store_dtype="int4"), ("store_dtype", "int4", "bfloat16", "int8")),
            (lambda: AlayaConfig(store_dtype="int8"), ("store_dtype", "int8", "engine='device'")),
            (lambda: AlayaConfig(hot_bytes=-1), ("hot_bytes", "-1", "at least 0")),
            (lambda: AlayaConfig(dense_layers=[-1]), ("dense_layers", "-1")),  # type: ignore[arg-type]
            (lambda: AlayaConfig(dense_layers=3), ("dense_layers", "3", "list")),  # type: ignore[arg-type]
            (lambda: AlayaConfig(query="dippr"), ("query", "dippr", "Available", "dipr", "topk")),
            (lambda: AlayaConfig(index="flatt"), ("index", "flatt", "Available", "flat")),
            (lambda: AlayaConfig(residual="nothing"), ("residual", "nothing", "Available", "none")),
            (lambda: AlayaConfig(query={"kind": "topk", "kk": 3}), ("topk", "kk", "parameters", "k")),
            (lambda: AlayaConfig(query={"k": 3}), ("query", "kind")),
            (lambda: AlayaConfig(query=3), ("query", "3", "Available")),
            (lambda: AlayaConfig(layers={"first": {}}), ("layers", "first")),  # type: ignore[dict-item]
            (lambda: AlayaConfig(layers={0: {"querry": "full"}}), ("querry", "query")),
            (lambda: AlayaConfig(layers={0: {"query": "fulll"}}), ("fulll", "Available")),
            (lambda: AlayaConfig(layers={0: {"layers": {}}}), ("layers.0",)),
            (lambda: AlayaConfig(layers=[1]), ("layers", "map")),  # type: ignore[arg-type]
            (lambda: AlayaConfig.from_dict({"quer": "full"}), ("quer", "Known keys", "query")),
            (lambda: AlayaConfig.from_dict(3), ("mapping", "int")),  # type: ignore[arg-type]
            (lambda: AlayaConfig.preset("alayadb"), ("preset", "alayadb", "Available", "alaya", "full")),
            (lambda: AlayaCache("alayadb"), ("preset", "alayadb", "Available")),
            (lambda: AlayaCache(3), ("AlayaConfig", "int")),  # type: ignore[arg-type]
            (lambda: AlayaCache(build("llama").config), ("AlayaConfig", "LlamaConfig", "config=model.config")),
        ],
    )
    def test_refused(self, make: Callable[[], Any], words: tuple[str, ...]) -> None:
        with pytest.raises(ConfigError) as caught:
            make()
        says(caught.value, *words)


class TestMasks:
    def test_causal_and_padding_4d(self, model: Any) -> None:
        """The full mask, as bool and as bias, does what the 2-D mask does."""
        batch = pad_left(ROWS)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        expected = forward(model, AlayaCache(SETTINGS), ids, attention_mask=mask)
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded_positions = forward(model, AlayaCache(SETTINGS), ids, attention_mask=mask, position_ids=positions)
        for given in (seen, bias):
            actual = forward(model, AlayaCache(SETTINGS), ids, attention_mask=given, position_ids=positions)
            torch.testing.assert_close(actual[mask.bool()], padded_positions[mask.bool()], rtol=1e-5, atol=1e-5)
        assert expected.shape == padded_positions.shape

    def test_4d_mask_of_a_later_pass(self, model: Any) -> None:
        cache, dense = AlayaCache(SETTINGS), DynamicCache(config=model.config)
        seen = torch.ones(5, 45, dtype=torch.bool).tril(40)[None, None]
        outs = []
        for held in (cache, dense):
            forward(model, held, prompt(40))
            outs.append(forward(model, held, prompt(5, 2), attention_mask=seen))
        torch.testing.assert_close(*outs, rtol=1e-4, atol=2e-4)

    def _tree(self) -> torch.Tensor:
        seen = torch.ones(12, 12, dtype=torch.bool).tril()
        seen[9, 5] = False
        return seen[None, None]

    @pytest.mark.parametrize("kind", ["tree", "bidirectional", "packed"])
    def test_other_4d_masks(self, model: Any, kind: str) -> None:
        given = {
            "tree": self._tree(),
            "bidirectional": torch.ones(1, 1, 12, 12, dtype=torch.bool),
            "packed": torch.block_diag(torch.ones(6, 6).tril(), torch.ones(6, 6).tril()).bool()[None, None],
        }[kind]
        cache = AlayaCache(SETTINGS)
        with pytest.raises(UnsupportedMaskError) as caught:
            forward(model, cache, prompt(12), attention_mask=given)
        says(caught.value, "causal + padding", "4-D", "2-D attention_mask")

    def test_4d_mask_of_another_shape(self, model: Any) -> None:
        with pytest.raises(UnsupportedMaskError) as caught:
            forward(model, AlayaCache(SETTINGS), prompt(12), attention_mask=torch.ones(1, 1, 12, 9, dtype=torch.bool))
        says(caught.value, "(1, 1, 12, 9)", "12, 12", "2-D")

    def test_padding_rows_may_see_everything(self, model: Any) -> None:
        """Transformers opens rows that would see nothing."""
        batch = pad_left(ROWS)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        seen = torch.ones(40, 40, dtype=torch.bool).tril() & mask.bool()[:, None, None, :]
        opened = seen | ~seen.any(-1, keepdim=True)
        one, other = (forward(model, AlayaCache(SETTINGS), ids, attention_mask=given) for given in (seen, opened))
        assert torch.equal(one, other)

    def test_mask_too_short(self, model: Any) -> None:
        cache = AlayaCache(SETTINGS)
        forward(model, cache, prompt(40))
        with pytest.raises(UnsupportedMaskError) as caught:
            forward(model, cache, prompt(3, 2), attention_mask=torch.ones(1, 3, dtype=torch.int64))
        says(caught.value, "43", "whole sequence")
        still_works(model, cache, prompt(40))

    def test_mask_that_changes_the_past(self, model: Any) -> None:
        cache = AlayaCache(SETTINGS)
        forward(model, cache, prompt(40))
        mask = torch.ones(1, 41, dtype=torch.int64)
        mask[0, :3] = 0
        with pytest.raises(UnsupportedMaskError) as caught:
            forward(model, cache, prompt(1, 2), attention_mask=mask)
        says(caught.value, "padding", "fresh AlayaCache")
        still_works(model, cache, prompt(40))

    def test_padding_forgotten(self, model: Any) -> None:
        batch = pad_left(ROWS)
        cache = AlayaCache(SETTINGS)
        forward(model, cache, batch["input_ids"], attention_mask=batch["attention_mask"])
        for mask in (None, torch.ones(3, 41, dtype=torch.int64)):
            with pytest.raises(UnsupportedMaskError, match="padd"):
                forward(model, cache, prompt(1, 2, batch=3), attention_mask=mask)


class TestAttention:
    """An attention implementation that would ignore what is cached."""

    @pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
    def test_other_implementations(self, implementation: str) -> None:
        model = build("llama", implementation)
        for cache in (AlayaCache(SETTINGS), AlayaCache(SETTINGS, config=model.config)):
            with pytest.raises(IgnoredCacheError) as caught:
                generate(model, cache, prompt(30))
            says(caught.value, implementation, "set_attn_implementation", "alaya")

    def test_an_implementation_that_computes_with_the_handle(self) -> None:
        layer = AlayaLayer(SETTINGS)
        keys = torch.randn(1, 2, 5, 16)
        handle, _ = layer.update(keys, keys)
        assert handle.shape == keys.shape and handle.dtype == keys.dtype and handle.device == keys.device
        for use in (
            lambda: torch.matmul(torch.randn(1, 2, 5, 16), handle.transpose(2, 3)),
            lambda: handle.repeat_interleave(2, dim=1),
            lambda: handle[:, :, None],
            lambda: torch.nn.functional.scaled_dot_product_attention(keys, handle, handle),
        ):
            with pytest.raises(IgnoredCacheError) as caught:
                use()
            says(caught.value, "only the new tokens", "set_attn_implementation")

    def test_an_implementation_that_ignores_the_handle(self) -> None:
        layer = AlayaLayer(SETTINGS)
        keys = torch.randn(1, 2, 5, 16)
        layer.update(keys, keys)
        with pytest.raises(IgnoredCacheError) as caught:
            layer.update(keys, keys)
        says(caught.value, "layer 0", "set_attn_implementation")

    def test_shared_keys(self) -> None:
        layer = AlayaLayer(SETTINGS)
        keys = torch.randn(1, 2, 5, 16)
        layer.update(keys, keys)
        layer.attend(torch.randn(1, 4, 5, 16), 0.25)
        with pytest.raises(AlayaError) as caught:
            layer.attend(torch.randn(1, 4, 5, 16), 0.25)
        says(caught.value, "already", "DynamicCache")

    @pytest.mark.parametrize("implementation", ["alaya", "sdpa"])
    def test_output_attentions(self, implementation: str) -> None:
        model = build("llama", implementation)
        with pytest.raises(ValueError) as caught:
            forward(model, AlayaCache(SETTINGS), prompt(30), output_attentions=True)
        says(caught.value, "output_attentions")
        with pytest.raises(ValueError) as caught:
            generate(model, AlayaCache(SETTINGS), prompt(30), output_attentions=True, return_dict_in_generate=True)
        says(caught.value, "output_attentions")
        with pytest.raises(ValueError) as caught:
            model.config.output_attentions = True
            generate(model, AlayaCache(SETTINGS), prompt(30))
        says(caught.value, "output_attentions")

    def test_training(self) -> None:
        model = build("llama", "alaya").train()
        with pytest.raises(UnsupportedModelError) as caught:
            model(prompt(30), **cache_argument(AlayaCache(SETTINGS)), use_cache=True)
        says(caught.value, "training", "eval()")

    def test_dropout(self) -> None:
        model = build("llama", "alaya").train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        with pytest.raises(UnsupportedModelError, match="dropout 0.3"):
            forward(model, AlayaCache(SETTINGS), prompt(30))


class TestModels:
    def test_learned_positions(self) -> None:
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=4)
        with pytest.raises(UnsupportedModelError) as caught:
            AlayaCache(config=config)
        says(caught.value, "rotary", "GPT2Config", "DynamicCache")
        model = AutoModelForCausalLM.from_config(config).eval()
        with pytest.raises(UnsupportedModelError, match="rotary"):
            model.generate(prompt(20), **cache_argument(AlayaCache(SETTINGS)), max_new_tokens=3, pad_token_id=0)
        with pytest.raises(UnsupportedModelError, match="rotary"):
            forward(model, AlayaCache(SETTINGS), prompt(20))

    def test_latent_attention(self) -> None:
        config = DeepseekV3Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            moe_intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
        )
        model = AutoModelForCausalLM.from_config(config, attn_implementation="alaya").eval()
        with pytest.raises(UnsupportedModelError) as caught:
            forward(model, AlayaCache(SETTINGS), prompt(20))
        says(caught.value, "grouped-query", "one shape", "keys (1, ", "values (1, ", "DynamicCache")

    def test_encoder_decoder(self) -> None:
        config = T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
        with pytest.raises(UnsupportedModelError) as caught:
            AlayaCache(config=config)
        says(caught.value, "encoder-decoder", "T5Config", "EncoderDecoderCache")
        model = T5ForConditionalGeneration(config).eval()
        with pytest.raises(ValueError):
            model.generate(prompt(20), **cache_argument(AlayaCache(SETTINGS)), max_new_tokens=3)

    def test_heads_that_do_not_divide(self) -> None:
        layer = AlayaLayer(SETTINGS)
        keys = torch.randn(1, 3, 5, 16)
        layer.update(keys, keys)
        with pytest.raises(UnsupportedModelError, match="4 query heads over 3"):
            layer.attend(torch.randn(1, 4, 5, 16), 0.25)

    def test_sliding_layers_never_become_full(self) -> None:
        """A cache filled by hand before anything told it the layers."""
        model = build("gemma3", "alaya")
        cache = AlayaCache(SETTINGS)
        keys = torch.randn(1, 2, 5, 16)
        cache.update(keys, keys, 0)
        cache.layers[0].attend(torch.randn(1, 4, 5, 16), 0.25)
        with pytest.raises(UnsupportedModelError) as caught:
            cache.bind(model.config)
        says(caught.value, "layer 0", "Gemma3TextConfig", "for_model")


class TestBatches:
    def test_other_batch_size(self, model: Any) -> None:
        cache = AlayaCache(SETTINGS)
        forward(model, cache, prompt(40))
        with pytest.raises(BatchSizeError) as caught:
            forward(model, cache, prompt(2, batch=3))
        says(caught.value, "holds 1", "3 were given", "batch_repeat_interleave")
        still_works(model, cache, prompt(40))

    def test_other_batch_size_in_generate(self, model: Any) -> None:
        cache = AlayaCache(SETTINGS)
        forward(model, cache, prompt(40))
        with pytest.raises(ValueError) as caught:
            generate(model, cache, prompt(44, batch=2))
        says(caught.value, "1", "2")

    def test_positive_crop(self, model: Any) -> None:
        cache = AlayaCache(SETTINGS)
        forward(model, cache, prompt(40))
        with pytest.raises(AlayaError) as caught:
            cache.crop(3)
        says(caught.value, "negative", "3", "crop(-3)")
        still_works(model, cache, prompt(40))


class TestHostMemory:
    def test_refused_before_anything_is_allocated(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """The need of all layers counts, although the first one alone would fit."""
        per_layer = 2 * 16 * 2 * 4 * 280
        monkeypatch.setattr(alaya_hf.storage.memory, "available_host_memory", lambda: per_layer + per_layer // 2)
        cache = AlayaCache(SETTINGS)
        with pytest.raises(HostMemoryError) as caught:
            forward(model, cache, prompt(300))
        says(caught.value, f"{per_layer + per_layer // 2:,}", "bytes", "free", "store_dtype")
        needed = int(re.search(r"needs ([\d,]+) bytes", str(caught.value))[1].replace(",", ""))  # type: ignore[index]
        assert needed >= 2 * per_layer
        assert cache.stats()["offloaded_bytes"] == 0
        assert isinstance(caught.value, MemoryError)

    def test_works_after_memory_was_freed(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        cache = AlayaCache(SETTINGS)
        with monkeypatch.context() as patch:
            patch.setattr(alaya_hf.storage.memory, "available_host_memory", lambda: 1000)
            with pytest.raises(HostMemoryError):
                forward(model, cache, prompt(300))
        cache.reset()
        dense = DynamicCache(config=model.config)
        torch.testing.assert_close(
            forward(model, cache, prompt(300))[:, -1], forward(model, dense, prompt(300))[:, -1], rtol=1e-4, atol=2e-4
        )

    def test_enough_is_enough(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """What all layers need, with the spare room that appending takes, is not refused."""
        needed = 2 * (2 * 16 * 2 * 4 * 280)
        monkeypatch.setattr(alaya_hf.storage.memory, "available_host_memory", lambda: 2 * needed)
        forward(model, AlayaCache(SETTINGS), prompt(300))


def test_everything_is_a_value_error() -> None:
    for kind in (
        BatchSizeError,
        ConfigError,
        HostMemoryError,
        IgnoredCacheError,
        PromptMismatchError,
        UnsupportedMaskError,
        UnsupportedModelError,
    ):
        assert issubclass(kind, AlayaError) and issubclass(kind, ValueError)


def test_full_is_not_refused() -> None:
    """The fixtures above raise for their reasons: the same calls without the fault work."""
    model = build("llama", "alaya")
    assert generate(model, AlayaCache(AlayaConfig(query=Full())), prompt(30), max_new_tokens=2).shape == (1, 32)
