"""The ways of generating that every cache goes through.

A mode takes a model and a function that makes fresh caches, and returns the tokens of all its calls. What a mode does never
depends on the kind of cache, so its tokens with two caches can be compared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from alaya_hf.cache_argument import cache_argument
from tests.contract.models import build, pad_left, prompt

NewCache = Callable[[], Any]
NEW = 24

# Longer than the battery's windows; unequal.
ROWS = [prompt(23, 1)[0], prompt(40, 2)[0], prompt(31, 3)[0]]


def generate(model: Any, cache: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """``[rows, n]`` tokens, prompt included; greedy and ``NEW`` new tokens unless told otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    kwargs = {"max_new_tokens": NEW, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=mask, **cache_argument(cache), **kwargs)


def padded(model: Any, cache: Any, extra: int = 0, rows: list[Tensor] | None = None, **kwargs: Any) -> Tensor:
    """The new tokens of a left-padded batch."""
    batch = pad_left(ROWS if rows is None else rows, extra)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return generate(model, cache, ids, mask, **kwargs)[:, ids.shape[1] :]


def greedy(model: Any, new: NewCache) -> list[Tensor]:
    return [generate(model, new(), prompt(40))]


def short_prompt(model: Any, new: NewCache) -> list[Tensor]:
    """Shorter than the window at first."""
    return [generate(model, new(), prompt(3), max_new_tokens=40)]


def long_prompt(model: Any, new: NewCache) -> list[Tensor]:
    """Some hundred offloaded tokens, in rows of unequal length."""
    return [padded(model, new(), rows=[prompt(260, 6)[0], prompt(171, 7)[0]], max_new_tokens=12)]


def unequal_lengths(model: Any, new: NewCache) -> list[Tensor]:
    return [padded(model, new())]


def extra_padding(model: Any, new: NewCache) -> list[Tensor]:
    return [padded(model, new(), extra=9)]


def sampling(model: Any, new: NewCache) -> list[Tensor]:
    set_seed(7)
    return [padded(model, new(), do_sample=True, top_k=20, temperature=0.7)]


def return_sequences(model: Any, new: NewCache) -> list[Tensor]:
    set_seed(8)
    return [padded(model, new(), rows=ROWS[:2], do_sample=True, num_return_sequences=3)]


def beams(model: Any, new: NewCache) -> list[Tensor]:
    return [padded(model, new(), rows=ROWS[:2], num_beams=4, num_return_sequences=2)]


def beam_sampling(model: Any, new: NewCache) -> list[Tensor]:
    set_seed(9)
    return [padded(model, new(), rows=ROWS[1:], num_beams=3, do_sample=True, temperature=0.5)]


def chunked_prefill(model: Any, new: NewCache) -> list[Tensor]:
    """Chunks shorter and longer than the windows, also with chunks that are padding alone."""
    return [
        generate(model, new(), prompt(61), prefill_chunk_size=7, max_new_tokens=12),
        generate(model, new(), prompt(61), prefill_chunk_size=25, max_new_tokens=12),
        padded(model, new(), extra=9, prefill_chunk_size=8, max_new_tokens=12),
    ]


def assisted(model: Any, new: NewCache) -> list[Tensor]:
    """A draft of other weights, mostly rejected, and one of the same weights, accepted."""
    name = {"gemma3_text": "gemma3"}.get(model.config.model_type, model.config.model_type)
    other, same = build(name, model.config._attn_implementation, seed=1), copy.deepcopy(model)
    return [generate(model, new(), prompt(40), assistant_model=draft) for draft in (other, same)]


def prompt_lookup(model: Any, new: NewCache) -> list[Tensor]:
    phrase = prompt(9, 4)
    return [generate(model, new(), torch.cat([phrase] * 4, dim=1), prompt_lookup_num_tokens=4)]


def turns(model: Any, new: NewCache) -> list[Tensor]:
    """A conversation: questions of one token, a few and many go on from what the cache holds."""
    cache, ids = new(), prompt(33)
    seen = []
    for number, length in enumerate((1, 6, 30, 2)):
        ids = generate(model, cache, ids, max_new_tokens=9)
        seen.append(ids)
        ids = torch.cat([ids, prompt(length, 50 + number)], dim=1)
    return seen


def turns_batch(model: Any, new: NewCache) -> list[Tensor]:
    """The same with padding before the rows and between the turns' lengths none."""
    cache, batch = new(), pad_left(ROWS, extra=2)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    seen = []
    for number, length in enumerate((1, 7, 25)):
        ids = generate(model, cache, ids, mask, max_new_tokens=8)
        seen.append(ids)
        question = prompt(length, 60 + number, batch=len(ids))
        ids = torch.cat([ids, question], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
    return seen


def prefix_reuse(model: Any, new: NewCache) -> list[Tensor]:
    """One prefill, three questions, each on a copy; then one on the cache itself."""
    cache, prefix = new(), prompt(45, 5)
    with torch.no_grad():
        model(prefix, **cache_argument(cache), use_cache=True)
    questions = [torch.cat([prefix, prompt(length, 70 + length)], dim=1) for length in (2, 11, 20)]
    answers = [generate(model, copy.deepcopy(cache), ids) for ids in questions]
    return [*answers, generate(model, cache, questions[0])]


MODES: dict[str, Callable[[Any, NewCache], list[Tensor]]] = {
    function.__name__: function
    for function in (
        greedy,
        short_prompt,
        long_prompt,
        unequal_lengths,
        extra_padding,
        sampling,
        return_sequences,
        beams,
        beam_sampling,
        chunked_prefill,
        assisted,
        prompt_lookup,
        turns,
        turns_batch,
        prefix_reuse,
    )
}
