"""A decode step captured in a CUDA graph answers as the step itself does."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf import AlayaCache, AlayaConfig, TopK  # noqa: E402
from alaya_hf.cache_argument import CACHE_ARGUMENT, cache_argument  # noqa: E402
from tests.gpu import layer_cases as cases  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return cases.tiny_model("cuda")


@pytest.fixture(autouse=True)
def no_warnings():
    """A step that could not be captured only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be captured.*")
        yield


def test_compiled_blocks():
    cases.check_compiled(cases.tiny_model("cuda"))


def test_equal_to_the_step_itself(model, monkeypatch):
    from alaya_hf.engine.device import tokens

    # Buffers grow in the middle of the answer.
    monkeypatch.setattr(tokens, "_STORE_STEP", 64)
    monkeypatch.setattr(tokens, "_TILE_STEP", 0)
    cases.check_graphs(model, cases.DEFAULT, cases.prompt(model, 150))


def test_rows_of_unequal_length(model):
    ids = cases.prompt(model, 150, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :70], mask[2, :3] = 0, 0
    cases.check_graphs(model, cases.DEFAULT, ids, attention_mask=mask)


def test_two_thousand_tokens(model):
    """The window overflows and the low-bit copy grows, replayed; the query keeps everything."""
    settings = cases.ALL.replace(query=TopK(512), window={"init": 4, "local": 1560})
    model.config.max_position_embeddings = 4096
    cache = cases.check_many_steps(model, 2000, settings)
    assert cache.stats()["replays"] > 1900


def test_beams_run_as_usual(model):
    cases.check_beams(model)


def test_outputs_are_not_overwritten(model):
    """Logits that a caller keeps stay what they were when the next step is replayed."""
    ids, cache = cases.prompt(model, 150), AlayaCache(cases.DEFAULT)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        kept = []
        for token in range(1, 8):
            out = model(input_ids=torch.tensor([[token]], device="cuda"), **cache_argument(cache))
            kept.append((out.logits, out.logits.clone()))
            assert out[CACHE_ARGUMENT] is cache
    assert cache.stats()["replays"] >= 4
    assert all(torch.equal(logits, copy) for logits, copy in kept)
    assert not torch.equal(kept[-1][0], kept[-2][0])


def test_a_model_that_waits_for_the_device_goes_on_without(model):
    """What cannot be captured is said once, and changes no answer."""
    ids = cases.prompt(model, 150)
    wanted = cases.generate(model, AlayaCache(AlayaConfig.replace(cases.DEFAULT, cuda_graphs="none")), ids, 8)
    handle = model.lm_head.register_forward_hook(lambda module, inputs, out: out if float(out.sum()) else out)
    try:
        with pytest.warns(UserWarning, match="could not be captured"):
            cache, stream = AlayaCache(cases.DEFAULT), torch.cuda.current_stream()
            found = cases.generate(model, cache, ids, 8)
            assert torch.cuda.current_stream() == stream
    finally:
        handle.remove()
    assert found == wanted and cache.stats()["replays"] == 0


def test_a_captured_cache_goes_when_it_is_let_go(model):
    """Its memory must not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        cache = AlayaCache(cases.DEFAULT)
        cases.generate(model, cache, cases.prompt(model, 150), 8)
        assert cache.stats()["replays"] >= 4
        gone = weakref.ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()


def test_other_weights(model):
    """A step captured with other weights is not replayed."""
    ids = cases.prompt(model, 150)
    outs = []
    for mode in ("none", "capture"):
        net, cache = copy.deepcopy(model), AlayaCache(cases.DEFAULT.replace(cuda_graphs=mode))
        cases.generate(net, cache, ids, 20)
        cache.crop(-20)  # of 150 + 19
        net.lm_head.weight.data = net.lm_head.weight.data.flip(0).clone()
        outs.append(cases.generate(net, cache, ids, 20))
    assert outs[0] == outs[1]
