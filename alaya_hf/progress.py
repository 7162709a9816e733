"""A progress bar over long prompts."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

SHORTEST = 4096
"""Tokens from which a prompt gets a bar."""


class PrefillProgress:
    """Shows how many tokens of a prompt have passed the layers, and how many a second.

    A token counts in shares, one for each layer that has attended to it, so that a prompt in one pass moves too. The bar is
    Transformers' own: ``transformers.utils.logging.disable_progress_bar`` hides it. On a GPU it shows what the host has handed
    over, which is a layer ahead of the device at most. Copies of a cache begin without a bar.
    """

    def __init__(self) -> None:
        self._bar: Any = None
        self._start = self._total = self._shown = self._layered = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefillProgress:
        return type(self)()

    def advance(self, new: int, past: int, expected: int, layers: int) -> None:
        """One more layer has attended to the tokens ``[past, past + new)``.

        Parameters
        ----------
        new, past : int
        expected : int
            Tokens that the cache will hold after the prompt, as far as is known; 0: this pass is the prompt.
        layers : int
            Layers that say so of each token.
        """
        if self._bar is not None and not self._start <= past < self._start + self._total:
            self.close()  # an earlier prompt was given up
        if self._bar is None:
            total = max(expected, past + new) - past
            if total < SHORTEST:
                return
            self._start, self._total, self._shown, self._layered = past, total, 0, 0
            self._bar = logging.tqdm(total=total, unit="tok", unit_scale=True, desc="prefill")
        self._layered += new
        done = min(self._total, self._layered // layers)
        self._bar.update(done - self._shown)
        self._shown = done
        if done == self._total:
            self.close()

    def close(self) -> None:
        """End the bar, if there is one."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
