"""When a step is captured and when it is replayed; capturing itself needs a GPU (tests/gpu/test_decode_graphs.py)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import AlayaCache, AlayaConfig, decode_graph
from alaya_hf.cache_argument import cache_argument
from alaya_hf.decode_graph import DecodeGraphs
from alaya_hf.engine.device.shared import Counters
from alaya_hf.layer import AlayaLayer
from alaya_hf.patches import decode_graphs


class _Tokens:
    """The numbers of a layer that has room for 40 tokens, and for 80 after that."""

    def __init__(self, layer: AlayaLayer) -> None:
        self.layer, self.buffers = layer, (object(),)
        self.room = 40

    def settled(self, columns: int, tokens: int = 1) -> bool:
        return columns < self.room


class _Graph:
    """Stands in for a captured step: replaying runs the model."""

    def __init__(self, model: Any, forward: Any, inputs: Any, cache: Any, blocks: Any) -> None:
        with blocks:
            self.call = lambda given: forward(model, **inputs.fixed, **given, **cache_argument(cache))
        self.key, self.layers, self.stamp = inputs.key(model), cache.layers, decode_graph._stamp(model)
        self.held = [layer.tokens.buffers for layer in cache.layers]

    def fits(self, key: Any, model: Any, begins: bool) -> bool:
        if begins and decode_graph._stamp(model) != self.stamp:
            return False
        return key == self.key and all(
            layer.tokens.buffers is held and layer.tokens.settled(layer.get_seq_length())
            for layer, held in zip(self.layers, self.held, strict=True)
        )

    def replay(self, inputs: Any, cache: Any) -> Any:
        return self.call(inputs.tensors)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model whose cache looks like one of the device engine."""
    monkeypatch.setattr(decode_graph, "DecodeGraph", _Graph)
    monkeypatch.setattr(decode_graph, "DeviceLayer", AlayaLayer)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(
        DecodeGraphs, "_serves", lambda self, cache, model: cache.get_seq_length() > 0 and not self._off
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with decode_graphs:
        yield LlamaForCausalLM(config).eval()


def _filled(model: Any, mode: str) -> AlayaCache:
    cache = AlayaCache(AlayaConfig(min_context=0), config=model.config)
    cache.graphs = DecodeGraphs(mode)
    with torch.no_grad():
        model(input_ids=torch.arange(1, 21)[None], **cache_argument(cache))
    for layer in cache.layers:
        layer.tokens = _Tokens(layer)
    return cache


@pytest.mark.parametrize("mode, before", [("capture", 1), ("compile", 2)])
def test_steps(model: Any, mode: str, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual steps first, then replays; new buffers and another batch shape begin anew."""
    monkeypatch.setattr(DecodeGraphs, "_blocks", lambda self, cache, model: decode_graph.nullcontext())
    cache, steps = _filled(model, mode), []
    graphs = cache.graphs
    assert graphs is not None

    def step() -> None:
        with torch.no_grad():
            model(input_ids=torch.tensor([[3]]), **cache_argument(cache))
        steps.append(graphs.captures + graphs.replays)

    for _ in range(5):
        step()
    # A capture is replayed at once, and counted as a capture.
    assert steps == [0] * before + list(range(1, 6 - before))
    assert graphs.captures == 1 and cache.get_seq_length() == 25
    cache.layers[1].tokens.buffers = (object(),)
    for _ in range(before + 1):
        step()
    assert graphs.captures == 2
    for layer in cache.layers:
        layer.tokens.room = cache.get_seq_length()  # the next step has to make room
    step()
    assert graphs.captures == 2 and steps[-1] == steps[-2]
    twin = copy.deepcopy(cache.graphs)
    assert twin.mode == mode and twin.captures == 0


def test_passes_of_several_tokens_have_a_graph_of_their_own(model: Any) -> None:
    """Steps and passes take turns; another number of tokens begins anew, and leaves the step's graph alone."""
    caches, outs = [_filled(model, "capture"), _filled(model, "capture")], []
    caches[1].graphs = None
    for cache in caches:
        found = []
        with torch.no_grad():
            for ids in ([3, 4], [5], [6, 7], [8], [9, 10], [11], [12, 13, 14], [15], [16, 17], [18, 19]):
                found.append(model(input_ids=torch.tensor([ids]), **cache_argument(cache)).logits[0])
        outs.append(torch.cat(found))
    torch.testing.assert_close(*outs)
    graphs = caches[0].graphs
    assert graphs is not None
    # Of two tokens twice, of one token once.
    assert (graphs.captures, graphs.replays) == (3, 3)


def test_a_replay_is_the_step(model: Any) -> None:
    """Positions that the caller leaves out come from the cache, whatever was captured."""
    caches = [_filled(model, "capture"), _filled(model, "capture")]
    caches[1].graphs = None
    outs = []
    with torch.no_grad():
        for cache in caches:
            outs.append(
                torch.cat([model(input_ids=torch.tensor([[t]]), **cache_argument(cache)).logits for t in range(5, 12)])
            )
    assert caches[0].graphs is not None and caches[0].graphs.replays >= 4
    torch.testing.assert_close(outs[0], outs[1])


def test_what_a_graph_cannot_stand_in_for(model: Any) -> None:
    """Calls that ask for more than logits, and several tokens, go to the model."""
    cache = _filled(model, "capture")
    assert cache.graphs is not None
    with torch.no_grad():
        for _ in range(4):
            model(input_ids=torch.full((1, 65), 3), **cache_argument(cache))
            model(input_ids=torch.tensor([[3]]), **cache_argument(cache), output_hidden_states=True)
    assert cache.graphs.captures == 0


def test_other_weights_and_hooks(model: Any) -> None:
    """A step that was captured with other weights or hooks is captured anew."""
    cache = _filled(model, "capture")
    assert cache.graphs is not None
    seen = []

    def steps(count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                model(input_ids=torch.tensor([[3]]), **cache_argument(cache))

    steps(3)
    assert cache.graphs.captures == 1
    handle = model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    steps(1)
    assert seen and cache.graphs.captures == 1
    steps(2)
    assert cache.graphs.captures == 2
    handle.remove()
    model.lm_head.weight.data = model.lm_head.weight.data.clone()
    steps(3)
    assert cache.graphs.captures == 3


def test_an_interrupted_replay_is_counted_anew() -> None:
    """The device may have counted a step that the host has not: its numbers are written again."""
    counters = Counters(2, torch.device("cpu"))
    counters.bring_to([5, 7], [0, 0], 4, 64, 640)
    counters.forget()
    counters.total += 1
    counters.bring_to([5, 7], [0, 0], 4, 64, 640)
    assert counters.total.tolist() == [5, 7]
    counters.counted([6, 8], [0, 0])
    counters.total += 1
    counters.bring_to([6, 8], [0, 0], 4, 64, 640)
    assert counters.total.tolist() == [6, 8]


def test_passes_are_counted_as_their_tokens() -> None:
    """Both rows by 150 tokens, of which one gives a tile more; then one row alone, which no rule says."""
    counters = Counters(2, torch.device("cpu"))
    counters.bring_to([70, 180], [0, 64], 4, 64, 640)
    counters.bring_to([220, 330], [128, 256], 4, 64, 640)
    assert (counters.total.tolist(), counters.low.tolist()) == ([220, 330], [128, 256])
    counters.bring_to([221, 330], [128, 256], 4, 64, 640)
    assert (counters.total.tolist(), counters.low.tolist()) == ([221, 330], [128, 256])
