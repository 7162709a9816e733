"""How the tokens that a query leaves out are estimated."""

from alaya_hf.engine.residual.none import NoResidual

__all__ = ["NoResidual"]
