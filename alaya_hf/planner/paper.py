"""The rules of AlayaDB's query optimizer."""

from __future__ import annotations

from dataclasses import replace

from alaya_hf.config import AlayaConfig, WindowConfig
from alaya_hf.engine.residual import NoResidual
from alaya_hf.index import Coarse, Flat, Graph
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.shape import ModelShape
from alaya_hf.query import DIPR, Full, TopK

#: InfLLM's parameters in the paper's comparison (section 9): 16 blocks of 128 tokens, 4 representatives each.
_BLOCKS = Coarse(block=128, strategy="representatives", count=4)
_TOKENS = 2048
_COARSE_WINDOW, _WINDOW = WindowConfig(128, 4096), WindowConfig(128, 512)


def paper_plan(
    settings: AlayaConfig, layer: int, shape: ModelShape, context: int, batch: int, reused: int
) -> LayerPlan:
    """The plan of a layer by the decision tree of AlayaDB (arXiv 2504.10326, figure 8).

    Parameters
    ----------
    settings : AlayaConfig
    layer : int
    shape : ModelShape
    context : int
        Tokens.
    batch : int
    reused : int
        Tokens of a stored context that a session begins with; fewer than it has mean a filter of its ids.

    Notes
    -----
    A short context is attended in full. A long one: with a large budget of GPU memory top-k on blocks; with a small one
    DIPR, on a flat scan in layer 0, whose attention is spread over thousands of tokens, and on a graph in all others. Partial
    reuse adds the filter, which the storage applies by itself: a session reads the stored context's first `reused` tokens. The
    paper gives no thresholds: short is up to ``min_context``; large is a budget that holds the keys and values of the whole
    context. Without a budget memory counts as small, the case that the system was made for. DIPR is the paper's, `beta` 50 at
    head dimension 128.
    """
    own = settings.for_layer(layer)
    budget = settings.gpu_bytes
    large = budget is not None and budget >= shape.layers * context * batch * shape.token_bytes
    engine = own.engine if "engine" in own.given else "host"
    plan = LayerPlan(engine, DIPR(), Graph(), NoResidual(), _WINDOW, own.min_context, own.store_dtype)
    if layer in own.dense_layers:
        plan = replace(plan, query=Full(), index=Flat()).because("dense layer, as given")
    elif context <= own.min_context:
        plan = replace(plan, query=Full(), index=Flat()).because(f"short context: up to {own.min_context} tokens")
    elif large:
        plan = replace(plan, query=TopK(_TOKENS), index=_BLOCKS, window=_COARSE_WINDOW).because(
            "large budget: top-k on blocks"
        )
    elif layer == 0:
        plan = replace(plan, index=Flat()).because("small budget, layer 0: DIPR on a scan")
    else:
        plan = plan.because("small budget: DIPR on a graph")
    if reused:
        plan = plan.because(f"{plan.reason}; the first {reused} tokens of a stored context")
    changes = {name: getattr(own, name) for name in ("query", "index", "residual", "window") if name in own.given}
    return replace(plan, **changes) if changes else plan
