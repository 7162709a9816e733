"""BSFA: tiles below a calibrated threshold are skipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from alaya_hf.engine.prefill.base import Chunk, Prefill
from alaya_hf.engine.prefill.thresholds import Thresholds, load_thresholds
from alaya_hf.engine.prefill.tiles import TilePass
from alaya_hf.errors import ConfigError
from alaya_hf.kernels.sparse_prefill import Q_TILE
from alaya_hf.registry import PREFILLS


@PREFILLS.register("bsfa")
@dataclass(frozen=True)
class BSFA(Prefill):
    """Skip an off-diagonal tile whose largest logit is below the threshold of its layer, head and block of queries.

    Parameters
    ----------
    thresholds : str
        A file that ``python -m eval calibrate-bsfa`` wrote for this model.

    Raises
    ------
    ConfigError
        Without a path; when the file is read, at the first pass, for a file that is missing, malformed or of another
        model.

    Notes
    -----
    BSFA (arXiv 2512.07011). A threshold depends on what lies before its block of 128 queries and not on what follows: a
    file calibrated at a length serves every shorter one as if it had been calibrated there. Tokens beyond its length
    are refused.
    """

    thresholds: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.thresholds, str) or not self.thresholds:
            raise ConfigError(
                f"prefill 'bsfa' needs thresholds, the path of a file, but got {self.thresholds!r}. Make one with "
                "`python -m eval calibrate-bsfa`, or use prefill='blasst', which needs none."
            )

    def check_model(self, config: Any) -> None:
        """See :meth:`Prefill.check_model`."""
        load_thresholds(self.thresholds).check_model(config)

    def begin(self, chunk: Chunk) -> TilePass:
        """See :meth:`Prefill.begin`."""
        held = load_thresholds(self.thresholds)
        table = held.of_layer(chunk.layer_idx, chunk.q.shape[1], chunk.kv_heads, chunk.q.shape[3])

        def limits(places: list[int]) -> Tensor:
            self._check_length(held, places)
            return table[:, [place // Q_TILE for place in places]] / chunk.scaling

        return TilePass(chunk, limits, relative=False)

    def _check_length(self, held: Thresholds, places: list[int]) -> None:
        if places and places[-1] // Q_TILE >= held.table.shape[2]:
            raise ConfigError(
                f"{self.thresholds} was calibrated for contexts of {held.table.shape[2] * Q_TILE} tokens, but a chunk reaches "
                f"beyond token {places[-1]}. Calibrate at the longest length in use (`python -m eval calibrate-bsfa --tokens`)."
            )
