"""The caches that every test of the battery runs over.

A new preset joins by itself: every file in ``configs/`` is taken in with a window small enough for the battery's prompts.
Another configuration is one more line in ``EXACT`` (keeps everything, so tokens equal dense attention's) or ``SPARSE``.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import DynamicCache

from alaya_hf import DIPR, AlayaCache, AlayaConfig, Full, TopK

# Small enough that prompts of 20 tokens are offloaded and a few decode steps flush the window.
SMALL: dict[str, Any] = {"window": {"init": 4, "local": 16, "overflow": 4}, "min_context": 0}
TINY: dict[str, Any] = {"window": {"init": 0, "local": 1, "overflow": 0}, "min_context": 0}

# What depends on nothing but the tokens held: a low-bit copy also remembers how they came in.
EXACT_SEARCH: dict[str, Any] = {"index": "flat", "residual": "none"}

EXACT: dict[str, AlayaConfig] = {
    "full": AlayaConfig(query=Full(), **SMALL),
    "full_tiny_window": AlayaConfig(query=Full(), **TINY),
    "full_streams_prefix": AlayaConfig(query=Full(), max_sparse_queries=2, prefill_block=5, **SMALL),
    "full_no_overflow": AlayaConfig(query=Full(), window={"init": 2, "local": 8, "overflow": 0}, min_context=0),
    "dipr_inf": AlayaConfig(query=DIPR(beta=math.inf), **SMALL),
    "topk_all_union": AlayaConfig(query=TopK(100_000), **SMALL),
    "topk_all_per_head": AlayaConfig(query=TopK(100_000), group_mode="per_head", **SMALL),
    "dipr_wide_per_head": AlayaConfig(query=DIPR(beta=1e9), group_mode="per_head", **TINY),
    "dense_layers": AlayaConfig(query=TopK(1), dense_layers=tuple(range(8)), **SMALL),
    "per_layer": AlayaConfig(
        query=TopK(0), layers={"default": {"query": "full"}, 0: {"query": DIPR(alpha=0)}}, **SMALL
    ),
    "default": AlayaConfig(),
    "default_query_late_offload": AlayaConfig(
        query=Full(), window={"init": 4, "local": 16, "overflow": 0}, min_context=30
    ),
}

SPARSE: dict[str, AlayaConfig] = {
    **{f"preset_{name}": AlayaConfig.preset(name).replace(**SMALL) for name in AlayaConfig.presets()},
    "dipr_per_head": AlayaConfig(query=DIPR(), group_mode="per_head", **SMALL),
    "topk2_union": AlayaConfig(query=TopK(2), **EXACT_SEARCH, **SMALL),
    "topk2_tiny_window": AlayaConfig(query=TopK(2), **EXACT_SEARCH, **TINY),
    # The first tokens of layer 1 outnumber what leaves its window.
    "topk2_per_layer": AlayaConfig(query=TopK(2), layers={1: {"query": "dipr", "window": {"local": 8}}}, **SMALL),
}

# Configurations under which the prompts of the battery stay in the window as a whole.
NEVER_OFFLOADS = {"default"}


def make(name: str, model: Any, **kwargs: Any) -> Any:
    """A fresh cache for ``model``; ``"dynamic"`` is Transformers' own."""
    if name == "dynamic":
        return DynamicCache(config=model.config)
    settings = EXACT.get(name) or SPARSE[name]
    return AlayaCache(settings, **kwargs)
