"""What a residual is: an estimate of the tokens that a query leaves out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from alaya_hf.index import Hits, Index
from alaya_hf.kernels.partial import Partial
from alaya_hf.storage import Piece, Segment


class Residual(ABC):
    """Parameters and arithmetic of a residual: a frozen dataclass registered by name."""

    kind: str
    #: Whether nothing is estimated.
    is_none: ClassVar[bool] = False

    def check(self, index: Index) -> None:  # noqa: B027  (most residuals follow every index)
        """Refuse an index that this residual cannot follow.

        Raises
        ------
        ConfigError
        """

    @abstractmethod
    def prepare(self, segment: Segment) -> None:
        """Bring what the estimate reads up to date with the segment; called before the index searches it."""

    def accelerate(self, segment: Segment, index: Index) -> None:
        """Build everything that the estimate reads beside this index, so that it can be stored with the segment."""
        self.prepare(segment)

    @abstractmethod
    def nbytes(self, segment: Segment) -> int:
        """Bytes that the estimate keeps for a segment."""

    @abstractmethod
    def estimate(self, q: Tensor, piece: Piece, hits: Hits, mask: Tensor | None, scaling: float) -> Partial:
        """Attention to the tokens that are not attended exactly.

        Parameters
        ----------
        q : Tensor
            ``[kv_heads, group, head_dim]`` float32.
        piece : Piece
            The tokens searched.
        hits : Hits
            What was found; ``hits.all_scores`` may be overwritten.
        mask : Tensor or None
            ``[group, total]`` uint8: which query head attends to which hit; None: every head of the group to all.
        scaling : float

        Returns
        -------
        Partial
            ``[kv_heads, group]``; empty where every token was attended exactly.
        """
