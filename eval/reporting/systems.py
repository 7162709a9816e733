"""How systems are named, described, coloured and ordered: the same everywhere in a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: The reference, and the system that the report is about.
FULL, OURS = "full", "alaya"


@dataclass(frozen=True)
class Look:
    """A system's appearance.

    Parameters
    ----------
    colour : str
        From the colour-blind-safe palettes of Okabe and Ito and of Paul Tol; no two systems share colour and marker.
    marker : str
        Of matplotlib.
    text : str
        What the system is, in one plain sentence.
    dense : bool
        Whether it attends exactly to every token, so that retrieval measures need no observation.
    """

    colour: str
    marker: str
    text: str
    dense: bool = False


SYSTEMS: dict[str, Look] = {
    "full": Look("#1a1a1a", "D", "Full attention over the whole KV cache: the reference.", True),
    "offloaded": Look("#8a8a8a", "D", "Full attention, the KV cache in host memory and copied in at every step.", True),
    "vllm": Look("#117733", "D", "The serving engine vLLM, full attention.", True),
    "sglang": Look("#a38a1f", "D", "The serving engine SGLang, full attention.", True),
    "lmcache": Look(
        "#661100", "D", "vLLM with LMCache, which stores and reloads whole KV caches; full attention.", True
    ),
    "alaya": Look("#0072b2", "o", "Critical tokens (DIPR) exactly, a low-bit copy for all others."),
    "alaya_block_means": Look("#3fa0dc", "s", "Critical tokens exactly, mean values of blocks for all others."),
    "alaya_graph": Look("#332288", "^", "Critical tokens found on a graph, means of blocks for all others."),
    "alayadb_paper": Look("#d55e00", "P", "AlayaDB as published: critical tokens exactly, nothing for the others."),
    "retrieval_attention": Look(
        "#882255", "v", "RetrievalAttention: the best 100 tokens of each head, found on a graph."
    ),
    "topk": Look("#cc6699", "<", "The best k tokens of each head, by exact search."),
    "infllm": Look("#e69f00", "s", "InfLLM: the best blocks of 128 tokens, judged by representative keys."),
    "quest": Look("#009e73", "^", "Quest: the best pages of 16 tokens, judged by bounds on their keys."),
    "streaming_llm": Look(
        "#8c8c2e", "X", "StreamingLLM: the first and the most recent tokens only, nothing retrieved."
    ),
    "quantized_cache": Look("#2f9c90", "p", "Transformers' quantised cache: every token, all in low precision."),
    "snapkv": Look("#cc4455", "h", "SnapKV (kvpress): prompt tokens judged unimportant are dropped for good."),
    "expected_attention": Look(
        "#aa4499", "*", "Expected Attention (kvpress): tokens expected to matter little are dropped."
    ),
}

_SPARE = ("#5a6b7b", "#7a5195", "#b5651d", "#4b7f52", "#8f3b76", "#3c6e91")
_SPARE_MARKERS = ("o", "s", "^", "v", "P", "X")


def look(system: str) -> Look:
    """A system's appearance; one made of its name for a system that is not listed, the same in every report."""
    if system in SYSTEMS:
        return SYSTEMS[system]
    number = sum(ord(letter) * place for place, letter in enumerate(system, 1))
    colour, marker = _SPARE[number % len(_SPARE)], _SPARE_MARKERS[number // len(_SPARE) % len(_SPARE_MARKERS)]
    return Look(colour, marker, "A configuration of this run, see the configuration at the end.")


def order(systems: Iterable[str]) -> list[str]:
    """Distinct systems: those listed in :data:`SYSTEMS` in its order, then the others by name."""
    places = {name: place for place, name in enumerate(SYSTEMS)}
    return sorted(set(systems), key=lambda name: (places.get(name, len(places)), name))
