"""The cache on a CUDA device: window and model on the GPU, the store in host memory."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig, Full
from alaya_hf.cache_argument import cache_argument
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.exact.plain import Plain

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, initializer_range=0.3, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().eval()
    model.generation_config.pad_token_id = 0
    return model


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 200}], ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "alaya"])
def test_full_query_equals_dense(model, implementation, options):
    model.set_attn_implementation(implementation)
    ids = torch.randint(1, 256, (2, 600), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :77] = 0
    call = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, **options}
    dense = model.generate(ids, **cache_argument(DynamicCache()), **call)
    settings = AlayaConfig(query=Full(), window=(16, 64), min_context=0)
    assert torch.equal(model.generate(ids, **cache_argument(AlayaCache(settings)), **call), dense)


@pytest.mark.parametrize("preset", AlayaConfig.presets())
def test_presets_decode_and_copies_agree(model, preset):
    settings = AlayaConfig.preset(preset).replace(window=(16, 64), min_context=0)
    ids = torch.randint(1, 256, (1, 600), device="cuda")
    cache = AlayaCache(settings)
    model(input_ids=ids[:, :-1], **cache_argument(cache))
    fork = copy.deepcopy(cache)
    first = model.generate(ids, **cache_argument(cache), max_new_tokens=8, do_sample=False)
    again = model.generate(ids, **cache_argument(fork), max_new_tokens=8, do_sample=False)
    assert torch.equal(first, again)
    assert cache.layers[0].window.view()[0].is_cuda
    assert not cache.layers[0].store.segments[0].kv.is_cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_error_is_at_most_twice_plain(dtype, causal):
    q = torch.randn(2, 8, 300, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 2, 2, 300, 64, device="cuda", dtype=dtype)
    truth = Plain().run(q.float(), k.float(), v.float(), 0.125, causal, None, None)
    found = exact_attention(q, k, v, 0.125, causal=causal)
    keys, values = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    plain = torch.nn.functional.scaled_dot_product_attention(q, keys, values, is_causal=causal).float()
    assert (found.out - truth.out).abs().max() <= 2 * (plain - truth.out).abs().max() + 1e-5
    assert (found.lse - truth.lse).abs().max() < 1e-2
