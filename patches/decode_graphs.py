"""Lets a cache replay a model's decode step.

A captured step stands in for a whole forward pass, so the only seam is the call of the model itself.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from alaya_hf.cache_argument import CACHE_ARGUMENT, renamed
from alaya_hf.patches.base import Patch


class DecodeGraphsPatch(Patch):
    """Asks the cache that a model is called with (``cache.graphs``) to run the call; other calls go to the model."""

    def _apply(self) -> None:
        self._own = PreTrainedModel.__dict__.get("__call__")
        original = self._own or nn.Module.__call__

        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            kwargs = renamed(kwargs, "graphs")
            cache = kwargs.get(CACHE_ARGUMENT)
            graphs = getattr(cache, "graphs", None)
            if graphs is None or args:
                return original(model, *args, **kwargs)
            return graphs(cache, model, original, kwargs)

        PreTrainedModel.__call__ = call  # type: ignore[method-assign, assignment]

    def _restore(self) -> None:
        if self._own is None:
            del PreTrainedModel.__call__
        else:
            PreTrainedModel.__call__ = self._own  # type: ignore[method-assign]


decode_graphs = DecodeGraphsPatch()
