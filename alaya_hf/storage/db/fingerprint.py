"""What a context depends on besides its tokens: the model, down to its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

# What a configuration says about where it came from and how the model is run, not about keys and values.
_IRRELEVANT = {
    "_name_or_path",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "architectures",
    "attn_implementation",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings", "partial_rotary_factor")
_SAMPLES = 64  # elements looked at per parameter


def fingerprint(model: Any) -> dict[str, str]:
    """What makes two models' keys and values interchangeable, in parts that can be named when they differ.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    dict of str to str
        ``config``, ``dtype``, ``rope``, ``adapter``, ``weights``. The last is a digest of 64 elements of every parameter:
        two checkpoints of one architecture differ in nearly all of them.

    Notes
    -----
    Reads some 20,000 numbers in one transfer per device. Parameters that Accelerate keeps off memory are left out.
    """
    config = model.config.get_text_config(decoder=True)
    plain = {key: value for key, value in config.to_dict().items() if key not in _IRRELEVANT and key not in _ROPE}
    rope = {key: getattr(config, key, None) for key in _ROPE}
    buffers = {
        name: _digest([buffer])
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and _there(buffer)
    }
    adapters = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None) if adapters else None
    active = active() if callable(active) else active
    names = sorted(adapters) if active is None else sorted(active if isinstance(active, (list, tuple)) else [active])
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if _there(parameter)]
    sampled = _digest([parameter for _, parameter in parameters])
    return {
        "config": _plain(plain),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": _plain({**rope, "frequencies": sorted(set(buffers.values()))}),
        "adapter": ", ".join(names) or "none",
        "weights": sampled,
    }


def digest_of(fields: Mapping[str, str]) -> bytes:
    """16 bytes that stand for a fingerprint."""
    return blake2b(_plain(dict(fields)).encode(), digest_size=16).digest()


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """Which parts differ, and how, for a message."""
    said = []
    for name in sorted(set(ours) | set(theirs)):
        mine, other = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if mine == other:
            continue
        if name in ("config", "rope"):
            a, b = _parsed(mine), _parsed(other)
            keys = [key for key in sorted(set(a) | set(b)) if a.get(key) != b.get(key)]
            said.append(f"{name} ({', '.join(f'{key}: {b.get(key)!r}, now {a.get(key)!r}' for key in keys[:4])})")
        else:
            said.append(f"{name} ({other}, now {mine})")
    return "; ".join(said)


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"value": text}


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _there(tensor: Tensor) -> bool:
    return tensor.device.type != "meta" and tensor.numel() > 0


def _digest(tensors: list[Tensor]) -> str:
    """Of a few elements of each tensor, evenly spread; independent of the device."""
    total = blake2b(digest_size=16)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    taken: list[Tensor] = [torch.empty(0)] * len(tensors)
    for number, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        step = max(1, flat.numel() // _SAMPLES)
        by_device.setdefault(tensor.device, []).append((number, flat[::step][:_SAMPLES].to(torch.float32)))
    for samples in by_device.values():
        together = torch.cat([sample for _, sample in samples]).cpu()
        parts = together.split([sample.numel() for _, sample in samples])
        for (number, _), part in zip(samples, parts, strict=True):
            taken[number] = part
    for tensor, part in zip(tensors, taken, strict=True):
        total.update(str(tuple(tensor.shape)).encode())
        total.update(part.contiguous().numpy().tobytes())
    return total.hexdigest()
