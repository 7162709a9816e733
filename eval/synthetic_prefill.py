"""Queries and keys of a whole prompt of which tile-skipping attention skips as much as of a real one.

What skipping saves depends on how many tiles it skips, and random Gaussian queries and keys let it skip none. Measured:
SmolLM2-135M on contracts of 4,096 tokens skips 27.5 % of the off-diagonal tiles at lambda = 0.01, the mean over all
layers and heads (docs/results/prefill.md). The generator is made of

* a background: keys and queries in 24 directions of decaying energy, whose logits spread by 3.5 (0.8 of AlayaDB's range
  at alpha = 0.012) around any query's mean, neighbours sharing half of their variance, as measured for
  :mod:`eval.synthetic`;
* a sink: the first four keys, to which every query of head ``h`` has the logit ``S_h``.

``S_h`` is searched for, head by head, until the kernel itself skips the wanted share of the head's tiles at lambda =
0.01. Heads differ: the wanted shares are ``u ** (1 / mean - 1)`` for ``u`` evenly in (0, 1), a few heads that skip nearly
all and many that skip little.

So it follows the model at other lambdas, too (here 8 heads, 2,048 tokens):

========================  ======  =====  =====  ====  ====
lambda                    0.0001  0.001  0.003  0.01  0.03
========================  ======  =====  =====  ====  ====
SmolLM2, tiles skipped    2.9 %   10.0   16.9   27.5  39.3
here                      0.8 %   8.4    15.7   27.6  39.2
========================  ======  =====  =====  ====  ====

**Assumed, not measured**: that the mean stays what it was at 4,096 tokens (attention of longer contexts is more
concentrated, so larger shares are likely: give them), and how heads share it. Skipped tiles lie at random places, while
a real model's come in stretches, which costs the kernel nothing and gains it nothing. Values are independent and normal,
so errors of BSFA, which leaves out tiles that count, are larger than a real model's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from alaya_hf.kernels.sparse_prefill import Q_TILE, TileRule, sparse_attention

MEASURED = 0.275
"""Share of tiles that SmolLM2 skips at `LAMBDA` at 4,096 tokens."""
LAMBDA = 0.01
_RANK, _SPREAD, _SINKS, _ROUNDS, _MOST = 24, 3.5, 4, 12, 64.0


def blasst_rule(heads: int, n: int, lam: float, scaling: float, device: torch.device | str) -> TileRule:
    """BLASST's rule for a prompt of ``n`` tokens in one pass."""
    limit = math.log(lam) / scaling if lam else -math.inf
    return TileRule(torch.full((heads, -(-n // Q_TILE)), limit, device=device), relative=True)


def skipped_shares(q: Tensor, k: Tensor, v: Tensor, lam: float) -> Tensor:
    """``[heads]``: the share of each head's off-diagonal tiles that BLASST skips in one causal pass."""
    heads, n, scaling = q.shape[1], q.shape[2], q.shape[3] ** -0.5
    top = torch.full(q.shape[:3], -math.inf, device=q.device)
    found = sparse_attention(q, k, v, blasst_rule(heads, n, lam, scaling, q.device), scaling, True, top)
    return found.skipped[0].sum(-1).float() / max(1, found.tiles // heads)


def random_prompt(
    heads: int, kv_heads: int, dim: int, n: int, device: str, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Independent normal queries ``[1, heads, n, dim]``, keys and values ``[1, kv_heads, n, dim]``."""
    generator = torch.Generator(device).manual_seed(seed)
    shapes = ((1, heads, n, dim), (1, kv_heads, n, dim), (1, kv_heads, n, dim))
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes)
    return q, k, v


def real_like_prompt(
    heads: int, kv_heads: int, dim: int, n: int, device: str, dtype: torch.dtype, share: float = MEASURED, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A prompt of one layer; see this module.

    Parameters
    ----------
    heads, kv_heads, dim : int
        `dim` more than 24.
    n : int
        Tokens.
    share : float
        Of the off-diagonal tiles, mean over heads, that BLASST skips at lambda = 0.01; in (0, 1).

    Returns
    -------
    q, k, v : Tensor
        ``[1, heads, n, dim]`` and twice ``[1, kv_heads, n, dim]``, contiguous.

    Raises
    ------
    ValueError
        For a share or a dimension out of range.

    Notes
    -----
    Cost: twelve passes of the kernel over the prompt.
    """
    if not 0 < share < 1 or dim <= _RANK:
        raise ValueError(f"expected a share in (0, 1) and more than {_RANK} dimensions, got {share} and {dim}")
    generator = torch.Generator(device).manual_seed(seed)
    decay = torch.linspace(1.6, 0.4, _RANK, device=device)
    # Of the logits of two vectors of this kind, each with unit variance per direction.
    unit = float((decay**4).sum().sqrt()) / math.sqrt(dim)

    def background(count: int, run: int, basis: Tensor) -> Tensor:
        """``[count, n, dim]``; neighbours in runs share half of their variance."""
        made = torch.empty(count, n, dim, device=device, dtype=dtype)
        for each in made:  # one head at a time: float32 working memory
            free = torch.randn(n, _RANK, generator=generator, device=device)
            runs = torch.randn(-(-n // run), _RANK, generator=generator, device=device).repeat_interleave(run, 0)[:n]
            each.copy_(((free + runs) * (math.sqrt(_SPREAD / unit / 2) * decay)) @ basis.T)
        return made

    group = heads // kv_heads
    k = torch.empty(1, kv_heads, n, dim, device=device, dtype=dtype)
    q = torch.empty(1, heads, n, dim, device=device, dtype=dtype)
    v = torch.randn(1, kv_heads, n, dim, generator=generator, device=device, dtype=dtype)
    sinks = torch.empty(heads, dim, device=device)
    for h in range(kv_heads):
        basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, device=device)).Q
        k[0, h] = background(1, 16, basis[:, 1 : _RANK + 1])[0]
        k[0, h, :_SINKS] = (2 * math.sqrt(dim) * basis[:, 0]).to(dtype)
        mine = slice(h * group, (h + 1) * group)
        q[0, mine] = background(group, 16, basis[:, 1 : _RANK + 1])
        sinks[mine] = basis[:, 0] / 2
    wanted = ((torch.arange(heads, device=device) + 0.5) / heads) ** (1 / share - 1)
    low, high = torch.zeros(heads, device=device), torch.full((heads,), _MOST, device=device)

    def with_sinks(logits: Tensor) -> Tensor:
        return q + (logits[:, None] * sinks).to(dtype)[None, :, None]

    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        enough = skipped_shares(with_sinks(middle), k, v, LAMBDA) >= wanted
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return with_sinks(high), k, v
