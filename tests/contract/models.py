"""Small random models whose greedy choices are clear enough that rounding cannot change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # The default of 0.02 makes attention uniform and logits nearly tied.
    "initializer_range": 0.4,
}
_SLIDING = {"sliding_window": 8, "num_hidden_layers": 3}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_SHAPE),
    "qwen2": lambda: Qwen2Config(**_SHAPE),
    "qwen3": lambda: Qwen3Config(**_SHAPE),
    "mistral": lambda: MistralConfig(**{**_SHAPE, "sliding_window": 8}),
    "mixtral": lambda: MixtralConfig(
        **{**_SHAPE, "sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "gemma2": lambda: Gemma2Config(
        **{**_SHAPE, **_SLIDING},
        query_pre_attn_scalar=16,
        attn_logit_softcapping=20.0,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SHAPE, **_SLIDING},
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **{**_SHAPE, **_SLIDING},
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}

# The implementation that dense attention is computed with; sdpa has neither sinks nor capped logits.
DENSE = {"gpt_oss": "eager", "gemma2": "eager"}


def build(name: str, attn_implementation: str | None = None, seed: int = 0) -> Any:
    """A float32 model in evaluation mode; equal weights for equal names and seeds."""
    torch.manual_seed(seed)
    kwargs = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32, **kwargs).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                parameter.uniform_(-1.0, 3.0)
    return model


def prompt(length: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """``[batch, length]`` random token ids without the padding id."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def pad_left(rows: list[torch.Tensor], extra: int = 0) -> dict[str, torch.Tensor]:
    """Rows of unequal length as a left-padded batch, with ``extra`` more columns of padding."""
    width = max(len(row) for row in rows) + extra
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = row
        mask[number, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}
