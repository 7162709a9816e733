"""BLASST: tiles far below the running maximum are skipped, without calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from alaya_hf.engine.prefill.base import Chunk, Prefill
from alaya_hf.engine.prefill.tiles import TilePass
from alaya_hf.errors import ConfigError
from alaya_hf.registry import PREFILLS


@PREFILLS.register("blasst")
@dataclass(frozen=True)
class BLASST(Prefill):
    """Skip a tile whose every weight is below ``lam`` times the largest weight that its row has seen.

    Parameters
    ----------
    lam : float, optional
        In [0, 1]; 0 skips nothing. Default, if there is no ``scale`` either: 1e-3.
    scale : float, optional
        Instead of ``lam``: ``lam = min(1, scale / tokens)`` with the tokens that the tile's first query sees.

    Raises
    ------
    ConfigError

    Notes
    -----
    BLASST (arXiv 2512.12087): the rule ``rowmax(tile) - running maximum < ln(lam)`` for all rows, and ``lam`` inversely
    proportional to the length. The running maximum is carried through the blocks of an offloaded prefix. The chunk
    itself and the window come first here, the paper goes from left to right: either keeps what the rule says, this one
    skips more.
    """

    lam: float | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.lam is not None and self.scale is not None:
            raise ConfigError(f"prefill 'blasst' takes lam or scale, but got lam={self.lam} and scale={self.scale}.")
        for name, value, most in (("lam", self.lam, 1.0), ("scale", self.scale, math.inf)):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value <= most and math.isfinite(value)):
                raise ConfigError(
                    f"prefill.{name} must be a number {'in [0, 1]' if most == 1 else 'of at least 0'}, but got {value!r}."
                )

    def margin(self, tokens: int) -> float:
        """``ln(lam)`` for a query that sees so many tokens."""
        lam = (
            min(1.0, self.scale / max(1, tokens)) if self.scale is not None else 1e-3 if self.lam is None else self.lam
        )
        return math.log(lam) if lam > 0 else -math.inf

    def begin(self, chunk: Chunk) -> TilePass:
        """See :meth:`Prefill.begin`."""
        heads = chunk.q.shape[1]

        def limits(places: list[int]) -> torch.Tensor:
            return (
                torch.tensor([self.margin(place + 1) / chunk.scaling for place in places])
                .expand(heads, -1)
                .contiguous()
            )

        return TilePass(chunk, limits, relative=True)
