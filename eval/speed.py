"""``python -m eval speed``: how long things take, always with the baseline in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numba
import torch
import typer
from rich.progress import Progress
from torch import Tensor
from transformers import DynamicCache

from alaya_hf import AlayaCache, AlayaConfig, AlayaLayer
from alaya_hf.cache_argument import cache_argument
from alaya_hf.kernels import host
from alaya_hf.probes import Probe
from eval.data import long_contracts
from eval.environment import describe
from eval.models import load
from eval.plots import loglog
from eval.report import markdown, write_csv
from eval.speed_alloc import alloc
from eval.speed_model import model
from eval.speed_prefill import prefill
from eval.speed_question import question
from eval.speed_reuse import reuse
from eval.speed_sparse_prefill import sparse_prefill
from eval.synthetic import synthetic_layer

app = typer.Typer(no_args_is_help=True, help="Speed, against the baseline of the same run.")
app.command()(reuse)
try:
    from eval.speed_gather import gathering
    from eval.speed_kernel import kernel
except ImportError:  # no Triton on this system
    pass
else:
    app.command()(kernel)
    app.command("gather")(gathering)
app.command()(model)
app.command()(alloc)
app.command()(prefill)
app.command()(question)
app.command()(sparse_prefill)


@app.callback()
def _speed() -> None:
    """Speed, against the baseline of the same run."""


# Shape of one Llama-3-8B layer.
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
SCALING = HEAD_DIM**-0.5

SYSTEMS: dict[str, dict[str, Any]] = {
    "streaming_llm": {"query": {"kind": "topk", "k": 0}, "index": "flat", "residual": "none"},
    "quest": {
        "query": {"kind": "topk", "k": 1024},
        "index": {"kind": "coarse", "block": 16, "strategy": "bounds"},
        "residual": "none",
        "group_mode": "per_head",
    },
    "infllm": {
        "query": {"kind": "topk", "k": 2048},
        "index": {"kind": "coarse", "block": 128, "strategy": "representatives", "count": 4},
        "residual": "none",
        "group_mode": "per_head",
    },
    "flat + top-100": {"query": {"kind": "topk", "k": 100}, "index": "flat", "residual": "none"},
    "flat + DIPR": {"index": "flat", "residual": "none"},
    "quantized + DIPR": {"index": "quantized", "residual": "none"},
    "quantized + DIPR + low_bit": {"index": "quantized", "residual": "low_bit"},
    "quantized + DIPR .001 + block_means": {
        "query": {"kind": "dipr", "alpha": 0.001},
        "index": "quantized",
        "residual": "block_means",
    },
    "graph + DIPRS": {"index": "graph", "residual": "none"},
    "retrieval_attention": {
        "query": {"kind": "topk", "k": 100},
        "index": "graph",
        "residual": "none",
        "group_mode": "per_head",
    },
    "graph + DIPRS .001 + block_means": {
        "query": {"kind": "dipr", "alpha": 0.001},
        "index": "graph",
        "residual": {"kind": "block_means", "block": 16},
    },
    # Long contexts need a graph that was built with more care than a document of a few thousand tokens.
    "graph + DIPRS (careful build)": {
        "index": {"kind": "graph", "knn": 64, "per_key": 16, "width": 64, "slack": 1.1},
        "residual": "none",
    },
}


def _median_ms(step: Callable[[int], Any], repeats: int) -> float:
    step(0)
    times = []
    for number in range(repeats):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run torch and numba on ``count`` threads, 0: as they are."""
    before = torch.get_num_threads(), numba.get_num_threads()
    if count:
        torch.set_num_threads(count)
        numba.set_num_threads(min(count, before[1]))
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        numba.set_num_threads(before[1])


def _layer(data: dict[str, Tensor]) -> AlayaLayer:
    """A layer that holds the synthetic context and its sampled queries, as after prefill."""
    layer = AlayaLayer(AlayaConfig(min_context=0))
    keys, values = data["kv"][None, :, :, 0], data["kv"][None, :, :, 1]
    layer.lazy_initialization(keys, values)
    layer._append(keys, values, None, layer.config.window.local, [data["queries"]])
    return layer


def _quality(layer: AlayaLayer, settings: AlayaConfig, queries: Tensor) -> dict[str, float]:
    """Recall against exact search, tokens asked for and touched, of the offloaded part."""
    assert layer.store is not None
    if settings.query.keeps_none:
        return {}
    piece = layer.store.rows[0][0]
    exact = AlayaConfig(query=settings.query, index="flat", residual="none")
    nothing = torch.full(queries.shape[1:3], float("-inf"))
    found = wanted = asked = touched = 0
    most = 0
    for q in queries:
        hits = piece.segment.searcher(settings.index).search(q, piece.kv, settings.query, nothing, SCALING, nothing)
        truth = piece.segment.searcher(exact.index).search(q, piece.kv, exact.query, nothing, SCALING, nothing)
        ours, theirs = _pairs(hits, piece.length), _pairs(truth, piece.length)
        found += int(torch.isin(theirs, ours).sum())
        wanted += len(theirs)
        asked += len(ours)
        touched += hits.touched
        per_head = torch.bincount(theirs // piece.length, minlength=KV_HEADS * GROUP)
        most = max(most, int(per_head.max()))
    count = len(queries)
    return {
        "critical per head": wanted / count / (KV_HEADS * GROUP),
        "most": most,
        "asked per head": asked / count / (KV_HEADS * GROUP),
        "touched share": touched / count / KV_HEADS / piece.length,
        "recall": found / max(1, wanted),
    }


def _pairs(hits: Any, n: int) -> Tensor:
    group, place = hits.mask.nonzero(as_tuple=True)
    return (hits.kv_head[place] * GROUP + group) * n + hits.ids[place].long()


def _recovery(layer: AlayaLayer, settings: AlayaConfig, queries: Tensor, token: Tensor) -> float:
    layer.probe = Probe(recovery=True)
    for q in queries[:4]:
        layer.update(token, token)
        layer.attend(q.reshape(1, -1, 1, HEAD_DIM), SCALING)
    layer.crop(-len(queries[:4]))
    recovery = [step.recovery for step in layer.probe.steps if step.recovery is not None]
    layer.probe = None
    return sum(recovery) / len(recovery)


def _measure(
    name: str, layer: AlayaLayer, data: dict[str, Tensor], settings: AlayaConfig, repeats: int, threads: int
) -> dict[str, Any]:
    queries = data["decode_queries"]
    layer = layer.with_config(settings)
    assert layer.store is not None
    token = torch.zeros(1, KV_HEADS, 1, HEAD_DIM, dtype=data["kv"].dtype)

    def step(number: int) -> None:
        layer.update(token, token)
        layer.attend(queries[number % len(queries)].reshape(1, -1, 1, HEAD_DIM).to(token.dtype), SCALING)

    began = time.perf_counter()
    step(0)
    build = time.perf_counter() - began
    with _threads(threads):
        row: dict[str, Any] = {"system": name, "ms": _median_ms(step, repeats)}
    row |= {"build s": build, "index + low-bit MB": (layer.index_bytes + layer.lowbit_bytes) / 1e6}
    row |= _quality(layer, settings, queries[:4])
    row["recovery"] = _recovery(layer, settings, queries, token)
    return row


def _baselines(data: dict[str, Tensor], repeats: int) -> list[dict[str, Any]]:
    kv, queries = data["kv"], data["decode_queries"]
    keys, values = kv[None, :, :, 0].contiguous(), kv[None, :, :, 1].contiguous()

    def sdpa(number: int) -> None:
        q = queries[number % len(queries)].reshape(1, -1, 1, HEAD_DIM).to(kv.dtype)
        torch.nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    def dense(number: int) -> None:
        host.dense_attention(queries[number % len(queries)], kv, SCALING)

    return [
        {"system": "torch SDPA", "ms": _median_ms(sdpa, max(3, repeats // 3))},
        {"system": "dense kernel", "ms": _median_ms(dense, repeats)},
    ]


@app.command()
def decode(
    device: Annotated[str, typer.Option(help="Where to decode; 'cpu'.")] = "cpu",
    contexts: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "8192,32768,131072,262144",
    dtypes: Annotated[str, typer.Option(help="Store dtypes, comma-separated.")] = "float32,bfloat16",
    systems: Annotated[str, typer.Option(help="Systems, comma-separated; default all.")] = "",
    repeats: Annotated[int, typer.Option(help="Timed steps per system.")] = 15,
    samples: Annotated[float, typer.Option(help="Sampled queries per key, for building graphs.")] = 0.4,
    threads: Annotated[int, typer.Option(help="CPU threads of timed steps; 0: all. Building always takes all.")] = 0,
    critical: Annotated[int, typer.Option(help="Critical tokens per query head in the synthetic keys.")] = 128,
    output: Annotated[Path, typer.Option(help="Folder for table, CSV and plot.")] = Path("results/speed-decode"),
) -> None:
    """One layer's decode step (32 query heads, 8 KV heads, head dimension 128): every system against torch SDPA."""
    if device != "cpu":
        raise typer.BadParameter(f"expected cpu, got {device!r}")
    names = [name.strip() for name in systems.split(",") if name.strip()] or list(SYSTEMS)
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown:
        raise typer.BadParameter(f"unknown systems {unknown}; available: {', '.join(SYSTEMS)}")
    lengths = [int(length) for length in contexts.split(",")]
    kinds = [kind.strip() for kind in dtypes.split(",")]
    rows: list[dict[str, Any]] = []
    text = ""
    with Progress() as progress:
        task = progress.add_task("decode", total=len(lengths) * len(kinds) * (len(names) + 1))
        for kind in kinds:
            for length in lengths:
                data = synthetic_layer(
                    KV_HEADS,
                    GROUP,
                    HEAD_DIM,
                    length,
                    sample_queries=int(samples * length),
                    critical=critical,
                    dtype=getattr(torch, kind),
                )
                with _threads(threads):
                    here = _baselines(data, repeats)
                # Systems share the offloaded context, and the indexes that several of them use.
                layer = _layer(data)
                progress.advance(task)
                for name in names:
                    settings = AlayaConfig(**SYSTEMS[name], min_context=0)
                    here.append(_measure(name, layer, data, settings, repeats, threads))
                    progress.advance(task)
                sdpa_ms = here[0]["ms"]
                rows += [{"dtype": kind, "context": length, **row, "x SDPA": sdpa_ms / row["ms"]} for row in here]
                # After every length, so that an interrupted run leaves what it has.
                text = _write_decode(rows, output, threads)
    typer.echo(text)


def _write_decode(rows: list[dict[str, Any]], output: Path, threads: int) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    columns.insert(4, columns.pop(columns.index("x SDPA")))
    rows = [{column: row.get(column) for column in columns} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "decode.csv", rows)
    text = f"{describe(threads)}\n\n{markdown(rows)}\n"
    (output / "decode.md").write_text(text, encoding="utf-8")
    loglog(rows, output / "decode.png")
    return text


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of the contract.")] = 7000,
    steps: Annotated[int, typer.Option(help="Decode steps timed per system.")] = 48,
    presets: Annotated[str, typer.Option(help="Presets, comma-separated.")] = "alaya,full",
    window: Annotated[str, typer.Option(help="Window: first, most recent.")] = "64,256",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-generate"),
) -> None:
    """Time per token of a whole model over a contract, against DynamicCache with sdpa; the systems take turns."""
    init, local = (int(part) for part in window.split(","))
    network, tokenizer = load(model, device)
    network.set_attn_implementation("sdpa")
    _, ids = long_contracts(data_dir, tokenizer, tokens, 1)[0]
    sequence = torch.tensor([ids], device=device)
    prompt, rest = sequence[:, :-steps], sequence[:, -steps:]
    caches: dict[str, Any] = {"DynamicCache + sdpa": DynamicCache(config=network.config)}
    for name in presets.split(","):
        settings = AlayaConfig.preset(name).replace(window=(init, local), min_context=0)
        caches[name] = AlayaCache(settings, config=network.config)
    times: dict[str, list[float]] = {name: [] for name in caches}
    with torch.no_grad(), Progress() as progress:
        task = progress.add_task("generate", total=len(caches) + steps)
        for cache in caches.values():
            network.model(input_ids=prompt, **cache_argument(cache))
            progress.advance(task)
        for step in range(steps):
            for name, cache in caches.items():
                began = time.perf_counter()
                network(input_ids=rest[:, step : step + 1], **cache_argument(cache)).logits.argmax().item()
                times[name].append(1000 * (time.perf_counter() - began))
            progress.advance(task)
    # The first steps build the low-bit copy and compile kernels.
    medians = {name: statistics.median(values[4:]) for name, values in times.items()}
    base = medians["DynamicCache + sdpa"]
    rows = [
        {"system": name, "ms per token": ms, "x DynamicCache": ms / base, "first step ms": times[name][0]}
        for name, ms in medians.items()
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "generate.csv", rows)
    text = f"{describe()}\n\n{model}, {tokens} tokens of contract, window {init} + {local}\n\n{markdown(rows)}\n"
    (output / "generate.md").write_text(text, encoding="utf-8")
    typer.echo(text)
