"""Compiled blocks answer as the model does, and leave it as it was."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_utils import AttentionInterface

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.compiled_blocks import compiled_blocks


@pytest.mark.parametrize("implementation", ["alaya", "sdpa"])
def test_equal_and_restored(implementation: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    ids = torch.randint(0, 64, (1, 80))
    settings = AlayaConfig.preset("alaya").replace(window=(4, 16), min_context=0)
    cache = AlayaCache(settings)
    functions, update = dict(AttentionInterface._global_mapping), AlayaCache.update
    with torch.no_grad():
        model(input_ids=ids, **cache_argument(cache))
        twin = copy.deepcopy(cache)
        for token in range(5, 8):
            step = {"input_ids": torch.tensor([[token]]), "position_ids": torch.tensor([[cache.get_seq_length()]])}
            with compiled_blocks(model, AlayaCache, backend="eager"):
                found = model(**step, **cache_argument(cache)).logits
            wanted = model(**step, **cache_argument(twin)).logits
            torch.testing.assert_close(found, wanted)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3, "nothing was compiled"
    assert dict(AttentionInterface._global_mapping) == functions and AlayaCache.update is update
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


def test_unknown_blocks_and_other_threads() -> None:
    """Models whose blocks are not known run as they are; so do other threads, while blocks are compiled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    model, other, third = (
        AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)
        for _ in range(3)
    )
    model._no_split_modules = []
    ids = torch.randint(0, 64, (1, 40))
    cache, update = AlayaCache(AlayaConfig(window=(4, 16), min_context=0)), AlayaCache.update
    with torch.no_grad():
        model(input_ids=ids, **cache_argument(cache))
        with compiled_blocks(model, AlayaCache, backend="eager"):
            model(input_ids=ids[:, :1], **cache_argument(cache))
        assert [layer.get_seq_length() for layer in cache.layers] == [41] * 3
        held = AlayaCache(AlayaConfig(window=(4, 16), min_context=0))
        with compiled_blocks(third, AlayaCache, backend="eager"):
            thread = threading.Thread(target=lambda: other(input_ids=ids, **cache_argument(held)))
            thread.start()
            thread.join()
    assert [layer.get_seq_length() for layer in held.layers] == [40] * 3
    assert [layer.self_attn.layer_idx for layer in other.model.layers] == [0, 1, 2]
    assert AlayaCache.update is update
