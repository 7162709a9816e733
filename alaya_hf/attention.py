"""The attention and mask functions registered with Transformers under the name ``"alaya"``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from alaya_hf.errors import UnsupportedMaskError, UnsupportedModelError
from alaya_hf.handle import KVHandle
from alaya_hf.kernels.attention import exact_attention

NAME = "alaya"


class CacheLength(int):
    """The key length that an :class:`~alaya_hf.AlayaCache` reports to the mask functions, carrying the cache.

    Transformers hands mask functions this number but not the cache; without the link they would build a
    ``[query, key]`` mask that the cache never reads (1 GB for a chunk of 8K tokens at 128K).
    """

    cache: Any

    @staticmethod
    def of(length: int, cache: Any) -> CacheLength:
        """``length`` with a reference to ``cache``."""
        value = CacheLength(length)
        value.cache = cache
        return value


def alaya_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function ``"alaya"``.

    With an :class:`~alaya_hf.AlayaCache` it tells the cache which new tokens are padding and returns None: nothing of the
    size of the context is ever built. Otherwise it is the mask function of ``sdpa``.

    Parameters
    ----------
    batch_size, q_length, kv_length, mask_function, attention_mask, local_size, config, ...
        As Transformers passes them to every mask function.

    Returns
    -------
    Tensor or None
        ``[batch, 1, q, kv]`` bool for other caches and for sliding layers, None where no mask is needed.

    Raises
    ------
    UnsupportedMaskError
        If an AlayaCache layer is asked for anything but causal + padding.
    """
    length = kwargs.get("kv_length")
    if not isinstance(length, CacheLength):
        return sdpa_mask(*args, **kwargs)
    cache = length.cache
    cache.bind(kwargs.get("config"))
    if kwargs.get("local_size") is not None:
        # A sliding or chunked layer, asked for before the layers were known: they keep Transformers' own cache.
        return sdpa_mask(*args, **{**kwargs, "kv_length": int(length)})
    function = kwargs.get("mask_function", causal_mask_function)
    if function is not causal_mask_function:
        raise UnsupportedMaskError(
            "AlayaCache takes attention masks that are causal + padding, but this model or call adds another pattern "
            f"({getattr(function, '__qualname__', function)}): packed sequences, bidirectional image tokens or a custom "
            "mask function. Use a DynamicCache for it."
        )
    cache.note_mask(kwargs.get("attention_mask"), kwargs["q_length"], int(length))
    return None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Dense attention for what sdpa lacks: capped logits and learned sinks."""
    causal = attention_mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True)
    if causal:
        # As in sdpa, whose is_causal aligns top-left: a static cache's keys beyond the queries are empty slots.
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask == 0
    partial = exact_attention(query, key, value, scaling, causal=causal, mask=mask, softcap=softcap)
    out = partial.out
    if sinks is not None:
        # A sink takes its share of the mass and contributes no value.
        out = out * torch.sigmoid(partial.lse - sinks.float().view(1, -1, 1)).unsqueeze(-1)
    return out.to(query.dtype).transpose(1, 2).contiguous()


def alaya_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function ``"alaya"``.

    Keys that come from an :class:`~alaya_hf.AlayaCache` carry a handle to their layer, which attends to everything it
    holds. With any other cache this is ``sdpa``, and dense attention with float32 softmax where ``sdpa`` lacks a feature
    (capped logits, learned sinks).

    Parameters
    ----------
    module : nn.Module
        The attention module.
    query : Tensor
        ``[batch, heads, q_len, head_dim]``.
    key, value : Tensor
        ``[batch, kv_heads, n, head_dim]``.
    attention_mask : Tensor, optional
        As made by :func:`alaya_mask`.
    dropout : float
        Has to be 0 with an AlayaCache.
    scaling : float, optional
        Factor from scores to logits; ``head_dim ** -0.5`` by default.
    softcap, s_aux : optional
        Cap on the logits and ``[heads]`` sink logits, where the model has them.

    Returns
    -------
    out : Tensor
        ``[batch, q_len, heads, head_dim]``.
    weights : None
        Attention weights are never available.

    Raises
    ------
    AlayaError
        For ``output_attentions=True``, dropout, training, a mask that is not causal + padding or a position bias, with an
        AlayaCache.
    """
    if not isinstance(key, KVHandle):
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
        if kwargs.get("position_bias") is not None or dropout:
            raise UnsupportedModelError(
                "the attention implementation 'alaya' has no position bias or dropout beside capped logits or sinks. "
                'Use model.set_attn_implementation("eager").'
            )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _dense(module, query, key, value, attention_mask, scale, softcap, s_aux), None
    if sliding_window is not None:
        raise UnsupportedModelError(
            f"layer {key.layer.layer_idx} attends within a sliding window of {sliding_window} tokens, but this AlayaCache "
            "was made without the model's layer types. Use AlayaCache.for_model(model) or AlayaCache(config, model=model)."
        )
    if kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise UnsupportedModelError(
            "output_attentions=True was given, but attention weights over a retrieved subset do not exist as a matrix. Drop "
            "it, use cache.stats() to see what was attended, or a DynamicCache with attn_implementation='eager'."
        )
    if dropout or (module.training and torch.is_grad_enabled()):
        raise UnsupportedModelError(
            f"AlayaCache is for inference, but the model is training (dropout {dropout}). Call model.eval() and run under "
            "torch.no_grad()."
        )
    if kwargs.get("position_bias") is not None or kwargs.get("is_causal") is False:
        raise UnsupportedModelError(
            "AlayaCache serves causal attention with rotary positions, but this model adds a position bias or attends in both "
            "directions. Use a DynamicCache for this model."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.layer.attend(query, scale, softcap=softcap, sinks=s_aux, mask=attention_mask), None


def register() -> None:
    """Make ``attn_implementation="alaya"`` known to Transformers, attention and mask together."""
    AttentionInterface.register(NAME, alaya_attention)
    AttentionMaskInterface.register(NAME, alaya_mask)
