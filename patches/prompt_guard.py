"""Refuses a prompt that does not continue what an AlayaCache holds.

``generate`` slices the prompt by the cache's length and never compares the two, so another prompt gives a wrong answer and
no error. Only ``prepare_inputs_for_generation`` sees the ids and the cache together.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.generation import GenerationMixin

from alaya_hf.cache_argument import CACHE_ARGUMENT, renamed
from alaya_hf.patches.base import Patch


class PromptGuard(Patch):
    """Shows the ids of every forward pass of ``generate`` to the cache (``cache.expect``)."""

    def _apply(self) -> None:
        original = self._original = GenerationMixin.prepare_inputs_for_generation

        @functools.wraps(original)
        def prepare(
            model: Any, input_ids: Any, next_sequence_length: int | None = None, *args: Any, **kwargs: Any
        ) -> Any:
            kwargs = renamed(kwargs, "expect")
            cache: Any = args[0] if args else kwargs.get(CACHE_ARGUMENT)
            expect = getattr(cache, "expect", None)
            embedded = kwargs.get("inputs_embeds") is not None
            if expect is not None and not embedded:
                cache.bind(model.config)
                expect(input_ids, next_sequence_length, bool(kwargs.get("is_first_iteration", False)))
            return original(model, input_ids, next_sequence_length, *args, **kwargs)

        GenerationMixin.prepare_inputs_for_generation = prepare  # type: ignore[method-assign]

    def _restore(self) -> None:
        GenerationMixin.prepare_inputs_for_generation = self._original  # type: ignore[method-assign]


prompt_guard = PromptGuard()
