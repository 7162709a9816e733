"""What the stages of a decode step cost on a machine: a short measurement, kept as a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from alaya_hf.errors import CalibrationError
from alaya_hf.planner.shape import ModelShape

SCHEMA = 1
#: Stages of the host engine: seconds per row, and per token (offloaded, or fetched for `gather`, `rescore`).
HOST_STAGES = (
    "window", "dense", "flat", "scan2", "scan4", "scan8", "cut", "cut_recovery", "select", "values2", "values4", "means",
    "key_means", "gather", "graph",
)  # fmt: skip
#: Most exact tokens per query head for which the device engine's selection is timed; others take as long as the next larger one.
CUT_CAPS = (32, 128, 256, 512)
#: Stages of the device engine. `passKV`: the low-bit pass with K-bit keys and V-bit values (0: means); `scores`: what it takes to
#: write all scores and not just those within a range; `cutN`, `shareN`: selecting up to N tokens per head by a range, or by a
#: share of the mass. What a fetched token costs besides depends on how much memory the tokens lie in, and varies: `gather@N` and
#: `gather8@N` are lines for N offloaded tokens, `gather_tail@N` and `gather8_tail@N` those of the 95th percentile.
DEVICE_STAGES = (
    "window", "dense", "pass42", "pass44", "pass40", "pass82", "scores", *(f"cut{cap}" for cap in CUT_CAPS),
    *(f"share{cap}" for cap in CUT_CAPS), "gather", "gather8", "merge",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A cost that grows by a straight line, which may be steeper from some number of tokens on.

    ``fixed + per_token * tokens + beyond * max(0, tokens - knee)`` seconds.
    """

    fixed: float
    per_token: float
    knee: float = 0.0
    beyond: float = 0.0

    def __call__(self, tokens: float) -> float:
        return self.fixed + self.growth(tokens)

    def growth(self, tokens: float) -> float:
        """What depends on the tokens."""
        return self.per_token * max(0.0, tokens) + self.beyond * max(0.0, tokens - self.knee)

    def to_list(self) -> list[float]:
        """The numbers, without those of a bend that there is not."""
        return [self.fixed, self.per_token, *((self.knee, self.beyond) if self.beyond else ())]


class Gathers:
    """What the device engine takes to attend to tokens of the store, from the lines `NAME@N` among its stages.

    Parameters
    ----------
    stages : mapping of str to Line
        Without such lines, the one called NAME holds for every context.
    """

    def __init__(self, stages: Mapping[str, Line]) -> None:
        self._stages = stages
        self._lines: dict[str, list[tuple[int, Line]]] = {}
        for key, line in stages.items():
            name, at, tokens = key.partition("@")
            if at:
                self._lines.setdefault(name, []).append((int(tokens), line))
        for lines in self._lines.values():
            lines.sort(key=lambda pair: pair[0])

    def __call__(self, name: str, fetched: float, offloaded: float, tail: bool = False) -> tuple[float, float]:
        """Seconds, in two parts.

        Parameters
        ----------
        name : {"gather", "gather8"}
            Of a store in the model's precision, or in 8 bits.
        fetched : float
            Tokens per KV head.
        offloaded : float
            Tokens that they are chosen from. Between the numbers that were measured, a straight line; beyond, the nearest one's.
        tail : bool
            The 95th percentile, where it was measured.

        Returns
        -------
        fixed, growth : float
            The second part depends on the tokens.
        """
        lines = self._lines.get(f"{name}_tail" if tail else name) or self._lines.get(name) or [(0, self._stages[name])]
        at = next((i for i, (tokens, _) in enumerate(lines) if tokens >= offloaded), len(lines) - 1)
        above, high = lines[at]
        if at == 0 or offloaded >= above:
            return high.fixed, high.growth(fetched)
        below, low = lines[at - 1]
        share = (offloaded - below) / (above - below)
        return (
            low.fixed + share * (high.fixed - low.fixed),
            low.growth(fetched) + share * (high.growth(fetched) - low.growth(fetched)),
        )


@dataclass(frozen=True)
class Calibration:
    """Measured costs.

    Attributes
    ----------
    hardware : str
        Where it was measured.
    kv_heads, group, head_dim : int
        Of the layer measured; other layers are estimated in proportion to their numbers.
    dtype : str
        Of its keys and values.
    host, device : mapping of str to Line
        Stages, see :data:`HOST_STAGES` and :data:`DEVICE_STAGES`; no device stages without a GPU.
    layer_overhead : mapping of str to float
        Seconds per layer and step besides the stages: ``host`` and ``device`` of attention; ``eager_cpu`` and ``eager_cuda`` of
        Transformers' Python and launches in a step that is not replayed as a graph.
    weights : mapping of str to float
        Bytes of weights per second that a decode step reads, by type of device; ``cuda_graph`` and ``cuda_compiled`` inside a
        graph.
    reference : bool
        Whether the numbers are those that come with the package, and not this machine's.
    report : tuple of mapping
        Whole steps: ``plan``, ``context``, ``predicted`` and ``measured`` seconds; of the device engine also ``cap``, and
        ``predicted_tail`` and ``tail``, the 95th percentile.
    """

    hardware: str
    kv_heads: int
    group: int
    head_dim: int
    dtype: str
    host: Mapping[str, Line]
    device: Mapping[str, Line]
    layer_overhead: Mapping[str, float]
    weights: Mapping[str, float]
    reference: bool = False
    report: tuple[Mapping[str, Any], ...] = field(default=(), compare=False)

    @property
    def median_error(self) -> float | None:
        """Median of ``|predicted - measured| / measured`` over the report; None without one."""
        errors = sorted(abs(row["predicted"] - row["measured"]) / row["measured"] for row in self.report)
        if not errors:
            return None
        middle = len(errors) // 2
        return errors[middle] if len(errors) % 2 else (errors[middle - 1] + errors[middle]) / 2

    def margin(self, engine: str, cap: int | None = None) -> float:
        """What nine of ten whole steps of an engine stay within, times their estimates: 1 to 1.5; 1 without a report.

        Of 95th percentiles where the report has them.

        Parameters
        ----------
        engine : {"host", "device"}
        cap : int, optional
            Of steps that select up to so many tokens per head alone, where the report has at least four: the more a step fetches,
            the less its time is known.
        """
        rows = [row for row in self.report if str(row["plan"]).startswith("host:") == (engine == "host")]
        alike = [row for row in rows if cap is not None and row.get("cap") == cap]
        pairs = [
            (row["tail"], row["predicted_tail"]) if "tail" in row else (row["measured"], row["predicted"])
            for row in (alike if len(alike) >= 4 else rows)
        ]
        ratios = sorted(measured / predicted for measured, predicted in pairs if predicted > 0)
        return min(1.5, max(1.0, ratios[int(0.9 * (len(ratios) - 1))])) if ratios else 1.0

    @cached_property
    def gather(self) -> Gathers:
        """What the device engine takes to attend to tokens of the store."""
        return Gathers(self.device)

    def to_json(self) -> str:
        """As text, the same for the same numbers."""
        data: dict[str, Any] = {"schema": SCHEMA, "kind": "alaya_hf.calibration"}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.name in ("host", "device"):
                value = {name: line.to_list() for name, line in sorted(value.items())}
            elif isinstance(value, Mapping):
                value = dict(sorted(value.items()))
            elif isinstance(value, tuple):
                value = [dict(row) for row in value]
            data[item.name] = value
        return json.dumps(data, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "calibration") -> Calibration:
        """The inverse of :meth:`to_json`.

        Parameters
        ----------
        source : str
            Where the text is from, for messages.

        Raises
        ------
        CalibrationError
            If the text is not a calibration of this schema with finite costs that are not negative.
        """
        try:
            data = json.loads(text)
            if data.get("kind") != "alaya_hf.calibration" or data.get("schema") != SCHEMA:
                raise ValueError(f"it has kind {data.get('kind')!r} and schema {data.get('schema')!r}")
            stages = {
                engine: {name: Line(*map(_cost, line)) for name, line in data[engine].items()}
                for engine in ("host", "device")
            }
            missing = [name for name in HOST_STAGES if name not in stages["host"]]
            if stages["device"]:
                missing += [name for name in DEVICE_STAGES if name not in stages["device"]]
            if missing:
                raise ValueError(f"it lacks the stages {', '.join(missing)}")
            return cls(
                hardware=str(data["hardware"]),
                kv_heads=int(data["kv_heads"]), group=int(data["group"]), head_dim=int(data["head_dim"]),
                dtype=str(data["dtype"]), host=stages["host"], device=stages["device"],
                layer_overhead={name: _cost(value) for name, value in data["layer_overhead"].items()},
                weights={name: _cost(value) for name, value in data["weights"].items()},
                reference=bool(data["reference"]), report=tuple(data["report"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                f"{source} is no calibration of schema {SCHEMA}: {error}. Measure again with `alaya-hf calibrate`."
            ) from error


def _cost(value: Any) -> float:
    cost = float(value)
    if not 0 <= cost < math.inf:
        raise ValueError(f"a cost of {value!r} is not a finite number of at least 0")
    return cost


def cache_folder() -> Path:
    """``alaya-hf`` in the user's cache folder (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alaya-hf"


def hardware_name() -> str:
    """Processor, threads and GPU."""
    processor = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    import numba

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor or 'processor'}, {numba.get_num_threads()} threads{gpu}"


def calibration_path(shape: ModelShape) -> Path:
    """Where the calibration of this machine for such layers is kept."""
    name = f"{hardware_name()}|{shape.kv_heads}|{shape.group}|{shape.head_dim}|{shape.dtype}"
    return cache_folder() / "calibration" / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"


def load_calibration(shape: ModelShape, path: str | Path | None = None) -> Calibration:
    """This machine's costs, or those that come with the package.

    Parameters
    ----------
    shape : ModelShape
    path : str or Path, optional
        Of a file; default: :func:`calibration_path`. The environment's ``ALAYA_HF_CALIBRATION`` names one, too.

    Raises
    ------
    CalibrationError
        For a file that is damaged, or one that was named and is not there.
    """
    named = path or os.environ.get("ALAYA_HF_CALIBRATION")
    file = Path(named) if named else calibration_path(shape)
    if file.is_file():
        return Calibration.from_json(file.read_text(encoding="utf-8"), str(file))
    if named:
        raise CalibrationError(
            f"there is no calibration at {file}. Measure one with `alaya-hf calibrate --output {file}`."
        )
    return shipped_calibration()


def shipped_calibration() -> Calibration:
    """The costs that come with the package."""
    text = (resources.files("alaya_hf.planner") / "data" / "calibration.json").read_text(encoding="utf-8")
    return Calibration.from_json(text, "the calibration of the package")


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write a file that readers see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(calibration.to_json(), encoding="utf-8")
    part.replace(path)
