"""How far the next token is from full attention's, teacher-forced over real text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument


@dataclass
class Fidelity:
    """One system's agreement with full attention.

    Attributes
    ----------
    kl : list of float
        Per step, ``KL(full || system)`` of the next-token distributions in nats.
    top1 : list of bool
        Per step, whether the most likely token is the same.
    retrieved, fetched, context, recovery : list of float
        Per document: mean offloaded tokens per query head and step that the query asked for; that were read per KV head;
        tokens of the context; share of the attention mass attended exactly.
    worst : list of float
        Per document: recovery of the worst layer.
    """

    kl: list[float] = field(default_factory=list)
    top1: list[bool] = field(default_factory=list)
    retrieved: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)
    context: list[float] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @staticmethod
    def mean(values: list[Any]) -> float:
        """Arithmetic mean, nan for nothing."""
        return sum(values) / len(values) if values else float("nan")


@torch.no_grad()
def reference(model: Any, ids: Tensor, steps: int, chunk: int = 2048) -> Tensor:
    """Log-probabilities of full attention for the last ``steps`` next tokens: ``[steps, vocabulary]`` float32.

    Parameters
    ----------
    ids : Tensor
        ``[1, n]``; the predictions after tokens ``n - steps ... n - 1``.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    prompt = ids.shape[1] - steps
    for start in range(0, prompt, chunk):
        model.model(input_ids=ids[:, start : min(start + chunk, prompt)], **cache_argument(cache))
    logits = model(input_ids=ids[:, prompt:], **cache_argument(cache)).logits[0]
    return logits.float().log_softmax(dim=-1)


@torch.no_grad()
def prefill(model: Any, ids: Tensor, settings: AlayaConfig, probe_recovery: bool = True) -> AlayaCache:
    """A cache that holds ``ids`` (``[1, n]``)."""
    cache = AlayaCache(settings, config=model.config, probe=True, probe_recovery=probe_recovery)
    model.model(input_ids=ids, **cache_argument(cache))
    return cache


@torch.no_grad()
def follow(
    model: Any, cache: AlayaCache, ids: Tensor, expected: Tensor, into: Fidelity, recovery_steps: int = 8
) -> None:
    """Feed ``ids`` (``[1, steps]``) one token at a time and compare every prediction.

    Parameters
    ----------
    cache : AlayaCache
        Prefilled; is used up.
    expected : Tensor
        ``[steps, vocabulary]`` log-probabilities of full attention.
    into : Fidelity
        Where the results go.
    recovery_steps : int
        Steps on which the recovery ratio is measured, which costs a dense pass each.
    """
    for step in range(ids.shape[1]):
        if step == recovery_steps:
            for layer in cache.alaya_layers:
                if layer.probe is not None:
                    layer.probe.recovery = False
        logits = model(input_ids=ids[:, step : step + 1], **cache_argument(cache)).logits[0, -1]
        found = logits.float().log_softmax(dim=-1)
        into.kl.append(float((expected[step].exp() * (expected[step] - found)).sum()))
        into.top1.append(bool(expected[step].argmax() == found.argmax()))
    stats = cache.stats()
    into.retrieved.append(stats["retrieved"])
    into.fetched.append(stats["fetched"])
    into.context.append(stats["tokens"])
    into.seconds.append(stats["seconds_per_step"])
    if stats["recovery"] is not None:
        into.recovery.append(stats["recovery"])
        into.worst.append(min(layer["recovery"] for layer in stats["layers"].values()))
