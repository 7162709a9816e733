"""``python -m eval speed sparse-prefill``: one layer's attention of a whole prompt, skipping tiles, against torch's own."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alaya_hf import AlayaConfig, AlayaLayer
from alaya_hf.kernels.attention import exact_attention
from alaya_hf.kernels.exact.base import Request
from alaya_hf.kernels.exact.choose import choose
from alaya_hf.kernels.sparse_prefill import SparsePartial, TileRule, sparse_attention, tile_maxima
from alaya_hf.kernels.sparse_prefill.tuning import Cut, cuts, prefer
from eval.calibrate_bsfa import thresholds_of
from eval.environment import describe
from eval.report import markdown, write_csv
from eval.synthetic_prefill import MEASURED, blasst_rule, random_prompt, real_like_prompt

#: torch's implementations on a GPU; the faster one is the baseline.
BACKENDS = {
    "SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA, flash": SDPBackend.FLASH_ATTENTION,
}
_PER_CALL = 1.0  # seconds of timed calls after which there are enough of them


@dataclass
class Prompt:
    """Queries, keys and values ``[1, heads or kv_heads, n, head_dim]`` of one layer, and where they are from."""

    q: Tensor
    k: Tensor
    v: Tensor
    source: str

    @property
    def scaling(self) -> float:
        """Factor from scores to logits."""
        return float(self.q.shape[3] ** -0.5)

    @property
    def flop(self) -> float:
        """Of dense causal attention: two products."""
        _, heads, n, dim = self.q.shape
        return 2.0 * heads * dim * n * (n + 1)


def timed(call: Callable[[], Any], cuda: bool, repeats: int) -> tuple[float, Any]:
    """Median seconds of a call, and what it returned last; the first call warms up and is not counted."""
    result = call()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 2 or sum(times) < _PER_CALL):
        result = None  # room for the next one
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - began)
    return statistics.median(times), result


def captured(path: Path, device: str, dtype: torch.dtype) -> Prompt:
    """Real queries and keys from a safetensors file.

    It has ``q [heads, n, head_dim]`` and ``k [kv_heads, n, head_dim]``, after the rotary embedding, and perhaps ``v`` like
    ``k``; values are normal otherwise.

    Raises
    ------
    typer.BadParameter
        If the file has other tensors.
    """
    with safe_open(str(path), "pt") as file:
        names = set(file.keys())
        found = {name: file.get_tensor(name).to(device, dtype)[None] for name in names & {"q", "k", "v"}}
    if not {"q", "k"} <= names or found["q"].dim() != 4 or found["q"].shape[2:] != found["k"].shape[2:]:
        raise typer.BadParameter(
            f"expected q [heads, n, head_dim] and k [kv_heads, n, head_dim] in {path}, found {sorted(names)} of shapes "
            f"{ {name: list(x.shape[1:]) for name, x in found.items()} }"
        )
    return Prompt(found["q"], found["k"], found.get("v", torch.randn_like(found["k"])), path.name)


def bsfa_rules(prompt: Prompt, ks: list[int]) -> dict[int, TileRule]:
    """Rules that keep k tiles per head and block of queries, calibrated on the prompt itself."""
    maxima = tile_maxima(prompt.q, prompt.k)[0]
    return {k: TileRule(thresholds_of(maxima, k).contiguous()) for k in ks}


def _sparse(prompt: Prompt, rule: TileRule | None) -> SparsePartial:
    top = None
    if rule is not None and rule.relative:
        top = torch.full(prompt.q.shape[:3], -math.inf, device=prompt.q.device)
    return sparse_attention(prompt.q, prompt.k, prompt.v, rule, prompt.scaling, True, top)


def _sdpa(prompt: Prompt, backend: SDPBackend | None) -> Tensor:
    with sdpa_kernel(backend) if backend is not None else nullcontext():
        return torch.nn.functional.scaled_dot_product_attention(
            prompt.q, prompt.k, prompt.v, is_causal=True, enable_gqa=True
        )


def _layer(prompt: Prompt, prefill: Any, chunk: int) -> Tensor:
    """The same through a layer that offloads, chunk by chunk: outputs ``[1, heads, n, head_dim]``."""
    settings = AlayaConfig(
        prefill=prefill,
        query={"kind": "topk", "k": 0},
        index="flat",
        residual="none",
        min_context=0,
        max_sparse_queries=1,
    )
    layer, outs = AlayaLayer(settings), []
    for start in range(0, prompt.q.shape[2], chunk):
        part = slice(start, start + chunk)
        layer.forward.past = start
        layer.update(prompt.k[:, :, part], prompt.v[:, :, part])
        outs.append(layer.attend(prompt.q[:, :, part], prompt.scaling))
    return torch.cat(outs, dim=1).transpose(1, 2)


def _error(found: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and norm of the difference over that of the truth; a head at a time."""
    most, difference, norm = 0.0, 0.0, 0.0
    for head in range(truth.shape[1]):
        gap = found[:, head].float() - truth[:, head].float()
        most = max(most, float(gap.abs().max()))
        difference, norm = difference + float(gap.square().sum()), norm + float(truth[:, head].float().square().sum())
    return most, math.sqrt(difference / norm)


def systems(
    prompt: Prompt, lambdas: list[float], ks: list[int], chunk: int, cuda: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is timed after the baselines."""
    chosen = choose(Request.of(prompt.q, prompt.k, prompt.v, True, None, None)).name
    yield (
        f"kernels/exact ({chosen})",
        lambda: exact_attention(prompt.q, prompt.k, prompt.v, prompt.scaling, causal=True),
    )
    yield "ours, dense", lambda: _sparse(prompt, None)
    heads, n = prompt.q.shape[1:3]
    for lam in (0.0, *lambdas):
        rule = blasst_rule(heads, n, lam, prompt.scaling, prompt.q.device)
        yield f"blasst, lambda {lam:g}", lambda rule=rule: _sparse(prompt, rule)
    for k, rule in bsfa_rules(prompt, ks).items():
        yield f"bsfa, k {k}", lambda rule=rule: _sparse(prompt, rule)
    if chunk and n > chunk:
        yield f"exact, offloading, chunks of {chunk}", lambda: _layer(prompt, "exact", chunk)
        yield f"retrieval, offloading, chunks of {chunk}", lambda: _layer(prompt, "retrieval", chunk)


def measure(
    prompt: Prompt, lambdas: list[float], ks: list[int], chunk: int, repeats: int, cuda: bool
) -> list[dict[str, Any]]:
    """All systems on one prompt.

    Raises
    ------
    RuntimeError
        If our dense kernel is not dense attention.
    """
    rows: list[dict[str, Any]] = []
    n = prompt.q.shape[2]
    base: tuple[float, Tensor] | None = None

    def row(name: str, seconds: float) -> dict[str, Any]:
        rows.append(
            {
                "tokens": n,
                "data": prompt.source,
                "system": name,
                "ms": 1e3 * seconds,
                "TFLOP/s": prompt.flop / seconds / 1e12,
            }
        )
        return rows[-1]

    backends: dict[str, SDPBackend | None] = dict(BACKENDS) if cuda else {"SDPA": None}
    for name, backend in backends.items():
        try:
            seconds, out = timed(lambda backend=backend: _sdpa(prompt, backend), cuda, repeats)
        except RuntimeError as error:  # a backend that this build does not have
            typer.echo(f"{name} did not run: {error}", err=True)
            continue
        row(name, seconds)
        if base is None or seconds < base[0]:
            base = seconds, out
        del out
    if base is None:
        raise typer.BadParameter("expected cuDNN's or flash attention from torch, found neither")
    fastest, truth = base
    ours = None
    for name, call in systems(prompt, lambdas, ks, chunk, cuda):
        if name == "ours, dense":  # right before fast
            most, _ = _error(call().partial.out, truth)
            if most > 0.05:
                raise RuntimeError(f"our dense kernel differs from SDPA by {most:.3g} at {n} tokens; nothing was timed")
        seconds, found = timed(call, cuda, 1 if "offloading" in name else repeats)
        this = row(name, seconds)
        if name == "ours, dense":
            ours = seconds
        this["skipped"] = int(found.skipped.sum()) / max(1, found.tiles) if isinstance(found, SparsePartial) else None
        out = found.partial.out if isinstance(found, SparsePartial) else getattr(found, "out", found)
        this["max error"], this["relative error"] = _error(out, truth)
        del found, out
    for this in rows:
        this["x SDPA"] = fastest * 1e3 / this["ms"]
        this["x ours dense"] = ours * 1e3 / this["ms"] if ours else None
    return rows


def tune(prompt: Prompt, repeats: int, cuda: bool) -> list[dict[str, Any]]:
    """Time every cut of the kernel, and use the fastest from now on; nothing is skipped meanwhile, but looked for."""
    heads, n, dim = prompt.q.shape[1:]
    rows = []
    for skips in (False, True):
        rule = blasst_rule(heads, n, 0.0, prompt.scaling, prompt.q.device) if skips else None
        times: dict[Cut, float] = {}
        for cut in cuts(dim, skips):
            prefer(dim, skips, cut)
            times[cut], _ = timed(lambda rule=rule: _sparse(prompt, rule), cuda, repeats)
            rows.append(
                {
                    "head_dim": dim, "skips": skips, "keys": cut.keys, "warps": cut.warps, "stages": cut.stages,
                    "ms": 1e3 * times[cut], "TFLOP/s": prompt.flop / times[cut] / 1e12,
                }
            )  # fmt: skip
        prefer(dim, skips, min(times, key=times.__getitem__))
    return rows


def sparse_prefill(
    contexts: Annotated[str, typer.Option(help="Prompt lengths, comma-separated.")] = "8192,32768,65536,131072",
    statistics: Annotated[
        str,
        typer.Option(
            help="'real-like': tiles are skipped as in a real model, see eval/synthetic_prefill.py; 'random'."
        ),
    ] = "real-like",
    shares: Annotated[
        str,
        typer.Option(help="Shares of the tiles that real-like data let BLASST skip at lambda 0.01, comma-separated."),
    ] = str(MEASURED),
    capture: Annotated[
        Path | None, typer.Option("--captured", help="safetensors with q, k (and v) of a model; cut to the contexts.")
    ] = None,
    lambdas: Annotated[str, typer.Option(help="BLASST's lambdas, comma-separated.")] = "0.001,0.01",
    ks: Annotated[str, typer.Option(help="BSFA's k, comma-separated.")] = "32,64,128",
    shape: Annotated[str, typer.Option(help="Query heads, KV heads, head dimension.")] = "32,8,128",
    chunk: Annotated[
        int, typer.Option(help="Chunk of the layers that offload to the host and retrieve there; 0: leave them out.")
    ] = 16384,
    longest_chunked: Annotated[int, typer.Option(help="Longest prompt for those.")] = 65536,
    tuning: Annotated[bool, typer.Option("--tune", help="First choose the kernel's cuts on this device.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls at most; the median counts.")] = 10,
    device: Annotated[str, typer.Option(help="cuda; cpu compares plain torch, to try the command.")] = "cuda",
    output: Annotated[Path, typer.Option(help="Folder for tables and CSV.")] = Path("results/speed-sparse-prefill"),
) -> None:
    """One layer's attention of a whole prompt: SDPA, our kernel dense, BLASST, BSFA, retrieval; speed, tiles skipped, error."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    if statistics not in ("real-like", "random"):
        raise typer.BadParameter(f"expected statistics 'real-like' or 'random', got {statistics!r}")
    dtype = torch.bfloat16 if cuda else torch.float32
    heads, kv_heads, dim = (int(x) for x in shape.split(","))
    rows: list[dict[str, Any]] = []
    cut_rows: list[dict[str, Any]] = []
    given = None if capture is None else captured(capture, device, dtype)

    def prompts(n: int) -> Iterator[Prompt]:
        if given is not None:
            yield Prompt(*(x[:, :, :n].contiguous() for x in (given.q, given.k, given.v)), given.source)
        elif statistics == "random":
            yield Prompt(*random_prompt(heads, kv_heads, dim, n, device, dtype), "random")
        else:
            for share in (float(x) for x in shares.split(",")):
                yield Prompt(
                    *real_like_prompt(heads, kv_heads, dim, n, device, dtype, share), f"real-like, share {share:g}"
                )

    lengths = [int(x) for x in contexts.split(",")]
    if given is not None:
        lengths = sorted({min(n, given.q.shape[2]) for n in lengths})
    text = ""
    with torch.cuda.device(device) if cuda else nullcontext(), torch.no_grad():
        for n in lengths:
            for prompt in prompts(n):
                if tuning and not cut_rows:
                    cut_rows = tune(prompt, repeats, cuda)
                rows += measure(
                    prompt, [float(x) for x in lambdas.split(",") if x], [int(x) for x in ks.split(",") if x],
                    chunk if n <= longest_chunked else 0, repeats, cuda,
                )  # fmt: skip
                text = _write(rows, cut_rows, f"{describe()}; {tuple(prompt.q.shape[1:])} queries, "
                              f"{prompt.k.shape[1]} KV heads, {str(dtype)[6:]}, causal", output)  # fmt: skip
                typer.echo(f"{n} tokens, {prompt.source}: done", err=True)
    typer.echo(text)


def _write(rows: list[dict[str, Any]], cut_rows: list[dict[str, Any]], head: str, output: Path) -> str:
    columns = (
        "tokens",
        "data",
        "system",
        "ms",
        "TFLOP/s",
        "x SDPA",
        "x ours dense",
        "skipped",
        "max error",
        "relative error",
    )
    rows = [{column: row.get(column) for column in columns} for row in rows]
    output.mkdir(parents=True, exist_ok=True)
    write_csv(output / "sparse-prefill.csv", rows)
    text = f"{head}\n\n{markdown(rows)}\n"
    if cut_rows:
        write_csv(output / "cuts.csv", cut_rows)
        text += f"\nCuts of the kernel, nothing skipped\n\n{markdown(cut_rows)}\n"
    text += (
        "\nTFLOP/s: of dense causal attention, whatever is skipped. x: how many times as fast as the faster SDPA, and as ours "
        "dense. Errors against that SDPA. Thresholds of bsfa come from the same prompt. Real-like data and what they assume: "
        "eval/synthetic_prefill.py.\n"
    )
    (output / "sparse-prefill.md").write_text(text, encoding="utf-8")
    return text
