"""One bit per channel: the signs of the rotated keys, with an unbiased estimate of inner products and its error.

RaBitQ (arXiv 2405.12497, section 3): after centring and a random rotation, a key's signs are the nearest vertex of a
hypercube, and dividing by how well the vertex fits the key makes the estimate unbiased.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from alaya_hf.kernels.cpu.numeric import splits
from alaya_hf.kernels.state import expect_tensors

__all__ = ["SignKeys", "sign_scores", "sign_scores_reference"]


class SignKeys:
    """1-bit codes of one row's keys, filled incrementally.

    Parameters
    ----------
    kv_heads, head_dim : int
        ``head_dim`` must be a multiple of 8.

    Attributes
    ----------
    num_tokens : int
    codes : Tensor
        ``[kv_heads, capacity, head_dim / 8]`` uint8, channel ``8 b + i`` in bit ``i`` of byte ``b``, 1 where positive.
    factor, spread : Tensor
        ``[kv_heads, capacity]`` float32: what turns a sum of signed query channels into a score, and the standard deviation of
        the estimate per unit of query norm.
    """

    def __init__(self, kv_heads: int, head_dim: int) -> None:
        if head_dim % 8:
            raise ValueError(f"expected a head_dim that is a multiple of 8, got {head_dim}; use 4-bit keys instead")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.num_tokens = 0
        self.centre: Tensor | None = None
        generator = torch.Generator().manual_seed(0)
        self.rotation = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator)).Q
        self.codes = torch.empty(kv_heads, 0, head_dim // 8, dtype=torch.uint8)
        self.factor = torch.empty(kv_heads, 0)
        self.spread = torch.empty(kv_heads, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and factors, spare capacity not counted: ``head_dim / 8 + 8`` per key and KV head."""
        return self.kv_heads * self.num_tokens * (self.head_dim // 8 + 8)

    def append(self, keys: Tensor) -> None:
        """Add keys ``[kv_heads, m, head_dim]``. The first call fixes the centre.

        Cost: one rotation per key, ``2 * head_dim ** 2`` operations.
        """
        end, capacity = self.num_tokens + keys.shape[1], self.codes.shape[1]
        if end > capacity:
            for name in ("codes", "factor", "spread"):
                old = getattr(self, name)
                grown = old.new_empty(self.kv_heads, max(end, 2 * capacity), *old.shape[2:])
                grown[:, :capacity] = old
                setattr(self, name, grown)
        if self.centre is None:
            self.centre = keys.float().mean(dim=1, keepdim=True)
        bits = 1 << torch.arange(8)
        for start in range(0, keys.shape[1], 1 << 14):
            part = (keys[:, start : start + (1 << 14)].float() - self.centre) @ self.rotation
            norm = part.norm(dim=-1)
            positive = part > 0
            # Cosine between a key and its vertex; 1 for a key at the centre, whose estimate is exact anyway.
            fit = part.abs().sum(-1) / (norm * self.head_dim**0.5)
            fit = torch.where(norm > 0, fit, torch.ones_like(fit))
            span = slice(self.num_tokens, self.num_tokens + part.shape[1])
            self.codes[:, span] = (positive.unflatten(-1, (-1, 8)) * bits).sum(-1).to(torch.uint8)
            self.factor[:, span] = norm / (fit * self.head_dim**0.5)
            self.spread[:, span] = norm * ((1 - fit.square()).clamp(min=0)).sqrt() / fit / (self.head_dim - 1) ** 0.5
            self.num_tokens += part.shape[1]

    def state_dict(self) -> dict[str, Tensor]:
        """The codes as tensors without spare capacity; `from_state_dict` reads them in place."""
        assert self.centre is not None
        state = {name: getattr(self, name)[:, : self.num_tokens].contiguous() for name in ("codes", "factor", "spread")}
        return {**state, "centre": self.centre.contiguous()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], kv_heads: int, head_dim: int, tokens: int) -> SignKeys:
        """Codes over tensors that may be mapped read-only, to be read and not appended to.

        Raises
        ------
        ValueError
            If a tensor is missing or of another shape or dtype.
        """
        signs = cls(kv_heads, head_dim)
        dtypes = {"codes": torch.uint8, "factor": torch.float32, "spread": torch.float32, "centre": torch.float32}
        shapes = {
            "codes": (kv_heads, tokens, head_dim // 8),
            "factor": (kv_heads, tokens),
            "spread": (kv_heads, tokens),
            "centre": (kv_heads, 1, head_dim),
        }
        signs.codes, signs.factor, signs.spread, signs.centre = expect_tensors(state, dtypes, shapes)
        signs.num_tokens = tokens
        return signs


@njit(parallel=True, fastmath=True, cache=True, nogil=True, error_model="numpy")
def _sign_scores(table, base, codes, factor, n, parts, out):
    heads, group, width = table.shape[0], table.shape[1], table.shape[2]
    for task in prange(heads * parts):
        h = task // parts
        first, last = n * (task % parts) // parts, n * (task % parts + 1) // parts
        for token in range(first, last):
            code = codes[h, token]
            for g in range(group):
                total = np.float32(0.0)
                for b in range(width):
                    total += table[h, g, b, code[b]]
                out[h, g, token] = base[h, g] + factor[h, token] * total


def sign_scores(q: Tensor, signs: SignKeys) -> Tensor:
    """Estimated scores of every key.

    Parameters
    ----------
    q : Tensor
        ``[kv_heads, group, head_dim]`` float32.
    signs : SignKeys

    Returns
    -------
    Tensor
        ``[kv_heads, group, num_tokens]`` float32; the error of token ``j`` has standard deviation ``|q| * spread[j]``.

    Notes
    -----
    One table of 256 partial sums per byte of a code: ``head_dim / 8`` look-ups per key and query.
    """
    n = signs.num_tokens
    out = torch.empty(*q.shape[:2], n)
    if not n:
        return out
    assert signs.centre is not None
    rotated = (q @ signs.rotation).unflatten(-1, (-1, 8))
    signed = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).float() * 2 - 1
    table = (rotated @ signed.T).contiguous()
    base = (q @ signs.centre.transpose(1, 2)).squeeze(-1).contiguous()
    _sign_scores(
        table.numpy(), base.numpy(), signs.codes.numpy(), signs.factor.numpy(), n, splits(q.shape[0], n), out.numpy()
    )
    return out


def sign_scores_reference(q: Tensor, signs: SignKeys) -> Tensor:
    """Plain torch, see :func:`sign_scores`."""
    n = signs.num_tokens
    assert signs.centre is not None
    bits = (signs.codes[:, :n].unsqueeze(-1) >> torch.arange(8)) & 1
    vertices = bits.flatten(-2).float() * 2 - 1
    estimate = (q @ signs.rotation) @ vertices.transpose(1, 2) * signs.factor[:, None, :n]
    return q @ signs.centre.transpose(1, 2) + estimate
