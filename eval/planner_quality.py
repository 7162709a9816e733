"""Whether the planner keeps what it promises of quality, on held-out text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alaya_hf import AlayaCache, AlayaConfig, AlayaLayer
from eval.fidelity import Fidelity, follow, prefill, reference

RESIDUALS: dict[str, Any] = {
    "none": "none",
    "block means of V": "block_means",
    "4-bit keys, 2-bit values": {"kind": "low_bit", "key_bits": 4, "value_bits": 2},
}


def targets(recoveries: tuple[float, ...], kls: tuple[float, ...], window: tuple[int, int]) -> dict[str, AlayaConfig]:
    """Configurations with one target each."""
    base = AlayaConfig(window=window, min_context=0)
    return {
        **{f"recovery {r:g}": base.replace(recovery=r) for r in recoveries},
        **{f"KL {k:g}": base.replace(kl=k) for k in kls},
    }


def promises(
    network: Any, prefilled: AlayaCache, ids: Tensor, expected: Tensor, settings: AlayaConfig
) -> dict[str, Any]:
    """One document under one target: what was promised and what came.

    Parameters
    ----------
    ids : Tensor
        ``[1, steps]``.
    expected : Tensor
        ``[steps, vocabulary]`` log-probabilities of full attention.
    """
    cache, found = prefilled.fork(settings), Fidelity()
    assert cache.keeper is not None and cache.keeper.plan is not None
    first = cache.keeper.plan
    follow(network, cache, ids, expected, found)
    layers = cache.stats()["layers"]
    heads = [
        sum(record["min_recovery"] for record in layer["records"] if record["min_recovery"] is not None)
        / max(1, sum(record["min_recovery"] is not None for record in layer["records"]))
        for layer in layers.values()
    ]
    plans = {plan.names() for plan, _ in first.layers}
    return {
        "expected recovery": first.recovery, "recovery": found.recovery[0], "worst layer": found.worst[0],
        "worst head": min(heads),
        "expected KL": first.kl, "KL": Fidelity.mean(found.kl), "retrieved": found.retrieved[0], "plans": len(plans),
        "moves": cache.keeper.moves,
    }  # fmt: skip


class TrueErrors:
    """Beside a cache's layers: the real error of every decode step's output, against exact attention to all that is held."""

    def __init__(self, cache: AlayaCache) -> None:
        self.errors: dict[int, list[float]] = {}
        for layer in cache.alaya_layers:
            self._watch(layer)

    def _watch(self, layer: AlayaLayer) -> None:
        inner, found = layer.attend, self.errors.setdefault(layer.layer_idx, [])

        def attend(query: Tensor, scaling: float, *args: Any, **kwargs: Any) -> Tensor:
            out = inner(query, scaling, *args, **kwargs)
            keys, values = layer.contents()
            heads = keys.shape[1]
            q = query[0].reshape(heads, -1, query.shape[-1]).float()
            weights = torch.softmax(scaling * q @ keys[0].float().transpose(1, 2), dim=-1)
            exact = (weights @ values[0].float()).reshape(-1, query.shape[-1])
            given = out[0, 0].float()
            found.append(float(((given - exact).norm(dim=-1) / exact.norm(dim=-1)).mean()))
            return out

        layer.attend = attend  # type: ignore[method-assign]


def doubts(
    network: Any, prefilled: AlayaCache, ids: Tensor, expected: Tensor, base: AlayaConfig
) -> list[dict[str, Any]]:
    """How the estimate of a step's error ranks with its true error, and what widening the worst 5 % brings."""
    rows = []
    for name, residual in RESIDUALS.items():
        settings = base.replace(query={"kind": "dipr", "alpha": 0.012}, residual=residual)
        cache, plain = prefilled.fork(settings), Fidelity()
        true = TrueErrors(cache)
        follow(network, cache, ids, expected, plain, 0)
        estimated = {
            i: [record["error"] for record in layer["records"] if record["kind"] == "decode"]
            for i, layer in cache.stats()["layers"].items()
        }
        pairs = [
            (e, t) for i in true.errors for e, t in zip(estimated[i], true.errors[i], strict=True) if e is not None
        ]
        estimates, truths = (torch.tensor(values) for values in zip(*pairs, strict=True))
        threshold = float(estimates.quantile(0.95))
        wider, widened = prefilled.fork(settings.replace(on_doubt="widen", doubt=threshold)), Fidelity()
        follow(network, wider, ids, expected, widened, 0)
        records = [r for layer in wider.stats()["layers"].values() for r in layer["records"] if r["kind"] == "decode"]
        rows.append(
            {
                "residual": name, "rank correlation": spearman(estimates, truths),
                "within a layer": sum(spearman(torch.tensor(estimated[i]), torch.tensor(true.errors[i])) for i in true.errors)
                / len(true.errors),
                "true error": float(truths.mean()), "estimated / true": float((estimates.log() - truths.log()).median().exp()),
                "true error of the doubtful 5 %": float(truths[estimates > threshold].mean()), "KL": Fidelity.mean(plain.kl),
                "KL, doubtful steps widened": Fidelity.mean(widened.kl),
                "widened %": 100 * sum(r["widened"] for r in records) / len(records),
                "retrieved": plain.retrieved[0], "retrieved, widened": widened.retrieved[0],
            }
        )  # fmt: skip
    return rows


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation."""
    ranks = [values.argsort().argsort().double() for values in (x, y)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def quality(
    network: Any, texts: list[list[int]], steps: int, window: tuple[int, int], recoveries: tuple[float, ...],
    kls: tuple[float, ...], advance: Any = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Promises and doubts, means over the texts.

    Parameters
    ----------
    texts : list of list of int
        Token ids; the last `steps` of each are fed one by one.
    """
    network.set_attn_implementation("alaya")
    base = AlayaConfig(window=window, min_context=0)
    kept: dict[str, list[dict[str, Any]]] = {}
    doubtful: dict[str, list[dict[str, Any]]] = {}
    for ids in texts:
        sequence = torch.tensor([ids], device=network.device)
        expected = reference(network, sequence, steps)
        prefilled = prefill(network, sequence[:, :-steps], base)
        for name, settings in targets(recoveries, kls, window).items():
            kept.setdefault(name, []).append(promises(network, prefilled, sequence[:, -steps:], expected, settings))
            if advance is not None:
                advance()
        for row in doubts(network, prefilled, sequence[:, -steps:], expected, base):
            doubtful.setdefault(row.pop("residual"), []).append(row)
        if advance is not None:
            advance()
    return _means("target", kept), _means("residual", doubtful)


def _means(label: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        {label: name, **{key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}}
        for name, rows in found.items()
    ]
