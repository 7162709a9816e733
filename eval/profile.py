"""``python -m eval profile``: how a model's attention is spread, measured once for the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor

from alaya_hf import AlayaConfig, AlayaLayer
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.planner.profile import ALPHAS, RECOVERIES, HeadGroup, Profile, family, profile_path
from eval.data import long_contracts
from eval.fidelity import Fidelity, follow, prefill, reference
from eval.models import load

_BITS = {"kind": "low_bit", "key_bits": 4, "value_bits": 2}
_BITS44 = {**_BITS, "value_bits": 4}
_SCAN = {"kind": "quantized", "bits": 4, "margin": 0}
_KEYS = {"kind": "block_means", "block": 16, "keys": True}


def plans(quick: bool = False) -> list[dict[str, Any]]:
    """Settings whose KL is measured: a narrow and a wide cut for every residual."""
    narrow, wide = {"kind": "dipr", "alpha": 0.012}, {"kind": "recovery", "ratio": 0.98}
    residuals: list[Any] = ["none", _BITS, _BITS44, "block_means", _KEYS]
    cuts = [narrow, wide] if quick else [narrow, {"kind": "dipr", "alpha": 0.001}, wide]
    return [{"query": cut, "index": _SCAN, "residual": residual} for residual in residuals for cut in cuts]


class Spread:
    """An observer of decode steps: tokens that every head needs for a share of its mass."""

    def __init__(self) -> None:
        self.needed: dict[int, list[Tensor]] = {}
        self.window: dict[int, list[Tensor]] = {}
        self.ranges: dict[int, list[Tensor]] = {}
        self.unions: list[float] = []

    def __call__(self, layer: AlayaLayer, query: Tensor, best: Tensor, window_lse: Tensor) -> None:
        """See :class:`alaya_hf.probes.Probe`."""
        assert layer.store is not None
        kv_heads, scaling = layer.store.kv_heads, query.shape[-1] ** -0.5
        kv = layer.store.rows[0][0].kv
        q = query.float().reshape(kv_heads, -1, query.shape[-1])
        logits = (q @ kv[:, :, 0].float().transpose(1, 2)) * scaling
        lse = torch.logaddexp(logits.logsumexp(-1), window_lse.reshape(kv_heads, -1))
        window = (window_lse.reshape(kv_heads, -1) - lse).exp()
        ordered = (logits - lse.unsqueeze(-1)).exp().sort(dim=-1, descending=True).values
        held = window.unsqueeze(-1) + ordered.double().cumsum(-1).float()
        wanted = torch.tensor(RECOVERIES).expand(*window.shape, len(RECOVERIES)).contiguous()
        needed = torch.searchsorted(held, wanted) + 1
        needed = torch.where(wanted <= window.unsqueeze(-1), 0, needed).clamp(max=logits.shape[-1])
        top = torch.maximum(best.reshape(kv_heads, -1) * scaling, logits.amax(-1))
        ranges = []
        for alpha in ALPHAS:
            inside = logits >= (top + torch.tensor(alpha).log()).unsqueeze(-1)
            share = window + torch.where(inside, (logits - lse.unsqueeze(-1)).exp(), 0.0).sum(-1)
            ranges.append(torch.stack([inside.sum(-1).float(), share], dim=-1))
            if alpha == 0.003:
                one = float(inside.sum(-1).float().mean())
                self.unions += [float(inside.any(1).sum(-1).float().mean()) / one] if one else []
        self.needed.setdefault(layer.layer_idx, []).append(needed.float().mean(1))
        self.window.setdefault(layer.layer_idx, []).append(window.mean(1))
        self.ranges.setdefault(layer.layer_idx, []).append(torch.stack(ranges, dim=-2).mean(1))

    def layers(self) -> tuple[tuple[HeadGroup, ...], ...]:
        """Means over the steps seen."""
        found = []
        for layer in sorted(self.needed):
            needed, window, ranges = (
                torch.stack(seen[layer]).mean(0) for seen in (self.needed, self.window, self.ranges)
            )
            found.append(
                tuple(
                    HeadGroup(
                        round(float(window[h]), 4),
                        tuple(round(float(x), 1) for x in needed[h]),
                        {
                            a: (round(float(t), 1), round(float(r), 4))
                            for a, (t, r) in zip(ALPHAS, ranges[h], strict=True)
                        },
                    )
                    for h in range(len(window))
                )
            )
        return tuple(found)


def measure_profile(
    name: str, network: Any, texts: list[list[int]], steps: int, spread_steps: int, window: tuple[int, int], quick: bool,
    advance: Any = None,
) -> Profile:  # fmt: skip
    """Measure a model over texts.

    Parameters
    ----------
    network : PreTrainedModel
    texts : list of list of int
        Token ids, equally many each; the last `steps` of each are fed one by one.
    spread_steps : int
        Of them, those on which every head's attention is looked at.
    advance : callable, optional
        Called after each of ``len(texts) * (len(plans(quick)) + 1)`` parts.
    """
    network.set_attn_implementation("alaya")
    base = AlayaConfig(window=window, min_context=0)
    spread = Spread()
    compared = [base.replace(**changes) for changes in plans(quick)]
    results = [Fidelity() for _ in compared]
    for ids in texts:
        sequence = torch.tensor([ids], device=network.device)
        expected = reference(network, sequence, steps)
        prefilled = prefill(network, sequence[:, :-steps], base)
        watched = prefilled.fork(base.replace(query="full", index="flat", residual="none"))
        for layer in watched.alaya_layers:
            assert layer.probe is not None
            layer.probe.observer, layer.probe.recovery = spread, False
        follow(network, watched, sequence[:, -steps:][:, :spread_steps], expected, Fidelity(), 0)
        if advance is not None:
            advance()
        for settings, result in zip(compared, results, strict=True):
            follow(network, prefilled.fork(settings), sequence[:, -steps:], expected, result, min(8, steps))
            if advance is not None:
                advance()
    config = network.config.get_text_config(decoder=True)
    measured = tuple(
        {
            "residual": family(LayerPlan.of(settings)),
            "recovery": round(Fidelity.mean(result.recovery), 4),
            "kl": float(f"{Fidelity.mean(result.kl):.3g}"),
        }
        for settings, result in zip(compared, results, strict=True)
    )
    group = config.num_attention_heads // config.num_key_value_heads
    union = sum(spread.unions) / max(1, len(spread.unions))
    return Profile(name, len(texts[0]), group, round(max(1.0, union), 3), spread.layers(), measured)


def profile(
    model: Annotated[str, typer.Argument(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[int, typer.Option(help="Tokens of each contract.")] = 7000,
    steps: Annotated[int, typer.Option(help="Teacher-forced steps at the end of each contract.")] = 32,
    spread_steps: Annotated[int, typer.Option(help="Steps on which every head's attention is looked at.")] = 16,
    documents: Annotated[int, typer.Option(help="Contracts.")] = 2,
    window: Annotated[str, typer.Option(help="Window: first, most recent.")] = "64,256",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Fewer plans.")] = False,
    output: Annotated[Path | None, typer.Option(help="File. [default: where the planner looks for it]")] = None,
) -> None:
    """Measure a model once for the planner: how its attention is spread, and the KL of a few plans."""
    init, local = (int(part) for part in window.split(","))
    network, tokenizer = load(model, device)
    texts = [ids for _, ids in long_contracts(data_dir, tokenizer, tokens, documents)]
    with Progress() as progress:
        task = progress.add_task("profile", total=len(texts) * (len(plans(quick)) + 1))
        found = measure_profile(
            model, network, texts, steps, spread_steps, (init, local), quick, lambda: progress.advance(task)
        )
    path = output or profile_path(str(getattr(network.config, "_name_or_path", "") or model))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(found.to_json(), encoding="utf-8")
    typer.echo(f"{model}: {len(found.layers)} layers, {len(found.plans)} plans -> {path}")
