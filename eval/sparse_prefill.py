"""``python -m eval sparse-prefill``: how far a sparse prefill is from a dense one, on real contracts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from eval.data import long_contracts
from eval.environment import describe
from eval.models import load
from eval.report import markdown, write_csv

DENSE = "exact"
#: Systems without calibration: name and what `prefill` is.
FREE: dict[str, Any] = {
    DENSE: "exact",
    **{f"blasst, lambda {lam:g}": {"kind": "blasst", "lam": lam} for lam in (1e-4, 1e-3, 3e-3, 1e-2, 3e-2)},
    **{f"retrieval, {n} tokens": {"kind": "retrieval", "tokens": n} for n in (512, 1024)},
}


@dataclass
class Outcome:
    """One system over all documents: sums over predicted tokens, and the share of tiles skipped per document."""

    kl: float = 0.0
    same: int = 0
    loss: float = 0.0
    count: int = 0
    skipped: list[float] = field(default_factory=list)

    def row(self, name: str) -> dict[str, Any]:
        """For the table."""
        return {
            "prefill": name,
            "tiles skipped": sum(self.skipped) / len(self.skipped) if self.skipped else math.nan,
            "KL": self.kl / self.count,
            "top-1": self.same / self.count,
            "perplexity": math.exp(self.loss / self.count),
            "predictions": self.count,
        }


@torch.no_grad()
def hidden_states(model: Any, ids: Tensor, prefill: Any, chunk: int) -> tuple[Tensor, float | None]:
    """The last hidden states of a text ``[1, n]`` that came in chunks, and the share of tiles skipped."""
    settings = AlayaConfig(prefill=prefill, window=(64, 256), min_context=0)
    cache = AlayaCache(settings, config=model.config, probe=True)
    parts = [
        model.model(input_ids=ids[:, start : start + chunk], **cache_argument(cache)).last_hidden_state[0]
        for start in range(0, ids.shape[1], chunk)
    ]
    return torch.cat(parts), cache.stats()["skipped_tiles"]


@torch.no_grad()
def compare(model: Any, ids: Tensor, dense: Tensor, found: Tensor, first: int, into: Outcome) -> None:
    """Next-token distributions from token `first` on, against dense attention's and the text's own."""
    for start in range(first, ids.shape[1] - 1, 128):
        part = slice(start, min(start + 128, ids.shape[1] - 1))
        expected, actual = (model.lm_head(x[part]).float().log_softmax(-1) for x in (dense, found))
        target = ids[0, part.start + 1 : part.stop + 1]
        into.kl += float((expected.exp() * (expected - actual)).sum())
        into.same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        into.loss -= float(actual.gather(1, target[:, None]).sum())
        into.count += len(target)


def sparse_prefill(
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of each contract.")] = 4096,
    documents: Annotated[int, typer.Option(help="Contracts.")] = 2,
    skip: Annotated[int, typer.Option(help="Contracts to leave to calibration, the first ones.")] = 16,
    chunk: Annotated[int, typer.Option(help="New tokens of a pass.")] = 1024,
    last: Annotated[int, typer.Option(help="Predictions compared, at the end of each contract.")] = 2048,
    thresholds: Annotated[str, typer.Option(help="BSFA's files, separated by commas.")] = "",
    device: Annotated[str, typer.Option(help="'cpu' or a CUDA device.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/sparse-prefill"),
) -> None:
    """KL, top-1 agreement and perplexity of every token of a prompt under sparse prefill, against dense prefill."""
    systems = dict(FREE)
    for path in filter(None, thresholds.split(",")):
        systems[f"bsfa, {Path(path).stem.rpartition('-')[2]}"] = {"kind": "bsfa", "thresholds": path}
    network, tokenizer = load(model, device)
    network.set_attn_implementation("alaya")
    results = {name: Outcome() for name in systems}
    text = ""
    output.mkdir(parents=True, exist_ok=True)
    chosen = long_contracts(data_dir, tokenizer, tokens, skip + documents)[skip:]
    for done, (_, contract) in enumerate(chosen, 1):
        ids = torch.tensor([contract], device=device)
        dense, _ = hidden_states(network, ids, systems[DENSE], chunk)
        for name, prefill in systems.items():
            found, share = (dense, None) if name == DENSE else hidden_states(network, ids, prefill, chunk)
            compare(network, ids, dense, found, max(0, tokens - 1 - last), results[name])
            if share is not None:
                results[name].skipped.append(share)
            typer.echo(f"{done}: {results[name].row(name)}", err=True)
        rows = [outcome.row(name) for name, outcome in results.items()]
        write_csv(output / "sparse-prefill.csv", rows)
        title = (
            f"{model}, {done} contracts of {tokens} tokens in chunks of {chunk}, the last {last} predictions of each"
        )
        text = f"{describe()}\n\n{title}\n\n{markdown(rows)}\n"
        (output / "sparse-prefill.md").write_text(text, encoding="utf-8")
    typer.echo(text)
