"""Models of a published shape with random weights: honest times and memory, no quality."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

#: Shapes by name; vocabulary and rotary embedding of Llama 3.
SHAPES: dict[str, dict[str, int]] = {
    "llama-3-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-3-70b": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 128,
    },
}  # fmt: skip


def shape_config(shape: str, dtype: torch.dtype, layers: int = 0) -> LlamaConfig:
    """The configuration of a shape of :data:`SHAPES`, or of its first `layers` layers."""
    settings = {"vocab_size": 128256, **SHAPES[shape]}
    if layers:
        settings["num_hidden_layers"] = layers
    return LlamaConfig(
        **settings, max_position_embeddings=1 << 21, rope_theta=500000.0, dtype=dtype, pad_token_id=0, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip


def random_model(
    shape: str, device: str, dtype: torch.dtype, layers: int = 0, seed: int = 0, shared: bool = False
) -> Any:
    """A causal language model of this shape, in evaluation mode, its weights made on the device.

    Parameters
    ----------
    shape : str
        Of :data:`SHAPES`.
    layers : int
        Only so many of its layers; 0: all.
    shared : bool
        Let all layers have one layer's weights. A device then runs every layer of a model whose weights it could not hold: a step
        takes as long, since a layer's weights are many times what a cache holds and come from memory each time they are read.
    """
    config = shape_config(shape, dtype, layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            shape_config(shape, dtype, 1) if shared else config, dtype=dtype, attn_implementation="sdpa"
        )
    model = model.to_empty(device=device)
    if shared:
        _repeat_layer(model, config.num_hidden_layers)
    # What is computed and not stored would be lost with the meta device.
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.fill_(1)
            else:
                weight.normal_(0, 0.02)
    return model.eval()


def _repeat_layer(model: Any, layers: int) -> None:
    """Let a model of one layer have so many, each a module of its own over the same weights."""
    (first,) = model.model.layers
    same = [*first.parameters(), *first.buffers(), model.config]
    for index in range(1, layers):
        layer = copy.deepcopy(first, {id(each): each for each in same})
        layer.self_attn.layer_idx = index
        model.model.layers.append(layer)
    model.config.num_hidden_layers = layers
