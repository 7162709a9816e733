"""Keys and queries of any length whose scores are distributed as a real model's.

Random Gaussian keys are no test for retrieval: no key stands out, and queries look like keys. What a model shows was
measured on SmolLM2-135M-Instruct over a contract of 7.1K tokens (post-RoPE, window 64 + 256, alpha = 0.012, layers past
the first), and the generator reproduces it:

=============================================  ======================  =====================================
property                                       measured                here
=============================================  ======================  =====================================
effective rank of the centred keys             15-29 (of 64)           ``rank`` directions of decaying energy
norm of the mean key / norm of a key           0.6-0.7                 a common mean of that size
spread (std) of the scores of one query / b    0.7-1.1                 0.55-0.65 b
best score - mean score                        2.4-3.5 b (mid layers)  3.3 b
critical keys per query head                   60-90, up to 350        ``critical``, at any length
union over a group of 3 / keys per head        1.6                     half of a head's topics are its group's
attention mass: outside the window / critical  0.8 / 0.7               0.9-0.99 / 0.96-0.99
queries vs keys                                other distribution      topic directions plus query-only noise
=============================================  ======================  =====================================

(``b`` is the range ``-ln(0.012) * sqrt(d)``; effective rank is ``tr(S)^2 / tr(S^2)``.)

A context has topics (things the text comes back to), each with ``critical`` keys at random places. A topic is a unit
direction that background keys hardly contain; its keys are ordinary keys moved along it to their score within ``b`` of
the best. A query asks for one topic: its direction, plus directions of the background that give the spread of scores,
plus noise that no key shares. More tokens bring more background and more topics, never more critical keys per query.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 15  # tokens made at once


def synthetic_layer(
    kv_heads: int = 8,
    group: int = 4,
    head_dim: int = 128,
    tokens: int = 131072,
    decode_queries: int = 16,
    sample_queries: int | None = None,
    seed: int = 0,
    critical: int = 128,
    topics: int = 256,
    rank: int = 24,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Make one layer of keys and values, sampled queries to build an index with, and decode queries to search with.

    Parameters
    ----------
    tokens : int
        Context length, at least ``2 * critical``.
    sample_queries : int, optional
        Per KV head; 0.4 per token when not given.
    critical : int
        Keys within ``beta`` of the best, per query head, alpha = 0.012, whatever the length; the exact number varies
        around it with the background.
    topics : int
        Most topics per KV head; fewer where the context has no room for ``critical`` keys of each.
    rank : int
        Directions that hold the background's energy, at most ``head_dim``.

    Returns
    -------
    dict
        ``kv [kv_heads, tokens, 2, head_dim]`` in ``dtype``, ``queries [kv_heads, sample_queries, head_dim]``,
        ``decode_queries [decode_queries, kv_heads, group, head_dim]`` float32.

    Notes
    -----
    Made in chunks of 32K tokens: beyond the result itself at most some 50 MB. The same seed gives the same data.
    """
    if tokens < 2 * critical or critical < 1 or rank > head_dim:
        raise ValueError(
            f"expected tokens >= 2 * critical >= 2 and rank <= head_dim, got {tokens=} {critical=} {rank=}."
        )
    generator = torch.Generator().manual_seed(seed)
    beta = -math.log(0.012) * math.sqrt(head_dim)
    samples = round(0.4 * tokens) if sample_queries is None else sample_queries
    topics = max(1, min(topics, tokens // (2 * critical)))
    kv = torch.empty(kv_heads, tokens, 2, head_dim, dtype=dtype)
    queries = torch.empty(kv_heads, samples, head_dim)
    decode = torch.empty(decode_queries, kv_heads, group, head_dim)
    for h in range(kv_heads):
        head = _Head(head_dim, topics, rank, beta, generator)
        for start in range(0, tokens, _CHUNK):
            stop = min(tokens, start + _CHUNK)
            kv[h, start:stop, 0] = head.background(stop - start, generator).to(dtype)
            kv[h, start:stop, 1] = torch.randn(stop - start, head_dim, generator=generator).to(dtype)
        places = torch.randperm(tokens, generator=generator)[: topics * critical]
        kv[h, places, 0] = head.planted(critical, generator).to(dtype)
        for start in range(0, samples, _CHUNK):
            stop = min(samples, start + _CHUNK)
            topic = torch.randint(topics, (stop - start,), generator=generator)
            queries[h, start:stop] = head.queries(topic, generator)
        shared = torch.randint(topics, (decode_queries, 1), generator=generator)
        own = torch.randint(topics, (decode_queries, group), generator=generator)
        topic = torch.where(torch.rand(decode_queries, group, generator=generator) < 0.5, shared, own)
        decode[:, h] = head.queries(topic.flatten(), generator).view(decode_queries, group, head_dim)
    return {"kv": kv, "queries": queries, "decode_queries": decode}


class _Head:
    """The directions one KV head is made of."""

    def __init__(self, d: int, topics: int, rank: int, beta: float, generator: torch.Generator) -> None:
        self.d, self.beta, self.generator = d, beta, generator
        basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
        decay = torch.linspace(1.6, 0.4, rank)
        self.spread = basis[:, :rank] * decay  # background keys vary along these columns
        self.rest = basis[:, rank:]
        self.norm = 2.0 * math.sqrt(d)  # of a key, about
        self.mean = 0.65 * self.norm * basis[:, 0]
        inside = torch.randn(topics, rank, generator=generator)
        outside = torch.randn(topics, d - rank, generator=generator)
        inside, outside = torch.nn.functional.normalize(inside), torch.nn.functional.normalize(outside)
        # A topic's direction lies half outside the background's span, as rare content does.
        self.topics = 0.7 * inside @ basis[:, :rank].T + (0.714 * outside @ self.rest.T if d > rank else 0)
        self.query_norm = 1.1 * math.sqrt(d)

    def background(self, count: int, generator: torch.Generator) -> Tensor:
        """Keys without a topic ``[count, d]``: neighbouring tokens share half of their variance."""
        rank = self.spread.shape[1]
        free = torch.randn(count, rank, generator=generator)
        runs = torch.randn(-(-count // 16), rank, generator=generator).repeat_interleave(16, 0)[:count]
        scale = 0.75 * self.norm / math.sqrt(float((self.spread**2).sum()))
        keys = self.mean + ((free + runs) * (scale / math.sqrt(2))) @ self.spread.T
        return keys + 0.05 * self.norm / math.sqrt(self.d) * torch.randn(count, self.d, generator=generator)

    def planted(self, critical: int, generator: torch.Generator) -> Tensor:
        """Keys of every topic ``[topics * critical, d]``, scores from the best down to ``beta`` below it."""
        topics = self.topics.shape[0]
        keys = self.background(topics * critical, generator).view(topics, critical, self.d)
        axis = self.topics[:, None]
        depth = torch.rand(topics, critical, 1, generator=generator)
        top = self.beta * 3.3 / self.query_norm
        along = top - depth * 0.8 * self.beta / self.query_norm
        centre = (axis * self.mean).sum(-1, keepdim=True)
        keys = 0.5 * (keys - self.mean) + self.mean  # what a topic's keys have besides the topic
        keys = keys + (along + centre - (keys * axis).sum(-1, keepdim=True)) * axis
        return keys.reshape(-1, self.d)

    def queries(self, topic: Tensor, generator: torch.Generator) -> Tensor:
        """Queries for these topics ``[len(topic), d]``."""
        noise = torch.randn(len(topic), self.d, generator=generator) / math.sqrt(self.d)
        return self.query_norm * (self.topics[topic] + 0.25 * noise)
