"""``python -m eval speed reuse``: time to the first token of a question on a stored context, and what storing costs."""

from __future__ import annotations

import functools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaConfig, AlayaDB
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import StoreError
from alaya_hf.index import Flat
from alaya_hf.registry import INDEXES, QUERIES
from alaya_hf.storage.db.catalog import Catalog, NewSegment
from alaya_hf.storage.db.mapped import over
from eval.data import long_contracts
from eval.disk import dd_rate
from eval.environment import describe
from eval.models import load
from eval.random_model import SHAPES as RANDOM
from eval.report import markdown, write_csv
from eval.synthetic import synthetic_layer

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b-shape": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 1 << 20,
        "rope_theta": 500000.0,
    },
}
"""Models of random weights: honest times, no quality."""


def _model(name: str, device: str) -> tuple[Any, Any]:
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                return LlamaForCausalLM(LlamaConfig(**SHAPES[name])).eval(), None
            finally:
                torch.set_default_dtype(before)
    model, tokenizer = load(name, device)
    model.set_attn_implementation("sdpa")
    return model, tokenizer


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _timed(device: str, work: Callable[[], Any]) -> tuple[float, Any]:
    _wait(device)
    began = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - began, result


def _question(model: Any, cache: Any, ids: Tensor) -> int:
    return int(model(input_ids=ids, **cache_argument(cache), logits_to_keep=1).logits[0, -1].argmax())


def _drop_pages(folder: Path) -> None:
    """Ask the system to forget the pages of a folder's files; nobody may have them mapped."""
    for path in folder.rglob("*.safetensors"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def _keep_pages(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _load_all(model: Any, folder: Path, device: str) -> DynamicCache:
    """What KV disaggregation does: read every layer's keys and values and move them to the device."""
    import json

    cache = DynamicCache(config=model.config)
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            size = int.from_bytes(file.read(8), "little")
            entry = json.loads(file.read(size))["kv"]
            data = torch.empty(entry["data_offsets"][1], dtype=torch.uint8, pin_memory=device.startswith("cuda"))
            view = memoryview(data.numpy())
            while view:
                view = view[file.readinto(view) :]
        dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[entry["dtype"]]
        kv = data.view(dtype).view(entry["shape"]).to(device, model.dtype, non_blocking=True)
        cache.update(kv[None, :, :, 0].contiguous(), kv[None, :, :, 1].contiguous(), number)
    return cache


def _context(model: Any, ids: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of ``tokens`` tokens on the host: those of a prefill, repeated where that is shorter."""
    cache = DynamicCache(config=model.config)
    model.model(input_ids=ids, **cache_argument(cache))
    repeats = math.ceil(tokens / ids.shape[1])
    kv = []
    for layer in cache.layers:
        keys, values = (side.cpu().repeat(1, 1, repeats, 1)[:, :, :tokens] for side in (layer.keys, layer.values))
        kv.append((keys.contiguous(), values.contiguous()))
        layer.keys = layer.values = None
    return kv


def _first_tokens(
    model: Any, device: str, folder: Path, settings: AlayaConfig, ids: Tensor, question: Tensor, repeats: int
) -> list[dict[str, Any]]:
    """Seconds to the first token by ``load_all`` and ``alaya``, cold and warm."""
    (segment,) = (folder / "segments").iterdir()
    prompt = torch.cat([ids, question.cpu()], dim=1)[0]

    def alaya() -> int:
        with AlayaDB(folder, model=model, settings=settings) as db:
            session, rest = db.create_session(prompt)
            assert session.reused == ids.shape[1]
            return _question(model, session, rest.to(device))

    def load_all() -> int:
        return _question(model, _load_all(model, segment, device), question)

    rows = []
    for system, work in (("load_all", load_all), ("alaya", alaya)):
        work()  # kernels are compiled
        for pages, prepare in (("cold", _drop_pages), ("warm", _keep_pages)):
            times = []
            for _ in range(repeats):
                prepare(folder)
                times.append(_timed(device, work)[0])
            rows.append({"system": system, "page cache": pages, "seconds": statistics.median(times)})
    return rows


def _filter(tokens: int, share: float, index: str, repeats: int) -> dict[str, Any]:
    """One layer's search of the first ``share`` of a context, and of all of it."""
    data = synthetic_layer(kv_heads=2, group=4, head_dim=64, tokens=tokens, sample_queries=tokens // 10)
    segment = over(data["kv"])
    segment.add_samples(data["queries"])
    segment.shared = False
    searcher = segment.searcher(INDEXES.build(index))
    query = QUERIES.build({"kind": "dipr"})
    nothing = torch.full((2, 4), float("-inf"))
    kept = int(tokens * share)

    def search(q: Tensor, n: int, by: Any) -> Any:
        return by.search(q, segment.view[:, :n], query, nothing, 64**-0.5, nothing)

    exact = segment.searcher(Flat())
    seconds: dict[int, float] = {}
    recall: dict[int, float] = {}
    for n in (tokens, kept):
        times, found, wanted = [], 0, 0
        for q in data["decode_queries"]:
            search(q, n, searcher)
            taken = []
            for _ in range(repeats):
                taken.append(_timed("cpu", lambda: search(q, n, searcher))[0])  # noqa: B023
            times.append(min(taken))
            truth, answer = (_pairs(search(q, n, by), n) for by in (exact, searcher))
            found, wanted = found + int(torch.isin(truth, answer).sum()), wanted + truth.numel()
        seconds[n], recall[n] = statistics.median(times), found / wanted
    return {
        "index": index,
        "tokens": tokens,
        "reused": kept,
        "whole ms": 1000 * seconds[tokens],
        "filtered ms": 1000 * seconds[kept],
        "filtered / whole": seconds[kept] / seconds[tokens],
        "recall whole": recall[tokens],
        "recall filtered": recall[kept],
    }


def _pairs(hits: Any, n: int) -> Tensor:
    head, place = hits.mask.nonzero(as_tuple=True)
    return (head * hits.kv_head.max().add(1) + hits.kv_head[place]) * n + hits.ids[place]


def _lookup(folder: Path, contexts: int, tokens: int) -> dict[str, Any]:
    """Longest-prefix lookup in a catalog of many contexts."""
    catalog = Catalog(folder / "lookup.sqlite")
    random = np.random.default_rng(0)
    stem = random.integers(0, 32000, tokens).astype(np.int32)
    for number in range(contexts):
        # Half branch from one long document, half are documents of their own.
        ids = random.integers(0, 32000, 2048).astype(np.int32)
        if number % 2:
            ids = np.concatenate([stem[: random.integers(tokens // 2, tokens)], ids])
        base = catalog.longest("n", {}, ids)
        segment = NewSegment(f"{number:032x}", base.tokens, len(ids) - base.tokens, "float32", [])
        catalog.commit("n", {}, ids, base, [segment], None)
    times = []
    for _ in range(25):
        ids = np.concatenate([stem[: random.integers(tokens // 2, tokens)], random.integers(0, 32000, 32)])
        times.append(_timed("cpu", lambda: catalog.longest("n", {}, ids.astype(np.int32)))[0])  # noqa: B023
    catalog.close()
    return {"contexts": contexts, "prompt tokens up to": tokens, "lookup ms": 1000 * statistics.median(times)}


def reuse(
    model: Annotated[
        str, typer.Option(help=f"'smollm2', a name or path, or a shape of random weights: {', '.join(SHAPES)}.")
    ] = "smollm2",
    contexts: Annotated[str, typer.Option(help="Tokens of the stored contexts.")] = "7168,32768",
    questions: Annotated[str, typer.Option(help="Tokens of the question.")] = "1,32",
    prefill: Annotated[
        int, typer.Option(help="Most tokens to prefill; longer contexts repeat its keys and values.")
    ] = 7168,
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    preset: Annotated[str, typer.Option(help="Preset of the sessions.")] = "alaya",
    store_dtype: Annotated[str, typer.Option(help="Precision of the stored vectors.")] = "auto",
    engine: Annotated[str, typer.Option(help="'host' or 'device', see AlayaConfig.")] = "host",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Times per figure; the median counts.")] = 3,
    filter_tokens: Annotated[int, typer.Option(help="Context of the prefix filter's search.")] = 204800,
    filter_indexes: Annotated[str, typer.Option(help="Indexes of the prefix filter's search.")] = "flat,quantized",
    lookups: Annotated[int, typer.Option(help="Contexts in the catalog of the lookup.")] = 1000,
    store: Annotated[Path | None, typer.Option(help="Where the stores lie; a disk, not memory.")] = None,
    limit_gb: Annotated[float, typer.Option(help="Device engine: most GB of files at a time.")] = 40.0,
    recompute: Annotated[int, typer.Option(help="Device engine: longest context to recompute.")] = 131072,
    seconds: Annotated[float, typer.Option(help="Device engine: nothing new is begun after that.")] = 180.0,
    layers: Annotated[int, typer.Option(help="Device engine: only so many of the model's layers; 0: all.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for tables and CSV.")] = Path("results/speed-reuse"),
) -> None:
    """Time to first token on a stored context: recompute, load everything, attend in place; and what storing costs.

    With ``--engine device`` (a shape of eval/random_model.py, ``--device cuda``): a context of synthetic keys and values from
    host memory, from the page cache as after a restart, and from a cold file, each against loading all of it from there, and
    against recomputing.
    """
    if engine == "device":
        from eval.speed_reuse_device import reuse_on_device, settings_of

        shape = model.removesuffix("-shape")
        if shape not in RANDOM:
            raise typer.BadParameter(f"--engine device takes a shape ({', '.join(RANDOM)}), but got --model {model}")
        lengths = [int(length) for length in contexts.split(",")]
        reuse_on_device(
            shape, lengths, [int(n) for n in questions.split(",")], settings_of(preset, store_dtype), device, repeats, store,
            limit_gb,
            recompute, seconds, layers, output,
        )  # fmt: skip
        return
    network, tokenizer = _model(model, device)
    settings = AlayaConfig.preset(preset).replace(store_dtype=store_dtype, engine=engine)
    lengths = [int(length) for length in contexts.split(",")]
    read = min(prefill, max(lengths))
    if tokenizer is None:
        real = torch.randint(0, 32000, (1, read), generator=torch.Generator().manual_seed(0))
    else:
        real = torch.tensor([long_contracts(data_dir, tokenizer, read, 1)[0][1]])
    first: list[dict[str, Any]] = []
    stored: list[dict[str, Any]] = []
    with torch.inference_mode(), Progress() as progress, tempfile.TemporaryDirectory(dir=store) as place:
        task = progress.add_task("reuse", total=len(lengths) * (1 + len(questions.split(","))))
        for length in lengths:
            ids = real.repeat(1, math.ceil(length / real.shape[1]))[:, :length]
            kv = _context(network, real[:, :length].to(device), length)
            where = Path(place) / str(length)
            with AlayaDB(where, model=network, settings=settings) as db:
                first_import, row = _timed(device, functools.partial(db.import_context, ids, kv))
                session, _ = db.create_session(context=row.id)
                copy = Path(place) / "copy"
                # A session whose indexes are built, so that what is timed is the writing.
                with AlayaDB(copy, model=network, settings=settings) as other:
                    seconds, _ = _timed(device, functools.partial(other.store, session))
                shutil.rmtree(copy)
                rate = dd_rate(Path(place), row.bytes)
            del kv, session
            held = length * 2 * _per_token(network)
            stored.append(
                {
                    "context": length,
                    "GB": row.bytes / 1e9,
                    "beside the vectors": row.bytes / held - 1,
                    "import GB/s": row.bytes / 1e9 / first_import,
                    "store GB/s": row.bytes / 1e9 / seconds,
                    "dd fsync GB/s": rate / 1e9,
                    "store / dd": row.bytes / seconds / rate,
                }
            )
            progress.advance(task)
            for count in (int(count) for count in questions.split(",")):
                asked = real[:, :count].flip(1).to(device)
                rows = _first_tokens(network, device, where, settings, ids, asked, repeats)
                if length <= prefill:
                    whole = torch.cat([ids.to(device), asked], dim=1)
                    cache = DynamicCache(config=network.config)
                    seconds, _ = _timed(device, lambda: _question(network, cache, whole))  # noqa: B023
                    rows.insert(0, {"system": "recompute", "page cache": "", "seconds": seconds})
                base = {row["page cache"]: row["seconds"] for row in rows if row["system"] == "load_all"}
                for row_of in rows:
                    row_of["sooner than load_all"] = base.get(row_of["page cache"], base["warm"]) / row_of["seconds"]
                first += [{"context": length, "question": count, **row_of} for row_of in rows]
                progress.advance(task)
            shutil.rmtree(where)
        looked = [_lookup(Path(place), lookups, 131072)]
    filtered = [_filter(filter_tokens, 0.2, index, 3) for index in filter_indexes.split(",") if index]
    if not first:
        raise StoreError("no context was given. Give --contexts, for example 7168,32768.")
    output.mkdir(parents=True, exist_ok=True)
    text = f"{describe()}\n\n{model}, preset {preset}, engine {engine}, on {device}, {repeats} times each\n"
    for name, title, rows in (
        ("first", "Time to first token", first),
        ("store", "Storing", stored),
        ("filter", "Prefix filter", filtered),
        ("lookup", "Longest stored prefix", looked),
    ):
        if rows:
            write_csv(output / f"{name}.csv", rows)
            text += f"\n## {title}\n\n{markdown(rows)}\n"
    (output / "reuse.md").write_text(text, encoding="utf-8")
    typer.echo(text)


def _per_token(model: Any) -> int:
    """Bytes of a token's keys, in the model's precision."""
    config = model.config.get_text_config(decoder=True)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * config.num_key_value_heads * dim * model.dtype.itemsize)
