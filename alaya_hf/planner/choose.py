"""Which query runs on which index, per layer and step."""

from __future__ import annotations

from alaya_hf.config import AlayaConfig
from alaya_hf.engine.plan import Plan
from alaya_hf.query import Full


def choose(config: AlayaConfig, layer_idx: int, softcap: float | None = None) -> Plan:
    """The plan of a layer.

    Parameters
    ----------
    config : AlayaConfig
        Of this layer (:meth:`AlayaConfig.for_layer`).
    layer_idx : int
    softcap : float, optional
        The model's cap on logits. Estimates of left-out tokens assume uncapped logits, so such layers attend fully.

    Notes
    -----
    The rules of AlayaDB's query optimizer (arXiv 2504.10326, figure 8) that need no measurement: dense layers attend
    fully, everything else does what the configuration asks. Contexts below ``min_context`` never reach the planner: they
    stay in the window.
    """
    if layer_idx in config.dense_layers:
        return Plan(Full(), config.index, config.residual, "dense layer")
    if softcap is not None:
        return Plan(Full(), config.index, config.residual, "capped logits")
    return Plan(config.query, config.index, config.residual, "as configured")
