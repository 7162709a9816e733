"""Tells an AlayaCache how long a prompt is before its first chunk comes.

With ``prefill_chunk_size`` a cache sees one chunk after the other and would have to grow, and copy, as it goes. Only
``generate`` itself has the whole prompt.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from transformers.generation import GenerationMixin

from alaya_hf.cache_argument import CACHE_ARGUMENT, renamed
from alaya_hf.patches.base import Patch


class Reservation(Patch):
    """Shows the length of a prompt to the cache that ``generate`` is called with (``cache.reserve``)."""

    def _apply(self) -> None:
        original = self._original = GenerationMixin.generate

        @functools.wraps(original)
        def generate(model: Any, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
            kwargs = renamed(kwargs, "reserve")
            reserve = getattr(kwargs.get(CACHE_ARGUMENT), "reserve", None)
            ids = kwargs.get("input_ids") if inputs is None else inputs
            if callable(reserve) and isinstance(ids, Tensor) and ids.dim() == 2:
                reserve(ids.shape[1])
            return original(model, inputs, *args, **kwargs)

        GenerationMixin.generate = generate  # type: ignore[method-assign]

    def _restore(self) -> None:
        GenerationMixin.generate = self._original  # type: ignore[method-assign]


reservation = Reservation()
