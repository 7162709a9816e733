"""``python -m eval speed model``: time per token of a whole model in stock ``generate``, against stock caches."""

from __future__ import annotations

import gc
import math
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache, StoppingCriteria, StoppingCriteriaList
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from alaya_hf import DIPR, AlayaCache, AlayaConfig, TopK
from alaya_hf.attention import alaya_attention, alaya_mask
from alaya_hf.cache_argument import cache_argument
from alaya_hf.probes import Probe
from eval import plots
from eval.environment import describe
from eval.random_model import SHAPES, random_model
from eval.report import markdown, read_csv, write_csv
from eval.speed_resident import NAME as RESIDENT_NAME
from eval.speed_resident import Resident, stepping

#: The query of the speed figures: the paper's range, at most 32 exact tokens per query head, highest scores first.
QUERY = DIPR(alpha=0.012, cap=32)
DEVICE = AlayaConfig(query=QUERY, engine="device", min_context=0)

ALAYA: dict[str, AlayaConfig] = {
    "alaya": DEVICE,
    "alaya, compiled blocks": DEVICE.replace(cuda_graphs="compile"),
    "alaya, no graph": DEVICE.replace(cuda_graphs="none"),
    "alaya, cap 128": DEVICE.replace(query=DIPR(alpha=0.003, cap=128)),
    "alaya, cap 512": DEVICE.replace(query=DIPR(alpha=0.003, cap=512)),
    "alaya, cap 512, hot set": DEVICE.replace(query=DIPR(alpha=0.003, cap=512), hot_bytes=1 << 29),
    "alaya, 4-bit values": DEVICE.replace(residual={"kind": "low_bit", "key_bits": 4, "value_bits": 4}),
    "alaya, block means": DEVICE.replace(residual={"kind": "block_means", "block": 32}),
    # The tightest in device memory. InfLLM's blocks, fewer of them: each brings 128 tokens over the bus.
    "alaya, coarse": DEVICE.replace(query=TopK(512), index="coarse", residual="none"),
    "alaya, host engine": DEVICE.replace(engine="host"),
    "alaya, 8-bit store": DEVICE.replace(store_dtype="int8"),
    "alaya, 8-bit store, compiled blocks": DEVICE.replace(store_dtype="int8", cuda_graphs="compile"),
}
#: Full attention over resident keys in a CUDA graph: nobody's cache, the fastest that a resident one could be.
RESIDENT = "resident"
STOCK = ("full", "static_compiled", RESIDENT, "offloaded", "quantized_cache")
#: The store in a pool of each allocator, its settings made for the context by :func:`allocated`.
POOLED = {f"alaya, {name}": name for name in ("contiguous", "dynamic", "paged", "segment")}
ALAYA |= dict.fromkeys(POOLED, DEVICE)
#: Hundreds of milliseconds a token.
SLOW = ("offloaded", "quantized_cache")


class SystemFails(RuntimeError):
    """A system cannot run this case; the message says why."""


class Stopwatch(StoppingCriteria):
    """Stops never; notes when every token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize(input_ids.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


#: Queries ``[1, heads, 1, head_dim]`` of each layer, in place of the model's own.
_queries: list[Tensor] = []
NAME = "alaya_speed"


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention with queries that fit the synthetic keys: those of random weights would find nothing to select."""
    if _queries and query.shape[2] == 1:
        query = _queries[module.layer_idx % len(_queries)].expand_as(query)
    return alaya_attention(module, query, key, value, *args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, alaya_mask)


def context_of(
    config: Any, tokens: int, device: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values ``[1, kv_heads, tokens, head_dim]`` of a layer; on a GPU distributed as a real model's are.

    With queries ``[layers, 1, heads, head_dim]`` of the same distribution there, None elsewhere.
    """
    kv_heads, d = config.num_key_value_heads, config.head_dim
    if device.startswith("cuda"):
        from eval.speed_kernel import synthetic_device_layer

        group = config.num_attention_heads // kv_heads
        return synthetic_device_layer(kv_heads, group, d, tokens, config.num_hidden_layers, 128, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, kv_heads, tokens, d, generator=generator).to(dtype)
    return keys, values, None


def allocated(settings: AlayaConfig, allocator: str, tokens: int) -> AlayaConfig:
    """The settings with the store of up to so many tokens per row in an allocator's pool."""
    # Room that the engine asks for at once, beyond what is there.
    longest: dict[str, Any] = {"max_tokens": tokens + 8192} if allocator == "contiguous" else {}
    return settings.replace(allocator={"kind": allocator, **longest})


def filled(
    name: str, model: Any, keys: Tensor, values: Tensor, batch: int, new: int, settings: AlayaConfig | None = None
) -> Any:
    """A cache of the system whose layers all hold the context; every layer and row has a copy of its own.

    Raises
    ------
    SystemFails
    """
    config = model.config
    if settings is None and name in ALAYA:
        settings = ALAYA[name]
        if name in POOLED:
            settings = allocated(settings, POOLED[name], keys.shape[2] + new)
    if settings is not None:
        cache: Any = AlayaCache(settings, config=config)
    elif name == RESIDENT:
        return Resident(config, *(x.expand(batch, -1, -1, -1) for x in (keys, values)))
    elif name == "full":
        cache = DynamicCache(config=config)
    elif name == "offloaded":
        if not model.device.type == "cuda":
            raise SystemFails("offloads from a GPU, and the model is on the CPU")
        cache = DynamicCache(config=config, offloading=True)
    elif name == "quantized_cache":
        try:
            cache = QuantizedCache("quanto", config, nbits=4)
        except ImportError as error:
            raise SystemFails("optimum-quanto is not installed") from error
    else:
        cache = StaticCache(config=config, max_cache_len=keys.shape[2] + new + 2)
    keys, values = (x.expand(batch, -1, -1, -1) for x in (keys, values))
    for idx in range(config.num_hidden_layers):
        if settings is not None:
            cache.layers[idx].fill(keys, values)
        else:
            cache.update(keys, values, idx)
    return cache


def measure(
    name: str, model: Any, keys: Tensor, values: Tensor, batch: int, new: int, settings: AlayaConfig | None = None
) -> dict[str, Any]:
    """One system at one context length.

    Parameters
    ----------
    name : str
        Of :data:`STOCK` or :data:`ALAYA`; any other one needs `settings`.
    new : int
        Tokens to generate. The median leaves out the first six, in which kernels and blocks are compiled and captured.
    settings : AlayaConfig, optional
        Of an :class:`~alaya_hf.AlayaCache`, in place of the name's.

    Raises
    ------
    SystemFails
    """
    settings = ALAYA.get(name) if settings is None else settings
    model.set_attn_implementation(NAME if settings is not None else {RESIDENT: RESIDENT_NAME}.get(name, "sdpa"))
    device, tokens = model.device, keys.shape[2]
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    try:
        cache = filled(name, model, keys, values, batch, new, settings)
        if cuda:
            torch.cuda.synchronize()
        fill = time.perf_counter() - began
        ids = torch.randint(1, model.config.vocab_size, (batch, tokens + 1), device=device)
        watch = Stopwatch()
        began = time.perf_counter()
        with torch.no_grad(), stepping(model, cache, batch) if name == RESIDENT else nullcontext():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=new, do_sample=False,
                stopping_criteria=StoppingCriteriaList([watch]),
            )  # fmt: skip
    except torch.cuda.OutOfMemoryError as error:
        raise SystemFails("out of device memory") from error
    steps = [1000 * (b - a) for a, b in zip(watch.times, watch.times[1:], strict=False)]
    row: dict[str, Any] = {
        "tokens": tokens, "batch": batch, "system": name, "ms": statistics.median(steps[6:]),
        "p95 ms": sorted(steps[6:])[int(0.95 * (len(steps) - 7))], "tokens/s": 1000 * batch / statistics.median(steps[6:]),
        "first ms": 1000 * (watch.times[0] - began), "slowest of 6 ms": max(steps[:6]), "fill s": fill,
    }  # fmt: skip
    if cuda:
        row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    row["full KV GB"] = 2 * keys.numel() * keys.element_size() * batch * model.config.num_hidden_layers / 1e9
    if settings is not None:
        stats = cache.stats()
        row["cache on device GB"], row["replays"] = stats["device_bytes"] / 1e9, stats["replays"]
        row["device share"] = stats["device_bytes"] / stats["total_bytes"]
        # One more step that is looked at; graphs have nothing to look at.
        for layer in cache.alaya_layers:
            layer.probe = Probe()
        with torch.no_grad():
            model(input_ids=ids[:, :1], **cache_argument(cache))
        stats = cache.stats()
        row["bus MB per token"], row["exact per head"] = stats["bytes_moved"] / 1e6 / batch, stats["retrieved"]
    return row


def floor_ms(model: Any, row: dict[str, Any], bandwidth: float) -> float:
    """Milliseconds that reading the weights and what the cache keeps on the device takes at the measured bandwidth."""
    weights = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if "embed" not in name)
    held = 1e9 * row.get("cache on device GB", row["full KV GB"])
    return (weights + held) / bandwidth / 1e6


def copy_bandwidth() -> float:
    """GB/s of a copy inside the device, bytes read and written."""
    a = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * a.numel() / statistics.median(times) / 1e6


def model(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    contexts: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "8192,32768,131072",
    systems: Annotated[
        str, typer.Option(help="Systems, comma-separated.")
    ] = "full,offloaded,alaya,alaya, compiled blocks",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    new: Annotated[int, typer.Option(help="Tokens to generate per system; slow ones generate 16.")] = 64,
    layers: Annotated[int, typer.Option(help="Only so many of the model's layers; 0: all.")] = 0,
    device: Annotated[str, typer.Option(help="cuda, or cpu for stock caches.")] = "cuda",
    output: Annotated[
        Path, typer.Option(help="Folder for table, CSV and plot; rows that are there stay, unless measured again.")
    ] = Path("results/speed-model"),
) -> None:
    """Time per token in stock ``generate`` over a context that is already there: random weights, synthetic keys."""
    names = _names(systems)
    unknown = sorted(set(names) - {*STOCK, *ALAYA})
    if unknown or shape not in SHAPES:
        raise typer.BadParameter(
            f"unknown {unknown or shape}; systems: {'; '.join([*STOCK, *ALAYA])}; shapes: {', '.join(SHAPES)}"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    with torch.cuda.device(device) if cuda else nullcontext():
        network = random_model(shape, device, dtype, layers)
        bandwidth = copy_bandwidth() if cuda else math.nan
        name_of = f"{shape}{f', {layers} layers' if layers else ''}, {str(dtype)[6:]}"
        rows: list[dict[str, Any]] = []
        for tokens in (int(n) for n in contexts.split(",")):
            keys, values, queries = context_of(network.config, tokens, device, dtype)
            _queries[:] = [] if queries is None else queries.unsqueeze(3)
            for name in names:
                rows.append({"model": name_of, **_row(name, network, keys, values, batch, new)})
                if "ms" in rows[-1] and cuda:
                    rows[-1]["floor ms"] = floor_ms(network, rows[-1], bandwidth)
                base = next((r.get("ms") for r in rows if r["tokens"] == tokens and r["system"] == "full"), None)
                contiguous = next(
                    (r.get("ms") for r in rows if r["tokens"] == tokens and r["system"] == "alaya, contiguous"), None
                )
                for row in rows:
                    if contiguous and row["tokens"] == tokens and row["system"] in POOLED and "ms" in row:
                        row["x contiguous"] = row["ms"] / contiguous
                    if base and row["tokens"] == tokens and "ms" in row:
                        row["x full"] = base / row["ms"]
                gc.collect()
                if cuda:
                    torch.cuda.empty_cache()
                _write(rows, output)
                typer.echo(markdown(rows).splitlines()[-1])
            del keys, values
    typer.echo(_write(rows, output))


def _names(systems: str) -> list[str]:
    """Split at commas that are not followed by a space, which belong to names."""
    return [name.replace("\0", ", ") for name in systems.replace(", ", "\0").split(",") if name]


def _steps(name: str, new: int) -> int:
    return min(new, 16) if name in SLOW else new


def _row(name: str, model: Any, keys: Tensor, values: Tensor, batch: int, new: int) -> dict[str, Any]:
    try:
        return measure(name, model, keys, values, batch, _steps(name, new))
    except SystemFails as error:
        return {"tokens": keys.shape[2], "batch": batch, "system": name, "not run": str(error)}


def _write(rows: list[dict[str, Any]], output: Path) -> str:
    """Tables of these rows and those of earlier calls that they do not replace."""
    output.mkdir(parents=True, exist_ok=True)
    table = output / "model.csv"

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("model", "batch", "tokens", "system"))

    everything = {key(row): row for row in (read_csv(table) if table.exists() else []) + rows}
    rows = [everything[each] for each in sorted(everything, key=lambda each: (*each[:1], int(each[1]), int(each[2])))]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rows = [{column: row.get(column) for column in columns} for row in rows]
    write_csv(table, rows)
    text = f"{describe()}\n\n{markdown(rows)}\n"
    (output / "model.md").write_text(text, encoding="utf-8")
    plots.per_token([row for row in rows if row.get("ms") and int(row["batch"]) == 1], output / "model.png")
    return text
