"""``python -m eval planner``: whether the planner keeps its promises, and how far it is from the best plans."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from alaya_hf.planner import ModelShape
from eval.data import long_contracts
from eval.environment import describe
from eval.legal_command import shard_of
from eval.models import in_bfloat16, load
from eval.planner_grid_run import run_grid
from eval.planner_legal import CHOSEN, LegalPareto, stages_of
from eval.planner_pareto import WARM, fixed, measured_costs, planned, plot, table, tracks
from eval.planner_quality import quality
from eval.report import markdown, write_csv
from eval.systems import System


def planner(
    part: Annotated[str, typer.Option(help="grid, quality, pareto, legal, or both: grid and quality.")] = "both",
    device: Annotated[str, typer.Option(help="cpu: the host engine; cuda: the device engine.")] = "cpu",
    contexts: Annotated[str, typer.Option(help="Context lengths of the grid. [default: by device]")] = "",
    shape: Annotated[
        str, typer.Option(help="Query heads, KV heads, head dimension of the grid's layers.")
    ] = "32,8,128",
    layers: Annotated[int, typer.Option(help="Layers of the grid's model, all like the one measured.")] = 32,
    parameters: Annotated[
        int, typer.Option(help="Weights of the grid's model, without the embedding table.")
    ] = 7_504_658_432,
    time_limit: Annotated[
        float, typer.Option(help="Seconds after which the grid begins no further context; 0: none.")
    ] = 0,
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path, for the quality.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of each contract.")] = 7000,
    steps: Annotated[int, typer.Option(help="Teacher-forced steps at the end of each contract.")] = 32,
    skip: Annotated[int, typer.Option(help="Contracts to skip: those that the profile was made on.")] = 2,
    documents: Annotated[int, typer.Option(help="Contracts.")] = 2,
    window: Annotated[str, typer.Option(help="Window of the quality part: first, most recent.")] = "64,256",
    recoveries: Annotated[str, typer.Option(help="Targets.")] = "0.9,0.95,0.98",
    kls: Annotated[str, typer.Option(help="Targets.")] = "0.01,0.001,0.0001",
    indexes: Annotated[str, typer.Option(help="Of the fixed configurations.")] = "flat,quantized,graph",
    tasks: Annotated[str, typer.Option(help="Legal tasks whose scores count.")] = ",".join(CHOSEN),
    items: Annotated[int, typer.Option(help="Items a legal task.")] = 20,
    seed: Annotated[int, typer.Option(help="Of documents, needles and questions.")] = 0,
    stage: Annotated[
        str, typer.Option(help="Of the legal part: times, scores, judge (needs no model), or all of them.")
    ] = "all",
    shard: Annotated[
        str, typer.Option(help="RANK/COUNT: score this part of the documents and nothing else, after --stage times.")
    ] = "",
    output: Annotated[Path, typer.Option(help="Folder for tables and CSV.")] = Path("results/planner"),
) -> None:
    """The planner's choices against exhaustive search, and recovery, KL and error estimates against their true values."""
    if part not in ("grid", "quality", "pareto", "legal", "both"):
        raise typer.BadParameter(f"--part takes grid, quality, pareto, legal or both, but got {part!r}")
    output.mkdir(parents=True, exist_ok=True)
    texts = [describe()]
    if part in ("grid", "both"):
        heads, kv_heads, head_dim = (int(x) for x in shape.split(","))
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        whole = ModelShape(layers, heads, kv_heads, head_dim, dtype, device, parameters)
        lengths = tuple(
            int(n) for n in (contexts or ("8192,32768" if device == "cpu" else "32768,131072,524288")).split(",")
        )
        texts += run_grid(whole, lengths, "host" if device == "cpu" else "device", output, typer.echo, time_limit)
    ratios, limits = (tuple(float(x) for x in text.split(",")) for text in (recoveries, kls))
    kinds = tuple(indexes.split(","))

    def loaded() -> tuple[Any, Any]:
        network, tokenizer = load(model, device)
        # The device engine reads no float32.
        return (network if device == "cpu" or part == "quality" else in_bfloat16(network)), tokenizer

    if part == "legal":
        rank, count = shard_of(shard)
        whole_run = LegalPareto(
            model, device, data_dir, tuple(tasks.split(",")), tokens, items, seed, documents, skip, steps, kinds, ratios,
            limits, output,
        )  # fmt: skip
        texts = whole_run.run(stages_of(stage), loaded, rank, count)
    elif part != "grid":
        network, tokenizer = loaded()
        documents_found = [ids for _, ids in long_contracts(data_dir, tokenizer, tokens, skip + documents)][skip:]
    if part == "pareto":
        costs = measured_costs(network, output)
        ours = planned(ratios, limits)
        with Progress() as progress:
            task = progress.add_task("pareto", total=documents * steps)
            found = tracks(
                network,
                documents_found,
                steps,
                [System(name, settings) for name, settings in {**fixed(indexes=kinds), **ours}.items()],
                lambda: progress.advance(task),
            )
        rows = table(found, set(ours))
        write_csv(output / "pareto.csv", rows)
        plot(rows, output / "pareto.png")
        warm = WARM[network.device.type]
        title = f"{model}, {documents} contracts of {tokens} tokens, {steps} steps each; times from step {warm + 1} on"
        shown = [row for row in rows if row["planner"] or row["on the front"]]
        texts += [title, f"calibration: median error {100 * (costs.median_error or 0):.0f} %", markdown(shown)]
    elif part not in ("grid", "legal"):
        init, local = (int(x) for x in window.split(","))
        with Progress() as progress:
            task = progress.add_task("quality", total=documents * (len(ratios) + len(limits) + 1))
            kept, doubtful = quality(
                network, documents_found, steps, (init, local), ratios, limits, lambda: progress.advance(task)
            )
        write_csv(output / "promises.csv", kept)
        write_csv(output / "doubts.csv", doubtful)
        title = f"{model}, {documents} contracts of {tokens} tokens, window {init} + {local}, {steps} steps each"
        texts += [title, markdown(kept), markdown(doubtful)]
    if not texts:
        return  # nothing to judge yet
    text = "\n\n".join(part for part in texts if part) + "\n"
    (output / "planner.md").write_text(text, encoding="utf-8")
    typer.echo(text)
