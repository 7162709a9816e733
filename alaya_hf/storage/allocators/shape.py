"""What one token takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.errors import ConfigError


@dataclass(frozen=True)
class KVShape:
    """Keys and values of one token in all layers.

    A *row* is what one token has in one layer, ``[kv_heads, 2, head_dim]``, key and value of a head side by side. It is one
    run of bytes in every pool; pools differ in where the rows go.

    Parameters
    ----------
    layers, kv_heads, head_dim : int
    dtype : torch.dtype
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, but got {getattr(self, name)!r}.")

    @property
    def row_bytes(self) -> int:
        """Bytes of a token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all layers."""
        return self.layers * self.row_bytes

    def rows(self, data: Tensor) -> Tensor:
        """``[n * row_bytes]`` uint8 as ``[kv_heads, n, 2, head_dim]`` of ``dtype``: a strided view, nothing is copied."""
        return data.view(self.dtype).view(-1, self.kv_heads, 2, self.head_dim).transpose(0, 1)
