"""How a token's exact key and value lie in the store, per KV head: side by side, as they are or in 8 bits with two scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Names of the 8-bit formats and what their codes are.
EIGHT_BIT = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_SCALES = 8  # bytes: a float32 for the key, one for the value


@dataclass(frozen=True)
class StoreFormat:
    """Sizes and places inside a token's row of bytes.

    A row is one contiguous run, so that a token crosses the bus in one go: the key's codes, the value's codes, then, in 8
    bits, the scale of the key and the scale of the value, padded to a multiple of 16 bytes. A code times its scale is the
    number: the largest magnitude of the vector is the largest code (127, or 448 for float8_e4m3fn). The scales are float32
    because the padding leaves room for them.

    Parameters
    ----------
    head_dim : int
        A multiple of 16.
    dtype : torch.dtype
        ``bfloat16``, ``float16`` (no scales), ``int8`` or ``float8_e4m3fn``.

    Raises
    ------
    ValueError
        For another dtype or head dimension.
    """

    head_dim: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.dtype not in (torch.bfloat16, torch.float16, *EIGHT_BIT.values()):
            raise ValueError(
                f"expected a store of bfloat16, float16, int8 or float8_e4m3fn, got {self.dtype}; convert it first"
            )
        if self.head_dim <= 0 or self.head_dim % 16:
            raise ValueError(f"expected a head_dim that is a multiple of 16, got {self.head_dim}")

    @classmethod
    def of(cls, store: Tensor, head_dim: int) -> StoreFormat:
        """The format of a store, checked: ``[batch, kv_heads, capacity, *tail]``, contiguous.

        Raises
        ------
        ValueError
        """
        form = cls(head_dim, store.dtype)
        if tuple(store.shape[3:]) != form.tail or not store.is_contiguous():
            raise ValueError(
                f"expected a contiguous store of shape [batch, kv_heads, capacity, {', '.join(map(str, form.tail))}] for "
                f"{store.dtype} and head_dim {head_dim}, got {list(store.shape)} with strides {list(store.stride())}"
            )
        return form

    @property
    def scaled(self) -> bool:
        """Whether there are scales: 8-bit codes."""
        return self.dtype.itemsize == 1

    @property
    def row(self) -> int:
        """Elements of `dtype` in a token's row."""
        return -(-(2 * self.head_dim + _SCALES) // 16) * 16 if self.scaled else 2 * self.head_dim

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's row, a multiple of 16."""
        return self.row * self.dtype.itemsize

    @property
    def tail(self) -> tuple[int, ...]:
        """Shape of a token's row in a store: ``(2, head_dim)``, or ``(row,)`` where there are scales."""
        return (self.row,) if self.scaled else (2, self.head_dim)

    @property
    def largest(self) -> float:
        """The largest code."""
        return 127.0 if self.dtype == torch.int8 else 448.0

    @property
    def code(self) -> int:
        """What kernels call it: 0 without scales, 1 for int8, 2 for float8_e4m3fn."""
        return 0 if not self.scaled else 1 if self.dtype == torch.int8 else 2

    @property
    def scale_place(self) -> int:
        """Where the key's scale lies in a row seen as float32; the value's follows."""
        return 2 * self.head_dim // 4

    def kernel_views(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A store's elements and scales as kernels take them: 8-bit codes as int8, and the same bytes as float32."""
        if not self.scaled:
            return rows, rows
        return rows.view(torch.int8), rows.view(torch.float32)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Rows of tokens, on the device of the keys.

        Parameters
        ----------
        keys, values : Tensor ``[..., head_dim]``
            A vector with a value that is not finite gets the scale NaN: it comes back as NaN, never as a number.

        Returns
        -------
        Tensor ``[..., *tail]``

        Notes
        -----
        Codes round half to even. Works in float32: 4 bytes per value of working memory.
        """
        if not self.scaled:
            return torch.stack([keys, values], dim=-2).to(self.dtype)
        rows = torch.zeros(*keys.shape[:-1], self.row, dtype=torch.uint8, device=keys.device)
        for side, x in enumerate((keys.float(), values.float())):
            # Times the inverse, which rounds alike on every device; devices divide by a number in different ways.
            scale = x.abs().amax(-1, keepdim=True) * (1 / self.largest)
            codes = torch.where(scale > 0, x / scale, 0.0).masked_fill(~scale.isfinite(), 0.0)
            if self.dtype == torch.int8:
                codes = codes.round().clamp(-127, 127)
            here = slice(side * self.head_dim, (side + 1) * self.head_dim)
            rows[..., here] = codes.to(self.dtype).view(torch.uint8)
            rows.view(torch.float32)[..., self.scale_place + side] = torch.where(
                scale.isfinite(), scale, float("nan")
            ).squeeze(-1)
        return rows.view(self.dtype)

    def unpack(self, rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Keys and values of rows.

        Parameters
        ----------
        rows : Tensor ``[..., *tail]``
        dtype : torch.dtype
            Of the result.

        Returns
        -------
        Tensor ``[..., 2, head_dim]``
        """
        if not self.scaled:
            return rows.to(dtype)
        codes = rows[..., : 2 * self.head_dim].unflatten(-1, (2, self.head_dim)).float()
        scales = rows.view(torch.float32)[..., self.scale_place : self.scale_place + 2]
        return (codes * scales.unsqueeze(-1)).to(dtype)
