"""How the tokens that a query leaves out are estimated."""

from alaya_hf.engine.residual.base import Residual
from alaya_hf.engine.residual.block_means import BlockMean
from alaya_hf.engine.residual.low_bit import LowBit
from alaya_hf.engine.residual.none import NoResidual

__all__ = ["BlockMean", "LowBit", "NoResidual", "Residual"]
