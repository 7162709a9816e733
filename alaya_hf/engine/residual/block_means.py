"""Block means: one mean value (and key) stands for the tokens of a block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alaya_hf.engine.residual.base import Residual
from alaya_hf.errors import ConfigError
from alaya_hf.index import Hits, Index
from alaya_hf.kernels import host
from alaya_hf.kernels.partial import Partial
from alaya_hf.registry import RESIDUALS
from alaya_hf.storage import Piece, Segment


@RESIDUALS.register("block_means")
@dataclass(frozen=True)
class BlockMean(Residual):
    """Attend to the left-out tokens through the mean value of their block.

    Where the index scored every token (``flat``, ``quantized``), a block's mass is the sum over its left-out tokens.
    Where it did not (``coarse``, ``graph``), the mass is estimated from the block's mean key.

    Parameters
    ----------
    block : int
        Tokens per block. 32 suits means of values, 16 means of keys and values.
    keys : {"auto", True, False}
        Whether to estimate masses from mean keys; ``"auto"``: only if there are no scores.

    Notes
    -----
    Cost per token at head dimension 128: 8 bytes (values) or 32 bytes (keys and values, blocks of 16) per KV head, against
    512 in bfloat16.
    """

    block: int = 32
    keys: str | bool = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 1:
            raise ConfigError(f"residual.block must be an integer of at least 1, but got {self.block!r}.")
        if self.keys not in ("auto", True, False):
            raise ConfigError(f"residual.keys must be 'auto', true or false, but got {self.keys!r}.")

    def check(self, index: object) -> None:
        """See :meth:`Residual.check`."""
        if self.keys is False and not getattr(index, "scores_all", False):
            raise ConfigError(
                f"residual.keys is false, but the index {getattr(index, 'kind', index)!r} does not score every token, so masses "
                "need the mean keys. Use keys: auto, or the index 'flat' or 'quantized'."
            )

    def prepare(self, segment: Segment) -> None:
        """Nothing: the means are made when they are first read."""

    def accelerate(self, segment: Segment, index: Index) -> None:
        """See :meth:`Residual.accelerate`."""
        segment.means(self.block, self.keys is True or not index.scores_all, segment.used)

    def nbytes(self, segment: Segment) -> int:
        """See :meth:`Residual.nbytes`."""
        return segment.means_nbytes(self.block)

    def estimate(self, q: Tensor, piece: Piece, hits: Hits, mask: Tensor | None, scaling: float) -> Partial:
        """See :meth:`Residual.estimate`."""
        with_keys = self.keys is True or hits.all_scores is None
        means = piece.segment.means(self.block, with_keys, piece.length)
        scores = None if with_keys else hits.all_scores
        return host.block_mean_attention(
            q, means, scaling, scores=scores, kv=piece.view, ids=hits.ids, offsets=hits.offsets, mask=mask
        )
