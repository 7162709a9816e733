"""A rotary embedding extended afterwards is that of a model configured so from the start."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError, UnsupportedModelError
from alaya_hf.patches import extend_rope

LENGTH, FACTOR = 64, 4.0
SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
ROPES = {
    "linear": {"rope_type": "linear", "factor": FACTOR},
    "dynamic": {"rope_type": "dynamic", "factor": FACTOR},
    "yarn": {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": LENGTH},
    "llama3": {
        "rope_type": "llama3", "factor": FACTOR, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    },
}  # fmt: skip


def _model(rope=None, length=LENGTH):
    rope = {"rope_theta": 500000.0, "rope_type": "default", **(rope or {})}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=length, rope_parameters=rope)).eval()


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", ROPES)
def test_equal_to_a_model_made_so(kind):
    ids = torch.randint(1, 97, (1, 3 * LENGTH))
    model = _model()
    plain, config, state = _logits(model, ids), copy.deepcopy(model.config.to_dict()), model.model.rotary_emb.inv_freq
    wanted = _logits(_model(ROPES[kind], LENGTH if kind == "dynamic" else int(LENGTH * FACTOR)), ids)
    with extend_rope(model, FACTOR, kind):
        found = _logits(model, ids)
        # The embedding that a model made under the patch has is the same one.
        torch.testing.assert_close(_logits(_like(model), ids), wanted)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(found, plain, atol=1e-2)
    assert model.model.rotary_emb.inv_freq is state and model.config.to_dict() == config
    assert torch.equal(_logits(model, ids), plain)


def _like(model):
    """A model made from this one's configuration, with its weights."""
    other = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_with_a_cache_beyond_the_trained_length():
    ids = torch.randint(1, 97, (1, 3 * LENGTH))
    model = _model()
    with extend_rope(model, FACTOR):
        outs = [
            model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=6, do_sample=False)
            for cache in (AlayaCache(AlayaConfig(query="full", index="flat", window=(4, 20), min_context=0)), None)
        ]  # fmt: skip
    assert torch.equal(*outs)


def test_what_cannot_be_scaled_is_refused():
    with pytest.raises(UnsupportedModelError, match="scaled already"):
        extend_rope(_model(ROPES["yarn"], 256), 2)
    with pytest.raises(ConfigError, match="greater than 1"):
        extend_rope(_model(), 1)
    with pytest.raises(ConfigError, match="one of linear"):
        extend_rope(_model(), 2, "ntk")
    with pytest.raises(UnsupportedModelError, match="expected a Transformers model"):
        extend_rope(torch.nn.Linear(2, 2), 2)
    model = _model()
    with extend_rope(model, 2), pytest.raises(UnsupportedModelError, match="scaled already"):
        extend_rope(model, 2)
