"""Every implementation of dense attention that this machine has, against float32."""

from __future__ import annotations

import pytest
import torch

from alaya_hf.engine.prefill import attend_new
from alaya_hf.kernels.exact import BACKENDS, Request, attend, torch_cudnn
from alaya_hf.kernels.exact.plain import Plain

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("q_len, n, causal", [(300, 300, True), (130, 401, True), (130, 401, False), (1, 77, False)])
@pytest.mark.parametrize("batch, kv_heads, group", [(1, 2, 4), (2, 1, 1), (1, 1, 12)])
def test_error_is_at_most_twice_plain(backend, dtype, head_dim, q_len, n, causal, batch, kv_heads, group, monkeypatch):
    monkeypatch.setattr(torch_cudnn, "WORTH_IT", 100)  # never single queries
    # As the store has them: keys and values of a token side by side.
    kv = torch.randn(batch, kv_heads, n, 2, head_dim, device="cuda", dtype=dtype)
    q = (2 * torch.randn(batch, q_len, kv_heads * group, head_dim, device="cuda")).to(dtype).transpose(1, 2)
    k, v = kv[:, :, :, 0], kv[:, :, :, 1]
    reason = backend.missing() or backend.refuses(Request.of(q, k, v, causal, None, None))
    if reason:
        pytest.skip(reason)
    scaling = head_dim**-0.5
    found = backend.run(q, k, v, scaling, causal, None, None)
    truth = Plain().run(q.float(), k.float(), v.float(), scaling, causal, None, None)
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = (q @ keys.transpose(2, 3)).float() * scaling
    if causal:
        seen = torch.ones(q_len, n, dtype=torch.bool, device="cuda").tril(n - q_len)
        scores = scores.masked_fill(~seen, float("-inf"))
    plain = (scores.softmax(-1).to(dtype) @ values).float()
    assert found.out.dtype == found.lse.dtype == torch.float32 and found.lse.shape == q.shape[:3]
    assert (found.out - truth.out).abs().max() <= 2 * (plain - truth.out).abs().max() + 1e-5
    allowed = 2 * (scores.logsumexp(-1) - truth.lse).abs().max() + 1e-4
    assert (found.lse - truth.lse).abs().max() <= allowed


def test_the_chosen_ones_work(recwarn):
    """Nothing that was chosen for an ordinary model fails and is replaced."""
    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in (64, 80, 96, 128, 256):
            for q_len, n, causal in ((6000, 6000, True), (6000, 8192, False), (20, 20, True), (20, 500, False)):
                q = torch.randn(1, 8, q_len, head_dim, device="cuda", dtype=dtype)
                k, v = torch.randn(2, 1, 2, n, head_dim, device="cuda", dtype=dtype)
                part = attend(q, k, v, head_dim**-0.5, causal, None, None)
                last = Plain().run(q[:, :, -3:], k, v, head_dim**-0.5, causal, None, None)
                torch.testing.assert_close(part.out[:, :, -3:], last.out, atol=2e-2, rtol=2e-2)
                torch.testing.assert_close(part.lse[:, :, -3:], last.lse, atol=1e-2, rtol=1e-3)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_padding():
    q, k, v = (torch.randn(2, heads, 200, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    valid = torch.ones(2, 200, dtype=torch.bool)
    valid[0, :77] = False
    found = attend_new(q, k, v, valid, 0.125, None)
    visible = valid[:, None, None, :].cuda()
    wanted = Plain().run(q.float(), k.float(), v.float(), 0.125, True, visible, None)
    torch.testing.assert_close(found.out[0, :, 77:], wanted.out[0, :, 77:], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found.out[1], wanted.out[1], atol=2e-2, rtol=2e-2)
    assert torch.isneginf(found.lse[0, :, :77]).all()
