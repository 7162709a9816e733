"""What one layer is to do, and what that is estimated to take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from alaya_hf.config import COMPONENTS, AlayaConfig, WindowConfig
from alaya_hf.query import DIPR


@dataclass(frozen=True)
class LayerPlan:
    """A choice for one layer.

    Attributes
    ----------
    engine : {"host", "device"}
    query : Query
    index : Index
    residual : Residual
    window : WindowConfig
    min_context : int
    store_dtype : str
    reason : str
        Why this plan and no other, for people.
    """

    engine: str
    query: Any
    index: Any
    residual: Any
    window: WindowConfig
    min_context: int = 2048
    store_dtype: str = "auto"
    reason: str = field(default="", compare=False)

    def because(self, reason: str) -> LayerPlan:
        """The same plan for another reason."""
        return replace(self, reason=reason)

    def settings(self) -> dict[str, Any]:
        """As settings of a layer, see :class:`alaya_hf.AlayaConfig`."""
        return {
            "engine": self.engine, "query": self.query, "index": self.index, "residual": self.residual,
            "window": self.window, "min_context": self.min_context, "store_dtype": self.store_dtype,
        }  # fmt: skip

    @classmethod
    def of(cls, config: AlayaConfig, reason: str = "as configured") -> LayerPlan:
        """What the settings of one layer ask for."""
        return cls(
            config.engine, config.query, config.index, config.residual, config.window, config.min_context, config.store_dtype,
            reason,
        )  # fmt: skip

    def names(self) -> tuple[str, str, str]:
        """Query, index and residual in words."""

        def words(kind: str, component: Any) -> str:
            spec = COMPONENTS[kind].spec(component)
            if isinstance(spec, str):
                return spec
            return " ".join([str(spec["kind"]), *(f"{k}={v:g}" if isinstance(v, (int, float)) and not isinstance(v, bool)
                                                   else f"{k}={v}" for k, v in spec.items() if k != "kind")])  # fmt: skip

        if self.query.keeps_all:
            return "full", "-", "-"
        return words("query", self.query), words("index", self.index), words("residual", self.residual)

    def wider(self) -> LayerPlan:
        """The same with a wider cut: what a doubtful step is attended with again."""
        return replace(self, query=wider(self.query))


def wider(query: Any) -> Any:
    """A query that asks for more: a tenth of the range's `alpha`, a quarter of what `recovery` leaves out, four times the cap.

    Parameters
    ----------
    query : Query
    """
    changes: dict[str, Any] = {}
    if isinstance(query, DIPR):
        changes = {"beta": query.beta * 1.5} if query.beta is not None else {"alpha": (query.alpha or 0.0) / 10}
    elif hasattr(query, "ratio"):
        changes = {"ratio": 1 - (1 - query.ratio) / 4}
    if getattr(query, "cap", None) is not None:
        changes["cap"] = 4 * query.cap
    if hasattr(query, "k"):
        changes = {"k": 4 * max(16, query.k)}
    return replace(query, **changes) if changes else query


@dataclass(frozen=True)
class Estimate:
    """What a plan of one layer is expected to take, per decode step and for the whole batch.

    Attributes
    ----------
    tokens : float
        Offloaded tokens that a query head attends exactly.
    fetched : float
        Offloaded tokens read per KV head.
    recovery : float
        Share of the attention mass attended exactly, of the worst group of query heads.
    kl : float
        What the layer adds to the KL from full attention, nats per token.
    seconds, tail : float
        Of the layer's attention: as a rule, and the 95th percentile.
    device_bytes, host_bytes : int
        Held: on the layer's device, and in host memory.
    moved_bytes : float
        Read from the store.
    """

    tokens: float
    fetched: float
    recovery: float
    kl: float
    seconds: float
    tail: float
    device_bytes: int
    host_bytes: int
    moved_bytes: float
