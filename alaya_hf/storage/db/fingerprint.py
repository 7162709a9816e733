"""What a context depends on besides its tokens: the model, down to its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from alaya_hf.errors import UnsupportedModelError

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
# What a module has that computes no rotary embedding.
_PLAIN = {*vars(torch.nn.Linear(1, 1)), *vars(torch.nn.Embedding(1, 1)), "_is_hf_initialized", "variance_epsilon"}
_SAMPLES = 64  # elements looked at per parameter
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: Any) -> dict[str, str]:
    """What makes two models' keys and values interchangeable, in parts that can be named when they differ.

    Parameters
    ----------
    model : PreTrainedModel

    Returns
    -------
    dict of str to str
        ``config``, ``dtype``, ``rope``, ``adapter``, ``weights``. The last is a digest of 64 elements of every parameter and
        of every persistent buffer, which is where quantised checkpoints keep their weights: two checkpoints of one
        architecture differ in nearly all of them. ``rope`` has the frequencies in use and their attention scaling, and
        ``adapter`` which PEFT adapters are active, with their state (disabled, merged) and scaling.

    Raises
    ------
    UnsupportedModelError
        If Accelerate keeps parameters off memory, where they cannot be looked at.

    Notes
    -----
    Reads some 20,000 numbers in one transfer per device and dtype. Nothing is kept between calls: weights change in ways
    that leave no trace (``parameter.data.copy_``). A change of few weights can fall between the samples.
    """
    config = model.config.get_text_config(decoder=True)
    plain = {key: value for key, value in config.to_dict().items() if key not in _IRRELEVANT and key not in _ROPE}
    rope = {key: getattr(config, key, None) for key in _ROPE}
    weights = [*model.named_parameters(), *_persistent_buffers(model)]
    away = [name for name, tensor in weights if tensor.device.type == "meta"]
    if away:
        raise UnsupportedModelError(
            f"{len(away)} weights of the model are kept off memory (the meta device; the first is {away[0]}), "
            "so that its contexts "
            "cannot be told from another checkpoint's. Load the model onto devices, without offloading to the host or to disk "
            "by device_map."
        )
    return {
        "config": _plain(plain),
        "dtype": str(model.dtype).removeprefix("torch."),
        "rope": _plain({**rope, **_rotary(model)}),
        "adapter": _adapters(model),
        "weights": _digest([tensor for _, tensor in weights if tensor.numel()]),
    }


def _persistent_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """Buffers that a checkpoint holds."""
    return [
        (f"{prefix}.{name}", buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _rotary(model: Any) -> dict[str, Any]:
    """The rotary embedding as it is computed, whatever the configuration says."""
    frequencies, scalings = set(), set()
    for module in model.modules():
        # Most modules have nothing of their own to look at; asking each for all that it has would take longer than the rest.
        if not module._buffers and _PLAIN.issuperset(vars(module)):
            continue
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, Mapping) else {kinds}
        # These change with the length of a pass; what they start from does not.
        ending = "original_inv_freq" if kinds & {"dynamic", "longrope"} else "inv_freq"
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if name.endswith(ending) and isinstance(value, Tensor) and value.numel() and value.device.type != "meta":
                frequencies.add(_digest([value]))
            elif name.endswith("attention_scaling") and isinstance(value, (int, float)):
                scalings.add(float(value))
    return {"frequencies": sorted(frequencies), "attention_scaling": sorted(scalings)}


def _adapters(model: Any) -> str:
    """Which adapters are active, and how; ``"none"`` without any."""
    adapters = getattr(model, "peft_config", None) or {}
    if not adapters:
        return "none"
    active = getattr(model, "active_adapters", None)
    if callable(active):
        try:
            active = active()
        except ValueError:
            # Transformers raises where PEFT has layers but no adapter of them is active.
            active = []
    names = sorted(adapters) if active is None else sorted(active if isinstance(active, (list, tuple)) else [active])
    states = set()
    for module in model.modules():
        # PEFT's tuner layers, recognised by what they all have, so that PEFT is not needed to ask.
        if not hasattr(module, "disable_adapters") or not hasattr(module, "merged"):
            continue
        scaling = getattr(module, "scaling", None)
        scaling = {str(key): str(value) for key, value in scaling.items()} if isinstance(scaling, Mapping) else {}
        merged = sorted(map(str, getattr(module, "merged_adapters", []) or [])) or bool(module.merged)
        states.add(_plain({"disabled": bool(module.disable_adapters), "merged": merged, "scaling": scaling}))
    return "; ".join([", ".join(names) or "none active", *sorted(states)])


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


def _digest(tensors: list[Tensor]) -> str:
    """Of a few elements of each tensor, evenly spread; independent of the device."""
    total = blake2b(digest_size=16)
    plain = [inner for tensor in tensors for inner in _inner(tensor.detach())]
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    samples: list[Tensor] = []
    for number, tensor in enumerate(plain):
        flat = tensor.reshape(-1) if tensor.is_contiguous() else tensor.flatten()
        # An odd step: the columns of a matrix are often a power of two, and an even one would meet few of them.
        step = max(1, flat.numel() // _SAMPLES - 1 | 1) if flat.numel() > _SAMPLES else 1
        sample = flat[::step][:_SAMPLES]
        sample = torch.view_as_real(sample).flatten() if sample.is_complex() else sample
        # As the bits that they are: packed weights are integers, and rounding would hide what differs.
        samples.append(sample.view(_WORDS[sample.element_size()]))
        groups.setdefault((sample.device, samples[-1].dtype), []).append(number)
    for members in groups.values():
        together = torch.cat([samples[number] for number in members]).cpu()
        for number, part in zip(members, together.split([samples[n].numel() for n in members]), strict=True):
            samples[number] = part
    for tensor, sample in zip(plain, samples, strict=True):
        total.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(sample.contiguous().numpy().tobytes())
    return total.hexdigest()


def _inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor subclass (quantised, distributed) wraps; a plain one itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [inner for name in names for inner in _inner(getattr(tensor, name))]
