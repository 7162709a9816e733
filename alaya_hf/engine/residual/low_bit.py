"""Two precisions: a low-bit copy of every key and value answers for the whole context."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from alaya_hf.engine.residual.base import Residual
from alaya_hf.errors import ConfigError
from alaya_hf.index import Hits
from alaya_hf.kernels import host
from alaya_hf.kernels.partial import Partial
from alaya_hf.registry import RESIDUALS
from alaya_hf.storage import Piece, Segment


@RESIDUALS.register("low_bit")
@dataclass(frozen=True)
class LowBit(Residual):
    """Attend to the left-out tokens through their low-bit keys and values.

    Parameters
    ----------
    key_bits : {2, 4, 8}
        Keys: min-max per channel per 64 tokens. An index ``quantized`` of as many bits shares the copy and its scores.
    value_bits : {2, 4}
        Values: min-max per token per 32 channels.
    skip : float
        Values are not read where they carry at most this share of the left-out mass of every head, see
        :func:`~alaya_hf.kernels.cpu.lowbit_attend.lowbit_attention`.

    Notes
    -----
    Cost: one read of the low-bit copy per step, 23 % of the bytes of a bfloat16 context with 4-bit keys and 2-bit values.
    """

    key_bits: int = 4
    value_bits: int = 2
    skip: float = 1e-2

    def __post_init__(self) -> None:
        if self.key_bits not in (2, 4, 8):
            raise ConfigError(f"residual.key_bits must be 2, 4 or 8, but got {self.key_bits!r}.")
        if self.value_bits not in (2, 4):
            raise ConfigError(f"residual.value_bits must be 2 or 4, but got {self.value_bits!r}.")
        if not 0 <= float(self.skip) < 1:
            raise ConfigError(f"residual.skip must be in [0, 1), but got {self.skip!r}.")

    def prepare(self, segment: Segment) -> None:
        """See :meth:`Residual.prepare`."""
        segment.lowbit(self.key_bits, self.value_bits)

    def nbytes(self, segment: Segment) -> int:
        """See :meth:`Residual.nbytes`."""
        return segment.lowbit_nbytes(self.key_bits, self.value_bits)

    def estimate(self, q: Tensor, piece: Piece, hits: Hits, mask: Tensor | None, scaling: float) -> Partial:
        """See :meth:`Residual.estimate`."""
        low = piece.segment.lowbit(self.key_bits, self.value_bits)
        scores = hits.all_scores
        if scores is None:
            scores = host.lowbit_scores(q, low)[:, :, : piece.length]
        host.leave_out(scores, hits.ids, hits.offsets, mask)
        if scores.shape[2] < low.num_tokens:
            # A prefix of the segment: what follows it does not exist for this row.
            padded = scores.new_full((*scores.shape[:2], low.num_tokens), float("-inf"))
            padded[:, :, : scores.shape[2]] = scores
            scores = padded
        return host.lowbit_attention(low, scores, scaling, skip=self.skip)
