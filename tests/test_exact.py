"""Which implementation of dense attention is chosen where, and how those of FlashAttention's packages are called."""

from __future__ import annotations

import dataclasses
import sys
from types import ModuleType

import pytest
import torch

from alaya_hf.engine.prefill import attend_new
from alaya_hf.kernels import exact
from alaya_hf.kernels.exact import Request, base, flash_attn_2, flash_attn_3, flash_attn_4, torch_cudnn
from alaya_hf.kernels.exact.plain import Plain
from alaya_hf.kernels.partial import Partial

choosing = sys.modules["alaya_hf.kernels.exact.choose"]  # the package exports the function by this name
LARGE = Request("cuda", (9, 0), torch.bfloat16, 128, 8192, 8192, causal=True)
PACKAGES = (flash_attn_2, flash_attn_3, flash_attn_4)


@pytest.fixture(autouse=True)
def _as_found(monkeypatch):
    """Functions looked up afresh, nothing failed so far, as if there were CUDA and a recent cuDNN but no package."""
    monkeypatch.setattr(choosing, "_failed", set())
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 92000)
    for module in PACKAGES:
        module._function.cache_clear()
    yield
    for module in PACKAGES:
        module._function.cache_clear()


def install(monkeypatch, name, function):
    module = ModuleType(name)
    module.flash_attn_func = function
    monkeypatch.setitem(sys.modules, name, module)
    if "." in name:
        package = ModuleType(name.split(".")[0])
        package.__path__ = []
        monkeypatch.setitem(sys.modules, package.__name__, package)


def reference(q, k, v, causal, softcap):
    """FlashAttention's layout around the plain implementation."""
    part = Plain().run(*(x.transpose(1, 2) for x in (q, k, v)), 0.5, causal, None, softcap or None)
    return part.out.transpose(1, 2), part.lse


def version_2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
              alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    assert dropout_p == 0.0 and softmax_scale == 0.5
    out, lse = reference(q, k, v, causal, softcap)
    return (out, lse, torch.empty(0)) if return_attn_probs else out


def version_3(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
              window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
              sm_margin=0, return_attn_probs=False):  # fmt: skip
    assert softmax_scale == 0.5
    out, lse = reference(q, k, v, causal, softcap)
    return (out, lse) if return_attn_probs else out


def version_3_first(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
    return version_3(q, k, v, softmax_scale, causal, softcap=softcap, return_attn_probs=True)


def version_4(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False):
    assert softmax_scale == 0.5
    out, lse = reference(q, k, v, causal, softcap)
    return out, lse if return_lse else None


def version_4_old(q, k, v, softmax_scale=None, causal=False):
    raise AssertionError("not to be called")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "torch cuDNN"),
        ({"q_len": 1, "n": 100, "causal": False}, "torch flash (FlashAttention 2)"),
        ({"capability": (8, 0)}, "torch flash (FlashAttention 2)"),
        ({"capability": (12, 0)}, "torch flash (FlashAttention 2)"),
        ({"capability": (7, 5)}, "plain torch"),
        ({"head_dim": 256}, "torch flash (FlashAttention 2)"),
        ({"head_dim": 100}, "plain torch"),
        ({"head_dim": 0}, "plain torch"),
        ({"n": 16384}, "torch flash (FlashAttention 2)"),
        ({"n": 16384, "causal": False}, "torch cuDNN"),
        ({"n": 4096}, "plain torch"),
        ({"masked": True}, "plain torch"),
        ({"capped": True}, "plain torch"),
        ({"dtype": torch.float32}, "plain torch"),
        ({"dtype": None}, "plain torch"),
        ({"device": "cpu", "capability": (0, 0), "masked": True}, "torch flash (CPU)"),
        ({"device": "cpu", "capability": (0, 0), "capped": True}, "plain torch"),
        ({"device": "mps", "capability": (0, 0)}, "plain torch"),
    ],
    ids=str,
)
def test_without_packages(changes, expected):
    assert exact.choose(dataclasses.replace(LARGE, **changes)).name == expected


@pytest.mark.parametrize(
    ("name", "function", "changes", "expected"),
    [
        ("flash_attn", version_2, {"capability": (8, 6)}, "flash-attn 2"),
        ("flash_attn", version_2, {"capability": (8, 6), "capped": True}, "flash-attn 2"),
        ("flash_attn", version_2, {"masked": True}, "plain torch"),
        ("flash_attn", version_2, {"q_len": 100, "n": 100}, "flash-attn 2"),
        ("flash_attn_interface", version_3, {}, "flash-attn 3"),
        ("flash_attn_interface", version_3, {"n": 16384}, "flash-attn 3"),
        ("flash_attn_interface", version_3, {"capability": (10, 0)}, "torch cuDNN"),
        ("flash_attn.cute", version_4, {"capability": (10, 0)}, "flash-attn 4"),
        ("flash_attn.cute", version_4, {"capability": (8, 0)}, "torch flash (FlashAttention 2)"),
        ("flash_attn.cute", version_4, {"head_dim": 80}, "torch cuDNN"),
        ("flash_attn.cute", version_4_old, {"capability": (10, 0)}, "torch cuDNN"),
    ],
)
def test_packages_where_they_fit(monkeypatch, name, function, changes, expected):
    install(monkeypatch, name, function)
    assert exact.choose(dataclasses.replace(LARGE, **changes)).name == expected


def test_an_old_cudnn_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert exact.choose(LARGE).name == "torch flash (FlashAttention 2)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in torch_cudnn.TorchCuDNN().missing()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("flash_attn", version_2),
        ("flash_attn_interface", version_3),
        ("flash_attn_interface", version_3_first),
        ("flash_attn.cute", version_4),
    ],
    ids=["2", "3", "3 first", "4"],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_packages_are_called_as_they_ask(monkeypatch, name, function, causal, softcap):
    """Layout, scale, mask, cap and log-sum-exp arrive where they should: same answer as the plain implementation."""
    install(monkeypatch, name, function)
    backend = {"flash_attn": 3, "flash_attn_interface": 0, "flash_attn.cute": 1}[name]
    if softcap and backend == 1:
        pytest.skip("takes no cap")
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.autograd.profiler.record_function("on a device"))
    q, k, v = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    found = exact.BACKENDS[backend].run(q, k, v, 0.5, causal, None, softcap)
    wanted = Plain().run(q, k, v, 0.5, causal, None, softcap)
    torch.testing.assert_close(found.out, wanted.out)
    torch.testing.assert_close(found.lse, wanted.lse)


def test_what_fails_is_replaced_and_says_so(monkeypatch):
    class Broken(base.Backend):
        name, calls = "broken", 0

        def refuses(self, request):
            return None

        def run(self, *arguments):
            self.calls += 1
            raise RuntimeError("no kernel image")

    broken = Broken()
    monkeypatch.setattr(choosing, "BACKENDS", (broken, Plain()))
    q = torch.randn(1, 2, 3, 8)
    wanted = Plain().run(q, q, q, 0.3, True, None, None)
    with pytest.warns(RuntimeWarning, match="broken failed.*no kernel image"):
        found = exact.attend(q, q, q, 0.3, True, None, None)
    assert torch.equal(found.out, wanted.out)
    exact.attend(q, q, q, 0.3, True, None, None)
    assert broken.calls == 1


def test_running_out_of_memory_is_not_a_reason_to_try_again(monkeypatch):
    class Full(base.Backend):
        name = "full"

        def refuses(self, request):
            return None

        def run(self, *arguments):
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(choosing, "BACKENDS", (Full(), Plain()))
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(torch.OutOfMemoryError):
        exact.attend(q, q, q, 0.3, True, None, None)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_padding_anywhere_is_as_if_it_were_not_there(softcap):
    q, k, v = torch.randn(3, 4, 9, 16), torch.randn(3, 2, 9, 16), torch.randn(3, 2, 9, 16)
    valid = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 0, 0, 1, 1, 0], [0] * 9]).bool()
    found = attend_new(q, k, v, valid, 0.25, softcap)
    visible = valid[:, None, None, :]
    wanted: Partial = Plain().run(q, k, v, 0.25, True, visible, softcap)
    there = valid[:, None, :].expand(3, 4, 9)
    torch.testing.assert_close(found.out[there], wanted.out[there])
    torch.testing.assert_close(found.lse[there], wanted.lse[there])
    assert torch.isneginf(found.lse[~there]).all() and (found.out[~there] == 0).all()
