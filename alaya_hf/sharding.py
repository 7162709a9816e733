"""Device maps that leave room for the cache: Accelerate's, with what an AlayaCache keeps on its layers' devices counted in."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from alaya_hf.config import AlayaConfig
from alaya_hf.errors import AlayaError, ConfigError, UnsupportedModelError
from alaya_hf.footprint import META, LayerFootprint, layer_footprints, working_bytes
from alaya_hf.storage.memory import GIB, available_host_memory

Device = int | str
_BUFFER = "alaya_cache"  # under this name a block's cache is counted like a buffer of it
_HOSTS = ("cpu", "disk")


class DeviceMemoryError(AlayaError, MemoryError):
    """Weights, cache and working memory do not fit on the devices; names what is needed and what there is."""


@dataclass
class DeviceShare:
    """Bytes of one device.

    Attributes
    ----------
    weights : int
        Of the modules that lie there.
    cache : int
        Of their layers: windows, low-bit copies, hot sets, and the buffers of a decode step.
    working : int
        Most that a prefill chunk has in use beside them: activations, blocks on their way, a low-bit copy that grows, the
        largest block of weights that is brought from the host.
    available : int
        What `max_memory` says.
    blocks : int
        Decoder blocks there.
    """

    weights: int = 0
    cache: int = 0
    working: int = 0
    available: int = 0
    blocks: int = 0

    @property
    def needed(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working


@dataclass
class MemoryPlan:
    """Where a model goes, and what lies where.

    Attributes
    ----------
    device_map : dict of str to device
        For ``from_pretrained(device_map=...)``.
    devices : dict of device to DeviceShare
    host_cache : int
        Bytes of host memory for the offloaded context, all layers: pinned with ``engine="device"``.
    host_cache_per_rank : int
        The same for one process, where tensor parallelism divides the KV heads.
    host_weights, disk_weights : int
        Bytes of weights that Accelerate keeps there and brings to a device for every pass.
    """

    device_map: dict[str, Device]
    devices: dict[Device, DeviceShare] = field(default_factory=dict)
    host_cache: int = 0
    host_cache_per_rank: int = 0
    host_weights: int = 0
    disk_weights: int = 0

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("device", "blocks", "weights", "cache", "working", "needed", "available")]
        for device, share in self.devices.items():
            sizes = (share.weights, share.cache, share.working, share.needed, share.available)
            rows.append((str(device), str(share.blocks), *(f"{size / GIB:.2f}" for size in sizes)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        lines.append(
            f"GiB; host: {self.host_cache / GIB:.2f} for the context ({self.host_cache_per_rank / GIB:.2f} per rank), "
            f"{self.host_weights / GIB:.2f} of weights; disk: {self.disk_weights / GIB:.2f} of weights"
        )
        return "\n".join(lines)


def device_map(
    model_or_config: Any,
    *,
    context: int,
    batch: int = 1,
    config: AlayaConfig | str | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = 8192,
    working: int | None = None,
) -> dict[str, Device]:
    """A device map for ``from_pretrained`` under which a context of this length fits later.

    Parameters
    ----------
    model_or_config : PreTrainedModel, PreTrainedConfig or str
        A model (on the meta device, say), its configuration, or a name for ``AutoConfig``. No weights are needed.
    context : int
        Tokens of a row, those to be generated included.
    batch : int
        Rows.
    config : AlayaConfig or str, optional
        Of the cache. Default: the preset ``"alaya"``.
    max_memory : mapping of device to bytes, optional
        As for Accelerate, ``{0: "70GiB", 1: "70GiB"}``. Default: what is free on every GPU. Weights are offloaded to the host
        (``"cpu"``) or to ``"disk"`` only if those are named beside a GPU.
    dtype : torch.dtype, optional
        Of the weights. Default: the configuration's, or bfloat16.
    chunk : int
        Tokens of a prefill pass (``generate``'s `prefill_chunk_size`). Without chunks: the context's length.
    working : int, optional
        Bytes that such a pass takes on a device. Default: found by running a layer on the meta device.

    Returns
    -------
    dict of str to device
        No decoder block is split. Layers' caches land on their layers' devices by themselves; the caches of blocks whose weights
        are offloaded on the first GPU, where these run.

    Raises
    ------
    DeviceMemoryError
        If it does not fit.
    ConfigError, UnsupportedModelError
        For settings or models that cannot be planned for.

    Notes
    -----
    Weights of a quantised checkpoint are counted in `dtype`: pass ``max_memory`` accordingly.
    """
    plan = memory_plan(
        model_or_config, context=context, batch=batch, config=config, max_memory=max_memory, dtype=dtype, chunk=chunk,
        working=working,
    )  # fmt: skip
    return plan.device_map


def memory_plan(
    model_or_config: Any,
    *,
    context: int,
    batch: int = 1,
    config: AlayaConfig | str | None = None,
    max_memory: Mapping[Device, int | str] | None = None,
    dtype: torch.dtype | None = None,
    chunk: int = 8192,
    working: int | None = None,
    ranks: int = 1,
) -> MemoryPlan:
    """The table behind :func:`device_map`: bytes of weights, cache and working memory per device, and of host memory.

    Parameters
    ----------
    model_or_config, context, batch, config, max_memory, dtype, chunk, working
        See :func:`device_map`.
    ranks : int
        Processes of tensor parallelism, for `host_cache_per_rank`; the devices are those of one process that holds everything.

    Raises
    ------
    DeviceMemoryError, ConfigError, UnsupportedModelError
    """
    for name, value in (("context", context), ("batch", batch), ("chunk", chunk), ("ranks", ranks)):
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer of at least 1, but got {value!r}.")
    settings = AlayaConfig.preset(config or "alaya") if config is None or isinstance(config, str) else config
    model, model_config, dtype = _on_meta(model_or_config, dtype)
    layers = layer_footprints(model_config, settings, batch, context, dtype)
    shared = layers if ranks == 1 else layer_footprints(model_config, settings, batch, context, dtype, ranks)
    if working is None:
        working = working_bytes(model_config, settings, batch, context, chunk, dtype)
    working += max(layer.growth for layer in layers)
    room = _available(max_memory)
    planner = _Planner(model, dtype, layers, working, room)
    plan = planner.plan()
    plan.host_cache, plan.host_cache_per_rank = sum(f.host for f in layers), sum(f.host for f in shared)
    planner.check(plan, context, batch)
    if plan.host_cache > available_host_memory() and ranks == 1 and max_memory is None:
        raise DeviceMemoryError(
            f"the offloaded context of {batch} x {context:,} tokens needs {plan.host_cache / GIB:.1f} GiB of host memory, but "
            f"{available_host_memory() / GIB:.1f} GiB are free. Shorten the context, use a smaller batch, or "
            "store_dtype='int8' with engine='device'."
        )
    return plan


def _on_meta(given: Any, dtype: torch.dtype | None) -> tuple[nn.Module, PreTrainedConfig, torch.dtype]:
    """A model without weights, its configuration, and its dtype."""
    if isinstance(given, str):
        from transformers import AutoConfig

        given = AutoConfig.from_pretrained(given)
    config = given if isinstance(given, PreTrainedConfig) else getattr(given, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise UnsupportedModelError(
            f"expected a Transformers model, its configuration or its name, but got {type(given).__name__}."
        )
    found = dtype or getattr(config, "dtype", None)
    found = found if isinstance(found, torch.dtype) else torch.bfloat16
    # Always one of our own: what is counted is registered on it.
    with META:
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=found)
    model.tie_weights()
    return model, config, found


def _available(max_memory: Mapping[Device, int | str] | None) -> dict[Device, int]:
    """Bytes per device, those that compute first.

    Raises
    ------
    ConfigError
        Without a device to compute on.
    """
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    if max_memory is None:
        found = get_max_memory()
        gpus = {device: size for device, size in found.items() if device not in _HOSTS}
        return gpus or {"cpu": available_host_memory()}
    try:
        # Not by Accelerate's own function, which asks for GPUs: a plan may be made elsewhere.
        room = {device: int(convert_file_size_to_int(size)) for device, size in max_memory.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"max_memory must map devices to bytes or texts like '20GiB', but got {max_memory!r}: {error}."
        ) from error
    if not set(room) - {"disk"}:
        raise ConfigError(f"max_memory names no device to compute on: {max_memory!r}. Name a GPU's number, or 'cpu'.")
    return room


class _Planner:
    """Distributes modules with their caches over devices.

    Parameters
    ----------
    model : nn.Module
        On the meta device; gets a buffer of its cache's size per block.
    working : int
        Bytes on every computing device beside weights and caches.
    room : dict of device to int
    """

    def __init__(
        self, model: Any, dtype: torch.dtype, layers: list[LayerFootprint], working: int, room: dict[Device, int]
    ) -> None:
        self.model, self.dtype, self.layers, self.working, self.room = model, dtype, layers, working, room
        self.computing = [device for device in room if device not in _HOSTS] or ["cpu"]
        self.classes = sorted(set(getattr(model, "_no_split_modules", None) or ()))
        self.blocks = self._blocks()
        for (_, block), layer in zip(self.blocks, layers, strict=True):
            block.register_buffer(_BUFFER, torch.empty(layer.device, dtype=torch.uint8, device=META), persistent=False)
        keys: dict[Any, int] = {}
        for layer in layers:
            keys |= layer.workspace
        self.workspace = sum(keys.values())

    def _blocks(self) -> list[tuple[str, nn.Module]]:
        blocks = [(name, part) for name, part in self.model.named_modules() if type(part).__name__ in self.classes]
        if len(blocks) != len(self.layers):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} says that blocks of {self.classes or 'no class'} may not be split, which are "
                f"{len(blocks)} modules, but has {len(self.layers)} layers with a cache. Give a device_map of your own."
            )
        return blocks

    def plan(self) -> MemoryPlan:
        """The first distribution that fits: balanced, then one device after the other."""
        from accelerate import infer_auto_device_map
        from accelerate.utils import get_balanced_memory

        left = {
            device: max(0, size - (self.working + self.workspace if device in self.computing else 0))
            for device, size in self.room.items()
        }
        if "cpu" not in left:
            left["cpu"] = 0
        kwargs = {"no_split_module_classes": self.classes, "dtype": self.dtype}
        tries = [left] if len(self.computing) < 2 else [get_balanced_memory(self.model, dict(left), **kwargs), left]
        for memory in tries:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Current model requires")  # looked at below
                found = infer_auto_device_map(self.model, dict(memory), offload_buffers=False, **kwargs)
            plan = self._shares({name: device for name, device in found.items() if _BUFFER not in name.split(".")})
            if not self._offloaded(plan) and not self._over(plan):
                break
        return plan

    def _offloaded(self, plan: MemoryPlan) -> bool:
        return any(device not in self.computing for device in plan.device_map.values())

    def _over(self, plan: MemoryPlan) -> list[Device]:
        return [device for device, share in plan.devices.items() if share.needed > share.available]

    def _shares(self, found: dict[str, Device]) -> MemoryPlan:
        plan = MemoryPlan(found, {device: DeviceShare(available=self.room[device]) for device in self.computing})
        largest, seen = 0, set()
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if name.split(".")[-1] == _BUFFER or id(tensor) in seen:
                continue
            seen.add(id(tensor))  # tied weights once
            device, size = self._of(found, name), tensor.numel() * tensor.element_size()
            if device in plan.devices:
                plan.devices[device].weights += size
            elif device == "cpu":
                plan.host_weights += size
            else:
                plan.disk_weights += size
        main = self.computing[0]
        for (name, block), layer in zip(self.blocks, self.layers, strict=True):
            device = self._of(found, name)
            if device not in plan.devices:
                largest = max(largest, sum(p.numel() * p.element_size() for p in block.parameters()))
                device = main  # where Accelerate runs what is offloaded
            plan.devices[device].cache += layer.device
            plan.devices[device].blocks += 1
        for device, share in plan.devices.items():
            if share.blocks or share.weights:
                share.cache += self.workspace if share.blocks else 0
                share.working = self.working + (largest if device == main else 0)
        return plan

    @staticmethod
    def _of(found: dict[str, Device], name: str) -> Device:
        """The device of the longest entry that a name begins with."""
        parts = name.split(".")
        for length in range(len(parts), -1, -1):
            if ".".join(parts[:length]) in found:
                return found[".".join(parts[:length])]
        raise UnsupportedModelError(f"Accelerate placed everything but {name!r}. Give a device_map of your own.")

    def check(self, plan: MemoryPlan, context: int, batch: int) -> None:
        """Refuse what does not fit.

        Raises
        ------
        DeviceMemoryError
        """
        over = self._over(plan)
        unwanted = {d for d in plan.device_map.values() if d not in self.computing and d not in self.room}
        unwanted |= {"cpu"} if plan.host_weights > self.room.get("cpu", 0) and "cpu" not in self.computing else set()
        if not over and not unwanted:
            return
        weights = plan.host_weights + plan.disk_weights + sum(share.weights for share in plan.devices.values())
        cache = sum(layer.device for layer in self.layers)
        each = self.working + self.workspace
        needed = weights + cache + each * len(self.computing)
        available = sum(self.room[device] for device in self.computing)
        raise DeviceMemoryError(
            f"{type(self.model).__name__} with a context of {batch} x {context:,} tokens needs {needed / GIB:.2f} GiB on "
            f"{len(self.computing)} device(s) ({', '.join(map(str, self.computing))}): {weights / GIB:.2f} of weights, "
            f"{cache / GIB:.2f} of cache and {each / GIB:.2f} of working memory on each; {available / GIB:.2f} GiB are available"
            f"{', which whole decoder blocks do not fill' if needed <= available else ''}. Use more devices, a shorter context, "
            "a smaller batch or chunk, residual='block_means', fewer hot_bytes, or name 'cpu' in max_memory to offload weights."
        )
