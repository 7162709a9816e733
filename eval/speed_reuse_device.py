"""Time to the first token of a question on a stored context with ``engine="device"``, and by loading or recomputing all of it."""

from __future__ import annotations

import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache

from alaya_hf import AlayaConfig, AlayaDB, Session
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import AlayaError
from alaya_hf.storage.db import registered
from alaya_hf.storage.memory import available_host_memory
from alaya_hf.storage.pinned import pinned_pool
from eval.disk import dd_rate
from eval.environment import describe
from eval.random_model import random_model
from eval.report import markdown, write_csv
from eval.speed_model import QUERY, context_of

_READERS = 8
_GB = 1e9


def settings_of(preset: str, store_dtype: str) -> AlayaConfig:
    """The sessions': the preset under the device engine, with the query of the speed figures."""
    return AlayaConfig.preset(preset).replace(
        engine="device", query=QUERY, min_context=0, store_dtype=store_dtype, cuda_graphs="none"
    )


@dataclass
class _Bench:
    """What all measurements share."""

    model: Any
    device: str
    settings: AlayaConfig
    question: Tensor
    repeats: int
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    output: Path | None = None

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def ask(self, cache: Any) -> Tensor:
        """Logits ``[vocabulary]`` after the question, on the host: the first token is there."""
        out = self.model(input_ids=self.question, **cache_argument(cache), logits_to_keep=1)
        return out.logits[0, -1].float().cpu()

    def tidy(self) -> None:
        """Nothing of the last measurement stays: no session, no registration, no cached device memory."""
        gc.collect()
        registered.settle()
        if self.cuda:
            torch.cuda.empty_cache()

    def add(self, **row: Any) -> None:
        """A row, printed as it comes."""
        self.rows.append(row)
        typer.echo("  ".join(f"{key}={_short(value)}" for key, value in row.items()))
        if self.output is not None:
            columns = list(dict.fromkeys(key for each in self.rows for key in each))
            write_csv(self.output, [{column: each.get(column) for column in columns} for each in self.rows])

    def measure(
        self, about: dict[str, Any], work: Callable[[], dict[str, float]], prepare: Callable[[], None], repeats: int
    ) -> None:
        """The median of some runs as a row; what cannot be run says why."""
        if time.perf_counter() > self.deadline:
            self.add(**about, **{"not run": "the time given is over"})
            return
        taken: list[dict[str, float]] = []
        try:
            for _ in range(repeats):
                self.tidy()
                prepare()
                self.wait()
                began = time.perf_counter()
                parts = work()
                self.wait()
                taken.append({"seconds": time.perf_counter() - began, **parts})
                if time.perf_counter() > self.deadline:
                    break
        except (torch.cuda.OutOfMemoryError, AlayaError, OSError) as error:
            if not taken:
                self.add(**about, **{"not run": f"{type(error).__name__}: {str(error)[:160]}"})
                return
        middle = {key: statistics.median(run[key] for run in taken) for key in taken[0]}
        base = [
            r["seconds"] for r in self.rows if _same_place(r, about) and r["system"] == "load_all" and "seconds" in r
        ]
        ratio = {"load_all / this": base[0] / middle["seconds"]} if base else {}
        self.add(**about, **middle, runs=len(taken), **ratio)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _same_place(row: dict[str, Any], about: dict[str, Any]) -> bool:
    return all(row.get(key) == about.get(key) for key in ("context", "from", "question"))


def _in_memory(path: Path) -> bool:
    """Whether a folder lies on a file system without a disk."""
    best, kind = "", ""
    try:
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, found = line.split()[:3]
            inside = str(path.resolve()).startswith(mount.rstrip("/") + "/") or mount == "/"
            if inside and len(mount) > len(best):
                best, kind = mount, found
    except OSError:
        return False
    return kind in ("tmpfs", "ramfs")


def _drop_pages(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _keep_pages(folder: Path) -> None:
    def read(path: Path) -> None:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass

    with ThreadPoolExecutor(_READERS) as threads:
        list(threads.map(read, folder.rglob("*.safetensors")))


class _Files:
    """``load_all`` from files: every layer's vectors read by several threads into one of two pinned buffers, moved to the device.

    The next layer is read while this one crosses the bus.
    """

    def __init__(self, bench: _Bench, folder: Path) -> None:
        self.bench, self.layers = bench, []
        for path in sorted(folder.glob("segments/*/*.safetensors")):
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(size))["kv"]
            self.layers.append((path, 8 + size, entry["data_offsets"][1], entry["shape"]))
        self.buffers = [pinned_pool().allocate((self.layers[0][2],), torch.uint8) for _ in range(2)]
        self.threads = ThreadPoolExecutor(_READERS)

    def cache(self) -> DynamicCache:
        cache, model = DynamicCache(config=self.bench.model.config), self.bench.model
        free: list[Any] = [None, None]
        for number, (path, offset, nbytes, shape) in enumerate(self.layers):
            buffer = self.buffers[number % 2]
            if free[number % 2] is not None:
                free[number % 2].synchronize()
            fd = os.open(path, os.O_RDONLY)
            try:
                step = -(-nbytes // _READERS)
                view = memoryview(buffer.numpy())

                def read(
                    at: int, fd: int = fd, view: memoryview = view, step: int = step, offset: int = offset
                ) -> None:
                    part = view[at : min(at + step, nbytes)]  # noqa: B023
                    while part:
                        got = os.preadv(fd, [part], offset + at)
                        part, at = part[got:], at + got

                list(self.threads.map(read, range(0, nbytes, step)))
            finally:
                os.close(fd)
            kv = buffer.view(model.dtype).view(shape).to(self.bench.device, non_blocking=True)
            if self.bench.cuda:
                free[number % 2] = torch.cuda.Event()
                free[number % 2].record()
            cache.update(kv[None, :, :, 0].contiguous(), kv[None, :, :, 1].contiguous(), number)
        return cache


def _from_pinned(bench: _Bench, layers: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    cache = DynamicCache(config=bench.model.config)
    for number, pair in enumerate(layers):
        keys, values = (side.to(bench.device, non_blocking=True) for side in pair)
        cache.update(keys, values, number)
    return cache


def _attached(bench: _Bench, folder: Path, prompt: Tensor, ask: bool = True) -> Any:
    """A session on the stored context, and the seconds until it was there; asked the question."""
    began = time.perf_counter()
    with AlayaDB(folder, model=bench.model, settings=bench.settings) as db:
        session, rest = db.create_session(prompt)
        assert rest.shape[1] == bench.question.shape[1], f"the context is not found: {rest.shape[1]} tokens are left"
        attached = time.perf_counter() - began
        logits = bench.ask(session) if ask else None
    return session, attached, logits


def check(bench: _Bench, folder: Path, prompt: Tensor, keys: Tensor, values: Tensor) -> None:
    """An attached session answers as one in memory does: the question, then four tokens one by one.

    Raises
    ------
    RuntimeError
    """
    session, _, logits = _attached(bench, folder, prompt)
    memory = Session(bench.settings, config=bench.model.config)
    for layer in memory.layers:
        layer.fill(keys, values)
    in_place = all(layer.tokens.stored is not None for layer in session.alaya_layers)
    wanted, worst, tokens = bench.ask(memory), 0.0, []
    for _ in range(5):
        scale = float(wanted.std())
        worst = max(worst, float((logits - wanted).abs().max()) / scale)
        tokens.append((int(logits.argmax()), int(wanted.argmax())))
        next_token = torch.tensor([[tokens[-1][1]]], device=bench.device)
        logits, wanted = (
            bench.model(input_ids=next_token, **cache_argument(cache)).logits[0, -1].float().cpu()
            for cache in (session, memory)
        )
    agree = sum(a == b for a, b in tokens)
    typer.echo(
        f"check at {keys.shape[2]} tokens: {'in place' if in_place else 'copied'}; tokens that agree: {agree} of 5; largest "
        f"difference of logits {worst:.2g} of their deviation"
    )
    if not (in_place and worst < 0.2):
        raise RuntimeError("an attached session does not answer as one in memory does; no time means anything then")


@contextmanager
def _stored(bench: _Bench, place: Path, keys: Tensor, values: Tensor, ids: Tensor) -> Iterator[tuple[Path, float, int]]:
    """A folder with the context in it, the seconds that storing it from a session took, and its bytes."""
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        with AlayaDB(folder, model=bench.model, settings=bench.settings) as db:
            session = Session(bench.settings, config=bench.model.config)
            for layer in session.layers:
                layer.fill(keys, values)
            session._token_ids = ids
            bench.wait()
            began = time.perf_counter()
            row = db.store(session)
            seconds = time.perf_counter() - began
            del session
        gc.collect()
        pinned_pool().trim()
        yield folder, seconds, row.bytes
        bench.tidy()


def _one_context(bench: _Bench, folder: Path, ids: Tensor, prompt: Tensor, keys: Tensor, values: Tensor) -> None:
    """All systems at one length."""
    tokens, layers = keys.shape[2], bench.model.config.num_hidden_layers

    def alaya() -> dict[str, float]:
        session, attached, _ = _attached(bench, folder, prompt)
        stats = session.stats()
        return {"attach s": attached, "device GB": stats["device_bytes"] / _GB}

    def nothing() -> None:
        pass

    asked = {"context": tokens, "question": bench.question.shape[1]}
    where: dict[str, Any] = {**asked, "from": "page cache"}
    files = _Files(bench, folder)

    def load_files() -> dict[str, float]:
        cache = files.cache()
        bench.wait()
        bench.ask(cache)
        return {"device GB": sum(2 * layer.keys.nbytes for layer in cache.layers) / _GB}

    _keep_pages(folder)
    _attached(bench, folder, prompt)  # kernels are compiled
    bench.measure({**where, "system": "load_all"}, load_files, nothing, bench.repeats)
    bench.measure({**where, "system": "alaya"}, alaya, nothing, bench.repeats)

    where["from"] = "host memory"
    host: list[tuple[Tensor, Tensor]] = []

    def load_pinned() -> dict[str, float]:
        cache = _from_pinned(bench, host)
        bench.ask(cache)
        return {"device GB": sum(2 * layer.keys.nbytes for layer in cache.layers) / _GB}

    needed = 2 * keys.nbytes * layers
    if needed < 0.8 * available_host_memory():
        for _ in range(layers):
            pair = tuple(pinned_pool().allocate(side.shape, side.dtype) for side in (keys, values))
            for target, source in zip(pair, (keys, values), strict=True):
                target.copy_(source)
            host.append(pair)  # type: ignore[arg-type]
        bench.measure({**where, "system": "load_all"}, load_pinned, nothing, bench.repeats)
        host.clear()
        gc.collect()
        pinned_pool().trim()
    else:
        bench.add(**where, system="load_all", **{"not run": f"{needed / _GB:.0f} GB of pinned memory"})
    # Registered and verified, nothing on the device.
    session, _, _ = _attached(bench, folder, prompt)
    for layer in session.alaya_layers:
        layer.tokens.settle()
    held = [layer.tokens.stored.registered for layer in session.alaya_layers]
    del session
    bench.measure({**where, "system": "alaya"}, alaya, nothing, bench.repeats)
    held.clear()
    bench.tidy()

    where["from"] = "cold file"
    if _in_memory(folder):
        bench.add(**where, system="all", **{"not run": "the store is on no disk"})
    else:
        bench.measure({**where, "system": "load_all"}, load_files, lambda: _drop_pages(folder), 1)
        bench.measure({**where, "system": "alaya"}, alaya, lambda: _drop_pages(folder), 1)


def _recompute(bench: _Bench, ids: Tensor) -> dict[str, float]:
    cache = DynamicCache(config=bench.model.config)
    whole = torch.cat([ids.to(bench.device), bench.question], dim=1)
    bench.model(input_ids=whole, **cache_argument(cache), logits_to_keep=1).logits[0, -1].cpu()
    return {}


def reuse_on_device(
    shape: str,
    contexts: list[int],
    questions: list[int],
    settings: AlayaConfig,
    device: str,
    repeats: int,
    store: Path | None,
    limit_gb: float,
    recompute: int,
    seconds: float,
    layers: int,
    output: Path,
) -> list[dict[str, Any]]:
    """Run all systems over all lengths; see ``python -m eval speed reuse --help``.

    Parameters
    ----------
    limit_gb : float
        Contexts whose files would be larger are not run; nor are those that file system or host memory have no room for.
    recompute : int
        Longest context that is recomputed.
    seconds : float
        Measurements that would begin later are not run.
    """
    deadline = time.perf_counter() + seconds
    dtype = torch.bfloat16
    place = store if store is not None else Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        network = random_model(shape, device, dtype, layers)
        network.set_attn_implementation("alaya")
        config = network.config
        generator = torch.Generator().manual_seed(1)
        asked = torch.randint(1, config.vocab_size, (1, max(questions)), generator=generator)
        bench = _Bench(
            network, device, settings, asked.to(device), repeats, deadline, output=output / "device.csv"
        )  # fmt: skip
        typer.echo(f"{describe()}; {shape}, {config.num_hidden_layers} layers")
        for number, tokens in enumerate(contexts):
            per_layer = tokens * config.num_key_value_heads * config.head_dim * 2 * dtype.itemsize
            size = 1.3 * per_layer * config.num_hidden_layers
            stat = os.statvfs(place)
            room = min(limit_gb * _GB, 0.9 * stat.f_bavail * stat.f_frsize)
            host = available_host_memory() * (0.45 if _in_memory(place) else 0.9)
            if size > min(room, host) or time.perf_counter() > deadline:
                why = "the time given is over" if size <= min(room, host) else (
                    f"{size / _GB:.0f} GB; {room / _GB:.0f} GB of files and {host / _GB:.0f} GB of memory are allowed"
                )  # fmt: skip
                bench.add(context=tokens, **{"from": "all"}, system="all", **{"not run": why})
                continue
            keys, values, _ = context_of(config, tokens, device, dtype)
            ids = torch.randint(1, config.vocab_size, (1, tokens), generator=generator)
            prompt = torch.cat([ids, asked], dim=1)
            with _stored(bench, place, keys, values, ids) as (folder, took, nbytes):
                beside = nbytes / (per_layer * config.num_hidden_layers) - 1
                bench.add(
                    context=tokens, **{"from": "host memory"}, system="store", seconds=took, GB=nbytes / _GB,
                    **{"GB/s": nbytes / _GB / took, "beside the vectors": beside},
                )  # fmt: skip
                size = min(nbytes, 8 << 30)
                rate = dd_rate(folder, size)
                bench.add(context=tokens, system="dd with fsync", GB=size / _GB, **{"GB/s": rate / _GB})
                if number == 0:
                    check(bench, folder, prompt, keys, values)
                for question in questions:
                    bench.question = asked[:, :question].to(device)
                    _one_context(bench, folder, ids, torch.cat([ids, asked[:, :question]], dim=1), keys, values)
            if tokens <= recompute:
                where = {
                    "context": tokens,
                    "question": bench.question.shape[1],
                    "from": "nothing",
                    "system": "recompute",
                }
                del keys, values
                bench.measure(where, lambda: _recompute(bench, ids), lambda: None, 1)  # noqa: B023
            keys = values = None
            bench.tidy()
    columns = list(dict.fromkeys(key for row in bench.rows for key in row))
    table = [
        {column: row.get(column, math.nan if column == "seconds" else "") for column in columns} for row in bench.rows
    ]
    text = f"{describe()}\n\n{shape}\n\n{markdown(table)}\n"
    (output / "device.md").write_text(text, encoding="utf-8")
    typer.echo(text)
    return bench.rows
