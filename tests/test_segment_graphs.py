"""Blocks captured per device and replayed inside the model's own call; graphs that are none stand in for CUDA's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from alaya_hf import segment_graphs
from alaya_hf.decode_graph import _one_device, _several_devices
from alaya_hf.segment_graphs import SegmentGraphs

#: Two names of one device: three runs of blocks.
HERE, THERE = torch.device("cpu"), torch.device("cpu", 0)
DEVICES = [HERE, HERE, THERE, THERE, HERE]


class _Graph:
    """Remembers calls and where their results go; computes when it is replayed, as a CUDA graph does."""

    recording: _Graph | None = None

    def __init__(self):
        self.calls, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for block, args, kwargs, out in self.calls:
            out.copy_(block._call_impl(*args, **kwargs))


@pytest.fixture
def model(monkeypatch):
    @contextmanager
    def captured(graph, device):
        assert _Graph.recording is None
        _Graph.recording = graph
        try:
            yield
        finally:
            _Graph.recording = None

    def compute(block, args, kwargs):
        out = torch.full_like(args[0], float("nan"))
        _Graph.recording.calls.append((block, args, kwargs, out))
        return out

    monkeypatch.setattr(torch.cuda, "CUDAGraph", _Graph)
    monkeypatch.setattr(segment_graphs, "captured", captured)
    monkeypatch.setattr(segment_graphs._Segment, "compute", staticmethod(compute))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def _call(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits


def _captured(model, ids):
    ends = []
    graphs = SegmentGraphs(model.model.layers, DEVICES, lambda device: ends.append((device, _Graph.recording)))
    with graphs.capturing():
        _call(model, ids)
    return graphs, ends


def test_a_replay_is_the_call(model):
    """Other tokens, once more the first; each device's last graph counts, once; blocks are their own afterwards."""
    graphs, ends = _captured(model, [1, 2, 3])
    first, second, third = (segment.graph for segment in graphs.segments)
    assert [len(graph.calls) for graph in (first, second, third)] == [2, 2, 1]
    assert ends == [(THERE, second), (HERE, third)]
    kept = []
    for ids in ([4, 5, 6], [1, 2, 3], [9, 9, 9]):
        with graphs.replaying():
            kept.append((_call(model, ids), ids))
    for found, ids in kept:
        torch.testing.assert_close(found, _call(model, ids))
    assert first.replays == third.replays == 3
    assert all(block._compiled_call_impl is None for block in model.model.layers)


def test_other_arguments_are_refused(model):
    graphs, _ = _captured(model, [1, 2, 3])
    with pytest.raises(RuntimeError, match="other arguments"), graphs.replaying():
        _call(model, [1, 2])
    assert all(block._compiled_call_impl is None for block in model.model.layers)


def test_models_that_do_more_than_call_their_blocks_are_refused(model):
    """What happens between two blocks of a device would be left out."""
    layers = list(model.model.layers)

    class Between(torch.nn.Module):
        def forward(self, hidden, **kwargs):
            return layers[1](hidden * 2, **kwargs)

    model.model.layers[1] = Between()
    graphs = SegmentGraphs(layers, DEVICES, lambda device: None)
    with pytest.raises(RuntimeError, match="between its blocks"), graphs.capturing():
        _call(model, [1, 2, 3])
    assert _Graph.recording is None and all(block._compiled_call_impl is None for block in layers)
    model.model.layers[1] = torch.nn.Identity()
    graphs = SegmentGraphs(layers, DEVICES, lambda device: None)
    with pytest.raises((RuntimeError, TypeError)), graphs.capturing():
        _call(model, [1, 2, 3])
    assert _Graph.recording is None


def test_which_models_are_spread_over_gpus(model):
    assert _one_device(model) and not _several_devices(model)
    for places, wanted in (([0, 1], True), ([0, "cpu"], False), ([0, "disk", 1], False), ([0, 0], False)):
        model.hf_device_map = dict(enumerate(places))
        assert _several_devices(model) == wanted
        assert _one_device(model) == (len(set(places)) == 1)
