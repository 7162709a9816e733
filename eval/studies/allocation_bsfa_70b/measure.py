"""What a cell of the study measures: a prefill, decoding, a plan of memory, an allocator under a trace."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.engine.prefill.thresholds import Thresholds, load_thresholds, model_shape
from alaya_hf.errors import AlayaError
from alaya_hf.kernels.sparse_prefill import Q_TILE
from alaya_hf.sharding import MemoryPlan, memory_plan
from alaya_hf.storage.allocators import KVShape
from alaya_hf.storage.pinned import pinned_pool
from eval import speed_model
from eval.calibrate_bsfa import calibrate
from eval.legal_trace import legal_trace
from eval.random_model import random_model, shape_config
from eval.replay import GIB, replay
from eval.speed_alloc import built, needed_tokens
from eval.speed_prefill import prefill_once, weight_bytes

PREFILLS = ("dense", "bsfa", "blasst", "retrieval")
BASELINES = ("resident", "full", "static_compiled", "offloaded")
_WARM = 4096  # tokens that compile the kernels before anything is timed
_CALIBRATED = 131072  # tokens that BSFA's thresholds are made from, at most
_MOST_ROWS = 64  # that are looked for


@dataclass
class Bench:
    """A model of the shape, or of few of its layers, and what is needed to measure with it.

    Parameters
    ----------
    shape : str
        Of :data:`~eval.random_model.SHAPES`.
    layers : int
        Of the model that is held; times of fewer than the shape's are brought to all of them. 0: all.
    device : str
    chunk : int
        Tokens of a prefill pass, all rows together.
    new : int
        Tokens to decode.
    k : int
        Tiles per block of queries that BSFA's thresholds keep.
    folder : Path
        For the thresholds.
    room : dict of device to str
        Of the machine that the whole shape is planned for.
    host : int
        Bytes of host memory of that machine for offloaded contexts.
    here : int
        Bytes of host memory of this machine for the same.
    shared : bool
        Whether the layers share one layer's weights, see :func:`~eval.random_model.random_model`.
    """

    shape: str
    layers: int
    device: str
    chunk: int
    new: int
    k: int
    folder: Path
    room: dict[int | str, str]
    host: int
    here: int
    shared: bool = False
    _model: Any = None
    _warm: set[tuple[Any, ...]] = field(default_factory=set)
    _context: tuple[int, Any] | None = None
    _limits: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether a GPU computes."""
        return self.device.startswith("cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and keys."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def whole(self) -> Any:
        """The shape's configuration, all layers."""
        return shape_config(self.shape, torch.bfloat16)

    @property
    def all_layers(self) -> int:
        """Of the shape."""
        return int(self.whole.num_hidden_layers)

    @property
    def held(self) -> int:
        """Layers of the model that is held."""
        return min(self.layers, self.all_layers) if self.layers else self.all_layers

    @property
    def model(self) -> Any:
        """Made when it is first asked for."""
        if self._model is None:
            self._model = random_model(self.shape, self.device, self.dtype, self.layers, shared=self.shared)
        return self._model

    @contextmanager
    def only(self, layers: int) -> Iterator[Any]:
        """The model, of which the first so many layers run."""
        config = self.model.config
        config.num_hidden_layers = layers
        try:
            yield self.model
        finally:
            config.num_hidden_layers = self.held

    # Settings ---------------------------------------------------------------------------------------------------------

    def settings(self, prefill: str, context: int, batch: int, layers: int, allocation: str | None) -> AlayaConfig:
        """Of the cache, with one of :data:`PREFILLS`; the store in 8 bits where this machine's memory asks for it."""
        base = speed_model.DEVICE if self.cuda else speed_model.DEVICE.replace(engine="host")
        if allocation is not None:
            base = speed_model.allocated(base, allocation, context + self.new)
        if self.cuda:
            base = base.replace(store_dtype=self.store(context, batch, layers, self.here))
        if prefill == "retrieval":
            return base.replace(engine="host", store_dtype="auto", prefill={"kind": "retrieval"})
        if prefill == "bsfa":
            return base.replace(prefill={"kind": "bsfa", "thresholds": str(self._thresholds(context, layers))})
        return base.replace(prefill={"dense": "exact"}.get(prefill, prefill))

    def store(self, context: int, batch: int, layers: int, host: int) -> str:
        """``auto``, the model's own precision, where a context of so many layers fits into the host's memory; else ``int8``."""
        return "auto" if self._stored(context, batch, layers) <= host else "int8"

    def _stored(self, context: int, batch: int, layers: int) -> float:
        """Bytes of host memory for so many layers' keys and values in two bytes a number."""
        config = shape_config(self.shape, torch.bfloat16, layers)
        # Blocks of the store grow in steps.
        return 1.05 * batch * (context + self.new) * config.num_hidden_layers * _token_bytes(config)

    def fitting(self, context: int, batch: int, layers: int) -> int:
        """Of so many layers those whose offloaded context fits into this machine, in 8 bits if need be, a multiple of 4.

        A machine that is smaller than the one planned for, in host memory, runs some of the layers of its largest batches.
        """
        # A scale of two bytes to every vector, and room between the blocks.
        eight = 1.15 * (0.5 + 1 / self.whole.head_dim)
        if not self.cuda or eight * self._stored(context, batch, layers) <= self.here:
            return layers
        most = int(self.here / (eight * self._stored(context, batch, 1)))
        return max(1, min(layers, most // 4 * 4 or most))

    def rows_chunk(self, batch: int) -> int:
        """Tokens of a prefill pass of each row, whole tiles."""
        return max(Q_TILE, self.chunk // batch // Q_TILE * Q_TILE)

    def _thresholds(self, context: int, layers: int) -> Path:
        """Calibrated on random tokens with one layer, which random weights make like all others; beyond, the last block's."""
        folder, tokens = self.folder, min(context, _CALIBRATED if self.cuda else 1024)
        name = f"bsfa-{self.shape}-{self.device.split(':')[0]}-{context}-k{self.k}"
        path = folder / f"{name}-{layers}.safetensors"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with self.only(1) as model:
            one = folder / f"{name}-{1}.safetensors"
            if not one.exists():
                ids = torch.randint(1, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
                model.set_attn_implementation("sdpa")
                found = calibrate(model, [ids.tolist()], [self.k], f"random {self.shape}")[self.k]
                blocks = max(-(-context // Q_TILE), -(-_WARM // Q_TILE)) + 1
                rest = found.table[:, :, -1:].expand(-1, -1, max(0, blocks - found.table.shape[2]))
                Thresholds(torch.cat([found.table, rest], dim=2).contiguous(), found.shape, found.about).save(one)
        if layers > 1:
            found = load_thresholds(str(one))
            with self.only(layers) as model:
                shape = model_shape(model.config)
            Thresholds(found.table.expand(layers, -1, -1).contiguous(), shape, found.about).save(path)
        return path

    # Cells ------------------------------------------------------------------------------------------------------------

    def prefill(self, prefill: str, context: int, batch: int, layers: int, allocation: str | None) -> dict[str, Any]:
        """Time to first token of a prompt in chunks, offloading as it goes; memory as measured and as planned."""
        self._context = None  # its memory is no prefill's
        settings, scale = self.settings(prefill, context, batch, layers, allocation), self.all_layers / layers
        chunk, sparse = self.rows_chunk(batch), prefill in ("bsfa", "blasst")
        with self.only(layers) as model:
            model.set_attn_implementation("alaya")
            vocabulary = model.config.vocab_size
            kind = (prefill, layers, allocation, settings.store_dtype)
            if kind not in self._warm:
                warm = torch.randint(1, vocabulary, (1, min(context, _WARM)), device=self.device)
                prefill_once(model, AlayaCache(settings, config=model.config), warm, max(1, warm.shape[1] // 2))
                self._warm.add(kind)
            ids = torch.randint(1, vocabulary, (batch, context), device=self.device)
            # Only a probe knows how many tiles were skipped; it waits for the device once a layer and chunk.
            cache = AlayaCache(settings, config=model.config, probe=sparse)
            cache.reserve(context)
            if self.cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds = prefill_once(model, cache, ids, chunk)
            stats = cache.stats()
        row = {"measured s": seconds, "first token s": seconds * scale, "store": settings.store_dtype}
        row["host GB"] = (stats["offloaded_bytes"] + stats["index_bytes"]) * scale / 1e9
        row |= {"skipped tiles": stats.get("skipped_tiles")} if sparse else {}
        row["planned GB"] = self._planned(settings, context, batch, layers, chunk) / 1e9
        if self.cuda:
            row["peak GB"] = torch.cuda.max_memory_allocated(self.device) / 1e9
            row["reserved GB"] = torch.cuda.max_memory_reserved(self.device) / 1e9
            row["planned / measured"] = row["planned GB"] / row["peak GB"]
        return row

    def _planned(self, settings: AlayaConfig, context: int, batch: int, layers: int, chunk: int) -> int:
        """What :func:`~alaya_hf.sharding.memory_plan` says that these layers need on a device, and the weights of the others."""
        config = shape_config(self.shape, torch.bfloat16, layers)
        (share,) = memory_plan(
            config, context=context, batch=batch, config=settings, max_memory={0: 1 << 50}, dtype=torch.bfloat16, chunk=chunk
        ).devices.values()  # fmt: skip
        return share.needed - share.weights + weight_bytes(self.model, self.held)

    def decode(
        self, context: int, batch: int, system: str = "alaya", layers: int = 0, allocation: str | None = None
    ) -> dict[str, Any]:
        """Time per token over a store that was filled with synthetic keys; of few layers, from two numbers of them."""
        layers = layers or self.held
        fewer = [] if layers == self.all_layers or layers == 1 else [max(1, layers // 2)]
        times = {}
        for each in (*fewer, layers):
            self.give_back()  # blocks of other sizes
            times[each] = self._decode(context, batch, system, each, allocation)
        row = times[layers]

        def whole(name: str) -> float:
            """A figure of some layers brought to all of them."""
            if not fewer:
                return float(row[name] * self.all_layers / layers)
            (less,) = fewer
            each = (row[name] - times[less][name]) / (layers - less)
            return float(times[less][name] + each * (self.all_layers - less))

        row["ms per token"] = whole("measured ms")
        if "device GB" in row:
            # What the layers share weighs less with all of them.
            row["device share"] = whole("device GB") / whole("all GB")
        row["tokens/s"] = 1000 * batch / row["ms per token"]
        return row

    def _decode(self, context: int, batch: int, system: str, layers: int, allocation: str | None) -> dict[str, Any]:
        with self.only(layers) as model:
            if self._context is None or self._context[0] != context:
                self._context = None
                self._context = context, speed_model.context_of(model.config, context, self.device, self.dtype)
            keys, values, queries = self._context[1]
            speed_model._queries[:] = [] if queries is None else queries.unsqueeze(3)
            settings = self.settings("dense", context, batch, layers, allocation) if system == "alaya" else None
            new = speed_model._steps(system, self.new)
            found = speed_model.measure(system, model, keys, values, batch, new, settings)
        row = {"measured ms": found["ms"], "p95 ms": found["p95 ms"]}
        row |= {"peak GB": found["peak GB"]} if "peak GB" in found else {}
        if settings is not None:
            row |= {
                "store": settings.store_dtype,
                "replays": found["replays"],
                "device GB": found["cache on device GB"],
            }
            row["all GB"] = found["cache on device GB"] / found["device share"]
            row["MB over the bus per token"] = found["bus MB per token"] * self.all_layers / layers
        return row

    def planned(self, context: int, batch: int, host: int | None = None) -> MemoryPlan:
        """Of the whole shape on the machine it is planned for.

        Raises
        ------
        AlayaError
            If it does not fit.
        """
        host = self.host if host is None else host
        settings = speed_model.DEVICE.replace(store_dtype=self.store(context, batch, self.all_layers, host))
        plan = memory_plan(
            self.whole, context=context + self.new, batch=batch, config=settings, max_memory=self.room,
            dtype=torch.bfloat16, chunk=self.rows_chunk(batch),
        )  # fmt: skip
        if plan.host_cache > host:
            raise AlayaError(
                f"{batch} x {context:,} tokens take {plan.host_cache / GIB:.1f} GiB of host memory in 8 bits, and "
                f"{host / GIB:.1f} are available. Use a smaller batch."
            )
        return plan

    def limits(self, context: int) -> dict[str, Any]:
        """Most rows that fit on the machine planned for: offloaded; resident, where only weights, keys and values count."""
        if context not in self._limits:
            rows, plan = 0, None
            while rows < _MOST_ROWS:
                try:
                    plan = self.planned(context, rows + 1)
                except AlayaError:
                    break
                rows += 1
            if plan is None:
                plan = memory_plan(self.whole, context=64, config=speed_model.DEVICE, max_memory={0: 1 << 50}, chunk=64)
            weights = sum(share.weights for share in plan.devices.values())
            config = self.whole
            row = (context + self.new) * config.num_hidden_layers * _token_bytes(config)
            resident = max(0, (sum(map(_bytes, self.room.values())) - weights) // row)
            self._limits[context] = {"alaya rows": rows, "resident rows": min(_MOST_ROWS, int(resident))}
        return self._limits[context]

    def plan(self, context: int, batch: int) -> dict[str, Any]:
        """What the whole shape takes, on the devices and on the host."""
        found = self.planned(context, batch)
        shares = list(found.devices.values())
        cache = sum(share.cache for share in shares)
        config = self.whole
        return {
            "store": self.store(context, batch, self.all_layers, self.host),
            "fullest device GB": max(share.needed for share in shares) / 1e9,
            "weights GB": sum(share.weights for share in shares) / 1e9,
            "cache GB": cache / 1e9,
            "of the full KV %": 100 * cache / (batch * context * config.num_hidden_layers * _token_bytes(config)),
            "working GB": max(share.working for share in shares) / 1e9,
            "host GB": found.host_cache / 1e9,
        }

    def allocation(self, name: str, context: int, batch: int, documents: int, seed: int = 0) -> dict[str, Any]:
        """An allocator of the whole shape's host memory, without the memory: documents of up to this length, so many at once."""
        config, rng = self.whole, np.random.default_rng(seed)
        shape = KVShape(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        lengths = rng.integers(max(1, context // 2), context + 1, documents).tolist()
        events = legal_trace(lengths, rng, batch, 2, self.chunk)
        most, reserve = needed_tokens(events), context + 1024
        allocator = built(name, shape, reserve)
        ample = allocator.open(shape, batch * 6 * reserve * shape.token_bytes)
        free = replay(events, ample)
        capacity = int(1.2 * most) * shape.token_bytes
        result = replay(events, allocator.open(shape, capacity), allocator.open(shape, capacity))
        reserved, needed = (sum(point[key] for point in free.points) for key in ("reserved", "needed"))
        return {
            "needed GB": most * shape.token_bytes / 1e9,
            "held GB": ample.stats.peak_reserved / 1e9,
            "held / needed": ample.stats.peak_reserved / (most * shape.token_bytes),
            "not needed %": 100 * (1 - needed / reserved) if reserved else 0.0,
            "copied GB": ample.stats.bytes_copied / 1e9,
            "fragmentation": statistics.fmean(point["fragmentation"] for point in result.points)
            if result.points
            else 0.0,
            "refused": result.refused,
            "transfers": result.transfers,
            "calls per transfer": result.calls / max(1, result.transfers),
            "block by block": result.apart / max(1, result.transfers),
        }

    def give_back(self) -> None:
        """Let go of host memory that nobody uses, of what torch keeps for caches that offload as well."""
        gc.collect()
        pinned_pool().trim()
        if self.cuda and hasattr(torch._C, "_host_emptyCache"):
            torch._C._host_emptyCache()


def _token_bytes(config: Any) -> int:
    """Of one layer's keys and values of a token, in two bytes a number."""
    return 2 * int(config.num_key_value_heads) * int(config.head_dim) * 2


def _bytes(size: int | str) -> int:
    from accelerate.utils import convert_file_size_to_int

    return int(convert_file_size_to_int(size))
