"""``python -m eval recall``: what each index finds, and what that does to the next token."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from alaya_hf import DIPR, AlayaCache, AlayaConfig, AlayaLayer, TopK
from eval.data import long_contracts
from eval.environment import describe
from eval.fidelity import Fidelity, follow, prefill, reference
from eval.models import load
from eval.plots import curves
from eval.report import markdown, write_csv

INDEXES: dict[str, Any] = {
    "flat": "flat",
    "quantized 4-bit, re-scored": {"kind": "quantized", "bits": 4},
    "quantized 4-bit, as scanned": {"kind": "quantized", "bits": 4, "margin": 0},
    "quantized 8-bit, as scanned": {"kind": "quantized", "bits": 8, "margin": 0},
    "quantized 2-bit, re-scored": {"kind": "quantized", "bits": 2},
    "graph": "graph",
}

DEFAULT_BITS = {"kind": "low_bit", "key_bits": 4, "value_bits": 2}


def systems(quick: bool = False) -> list[tuple[str, str, dict[str, Any]]]:
    """``(family, name, settings)`` of every system compared."""
    found: list[tuple[str, str, dict[str, Any]]] = []

    def add(family: str, name: str, **settings: Any) -> None:
        found.append((family, name, settings))

    add("window", "window only", query={"kind": "topk", "k": 0}, index="flat", residual="none")
    preset = AlayaConfig.preset("alaya")
    add("preset", "the preset alaya", query=preset.query, index=preset.index, residual=preset.residual)
    add("low_bit alone", "no retrieval, 4-bit K, 2-bit V", query={"kind": "topk", "k": 0}, residual=DEFAULT_BITS)
    alphas = [0.012, 0.001] if quick else [0.1, 0.012, 0.003, 0.001]
    for alpha in alphas:
        query = {"kind": "dipr", "alpha": alpha}
        add("DIPR", f"DIPR {alpha}", query=query, index="flat", residual="none")
        add("DIPR + low_bit (4/2)", f"DIPR {alpha} + 4-bit K, 2-bit V", query=query, residual=DEFAULT_BITS)
        add(
            "DIPR + block means of V",
            f"DIPR {alpha} + block means of V (32)",
            query=query,
            residual={"kind": "block_means", "block": 32},
        )
        add(
            "DIPR + block means of K, V",
            f"DIPR {alpha} + block means of K and V (16)",
            query=query,
            index="flat",
            residual={"kind": "block_means", "block": 16, "keys": True},
        )
    add(
        "DIPR + low_bit (4/4)",
        "DIPR 0.012 + 4-bit K, 4-bit V",
        query={"kind": "dipr", "alpha": 0.012},
        residual={"kind": "low_bit", "key_bits": 4, "value_bits": 4},
    )
    for k in [32, 256] if quick else [32, 128, 256, 512]:
        add("top-k", f"top-{k}", query={"kind": "topk", "k": k}, index="flat", residual="none", group_mode="per_head")
        add(
            "top-k + low_bit (4/2)",
            f"top-{k} + 4-bit K, 2-bit V",
            query={"kind": "topk", "k": k},
            residual=DEFAULT_BITS,
        )
    for k in [512] if quick else [128, 256, 512]:
        add(
            "Quest pages",
            f"Quest pages, {k}",
            query={"kind": "topk", "k": k},
            index={"kind": "coarse", "block": 16, "strategy": "bounds"},
            residual="none",
            group_mode="per_head",
            dense_layers=(0, 1),
        )
        add(
            "InfLLM blocks",
            f"InfLLM blocks, {k}",
            query={"kind": "topk", "k": k},
            index={"kind": "coarse", "block": 128, "strategy": "representatives"},
            residual="none",
            group_mode="per_head",
        )
    for ratio in (0.95, 0.98):
        add("recovery", f"Recovery({ratio})", query={"kind": "recovery", "ratio": ratio}, residual="none")
        add(
            "recovery + low_bit",
            f"Recovery({ratio}) + 4/2",
            query={"kind": "recovery", "ratio": ratio},
            residual=DEFAULT_BITS,
        )
    add("graph", "graph DIPRS 0.012", query={"kind": "dipr", "alpha": 0.012}, index="graph", residual="none")
    add(
        "graph + block means of K, V",
        "graph DIPRS 0.001 + block means of K and V (16)",
        query={"kind": "dipr", "alpha": 0.001},
        index="graph",
        residual={"kind": "block_means", "block": 16},
    )
    return found


class RecallProbe:
    """Compares every index with exact search on the queries a layer really gets."""

    def __init__(self, rules: dict[str, Any]) -> None:
        self.rules = rules
        self.found: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
        self.touched: dict[tuple[str, str], list[float]] = defaultdict(list)

    def __call__(self, layer: AlayaLayer, query: Tensor, best: Tensor, window_lse: Tensor) -> None:
        assert layer.store is not None and layer.window is not None
        scaling = query.shape[-1] ** -0.5
        kv_heads = layer.store.kv_heads
        q = query.float().reshape(kv_heads, -1, query.shape[-1])
        top, lse = best.reshape(kv_heads, -1), window_lse.reshape(kv_heads, -1)
        piece = layer.store.rows[0][0]
        window_scores = q @ layer.window.view()[0][0].float().transpose(1, 2)
        for rule_name, rule in self.rules.items():
            base = AlayaConfig(query=rule, index="flat", residual="none")
            truth = piece.segment.searcher(base.index).search(q, piece.kv, base.query, top, scaling, lse)
            wanted = _dense(truth, piece.length)
            inside = torch.zeros_like(top, dtype=torch.int64)
            if isinstance(base.query, DIPR):
                # Critical tokens of the window are attended always and count as found.
                exact = truth.with_scores(q, piece.kv).as_rows()
                cut = base.query.threshold(exact, top, scaling, lse)
                inside = (window_scores >= cut.unsqueeze(-1)).sum(-1)
            for name, spec in INDEXES.items():
                index = AlayaConfig(query=rule, index=spec, residual="none").index
                hits = piece.segment.searcher(index).search(q, piece.kv, base.query, top, scaling, lse)
                both = (_dense(hits, piece.length) & wanted).sum(-1)
                recall = (both + inside) / (wanted.sum(-1) + inside).clamp(min=1)
                recall = torch.where(wanted.sum(-1) + inside == 0, torch.ones_like(recall), recall)
                self.found[rule_name, name, layer.layer_idx].append(recall.flatten())
                self.touched[rule_name, name].append(hits.touched / kv_heads / piece.length)


def _dense(hits: Any, n: int) -> Tensor:
    group = hits.mask.shape[0]
    dense = torch.zeros(hits.offsets.numel() - 1, group, n, dtype=torch.bool)
    dense[hits.kv_head, :, hits.ids.long()] = hits.mask.T != 0
    return dense


def _recall_tables(probe: RecallProbe) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    summary, detail = [], []
    for rule in probe.rules if probe.found else ():
        for name in INDEXES:
            layers = sorted(layer for r, n, layer in probe.found if (r, n) == (rule, name))
            means = {layer: torch.stack(probe.found[rule, name, layer]).mean(0) for layer in layers}
            per_layer = {layer: float(mean.mean()) for layer, mean in means.items()}
            touched = probe.touched[rule, name]
            summary.append(
                {
                    "query": rule,
                    "index": name,
                    "recall (mean over layers, heads)": sum(per_layer.values()) / len(per_layer),
                    "worst layer": min(per_layer.values()),
                    "touched %": 100 * sum(touched) / len(touched),
                }
            )
            detail += [
                {"query": rule, "index": name, "layer": layer, "head": head, "recall": float(value)}
                for layer, mean in means.items()
                for head, value in enumerate(mean)
            ]
    return summary, detail


def _fidelity_row(family: str, name: str, result: Fidelity) -> dict[str, Any]:
    context = Fidelity.mean(result.context)
    return {
        "family": family,
        "system": name,
        "KL": Fidelity.mean(result.kl),
        "top-1": Fidelity.mean(result.top1),
        "retrieved": Fidelity.mean(result.retrieved),
        "retrieved %": 100 * Fidelity.mean(result.retrieved) / context,
        "fetched": Fidelity.mean(result.fetched),
        "recovery": Fidelity.mean(result.recovery),
        "worst layer": Fidelity.mean(result.worst),
    }


def recall(
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of each contract.")] = 7000,
    steps: Annotated[int, typer.Option(help="Teacher-forced steps at the end of each contract.")] = 96,
    documents: Annotated[int, typer.Option(help="Contracts.")] = 2,
    recall_steps: Annotated[int, typer.Option(help="Steps of each contract on which indexes are compared.")] = 8,
    window: Annotated[str, typer.Option(help="Window: first, most recent.")] = "64,256",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Fewer settings.")] = False,
    only: Annotated[str, typer.Option(help="Systems with this in their names; no comparison of indexes.")] = "",
    output: Annotated[Path, typer.Option(help="Folder for tables, CSV and plot.")] = Path("results/recall"),
) -> None:
    """Recall of each index against exact search, and KL and top-1 agreement of the next token with full attention."""
    init, local = (int(part) for part in window.split(","))
    base = AlayaConfig(window=(init, local), min_context=0, sample_queries=0.4)
    compared = [system for system in systems(quick) if only in system[1]]
    if not compared:
        raise typer.BadParameter(f"--only {only!r}: no system has this in its name")
    settings = {name: base.replace(**changes) for _, name, changes in compared}
    network, tokenizer = load(model, device)
    texts = long_contracts(data_dir, tokenizer, tokens, documents)
    network.set_attn_implementation("alaya")
    results = {name: Fidelity() for name in settings}
    done, text = 0, ""
    probe = RecallProbe({"DIPR 0.012": DIPR(0.012), "top-100": TopK(100)})
    with Progress() as progress:
        task = progress.add_task("recall", total=len(texts) * (len(settings) + 2))
        for _, ids in texts:
            sequence = torch.tensor([ids], device=device)
            expected = reference(network, sequence, steps)
            progress.advance(task)
            prefilled = prefill(network, sequence[:, :-steps], base)
            if not only:
                _compare(network, prefilled, sequence[:, -steps:][:, :recall_steps], expected, probe)
            progress.advance(task)
            for name, chosen in settings.items():
                follow(network, prefilled.fork(chosen), sequence[:, -steps:], expected, results[name])
                progress.advance(task)
            # After every contract, so that an interrupted run leaves what it has.
            done += 1
            title = f"{model}, {done} contracts of {tokens} tokens, window {init} + {local}, {steps} steps each"
            text = _write(output, title, probe, compared, results)
    typer.echo(text)


def _write(
    output: Path,
    title: str,
    probe: RecallProbe,
    compared: list[tuple[str, str, dict[str, Any]]],
    results: dict[str, Fidelity],
) -> str:
    recall_rows, detail = _recall_tables(probe)
    rows = [_fidelity_row(family, name, results[name]) for family, name, _ in compared]
    output.mkdir(parents=True, exist_ok=True)
    if detail:
        write_csv(output / "recall_by_head.csv", detail)
    write_csv(output / "fidelity.csv", rows)
    curves(rows, output / "fidelity.png")
    tables = [markdown(table) for table in (recall_rows, rows) if table]
    text = "\n\n".join([describe(), title, *tables]) + "\n"
    (output / "recall.md").write_text(text, encoding="utf-8")
    return text


def _compare(network: Any, prefilled: AlayaCache, ids: Tensor, expected: Tensor, probe: RecallProbe) -> None:
    exact = prefilled.fork(prefilled.settings.replace(query=DIPR(0.012), index="flat", residual="none"))
    for layer in exact.alaya_layers:
        assert layer.probe is not None
        layer.probe.observer = probe
    follow(network, exact, ids, expected, Fidelity())
