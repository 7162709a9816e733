"""What a cell of the study measures: a prefill, decoding, a plan of memory, an allocator under a trace."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.engine.prefill.thresholds import Thresholds
from alaya_hf.kernels.sparse_prefill import Q_TILE
from alaya_hf.sharding import memory_plan
from alaya_hf.storage.allocators import KVShape
from eval import speed_model
from eval.calibrate_bsfa import calibrate
from eval.legal_trace import legal_trace
from eval.random_model import random_model, shape_config
from eval.replay import GIB, replay
from eval.speed_alloc import built, needed_tokens
from eval.speed_prefill import prefill_once

PREFILLS = ("dense", "bsfa", "blasst", "retrieval")
_WARM = 4096  # tokens that compile the kernels before anything is timed


@dataclass
class Bench:
    """A model of few of the shape's layers, and what is needed to measure with it.

    Parameters
    ----------
    shape : str
        Of :data:`~eval.random_model.SHAPES`.
    layers : int
        Of the model; times are scaled to the shape's. 0: all.
    device : str
    chunk : int
        Tokens of a prefill pass.
    new : int
        Tokens to decode.
    k : int
        Tiles per block of queries that BSFA's thresholds keep.
    folder : Path
        For the thresholds.
    """

    shape: str
    layers: int
    device: str
    chunk: int
    new: int
    k: int
    folder: Path
    _model: Any = None
    _warm: set[str] = field(default_factory=set)

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
    def scale(self) -> float:
        """Layers of the shape per layer measured."""
        return self.whole.num_hidden_layers / self.model.config.num_hidden_layers

    @property
    def model(self) -> Any:
        """Made when it is first asked for."""
        if self._model is None:
            self._model = random_model(self.shape, self.device, self.dtype, self.layers)
        return self._model

    def settings(self, prefill: str, context: int) -> AlayaConfig:
        """Of the cache, with one of :data:`PREFILLS`."""
        base = speed_model.DEVICE if self.cuda else speed_model.DEVICE.replace(engine="host")
        if prefill == "retrieval":
            return base.replace(engine="host", prefill={"kind": "retrieval"})
        if prefill == "bsfa":
            return base.replace(prefill={"kind": "bsfa", "thresholds": str(self._thresholds(context))})
        return base.replace(prefill={"dense": "exact"}.get(prefill, prefill))

    def _thresholds(self, context: int) -> Path:
        """Calibrated on random tokens; beyond what is calibrated, the last block's."""
        tokens = min(context, 32768 if self.cuda else 1024)
        path = (
            self.folder / f"bsfa-{self.shape}-{self.layers}-{self.device.split(':')[0]}-{context}-k{self.k}.safetensors"
        )
        if not path.exists():
            ids = torch.randint(1, self.model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0))
            self.model.set_attn_implementation("sdpa")
            with torch.no_grad():
                found = calibrate(self.model, [ids.tolist()], [self.k], f"random {self.shape}")[self.k]
            blocks = max(-(-context // Q_TILE), -(-_WARM // Q_TILE)) + 1
            rest = found.table[:, :, -1:].expand(-1, -1, max(0, blocks - found.table.shape[2]))
            self.folder.mkdir(parents=True, exist_ok=True)
            Thresholds(torch.cat([found.table, rest], dim=2).contiguous(), found.shape, found.about).save(path)
        return path

    def prefill(self, prefill: str, context: int, batch: int, allocation: str | None = None) -> dict[str, Any]:
        """Time to first token of a prompt in chunks, offloading as it goes, to a pool of an allocator if one is named.

        Raises
        ------
        ConfigError
            If the engine's store cannot lie in such a pool.
        """
        model, settings = self.model, self.settings(prefill, context)
        if allocation is not None:
            settings = speed_model.allocated(settings, allocation, context)
        model.set_attn_implementation("alaya")
        vocabulary = model.config.vocab_size
        if prefill not in self._warm:
            warm = torch.randint(1, vocabulary, (1, min(context, _WARM)), device=self.device)
            prefill_once(model, AlayaCache(settings, config=model.config), warm, max(1, warm.shape[1] // 2))
            self._warm.add(prefill)
        ids = torch.randint(1, vocabulary, (batch, context), device=self.device)
        cache = AlayaCache(settings, config=model.config)
        cache.reserve(context)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = prefill_once(model, cache, ids, self.chunk)
        stats = cache.stats()
        row = {"measured s": seconds, "time to first token s": seconds * self.scale}
        row["host GB"] = (stats["offloaded_bytes"] + stats["index_bytes"]) * self.scale / 1e9
        if self.cuda:
            row["measured peak GB"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        return row

    def decode(self, context: int, batch: int, allocation: str | None = None) -> dict[str, Any]:
        """Time per token over a store that was filled with synthetic keys, in a pool of an allocator if one is named.

        Raises
        ------
        ConfigError
            If the engine's store cannot lie in such a pool.
        """
        model = self.model
        keys, values, queries = speed_model.context_of(model.config, context, self.device, self.dtype)
        speed_model._queries[:] = [] if queries is None else queries.unsqueeze(3)
        name = "alaya" if self.cuda else "alaya, host engine"
        if allocation is not None:
            # Where there is no such system, the settings say why.
            speed_model.allocated(speed_model.ALAYA[name], allocation, context)
            name = f"alaya, {allocation}"
        found = speed_model.measure(name, model, keys, values, batch, self.new)
        row = {"measured ms": found["ms"], "ms per token": found["ms"] * self.scale}
        row["MB over the bus per token"] = found["bus MB per token"] * self.scale
        if "peak GB" in found:
            row["measured peak GB"] = found["peak GB"]
        return row

    def plan(self, context: int, batch: int, room: dict[int | str, str]) -> dict[str, Any]:
        """What the whole shape takes, on the devices and on the host."""
        found = memory_plan(
            self.whole, context=context + self.new, batch=batch, config=speed_model.DEVICE, max_memory=room,
            dtype=torch.bfloat16, chunk=self.chunk,
        )  # fmt: skip
        shares = list(found.devices.values())
        return {
            "peak device GB": max(share.needed for share in shares) / 1e9,
            "weights GB": sum(share.weights for share in shares) / 1e9,
            "cache GB": sum(share.cache for share in shares) / 1e9,
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
        capacity = int(1.2 * most) * shape.token_bytes
        allocator = built(name, shape, reserve)
        result = replay(events, allocator.open(shape, capacity), allocator.open(shape, capacity))
        points = result.points
        reserved, needed = (sum(point[key] for point in points) for key in ("reserved", "needed"))
        return {
            "peak reserved GB": max((point["reserved"] for point in points), default=0.0) * GIB / 1e9,
            "needed GB": most * shape.token_bytes / 1e9,
            "not needed %": 100 * (1 - needed / reserved) if reserved else 0.0,
            "fragmentation": statistics.fmean(point["fragmentation"] for point in points) if points else 0.0,
            "refused": result.refused,
            "transfers": result.transfers,
            "calls per transfer": result.calls / max(1, result.transfers),
            "block by block": result.apart / max(1, result.transfers),
        }
