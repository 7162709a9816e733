"""From an answer to a result row."""

from __future__ import annotations

from typing import Any

from transformers import Cache, QuantizedCache

from alaya_hf import AlayaCache, AlayaLayer
from alaya_hf.device_layer import DeviceLayer
from eval.running.answer import Answer


def fidelity(answer: Answer, reference: Answer) -> dict[str, float]:
    """Agreement with full attention along the same tokens.

    Returns
    -------
    dict
        ``kl``: mean of ``KL(full || system)`` in nats over positions; ``top1``: share of positions with the same most
        likely token; ``agreement``: 1 if the outcome (the answer, or the likeliest choice) is the same; ``steps``: positions;
        ``nll_difference``: system minus full, nats per token of the continuations.
    """
    kl = same = nll = steps = 0.0
    for found, expected in zip(answer.scored, reference.scored, strict=True):
        p, q = expected.logprobs, found.logprobs.to(expected.logprobs.device)
        kl += float((p.exp() * (p - q)).sum())
        same += float((p.argmax(dim=-1) == q.argmax(dim=-1)).sum())
        nll += expected.likelihood - found.likelihood
        steps += len(found.ids)
    outcomes = [_outcome(answer), _outcome(reference)]
    return {
        "kl": kl / steps,
        "top1": same / steps,
        "agreement": float(outcomes[0] == outcomes[1]),
        "steps": steps,
        "nll_difference": nll / steps,
    }


def _outcome(answer: Answer) -> object:
    if answer.output is None:  # it parted from the reference's
        return None
    logprobs = answer.output.logprobs
    return max(range(len(logprobs)), key=logprobs.__getitem__) if len(logprobs) > 1 else answer.output.text


def retrieval(cache: Cache, has_evidence: bool, context: int) -> dict[str, Any]:
    """What the answering steps attended to, as ``retrieval`` and ``layers`` of a row; nothing for a cache not observed."""
    if isinstance(cache, QuantizedCache):
        return {}
    if not isinstance(cache, AlayaCache):
        whole = {"attended": context, "retrieved": 0.0, "fetched": 0.0, "recovery": 1.0, "context": context}
        return {"retrieval": whole | ({"evidence_recall": 1.0, "evidence_coverage": 1.0} if has_evidence else {})}
    layers = cache.stats()["layers"].values()
    names = {"evidence_recall": "watched", "evidence_coverage": "watched_coverage"}
    names |= {name: name for name in ("attended", "retrieved", "fetched", "recovery")}
    found = {ours: [layer[theirs] for layer in layers] for ours, theirs in names.items()}
    found = {name: values for name, values in found.items() if all(value is not None for value in values)}
    means = {name: sum(values) / len(values) for name, values in found.items()}
    # Question and answer are in the window as well.
    means["window"] = sum(_window(layer) for layer in cache.alaya_layers) / len(cache.alaya_layers)
    kept = ("retrieved", "evidence_recall", "recovery")
    return {
        "retrieval": means | {"context": context},
        "layers": {name: [round(value, 4) for value in found[name]] for name in kept if name in found},
    }


def _window(layer: AlayaLayer) -> int:
    """Tokens of the first row that are not offloaded."""
    if isinstance(layer, DeviceLayer):
        return layer.tokens.counts[0] - layer.tokens.lows[0]
    assert layer.window is not None
    return layer.window.lengths[0]


def footprint(cache: Cache) -> dict[str, int]:
    """``device_bytes``, what has to lie beside the model, and ``full_bytes``, what all keys and values take.

    Of an AlayaCache with ``engine="device"`` also ``workspace_bytes``, the part of ``device_bytes`` that a step works in, and
    ``hot_bytes``, which come on top of them.
    """
    if isinstance(cache, AlayaCache):
        stats = cache.stats()
        held = stats["window_bytes"] + stats["lowbit_bytes"] + stats["index_bytes"] + stats["workspace_bytes"]
        driven = any(isinstance(layer, DeviceLayer) for layer in cache.alaya_layers)
        parts = {name: stats[name] for name in ("workspace_bytes", "hot_bytes")} if driven else {}
        return {"device_bytes": held, "full_bytes": stats["total_bytes"]} | parts
    full = held = 0
    for layer in cache.layers:
        for recent, quantized in (("keys", "_quantized_keys"), ("values", "_quantized_values")):
            exact, packed = getattr(layer, recent), getattr(layer, quantized, None)
            full += exact.nbytes
            held += exact.nbytes
            if packed is not None:
                full += packed.numel() * exact.element_size()
                # Codes, and one scale and one zero point per group.
                groups = packed.numel() // layer.q_group_size
                held += packed.numel() * layer.nbits // 8 + 2 * groups * exact.element_size()
    return {"device_bytes": held, "full_bytes": full}
