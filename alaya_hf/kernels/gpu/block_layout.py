"""What stands for a block of tokens on the device: one or two key vectors and, on request, its mean value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.kernels.gpu.layout import TILE

#: Strategies of :class:`~alaya_hf.index.coarse.Coarse`, and what kernels call them.
STRATEGIES = {"mean": 0, "bounds": 1, "representatives": 2}
#: Blocks whose scores share a maximum, see :func:`~alaya_hf.kernels.gpu.cut.cut`.
GROUPED = 64
LARGEST = 65000.0  # what a float16 takes


@dataclass(frozen=True)
class BlockLayout:
    """Sizes of the blocks and of what stands for each.

    A block's score is linear in its representatives, whose scores are averaged: their mean is kept, one vector. ``bounds``
    takes two, the smallest and the largest key per channel.

    Parameters
    ----------
    head_dim : int
        A multiple of 16, at most 256.
    tokens : int
        Per block: a power of two from 16 to 512.
    strategy : {"representatives", "bounds", "mean"}
        See :class:`~alaya_hf.index.coarse.Coarse`; representatives are the keys with the largest norms.
    count : int
        Representatives per block; of these, no more than a block of the window's tiles of 64 has at least.
    values : bool
        Whether the mean value is kept too, after the key vectors.

    Raises
    ------
    ValueError
        For other sizes.
    """

    head_dim: int
    tokens: int = 128
    strategy: str = "representatives"
    count: int = 4
    values: bool = False

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 16 or self.head_dim > 256:
            raise ValueError(f"expected a head_dim that is a multiple of 16 up to 256, got {self.head_dim}")
        if self.tokens not in (16, 32, 64, 128, 256, 512):
            raise ValueError(f"expected blocks of 16, 32, 64, 128, 256 or 512 tokens, got {self.tokens}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"expected a strategy in {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if not 1 <= self.count <= min(self.tokens, TILE):
            raise ValueError(f"expected 1 to {min(self.tokens, TILE)} representatives, got {self.count}")

    @property
    def keys(self) -> int:
        """Key vectors per block."""
        return 2 if self.strategy == "bounds" else 1

    @property
    def vectors(self) -> int:
        """Vectors per block, the mean value included."""
        return self.keys + self.values

    def scored(self, tokens: int) -> int:
        """Scores that a query head computes over so many tokens: one per block."""
        return -(-tokens // self.tokens)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token and KV head."""
        return 2 * self.vectors * self.head_dim / self.tokens

    def allocate(self, batch: int, kv_heads: int, tokens: int, device: torch.device | str) -> Tensor:
        """Room for `tokens` tokens: ``[batch, kv_heads, blocks, vectors, head_dim]`` float16, uninitialised."""
        shape = (batch, kv_heads, -(-tokens // self.tokens), self.vectors, self.head_dim)
        return torch.empty(shape, dtype=torch.float16, device=device)

    def summarise(self, keys: Tensor, values: Tensor) -> Tensor:
        """What stands for tokens that begin with a block, in plain torch.

        Parameters
        ----------
        keys, values : Tensor ``[..., tokens, head_dim]``
            The last block may be short.

        Returns
        -------
        Tensor ``[..., blocks, vectors, head_dim]`` float16
        """
        if not keys.shape[-2]:
            return self.allocate(1, 1, 0, keys.device)[0, 0].expand(*keys.shape[:-2], 0, -1, -1)
        blocks = []
        for k, v in zip(keys.float().split(self.tokens, -2), values.float().split(self.tokens, -2), strict=True):
            if self.strategy == "bounds":
                vectors = [k.amin(-2), k.amax(-2)]
            elif self.strategy == "mean":
                vectors = [k.mean(-2)]
            else:
                order = k.norm(dim=-1).sort(dim=-1, descending=True, stable=True).indices
                # A short block may have fewer keys than representatives: repeating some keeps the mean a mean.
                place = torch.arange(self.count, device=k.device) % k.shape[-2]
                vectors = [
                    k.gather(-2, order[..., place].unsqueeze(-1).expand(*k.shape[:-2], -1, k.shape[-1])).mean(-2)
                ]
            if self.values:
                vectors.append(v.mean(-2))
            blocks.append(torch.stack(vectors, -2))
        return torch.stack(blocks, -3).clamp(-LARGEST, LARGEST).half()
