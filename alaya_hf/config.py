"""The configuration of a cache: one frozen dataclass, to and from YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from alaya_hf.errors import ConfigError, ConflictError
from alaya_hf.registry import ALLOCATORS, INDEXES, PREFILLS, QUERIES, RESIDUALS, Registry
from alaya_hf.units import number_of_bytes, seconds_per_token

GROUP_MODES = ("union", "per_head")
ENGINES = ("host", "device")
CUDA_GRAPHS = ("capture", "compile", "none")
STORE_DTYPES_8BIT = ("fp8", "int8")
COMPONENTS: dict[str, Registry[Any]] = {
    "query": QUERIES,
    "index": INDEXES,
    "residual": RESIDUALS,
    "prefill": PREFILLS,
    "allocator": ALLOCATORS,
}
PLANNERS = ("cost", "paper")
ON_DOUBT = ("ignore", "warn", "widen")
#: Settings that say what is needed; each of them alone sets the planner to work.
TARGETS = ("slo", "gpu_memory", "recovery", "kl", "planner")
STORE_DTYPES = ("auto", "float32", "float16", "bfloat16", *STORE_DTYPES_8BIT)


def _check_int(name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ConfigError(f"{name} must be an integer of at least {minimum}, but got {value!r}.")


@dataclass(frozen=True)
class WindowConfig:
    """Which tokens stay on the layer's device at full precision and are always attended.

    Parameters
    ----------
    init : int
        First tokens of the context ("attention sinks").
    local : int
        Most recent tokens, at least 1.
    overflow : int
        How many generated tokens the window takes in beyond ``local`` before its oldest tokens move to the store (late
        materialisation, AlayaDB section 5.2). Larger values index less often and keep more on the device.
    """

    init: int = 128
    local: int = 512
    overflow: int = 256

    def __post_init__(self) -> None:
        _check_int("window.init", self.init, 0)
        _check_int("window.local", self.local, 1)
        _check_int("window.overflow", self.overflow, 0)

    @classmethod
    def build(cls, value: Any) -> WindowConfig:
        """From an instance, a mapping or a pair ``(init, local)``."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(*value)
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - {field.name for field in dataclasses.fields(cls)})
            if unknown:
                raise ConfigError(f"window has no parameter {unknown}. Its parameters: init, local, overflow.")
            return cls(**value)
        raise ConfigError(f"window must be a pair (init, local) or a mapping, but got {value!r}.")


@dataclass(frozen=True)
class AlayaConfig:
    """Every knob of an :class:`~alaya_hf.AlayaCache`.

    Components are given as instances (``DIPR(alpha=0.01)``), names (``"dipr"``) or mappings
    (``{"kind": "dipr", "alpha": 0.01}``); the attributes always hold instances.

    Parameters
    ----------
    query
        What is asked of the offloaded tokens: :class:`~alaya_hf.query.Full`, :class:`~alaya_hf.query.TopK`,
        :class:`~alaya_hf.query.DIPR`, :class:`~alaya_hf.query.Recovery`.
    index
        How it is found, see :mod:`alaya_hf.index`.
    residual
        How the offloaded tokens that the query leaves out are estimated, see :mod:`alaya_hf.residual`.
    window : WindowConfig or (init, local) or mapping
        The tokens that stay on the device and are always attended exactly.
    group_mode : {"union", "per_head"}
        ``"union"``: the query heads that share a KV head attend to the union of what each of them retrieved (one fetch
        serves them all). ``"per_head"``: each query head attends only to what it retrieved itself.
    dense_layers : tuple of int
        Layers that always attend to the whole context.
    min_context : int
        Contexts of up to this many tokens stay in the window as a whole: exact attention, nothing offloaded.
    max_sparse_queries : int
        Forward passes of up to this many tokens (decoding, assisted decoding, short follow-up questions) retrieve;
        longer ones are prefill, see there.
    prefill
        How passes of many tokens attend: :class:`~alaya_hf.engine.prefill.Exact` or, with less work,
        :class:`~alaya_hf.engine.prefill.BSFA`, :class:`~alaya_hf.engine.prefill.BLASST`,
        :class:`~alaya_hf.engine.prefill.Retrieval`. Layers in ``dense_layers`` are always exact.
    prefill_block : int
        Offloaded tokens that a prefill chunk brings to the device at a time; with ``engine="device"`` two blocks are there at
        once. Every block's result is merged into those before, which costs as much for short blocks as for long ones.
    store_dtype : {"auto", "float32", "float16", "bfloat16", "fp8", "int8"}
        Precision of the offloaded keys and values; ``"auto"`` keeps the model's. ``"fp8"`` (float8_e4m3fn) and ``"int8"``, with
        ``engine="device"`` only, halve the host memory and the bytes over the bus: 8-bit numbers and a scale per vector, see
        :class:`~alaya_hf.kernels.gpu.store_format.StoreFormat`. ``"int8"`` has the smaller error on vectors without outliers.
    engine : {"host", "device"}
        Who drives a decode step. ``"host"``: the offloaded part is searched and attended to on the CPU, next to the data.
        ``"device"``: kernels on a CUDA device do it all and read the exact tokens from pinned host memory, without waiting
        for the host; needs Triton and a model in bfloat16 or float16, see :class:`alaya_hf.device_layer.DeviceLayer`. A
        query without a cap is served with one of 256 tokens per query head there; at most 512 can be asked for.
    cuda_graphs : {"capture", "compile", "none"}
        With ``engine="device"``: whether a model's whole decode step is captured in a CUDA graph and replayed from the third
        token of an answer on, which takes Python out of it. ``"compile"`` also compiles the model's blocks first: ten
        to twenty seconds for 32 layers, once a process, for the fastest steps. Steps that a graph cannot hold (beams, whose
        memory moves; several devices; probes) run as usual.
    allocator : optional
        With ``engine="device"``: who hands out the host memory of the exact tokens (:mod:`alaya_hf.storage.allocators`):
        ``"contiguous"``, ``"dynamic"``, ``"paged"`` or ``"segment"``. All layers of a cache lie in one pool, where kernels read
        and write the tokens through a table; beams and copies of a cache share blocks of ``paged`` and ``segment`` until they are
        written. Default: none, a tensor per layer that grows by half and copies, with a stored
        context's file attended where it lies. Not with the index ``coarse``, ``hot_bytes`` or a target; a stored context is
        copied. ``"virtual"`` is refused: memory that is mapped on demand is not pinned.
    pool_bytes : str or int, optional
        With an ``allocator``: bytes of its pool, all layers of a cache together, taken from the host with the first token;
        ``"64GiB"`` or a number. What does not fit is refused. Default: as many as are needed; a pool that is full moves to a
        larger one, copying all tokens.
    hot_bytes : int
        With ``engine="device"``: bytes of device memory for the hot set, exact tokens that recent steps fetched and the next
        ones will find without crossing the bus. For the whole cache, split evenly over its layers. 0: none. A layer whose
        share is less than 8 tokens per row and KV head has none.
    sample_queries : float, optional
        Query vectors to keep during prefill for building the index, as a share of the number of keys. None: what the
        index asks for. They are dropped once the index is built.
    slo : str or float, optional
        Time per token that the model should keep: ``"50ms/token"``, ``"20 tokens/s"`` or seconds. With this or one of the next
        four the planner picks, per layer, whatever of query, index, residual, window, ``min_context``, store_dtype and engine is
        *not given*; what is given stays. A time that no plan reaches is warned about once.
    gpu_memory : str or int, optional
        Most device memory of the cache: ``"2GiB"`` or bytes. What ``stats()`` calls ``device_bytes``; never exceeded. Working
        memory of prefill and ``hot_bytes`` come on top. With ``engine="device"``, passes of several tokens then attend exactly
        instead of retrieving, unless ``max_sparse_queries`` is given.
    recovery : float, optional
        Share of the attention mass to be attended exactly, in every layer and group of query heads, in (0, 1].
    kl : float, optional
        KL divergence from full attention's next token to stay below, nats per token.
    planner : {"cost", "paper"}, optional
        ``"cost"`` (default once a target is given): measured costs and qualities. ``"paper"``: the rules of AlayaDB's query
        optimizer (arXiv 2504.10326, figure 8), which know context, reuse and ``gpu_memory`` only.
    on_doubt : {"ignore", "warn", "widen"}
        What becomes of a decode step of a layer whose estimated relative error exceeds ``doubt``: ``"warn"`` says so once,
        ``"widen"`` attends again with a wider cut (``engine="host"`` only).
    doubt : float
        Estimated error of a layer's output, relative to its norm, mean over heads, from which a step is doubtful.
    layers : mapping of int to mapping
        Overrides for single layers, for example ``{0: {"index": "flat"}}``. The key ``"default"`` sets every other
        layer.

    Raises
    ------
    ConfigError
        For an unknown key or a value out of range.
    """

    query: Any = "dipr"
    index: Any = dataclasses.field(default_factory=lambda: {"kind": "quantized", "margin": 0})
    residual: Any = "low_bit"
    window: Any = dataclasses.field(default_factory=WindowConfig)
    group_mode: str = "union"
    dense_layers: tuple[int, ...] = ()
    min_context: int = 2048
    max_sparse_queries: int = 64
    prefill: Any = "exact"
    prefill_block: int = 32768
    store_dtype: str = "auto"
    engine: str = "host"
    cuda_graphs: str = "capture"
    allocator: Any = None
    pool_bytes: str | int | None = None
    hot_bytes: int = 0
    sample_queries: float | None = None
    slo: str | float | None = None
    gpu_memory: str | int | None = None
    recovery: float | None = None
    kl: float | None = None
    planner: str | None = None
    on_doubt: str = "ignore"
    doubt: float = 0.1
    layers: Mapping[int | str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def __new__(cls, *args: Any, **kwargs: Any) -> AlayaConfig:
        """Remember what is given: the planner leaves it alone, also where it equals the default."""
        config = super().__new__(cls)
        names = [field.name for field in dataclasses.fields(cls)][: len(args)]
        object.__setattr__(config, "_given", frozenset(names) | frozenset(kwargs))
        return config

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "query", QUERIES.build(self.query))
        set_(self, "index", INDEXES.build(self.index))
        set_(self, "residual", RESIDUALS.build(self.residual))
        set_(self, "prefill", PREFILLS.build(self.prefill))
        if self.allocator is not None:
            set_(self, "allocator", ALLOCATORS.build(self.allocator))
        set_(self, "window", WindowConfig.build(self.window))
        if self.group_mode not in GROUP_MODES:
            raise ConfigError(f"group_mode must be one of {', '.join(GROUP_MODES)}, but got {self.group_mode!r}.")
        if self.engine not in ENGINES:
            raise ConfigError(f"engine must be one of {', '.join(ENGINES)}, but got {self.engine!r}.")
        if self.cuda_graphs not in CUDA_GRAPHS:
            raise ConfigError(f"cuda_graphs must be one of {', '.join(CUDA_GRAPHS)}, but got {self.cuda_graphs!r}.")
        if self.store_dtype not in STORE_DTYPES:
            raise ConfigError(f"store_dtype must be one of {', '.join(STORE_DTYPES)}, but got {self.store_dtype!r}.")
        if self.store_dtype in STORE_DTYPES_8BIT and self.engine != "device":
            raise ConfigError(
                f"store_dtype={self.store_dtype!r} needs engine='device', but got engine={self.engine!r}. Set both, or store "
                "'bfloat16'."
            )
        for name, minimum in (("min_context", 0), ("max_sparse_queries", 1), ("prefill_block", 1), ("hot_bytes", 0)):
            _check_int(name, getattr(self, name), minimum)
        if self.sample_queries is not None and not 0 <= float(self.sample_queries) <= 1:
            raise ConfigError(f"sample_queries must be in [0, 1] or null, but got {self.sample_queries!r}.")
        if not isinstance(self.dense_layers, (tuple, list)):
            raise ConfigError(f"dense_layers must be a list of layer numbers, but got {self.dense_layers!r}.")
        for layer in self.dense_layers:
            _check_int("dense_layers", layer, 0)
        set_(self, "dense_layers", tuple(self.dense_layers))
        self._check_targets()
        self._check_allocator()
        self._check_layers()
        self.index.check(self.query)
        self.residual.check(self.index)
        self.prefill.check(self.engine)

    def _check_allocator(self) -> None:
        if self.pool_bytes is not None:
            number_of_bytes("pool_bytes", self.pool_bytes)
        if self.allocator is None:
            if self.pool_bytes is not None:
                raise ConflictError(f"pool_bytes={self.pool_bytes!r} is an allocator's, but got none. Set allocator.")
            return
        name = self.allocator.kind
        if self.engine != "device":
            raise ConflictError(
                f"allocator={name!r} manages the store of engine='device', but got engine={self.engine!r}. Set both, or leave "
                "the allocator out."
            )
        if name == "virtual":
            raise ConfigError(
                "allocator='virtual' maps host memory on demand, which cannot be pinned for engine='device' to read. Use "
                "'segment'."
            )
        if self.index.kind == "coarse" or self.hot_bytes:
            what = f"hot_bytes={self.hot_bytes}" if self.hot_bytes else "the index 'coarse'"
            raise ConflictError(
                f"{what} reads a store in one piece, but got allocator={name!r}, whose tokens kernels find through a table. "
                "Leave one of them out."
            )
        if self.plans:
            targets = [target for target in TARGETS if getattr(self, target) is not None]
            raise ConflictError(
                f"{' and '.join(targets)} may give every layer another store, but got allocator={name!r}, in whose pool all "
                "layers are alike. Leave one of them out."
            )

    def _check_targets(self) -> None:
        if self.slo is not None:
            seconds_per_token("slo", self.slo)
        if self.gpu_memory is not None:
            number_of_bytes("gpu_memory", self.gpu_memory)
        for name, most in (("recovery", 1.0), ("kl", float("inf")), ("doubt", float("inf"))):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value <= most):
                raise ConfigError(
                    f"{name} must be a positive number{f' of at most {most:g}' if most == 1 else ''}, but got {value!r}."
                )
        if self.planner is not None and self.planner not in PLANNERS:
            raise ConfigError(f"planner must be one of {', '.join(PLANNERS)}, or none, but got {self.planner!r}.")
        if self.on_doubt not in ON_DOUBT:
            raise ConfigError(f"on_doubt must be one of {', '.join(ON_DOUBT)}, but got {self.on_doubt!r}.")
        wanted = [f"{name}={getattr(self, name)!r}" for name in ("recovery", "kl") if getattr(self, name) is not None]
        if self.planner == "paper" and wanted:
            raise ConflictError(
                f"planner='paper' follows fixed rules that promise no quality, but got {' and '.join(wanted)}. Use "
                "planner='cost', or leave the quality target out."
            )
        given: frozenset[str] = self.given
        if self.recovery is not None and "query" in given and self.query.keeps_none:
            raise ConflictError(
                f"recovery={self.recovery!r} asks for exact tokens, but the query given, {self.query!r}, retrieves none. Leave "
                "query or recovery out."
            )
        if self.on_doubt != "ignore" and "engine" in given and self.engine == "device":
            raise ConflictError(
                f"on_doubt={self.on_doubt!r} looks at every step on the host, but got engine='device', whose steps never wait "
                "for it. Use engine='host', or on_doubt='ignore' and read stats()['error'] of a cache with probe=True."
            )

    @property
    def given(self) -> frozenset[str]:
        """Names of the settings that were given, also those that equal the default: the planner leaves them alone."""
        return self._given  # type: ignore[attr-defined,no-any-return]

    @property
    def plans(self) -> bool:
        """Whether the planner is to choose what is not given."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def slo_seconds(self) -> float | None:
        """Seconds per token to keep."""
        return None if self.slo is None else seconds_per_token("slo", self.slo)

    @property
    def gpu_bytes(self) -> int | None:
        """Most bytes of device memory."""
        return None if self.gpu_memory is None else number_of_bytes("gpu_memory", self.gpu_memory)

    @property
    def pool_size(self) -> int | None:
        """Bytes of the allocator's pool."""
        return None if self.pool_bytes is None else number_of_bytes("pool_bytes", self.pool_bytes)

    def _check_layers(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers must map layer numbers to settings, but got {self.layers!r}.")
        object.__setattr__(self, "layers", {key: dict(value) for key, value in self.layers.items()})
        for key, overrides in self.layers.items():
            if key != "default":
                _check_int("a key of layers", key, 0)
            if "layers" in overrides:
                raise ConfigError(f"layers.{key} cannot itself contain 'layers'.")
            targets = [name for name in TARGETS if name in overrides]
            if targets:
                raise ConfigError(
                    f"layers.{key} sets {', '.join(targets)}, but targets are those of the whole model. Set them beside "
                    "'layers'; for a layer, set what it shall do."
                )
            # Building the layer's configuration validates it now rather than in the middle of a generation.
            self._merged(overrides)

    def _merged(self, overrides: Mapping[str, Any]) -> AlayaConfig:
        changes = dict(overrides)
        if isinstance(changes.get("window"), Mapping):
            changes["window"] = {**dataclasses.asdict(self.window), **changes["window"]}
        return self.replace(layers={}, **changes)

    def for_layer(self, layer_idx: int) -> AlayaConfig:
        """The configuration of one layer, its overrides applied."""
        config = self
        if not self.layers:
            return config
        keys: tuple[int | str, ...] = ("default", layer_idx)
        for key in keys:
            if key in self.layers:
                config = config._merged(self.layers[key])
        return config.replace(layers={})

    @property
    def engines(self) -> set[str]:
        """Engines that drive layers: those named in `layers`, and all others."""
        return {config.engine for config in self.all_layers}

    @property
    def all_layers(self) -> list[AlayaConfig]:
        """The configurations of the layers named in `layers`, and that of all others."""
        return [self.for_layer(idx) for idx in (-1, *(key for key in self.layers if isinstance(key, int)))]

    def replace(self, **changes: Any) -> AlayaConfig:
        """A copy with some fields changed."""
        self._check_fields(changes)
        return dataclasses.replace(self, **changes)._as_given(self.given | set(changes))

    def _as_given(self, names: Iterable[str]) -> AlayaConfig:
        object.__setattr__(self, "_given", frozenset(names))
        return self

    def override(self, changes: Mapping[str, Any]) -> AlayaConfig:
        """A copy with dotted fields changed.

        Parameters
        ----------
        changes : mapping
            For example ``{"query.beta": 50, "window.local": 1024, "layers.0.index": "flat"}``. Naming another ``kind``
            (``"query": "topk"``) starts from that component's defaults.
        """
        data = self.to_dict(full=True)
        for path, value in changes.items():
            *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
            node: Any = data
            for depth, part in enumerate(parents):
                child = node.get(part) if isinstance(node, Mapping) else None
                if child is None and parents[0] != "layers":
                    raise ConfigError(f"cannot set {path!r}: there is no {'.'.join(map(str, parents[: depth + 1]))!r}.")
                if child is None or isinstance(child, str):
                    child = {} if child is None else {"kind": child}
                if not isinstance(child, dict):
                    raise ConfigError(
                        f"cannot set {path!r}: {'.'.join(map(str, parents[: depth + 1]))!r} is {child!r} and has no parts."
                    )
                node[part] = child
                node = child
            node[last] = value
            other = {"alpha": "beta", "beta": "alpha", "lam": "scale", "scale": "lam"}.get(str(last))
            if value is not None and other is not None and ".".join([*map(str, parents), other]) not in changes:
                # Two names for one parameter: the one given takes the place of the other.
                node.pop(other, None)
        return type(self).from_dict(data)._as_given(self.given | {path.split(".")[0] for path in changes})

    @classmethod
    def _check_fields(cls, data: Mapping[Any, Any]) -> None:
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in data if key not in fields)
        if unknown:
            raise ConfigError(
                f"unknown configuration key {', '.join(map(repr, unknown))}. Known keys: {', '.join(fields)}."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AlayaConfig:
        """From plain data, as read from YAML."""
        if not isinstance(data, Mapping):
            raise ConfigError(f"a configuration must be a mapping of keys to values, but got {type(data).__name__}.")
        cls._check_fields(data)
        return cls(**data)

    def to_dict(self, full: bool = False) -> dict[str, Any]:
        """Plain data for YAML.

        Parameters
        ----------
        full : bool
            Every field, also those that have their default value. Otherwise those that differ from it and, with a target, those
            that were given.
        """
        default = None if full else type(self)()
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            stays = self.plans and field.name in self.given and field.name not in ("layers", *TARGETS)
            if default is not None and value == getattr(default, field.name) and not stays:
                continue
            if field.name in COMPONENTS and value is not None:
                value = COMPONENTS[field.name].spec(value)
            elif isinstance(value, WindowConfig):
                value = dataclasses.asdict(value)
            elif isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = {key: self._plain(overrides) for key, overrides in value.items()}
            data[field.name] = value
        return data

    @staticmethod
    def _plain(overrides: Mapping[str, Any]) -> dict[str, Any]:
        def plain(key: str, value: Any) -> Any:
            if key in COMPONENTS and value is not None:
                return COMPONENTS[key].spec(COMPONENTS[key].build(value))
            if isinstance(value, WindowConfig):
                return dataclasses.asdict(value)
            return list(value) if isinstance(value, tuple) else value

        return {key: plain(key, value) for key, value in overrides.items()}

    @classmethod
    def from_yaml(cls, path: str | Path) -> AlayaConfig:
        """Read a YAML file.

        Raises
        ------
        ConfigError
            If the file holds no mapping, an unknown key or a value out of range.
        """
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        try:
            return cls.from_dict(data or {})
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The configuration as YAML, also written to ``path`` if given."""
        text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def presets() -> list[str]:
        """Names that :meth:`preset` knows."""
        entries = [entry for entry in resources.files("alaya_hf.configs").iterdir() if entry.name.endswith(".yaml")]
        # Files of models, for the evaluation, lie beside them.
        return sorted(e.name[:-5] for e in entries if "\nmodels:" not in "\n" + e.read_text(encoding="utf-8"))

    @classmethod
    def preset(cls, name: str) -> AlayaConfig:
        """A published system's configuration, from ``configs/<name>.yaml``.

        Raises
        ------
        ConfigError
            If there is no such preset; the message lists those there are.
        """
        names = cls.presets()
        if name not in names:
            raise ConfigError(f"unknown preset {name!r}. Available: {', '.join(names)}.")
        text = (resources.files("alaya_hf.configs") / f"{name}.yaml").read_text(encoding="utf-8")
        return cls.from_dict(yaml.safe_load(text) or {})
