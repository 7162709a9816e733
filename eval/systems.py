"""Systems by name: configurations of our cache, and Transformers' own caches, filled from one prefilled context."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, QuantizedCache

from alaya_hf import AlayaCache, AlayaConfig, TopK
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError
from alaya_hf.index import Coarse

#: Transformers' own caches, which hold every token.
STOCK = ("full", "offloaded", "quantized_cache")
#: Systems with an environment of their own, see ``eval/peers``.
PEERS = ("snapkv", "expected_attention")
DEFAULT = (
    "full", "offloaded", "quantized_cache", "streaming_llm", "infllm", "quest", "topk", "retrieval_attention", "alaya",
    "alaya_block_means", "alaya_graph", "alayadb_paper", *PEERS,
)  # fmt: skip
#: Budgets of these follow another system's when systems are compared at an equal number of attended tokens.
MATCHED = ("streaming_llm", "infllm", "quest", "topk")


_MOST_WINDOWS = 4  # contexts held at once for systems whose windows follow a budget


class SystemUnavailable(RuntimeError):
    """A system cannot run here; the message says why."""


@dataclass(frozen=True)
class System:
    """One system under evaluation.

    Parameters
    ----------
    name : str
    settings : AlayaConfig, optional
        None for Transformers' own caches.
    matched : bool
        Whether :meth:`at_budget` replaces the settings' own budget.
    labels : dict
        Goes into the rows of this system.
    """

    name: str
    settings: AlayaConfig | None = None
    matched: bool = False
    labels: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        sparse = {layer.prefill.kind for layer in self.settings.all_layers} - {"exact"} if self.settings else None
        if sparse:
            raise ConfigError(
                f"the system {self.name!r} asks for prefill {', '.join(sorted(sparse))}, but all systems share one exact "
                "prefill here. Compare prefills with `python -m eval sparse-prefill`, or run one by itself with "
                "`python -m eval harness`."
            )

    @classmethod
    def named(cls, name: str, window: tuple[int, int] | None = None, matched: bool = False) -> System:
        """A system from its name, or from the path of a YAML file of :class:`~alaya_hf.AlayaConfig`.

        Parameters
        ----------
        name : str
        window : (int, int), optional
            Replaces the configuration's window: initial and recent tokens.
        matched : bool
            Let the systems of :data:`MATCHED` follow another system's number of attended tokens.

        Raises
        ------
        ConfigError
            For a name that is none of these, and for settings with another prefill than the exact one.
        """
        if name in STOCK:
            return cls(name)
        known = AlayaConfig.presets()
        if name in known:
            settings = AlayaConfig.preset(name)
        elif name.endswith((".yaml", ".yml")):
            settings, name = AlayaConfig.from_yaml(name), Path(name).stem
        else:
            raise ConfigError(
                f"unknown system {name!r}. Known: {', '.join(dict.fromkeys((*STOCK, *known, *PEERS)))}, or the path of a YAML "
                "file."
            )
        settings = settings.replace(min_context=0)
        if window is not None:
            settings = settings.replace(window=window)
        matched = matched and name in MATCHED
        if matched:
            # Dense layers would attend to more than their share.
            settings = settings.replace(dense_layers=())
        return cls(name, settings, matched)

    @property
    def sample_ratio(self) -> float:
        """Query vectors to sample during prefill, per key."""
        return 0.0 if self.settings is None else self.settings.index.sample_ratio

    def check(self, device: str) -> None:
        """Refuse systems that cannot run on this device or lack a package.

        Raises
        ------
        SystemUnavailable
        """
        if self.name == "offloaded" and not device.startswith("cuda"):
            raise SystemUnavailable("offloads from a GPU, and the model is on the CPU")
        if self.name == "quantized_cache":
            try:
                QuantizedCache("quanto", _tiny(), nbits=4)
            except ImportError as error:
                raise SystemUnavailable(f"needs optimum-quanto: {error}") from error

    def at_budget(self, attended: float, asked: float) -> System:
        """The system with as many exactly attended offloaded tokens per query head.

        Parameters
        ----------
        attended : float
            Offloaded tokens that each query head attended to.
        asked : float
            Those that its own query asked for; fewer where query heads share their union.

        Notes
        -----
        Blocks round to the nearest number of blocks, at least one. StreamingLLM, which retrieves nothing, gets the tokens
        as window.
        """
        settings = self.settings
        if not self.matched or settings is None:
            return self
        if settings.query.keeps_none:
            window = dataclasses.replace(settings.window, local=settings.window.local + round(attended))
            return dataclasses.replace(self, settings=settings.replace(window=window))
        tokens = round(attended if settings.group_mode == "per_head" else asked)
        if isinstance(settings.index, Coarse):
            tokens = settings.index.block * max(1, round(tokens / settings.index.block))
        return dataclasses.replace(self, settings=settings.replace(query=TopK(max(1, tokens))))

    def cache(self, context: Context) -> Cache:
        """A cache of this system that holds the context; stock caches are copies of it."""
        if self.settings is not None:
            return context.fork(self.settings)
        makers: dict[str, Callable[[], Cache]] = {
            "full": lambda: DynamicCache(config=context.model.config),
            "offloaded": lambda: DynamicCache(config=context.model.config, offloading=True),
            "quantized_cache": lambda: QuantizedCache("quanto", context.model.config, nbits=4),
        }
        return context.refilled(makers[self.name]())


class Context:
    """A prefilled text that every system shares.

    Parameters
    ----------
    model
        In evaluation mode.
    ids : Tensor
        ``[1, n]`` on the model's device.
    window : (int, int)
        Of the systems that share the offloaded context; others copy it.
    sample_ratio : float
        Query vectors sampled per key, for building graphs.
    chunk : int
        Tokens per forward pass.
    prefill_model
        The same model on a faster device, for the prefill alone. Takes no queries for graphs.
    windows : int
        Copies of the offloaded context to hold at once, one per window.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        window: tuple[int, int],
        sample_ratio: float = 0.0,
        chunk: int = 8192,
        prefill_model: Any = None,
        windows: int = _MOST_WINDOWS,
    ) -> None:
        settings = AlayaConfig(window=window, min_context=0, sample_queries=sample_ratio or None)
        self.model, self.ids = model, ids
        taken = DynamicCache(config=model.config) if prefill_model is not None and not sample_ratio else None
        self.base = AlayaCache(settings, config=model.config)
        self._forks: dict[tuple[int, int], AlayaCache] = {}  # the last used comes last
        self._windows = windows
        with torch.no_grad():
            for start in range(0, ids.shape[1], chunk):
                piece = ids[:, start : start + chunk]
                if taken is None:
                    model.model(input_ids=piece, **cache_argument(self.base))
                else:
                    prefill_model.model(input_ids=piece.to(prefill_model.device), **cache_argument(taken))
        if taken is not None:
            self.base = AlayaCache.from_cache(taken, settings, device=model.device, config=model.config)

    @classmethod
    def for_systems(
        cls, model: Any, ids: Tensor, window: tuple[int, int], systems: Sequence[System], **options: Any
    ) -> Context:
        """A context with what these systems ask of it: query vectors for graphs, and room for all their windows."""
        own = {(s.settings.window.init, s.settings.window.local) for s in systems if s.settings is not None}
        ratio = max((system.sample_ratio for system in systems), default=0.0)
        return cls(model, ids, window, ratio, windows=max(_MOST_WINDOWS, len(own)), **options)

    def fork(self, settings: AlayaConfig) -> AlayaCache:
        """A copy for one answer. Indexes are built once per document, and the offloaded context is copied once per window."""
        window = (settings.window.init, settings.window.local)
        kept = self._forks.pop(window, None)
        if kept is None:
            kept = self.base.fork(self.base.settings.replace(window=settings.window))
            while len(self._forks) >= self._windows:
                self._forks.pop(next(iter(self._forks)))
        self._forks[window] = kept
        return kept.fork(settings)

    def refilled(self, cache: Cache) -> Cache:
        """Fill an empty cache with the context's keys and values."""
        for layer, filled in enumerate(self.base.alaya_layers):
            cache.update(*filled.contents(), layer)
        return cache


def _tiny() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(num_hidden_layers=1, hidden_size=64, num_attention_heads=1, num_key_value_heads=1)
