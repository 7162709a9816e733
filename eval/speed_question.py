"""``python -m eval speed question``: time of a short question over a long context that is already there, on a whole model."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from alaya_hf import AlayaCache
from alaya_hf.attention import alaya_attention, alaya_mask
from alaya_hf.cache_argument import cache_argument
from alaya_hf.decode_graph import DecodeGraphs
from alaya_hf.errors import HostMemoryError
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.partial import merge
from alaya_hf.probes import Probe
from alaya_hf.storage.pinned import pinned_pool
from eval.environment import describe
from eval.random_model import SHAPES, random_model
from eval.report import markdown, write_csv
from eval.speed_model import DEVICE, context_of
from eval.speed_prefill import prefill_once

SYSTEMS = ("recompute", "alaya", "load_all")
ALAYA_NAME, LOAD_NAME = "alaya_speed_question", "load_all_speed_question"
#: Longest context that is prefilled again.
MOST_RECOMPUTED = 131072


class StreamedContext:
    """Keys and values of every layer in pinned host memory, brought to the device a layer ahead of their use.

    The best that loading the whole context can do where it does not fit on the device: one copy per layer, at the speed of the
    bus, on a stream of its own, into two buffers that take turns.

    Parameters
    ----------
    keys, values : Tensor ``[1, kv_heads, n, head_dim]``
        On the device; every layer gets a copy of its own in host memory.
    layers : int

    Raises
    ------
    HostMemoryError
    """

    def __init__(self, keys: Tensor, values: Tensor, layers: int) -> None:
        self.device, self.layers = keys.device, layers
        self.cuda = keys.is_cuda
        shape = (2, *keys.shape[1:])
        self.host = []
        for _ in range(layers):
            held = pinned_pool().allocate(shape, keys.dtype)
            held[0].copy_(keys[0])
            held[1].copy_(values[0])
            self.host.append(held)
        self.buffers = [torch.empty(shape, dtype=keys.dtype, device=self.device) for _ in range(2)]
        if self.cuda:
            self.side = torch.cuda.Stream(self.device)
            self.arrived, self.released = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
            for event in self.released:
                event.record()

    def _fetch(self, layer: int) -> None:
        place = layer % 2
        if not self.cuda:
            self.buffers[place].copy_(self.host[layer])
            return
        with torch.cuda.stream(self.side):
            self.side.wait_event(self.released[place])
            self.buffers[place].copy_(self.host[layer], non_blocking=True)
            self.arrived[place].record(self.side)

    def begin(self) -> None:
        """Let the first layer set out, before the model runs."""
        self._fetch(0)

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values ``[1, kv_heads, n, head_dim]``, until :meth:`release`; the next layer sets out."""
        if layer + 1 < self.layers:
            self._fetch(layer + 1)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.arrived[layer % 2])
        keys, values = self.buffers[layer % 2]
        return keys[None], values[None]

    def release(self, layer: int) -> None:
        """What has been asked of the layer's keys and values so far was all."""
        if self.cuda:
            self.released[layer % 2].record()


@dataclass
class _Running:
    """What the attention functions, which the model calls, have to know."""

    #: Per layer ``[1, heads, new, head_dim]``: queries that fit the synthetic keys, in place of the model's own.
    queries: list[Tensor] = field(default_factory=list)
    context: StreamedContext | None = None


_running = _Running()


def _query(module: Any, query: Tensor) -> Tensor:
    return _running.queries[module.layer_idx] if _running.queries else query


def _alaya(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return alaya_attention(module, _query(module, query), key, value, *args, **kwargs)


def _load_all(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Dense attention to a streamed context and, causally, to the new tokens."""
    assert _running.context is not None
    query, scaling = _query(module, query), query.shape[-1] ** -0.5
    keys, values = _running.context.take(module.layer_idx)
    batch, heads, new, d = query.shape
    # All rows of a KV head see all of the context: they are queries of one head, which then is read once.
    rows = query.reshape(batch, keys.shape[1], -1, d)
    held = exact_attention(rows, keys, values, scaling).reshape(batch, heads, new)
    _running.context.release(module.layer_idx)
    out = merge([held, exact_attention(query, key, value, scaling, causal=True)]).out
    return out.to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(ALAYA_NAME, _alaya)
AttentionMaskInterface.register(ALAYA_NAME, alaya_mask)
AttentionInterface.register(LOAD_NAME, _load_all)
AttentionMaskInterface.register(LOAD_NAME, lambda *args, **kwargs: None)


def queries_for(config: Any, queries: Tensor | None, new: int) -> list[Tensor]:
    """Per layer the queries of every position, all different: ``[1, heads, new, head_dim]``.

    Parameters
    ----------
    queries : Tensor or None
        ``[count, 1, heads, head_dim]``, see :func:`eval.speed_model.context_of`.
    """
    if queries is None:
        return []
    count = len(queries)
    places = [[(layer + 5 * p) % count for p in range(new)] for layer in range(config.num_hidden_layers)]
    return [queries[place].permute(1, 2, 0, 3).contiguous() for place in places]


def passes(run: Callable[[], Tensor], undo: Callable[[], None], warm: int, repeats: int) -> tuple[list[float], Tensor]:
    """Milliseconds of every timed pass, and the last one's logits. What `undo` does is not timed.

    Parameters
    ----------
    run : callable
        One pass: logits.
    undo : callable
        Takes the pass back.
    warm, repeats : int
        Passes before, and passes timed.
    """
    times, cuda = [], torch.cuda.is_available()
    for i in range(warm + repeats):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.no_grad():
            logits = run()
        if cuda:
            torch.cuda.synchronize()
        if i >= warm:
            times.append(1000 * (time.perf_counter() - began))
        kept = logits[0, -1].float().cpu()
        undo()
    return times, kept


def _timing(times: list[float]) -> dict[str, float]:
    return {"ms": statistics.median(times), "best ms": min(times), "worst ms": max(times)}


def _sums(run: Callable[[], Tensor], cache: Any, new: int) -> dict[str, Any]:
    """One more pass, whose middle layer is looked at."""
    layer = cache.alaya_layers[len(cache.alaya_layers) // 2]
    layer.probe, graphs, cache.graphs = Probe(), cache.graphs, None
    try:
        with torch.no_grad():
            run()
        step = layer.probe.steps[-1]
    finally:
        layer.probe, cache.graphs = None, graphs
        cache.crop(-new)
    return {
        "kind": step.kind, "exact per head": step.retrieved, "bus MB per layer": step.bytes_moved / 1e6,
    }  # fmt: skip


def alaya_rows(
    model: Any, keys: Tensor, values: Tensor, queries: Tensor | None, questions: list[int], repeats: int, report: Any
) -> None:
    """`alaya` for every question length, replayed as a CUDA graph.

    Questions of several tokens also without one, those of one token also with compiled blocks.
    """
    settings = DEVICE if keys.is_cuda else DEVICE.replace(engine="host")
    model.set_attn_implementation(ALAYA_NAME)
    began = time.perf_counter()
    cache = AlayaCache(settings, config=model.config)
    for layer in cache.layers:
        layer.fill(keys, values)
    if keys.is_cuda:
        torch.cuda.synchronize()
    fill = time.perf_counter() - began
    for new in questions:
        _running.queries = queries_for(model.config, queries, new)
        ids = torch.randint(1, model.config.vocab_size, (1, new), device=keys.device)

        def run(ids: Tensor = ids) -> Tensor:
            return model(input_ids=ids, **cache_argument(cache), logits_to_keep=1).logits

        def undo(new: int = new) -> None:
            cache.crop(-new)

        graphs = cache.graphs
        if new > 1 and graphs is not None:
            cache.graphs = None
            times, logits = passes(run, undo, 2, repeats)
            report("alaya, no graph", new, _timing(times) | {"fill s": fill}, ids, logits)
            cache.graphs = graphs
        before = cache.stats()["replays"]
        times, logits = passes(run, undo, 4, repeats)
        stats = cache.stats()
        row = _timing(times) | {"fill s": fill, "replays": stats["replays"] - before}
        row |= {"cache on device GB": stats["device_bytes"] / 1e9, "host GB": stats["offloaded_bytes"] / 1e9}
        report("alaya", new, row | _sums(run, cache, new), ids, logits)
        if new == 1 and graphs is not None:
            cache.graphs = DecodeGraphs("compile")
            times, logits = passes(run, undo, 5, repeats)
            report("alaya, compiled blocks", new, _timing(times) | {"replays": cache.graphs.replays}, ids, logits)
            cache.graphs = graphs


def load_all_rows(
    model: Any, keys: Tensor, values: Tensor, queries: Tensor | None, questions: list[int], repeats: int, report: Any
) -> None:
    """`load_all` for every question length."""
    model.set_attn_implementation(LOAD_NAME)
    began = time.perf_counter()
    context = _running.context = StreamedContext(keys, values, model.config.num_hidden_layers)
    fill, n = time.perf_counter() - began, keys.shape[2]
    for new in questions:
        _running.queries = queries_for(model.config, queries, new)
        ids = torch.randint(1, model.config.vocab_size, (1, new), device=keys.device)
        positions = torch.arange(n, n + new, device=keys.device)[None]

        def run(ids: Tensor = ids, positions: Tensor = positions) -> Tensor:
            context.begin()
            return model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1).logits

        times, logits = passes(run, lambda: None, 2, repeats)
        size = sum(held.numel() * held.element_size() for held in context.host) / 1e9
        row = _timing(times) | {"fill s": fill, "host GB": size, "bus GB/s": 1000 * size / statistics.median(times)}
        report("load_all", new, row, ids, logits)


def recompute_rows(model: Any, tokens: int, questions: list[int], report: Any) -> None:
    """Prefill of context and question with a DynamicCache, once."""
    model.set_attn_implementation("sdpa")
    new = max(questions)
    ids = torch.randint(1, model.config.vocab_size, (1, tokens + new), device=model.device)
    prefill_once(model, DynamicCache(config=model.config), ids[:, :4096], 4096)
    seconds = prefill_once(model, DynamicCache(config=model.config), ids, tokens + new)
    report("recompute", new, {"ms": 1000 * seconds}, None, None)


def question(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    contexts: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "131072,524288",
    tokens: Annotated[str, typer.Option(help="Tokens of the question, comma-separated.")] = "1,32",
    systems: Annotated[str, typer.Option(help=f"Of {', '.join(SYSTEMS)}, comma-separated.")] = "alaya,load_all",
    layers: Annotated[int, typer.Option(help="Only so many of the model's layers; 0: all.")] = 0,
    repeats: Annotated[int, typer.Option(help="Timed passes, of which the median counts.")] = 10,
    device: Annotated[str, typer.Option(help="cuda, or cpu (host engine).")] = "cuda",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-question"),
) -> None:
    """Time until a question over a stored context has its first token: random weights, synthetic keys.

    `alaya` retrieves with the low-bit copy on the device; `load_all` brings all keys and values from pinned memory, a layer
    ahead of full attention; `recompute` prefills everything again, once, up to 128K.
    """
    names = systems.split(",")
    unknown = sorted(set(names) - set(SYSTEMS))
    if unknown or shape not in SHAPES:
        raise typer.BadParameter(
            f"unknown {unknown or shape}; systems: {', '.join(SYSTEMS)}; shapes: {', '.join(SHAPES)}"
        )
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    questions, dtype = [int(n) for n in tokens.split(",")], torch.bfloat16 if cuda else torch.float32
    rows: list[dict[str, Any]] = []
    with torch.cuda.device(device) if cuda else nullcontext():
        model = random_model(shape, device, dtype, layers)
        head = f"{describe()}; {shape}{f', {layers} layers' if layers else ''}, {str(dtype)[6:]}, batch 1"
        typer.echo(head)
        for length in (int(n) for n in contexts.split(",")):
            keys, values, queries = context_of(model.config, length, device, dtype)
            answers: dict[int, Tensor] = {}

            def report(
                system: str, new: int, row: dict[str, Any], ids: Tensor | None, logits: Tensor | None, length: int = length,
                answers: dict[int, Tensor] = answers,
            ) -> None:  # fmt: skip
                row = {"context": length, "question": new, "system": system, **row}
                if logits is not None:
                    # The last system's logits are the yardstick's: those of dense attention, if load_all comes last.
                    if new in answers:
                        near = torch.cosine_similarity(answers[new], logits, dim=0)
                        row["cosine to the logits before"] = float(near)
                    answers[new] = logits
                if cuda:
                    row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
                    torch.cuda.reset_peak_memory_stats()
                rows.append(row)
                typer.echo(_write(rows, head, output).splitlines()[-1])

            for name in sorted(names, key=SYSTEMS.index):
                torch.manual_seed(length)  # the same questions for all systems
                try:
                    if name == "recompute":
                        if length <= MOST_RECOMPUTED:
                            recompute_rows(model, length, questions, report)
                    else:
                        rows_of = alaya_rows if name == "alaya" else load_all_rows
                        rows_of(model, keys, values, queries, questions, repeats, report)
                except (torch.cuda.OutOfMemoryError, HostMemoryError) as error:
                    report(name, 0, {"not run": str(error).splitlines()[0]}, None, None)
                _give_back(cuda)
            del keys, values, queries
            _give_back(cuda)
    typer.echo(_write(rows, head, output))


def _give_back(cuda: bool) -> None:
    """Free what a system held, pinned memory included: the next one needs as much."""
    _running.queries, _running.context = [], None
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    pinned_pool().trim()


def _write(rows: list[dict[str, Any]], head: str, output: Path) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    rows = [{column: row.get(column) for column in columns} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "question.csv", rows)
    text = f"{head}\n\n{markdown(rows)}\n"
    (output / "question.md").write_text(text, encoding="utf-8")
    return text
