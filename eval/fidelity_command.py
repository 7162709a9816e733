"""``python -m eval fidelity``: the GPU path's next token against full attention's, with the settings of the speed figures."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from alaya_hf import DIPR, TopK
from eval.data import long_contracts
from eval.environment import describe
from eval.fidelity import Fidelity, follow, prefill, reference
from eval.models import load
from eval.report import markdown, write_csv
from eval.speed_model import ALAYA, DEVICE

SYSTEMS = {
    **{name: ALAYA[name] for name in ("alaya", "alaya, cap 128", "alaya, 4-bit values", "alaya, block means")},
    "alaya, 8-bit store": ALAYA["alaya, 8-bit store"],
    "alaya, cap 128, hot set of 64 MiB": ALAYA["alaya, cap 128"].replace(hot_bytes=1 << 26),
    "alaya, coarse": ALAYA["alaya, coarse"],
    "coarse, 32 blocks of 64 by their bounds": ALAYA["alaya, coarse"].replace(
        query=TopK(2048), index={"kind": "coarse", "block": 64, "strategy": "bounds"}
    ),
    "coarse, 16 blocks of 16, block means of the rest": ALAYA["alaya, coarse"].replace(
        query=TopK(256),
        index={"kind": "coarse", "block": 16, "strategy": "mean"},
        residual={"kind": "block_means", "block": 16},
    ),
    "DIPR .012, the engine's own cap of 256": DEVICE.replace(query=DIPR(alpha=0.012)),
    "DIPR .012, cap 256, 4-bit values": DEVICE.replace(
        query=DIPR(alpha=0.012), residual={"kind": "low_bit", "key_bits": 4, "value_bits": 4}
    ),
}


def fidelity(
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of each contract.")] = 7000,
    steps: Annotated[int, typer.Option(help="Teacher-forced steps at the end of each contract.")] = 64,
    documents: Annotated[int, typer.Option(help="Contracts.")] = 4,
    window: Annotated[str, typer.Option(help="Window: first, most recent.")] = "64,256",
    device: Annotated[str, typer.Option(help="A CUDA device.")] = "cuda",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/fidelity"),
) -> None:
    """KL and top-1 agreement with full attention of ``engine="device"``, model and kernels in float16."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    init, local = (int(part) for part in window.split(","))
    network, tokenizer = load(model, "cpu")
    network = network.to(device, torch.float16)
    network.set_attn_implementation("sdpa")
    results, hits = {name: Fidelity() for name in SYSTEMS}, {name: [] for name in SYSTEMS}
    text = ""
    texts = long_contracts(data_dir, tokenizer, tokens, documents)
    with Progress() as progress:
        task = progress.add_task("fidelity", total=len(texts) * len(SYSTEMS))
        for done, (_, ids) in enumerate(texts, 1):
            sequence = torch.tensor([ids], device=device)
            expected = reference(network, sequence, steps)
            for name, settings in SYSTEMS.items():
                cache = prefill(network, sequence[:, :-steps], settings.replace(window=(init, local)), False)
                follow(network, cache, sequence[:, -steps:], expected, results[name], 0)
                hits[name].append(cache.stats()["hot_hit_rate"])
                progress.advance(task)
            rows = [_row(name, found, hits[name]) for name, found in results.items()]
            output.mkdir(parents=True, exist_ok=True)
            write_csv(output / "fidelity.csv", rows)
            title = (
                f"{model}, {done} contracts of {tokens} tokens, window {init} + {local}, {steps} steps each, float16"
            )
            text = f"{describe()}\n\n{title}\n\n{markdown(rows)}\n"
            (output / "fidelity.md").write_text(text, encoding="utf-8")
    typer.echo(text)


def _row(name: str, found: Fidelity, hits: list[float | None]) -> dict[str, Any]:
    worst, hits = sorted(found.kl)[-1], [rate for rate in hits if rate is not None]
    return {
        "system": name, "KL": Fidelity.mean(found.kl), "top-1": Fidelity.mean(found.top1), "worst KL": worst,
        "exact tokens per query head": Fidelity.mean(found.retrieved), "fetched per KV head": Fidelity.mean(found.fetched),
        "found in the hot set": statistics.mean(hits) if hits else None, "predictions": len(found.kl),
    }  # fmt: skip
