"""Lets an unmodified model work with an AlayaCache.

A model that runs ``sdpa`` or ``flash_attention_2`` (the default of ``from_pretrained``) looks its attention function up by
that name. While this patch is on, the entries of those names first look whether the keys carry an AlayaCache's handle, and
the mask functions whether the key length does; everything else goes to the original function, unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from alaya_hf.attention import CacheLength, alaya_attention, alaya_mask
from alaya_hf.errors import IgnoredCacheError
from alaya_hf.handle import KVHandle
from alaya_hf.patches.base import Patch

ROUTED = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
REFUSED = ("eager", "flex_attention")


def _routed_attention(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        function = alaya_attention if isinstance(key, KVHandle) else original
        return function(module, query, key, value, *args, **kwargs)

    return attention


def _routed_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        length = kwargs.get("kv_length")
        if not isinstance(length, CacheLength):
            return original(*args, **kwargs)
        if kwargs.get("local_size") is None:
            return alaya_mask(*args, **kwargs)
        length.cache.bind(kwargs.get("config"))
        return original(*args, **{**kwargs, "kv_length": int(length)})

    return mask


def _refusing_mask(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        length = kwargs.get("kv_length")
        if not isinstance(length, CacheLength):
            return original(*args, **kwargs)
        length.cache.bind(kwargs.get("config"))
        if kwargs.get("local_size") is None:
            raise IgnoredCacheError(
                f"the model runs attn_implementation={name!r}, which ignores an AlayaCache. Expected 'alaya' (or 'sdpa' / "
                "'flash_attention_2', which are routed). Call model.set_attn_implementation(\"alaya\")."
            )
        return original(*args, **{**kwargs, "kv_length": int(length)})

    return mask


class Routing(Patch):
    """Routes ``sdpa`` and ``flash_attention_*`` to the cache, and makes ``eager`` say what to do."""

    def _apply(self) -> None:
        self._attention: dict[str, Any] = {}
        self._masks: dict[str, Any] = {}
        attention, masks = AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping
        for name in ROUTED:
            if name in attention:
                self._attention[name] = attention[name]
                attention[name] = _routed_attention(attention[name])
            if name in masks:
                self._masks[name] = masks[name]
                masks[name] = _routed_mask(masks[name])
        for name in REFUSED:
            if name in masks:
                self._masks[name] = masks[name]
                masks[name] = _refusing_mask(masks[name], name)

    def _restore(self) -> None:
        AttentionInterface._global_mapping.update(self._attention)
        AttentionMaskInterface._global_mapping.update(self._masks)


routing = Routing()
