"""What a query is: a rule that turns scores into a cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from alaya_hf.errors import ConfigError


class Query(ABC):
    """A rule that says which offloaded tokens are critical for a query vector.

    Implementations are frozen dataclasses of their parameters, registered by name.
    """

    kind: str
    #: Whether the cut depends on the score of every token, so that only indexes that score all of them can answer.
    needs_all_scores: ClassVar[bool] = False
    #: Whether the rule means the same on a selection of tokens as on all of them.
    cut_again: ClassVar[bool] = True

    @abstractmethod
    def threshold(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The lowest score that is still critical, per query head.

        Parameters
        ----------
        scores : Tensor
            ``[kv_heads, group, n]`` float32, unscaled inner products of the offloaded tokens, exact or approximate.
        best : Tensor
            ``[kv_heads, group]`` float32, the highest score inside the window.
        scaling : float
            Factor from scores to logits.
        window_lse : Tensor
            ``[kv_heads, group]`` float32, log-sum-exp of the window's logits.

        Returns
        -------
        Tensor
            ``[kv_heads, group]`` float32. Token ``j`` is critical iff ``scores[..., j] >= threshold``.
        """

    @property
    def cuts_segments(self) -> bool:
        """Whether what several segments found, each for itself, has to be cut again: :meth:`threshold_over_segments`."""
        return self.cut_again

    def threshold_over_segments(self, scores: Tensor, best: Tensor, scaling: float, window_lse: Tensor) -> Tensor:
        """The lowest critical score over what all segments found; arguments as for :meth:`threshold`."""
        return self.threshold(scores, best, scaling, window_lse)

    @property
    def keeps_all(self) -> bool:
        """Whether the answer is always the whole context, so that no index has to be asked."""
        return False

    @property
    def keeps_none(self) -> bool:
        """Whether the answer is always empty."""
        return False


def check_cap(cap: object) -> None:
    """Refuse a cap that is not None or a positive integer.

    Raises
    ------
    ConfigError
    """
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise ConfigError(f"query.cap must be an integer of at least 1, or none, but got {cap!r}.")
