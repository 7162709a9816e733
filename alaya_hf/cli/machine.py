"""What a machine can do, measured: what ``alaya-hf doctor`` prints."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from alaya_hf import __version__
from alaya_hf.kernels.exact import BACKENDS, Request, choose
from alaya_hf.kernels.exact.base import HALF, Backend
from alaya_hf.kernels.exact.plain import Plain
from alaya_hf.storage.memory import GIB, available_host_memory, control_group_memory
from alaya_hf.storage.pinned import PinnedPool

SAMPLE = 512 << 20
"""Bytes of host memory to measure with; an eighth of what is free, if that is less."""
NO_CUDA = "not run: no CUDA device"
_PACKAGES = ("torch", "triton", "transformers", "numba", "accelerate", "flash-attn", "flash-attn-3", "flash-attn-4")


def examine() -> dict[str, Any]:
    """Everything, as plain data; takes some seconds, and as long as it takes to compile the kernels where they are new.

    Returns
    -------
    dict
        ``versions``, ``host``, ``pool``, ``attention`` and ``devices``; bytes are whole numbers, bandwidths in GB/s (1e9).
    """
    sample = max(1 << 20, min(SAMPLE, available_host_memory() // 8) >> 20 << 20)
    devices = (
        [_device(index, sample) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "versions": _versions(),
        "host": _host(sample),
        "pool": _pool(sample),
        "attention": {"cpu float32": choose(Request("cpu", (0, 0), torch.float32, 128, 8192, 8192, causal=True)).name},
        "devices": devices,
        "kernels": NO_CUDA if not devices else _verdict(devices),
    }


def failures(report: dict[str, Any]) -> list[str]:
    """What went wrong in a report of :func:`examine`, one line each."""
    return [
        f"cuda:{device['index']} {part} {name}: {result}"
        for device in report["devices"]
        for part in ("kernels", "attention_checks")
        for name, result in device[part].items()
        if result.startswith("failed")
    ]


def _verdict(devices: list[dict[str, Any]]) -> str:
    results = [result for device in devices for result in device["kernels"].values()]
    return f"{sum(result.startswith('ok') for result in results)} of {len(results)} agree with their references"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"alaya_hf": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _host(sample: int) -> dict[str, Any]:
    import numba

    limit = control_group_memory()
    data = torch.ones(sample // 4)
    seconds = _median(lambda: data.sum(), 3)
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        huge = pages.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except OSError:
        huge = "unknown"
    return {
        "processor": _processor(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "numba_threads": numba.get_num_threads(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "available": available_host_memory(),
        "container_limit": None if limit is None else limit[0],
        "huge_pages": huge,
        "read_gb_s": sample / seconds / 1e9,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _pool(sample: int) -> dict[str, Any]:
    """How long a pool of pinned memory takes to set up; it is given back at once."""
    pool = PinnedPool()
    pool.allocate((sample,), torch.uint8)
    stats = pool.stats
    pool.trim()
    return {"pinned": stats.pinned, "seconds_per_gib": stats.seconds / (stats.held / GIB)}


def _median(work: Callable[[], Any], repeats: int) -> float:
    """Seconds."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _device(index: int, sample: int) -> dict[str, Any]:
    with torch.cuda.device(index), torch.random.fork_rng(devices=[index]):
        torch.manual_seed(0)
        properties, (free, total) = torch.cuda.get_device_properties(index), torch.cuda.mem_get_info(index)
        found = {
            "index": index,
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": total,
            "free": free,
            **_bandwidths(index, sample, free),
            "attention": {kind: choose(request).name for kind, request in _requests(index).items()},
            "attention_checks": _attention_checks(index),
        }
        return {**found, **_kernels(index)}


def _device_median(work: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds on the current device."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _bandwidths(index: int, sample: int, free: int) -> dict[str, float]:
    """Copies inside the device (bytes read and written), and both ways over the bus from pinned memory."""
    size = min(1 << 32, free // 4) >> 20 << 20
    a, b = (torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}") for _ in "ab")
    part = min(sample, size, 256 << 20)
    host = PinnedPool().allocate((part,), torch.uint8)
    inside = _device_median(lambda: b.copy_(a))
    there = _device_median(lambda: b[:part].copy_(host, non_blocking=True))
    back = _device_median(lambda: host.copy_(a[:part], non_blocking=True))
    return {
        "copy_gb_s": 2 * size / inside / 1e9,
        "to_device_gb_s": part / there / 1e9,
        "to_host_gb_s": part / back / 1e9,
    }


def _requests(index: int) -> dict[str, Request]:
    """Calls that a prefill makes."""
    capability = torch.cuda.get_device_capability(index) if torch.version.cuda else (0, 0)
    request = Request("cuda", capability, torch.bfloat16, 128, 8192, 8192, causal=True)
    return {
        "prefill": request,
        "a short pass": Request("cuda", capability, torch.bfloat16, 128, 100, 5000),
        "head dimension 256": Request("cuda", capability, torch.bfloat16, 256, 8192, 8192, causal=True),
        "float32": Request("cuda", capability, torch.float32, 128, 8192, 8192, causal=True),
    }


def _attention_checks(index: int) -> dict[str, str]:
    """Every implementation for GPUs that is there, against float32."""
    return {backend.name: _guarded(partial(_check_attention, backend, index)) for backend in BACKENDS[:-1]}


def _check_attention(backend: Backend, index: int) -> str:
    missing = backend.missing()
    if missing is not None:
        return f"not there: {missing}"
    length = 6000  # large enough for all of them
    for dtype in HALF:
        q = 2 * torch.randn(1, 4, length, 128, device=f"cuda:{index}")
        q, (k, v) = q.to(dtype), torch.randn(2, 1, 2, length, 128, device=f"cuda:{index}").to(dtype)
        refused = backend.refuses(Request.of(q, k, v, True, None, None))
        if refused is not None:
            return f"not for this device: {refused}"
        found = backend.run(q, k, v, 0.1, True, None, None)
        # The last queries see everything; the whole square in float32 would take long.
        last = slice(length - 64, length)
        truth = Plain().run(q[:, :, last], k, v, 0.1, True, None, None)
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = (q[:, :, last] @ keys.transpose(2, 3)).float() * 0.1
        seen = torch.ones(64, length, dtype=torch.bool, device=q.device).tril(length - 64)
        plain = (scores.masked_fill(~seen, float("-inf")).softmax(-1).to(dtype) @ values).float()
        error, allowed = ((x - truth.out).abs().max() for x in (found.out[:, :, last], plain))
        if not error <= 2 * allowed + 1e-5 or not (found.lse[:, :, last] - truth.lse).abs().max() <= 1e-2:
            return f"failed: {dtype} differs from float32 by {error:.2g}, a plain implementation by {allowed:.2g}"
    return "ok"


def _guarded(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:  # whatever it is, the report has to go on
        return f"failed: {type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _kernels(index: int) -> dict[str, Any]:
    """The decode kernels against their references, and how the low-bit pass is compiled."""
    if importlib.util.find_spec("triton") is None:
        return {"nvrtc": False, "kernels": {"all": "not run: Triton is not installed"}}
    from alaya_hf.kernels.gpu import block_checks, checks, nvrtc

    there = nvrtc.available(index)
    if not __debug__:
        return {"nvrtc": there, "kernels": {"all": "not run: Python runs with -O, which leaves the checks out"}}

    def run(check: Callable[[Any], None], cases: Callable[[str], list[Any]]) -> str:
        begin = time.perf_counter()
        for case in cases(f"cuda:{index}"):
            check(case)
        torch.cuda.synchronize(index)
        return f"ok, {time.perf_counter() - begin:.1f} s with compiling"

    results = {
        name: _guarded(partial(run, check, each.two_cases))
        for each in (checks, block_checks)
        for name, check in each.CHECKS.items()
    }
    return {"nvrtc": there, "kernels": results}
