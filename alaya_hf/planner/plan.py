"""Which query runs on which index, per layer and step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from alaya_hf.config import AlayaConfig
from alaya_hf.query import Full


@dataclass(frozen=True)
class Plan:
    """What one layer does in one step with its offloaded tokens.

    Attributes
    ----------
    query : Query
    index : Index
    residual : Residual
    reason : str
        Why this plan and no other, for people.
    """

    query: Any
    index: Any
    residual: Any
    reason: str


def choose(config: AlayaConfig, layer_idx: int) -> Plan:
    """The plan of a layer.

    Parameters
    ----------
    config : AlayaConfig
        Of this layer (:meth:`AlayaConfig.for_layer`).
    layer_idx : int

    Notes
    -----
    The rules of AlayaDB's query optimizer (arXiv 2504.10326, figure 8) that need no measurement: dense layers attend
    fully, everything else does what the configuration asks. Contexts below ``min_context`` never reach the planner: they
    stay in the window.
    """
    if layer_idx in config.dense_layers:
        return Plan(Full(), config.index, config.residual, "dense layer")
    return Plan(config.query, config.index, config.residual, "as configured")
