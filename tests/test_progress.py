"""The progress bar over long prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig, progress
from alaya_hf.cache_argument import cache_argument

SETTINGS = AlayaConfig(query="full", window=(16, 64), min_context=0)


class Bar:
    """What a bar was told."""

    made: list[Bar] = []

    def __init__(self, total: int, **kwargs: Any) -> None:
        self.total, self.shown, self.closed = total, [0], False
        self.made.append(self)

    def update(self, n: int) -> None:
        assert not self.closed and n >= 0
        self.shown.append(self.shown[-1] + n)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bars(monkeypatch):
    monkeypatch.setattr(progress.logging, "tqdm", Bar)
    monkeypatch.setattr(progress, "SHORTEST", 100)
    monkeypatch.setattr(Bar, "made", [])
    return Bar.made


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("chunk", [None, 100, 64])
def test_one_bar_over_a_prompt_and_none_over_its_answer(bars, model, chunk):
    ids = torch.randint(1, 64, (2, 210))
    cache = AlayaCache(SETTINGS, progress=True)
    model.generate(ids, **cache_argument(cache), max_new_tokens=5, prefill_chunk_size=chunk)
    (bar,) = bars
    assert bar.total == bar.shown[-1] == 210 and bar.closed
    assert len(bar.shown) == 1 + 3 * -(-210 // (chunk or 210))  # moves with every layer


def test_nothing_without_being_asked_nor_over_short_prompts(bars, model):
    ids = torch.randint(1, 64, (1, 210))
    model.generate(ids, **cache_argument(AlayaCache(SETTINGS)), max_new_tokens=2)
    model.generate(ids[:, :90], **cache_argument(AlayaCache(SETTINGS, progress=True)), max_new_tokens=20)
    assert not bars


def test_a_second_prompt_counts_what_is_new(bars, model):
    ids = torch.randint(1, 64, (1, 400))
    cache = AlayaCache(SETTINGS, progress=True)
    out = model.generate(ids[:, :150], **cache_argument(cache), max_new_tokens=4, prefill_chunk_size=70)
    copies = [copy.deepcopy(cache), cache.fork()]
    held = cache.get_seq_length()
    for each in (cache, *copies):
        model.generate(torch.cat([out, ids], dim=1), **cache_argument(each), max_new_tokens=2, prefill_chunk_size=70)
    assert [bar.total for bar in bars] == [150] + [out.shape[1] + 400 - held] * 3
    assert all(bar.closed and bar.shown[-1] == bar.total for bar in bars)


def test_a_prompt_that_was_given_up(bars, model):
    ids = torch.randint(1, 64, (1, 210))
    cache = AlayaCache(SETTINGS, progress=True)
    cache.reserve(210)
    with torch.no_grad():
        model(ids[:, :100], **cache_argument(cache))
    cache.reset()
    model.generate(ids, **cache_argument(cache), max_new_tokens=2)
    assert bars[0].closed and bars[0].shown[-1] == 100 and bars[1].shown[-1] == 210
