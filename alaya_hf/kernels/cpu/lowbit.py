"""The low-bit copy of one context's keys and values: quantisation, packing, growth.

Keys: min-max per channel per group of 64 tokens. Values: min-max per token per group of 32 channels (KIVI,
arXiv 2402.02750, section 3: keys have outlier channels, values do not). Steps and offsets are float16, rounded outwards
so that every value lies inside its range and the error is at most half a step.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.numeric import (
    FASTMATH,
    as_numpy,
    check_store,
    f32_to_half,
    flat_store,
    fmax,
    fmin,
    half_to_f32,
    load_f32,
)
from alaya_hf.kernels.state import expect_tensors

__all__ = ["GROUP", "VALUE_GROUP", "LowBitKV"]

GROUP = 64  # tokens that share a key step per channel
VALUE_GROUP = 32  # channels that share a value step per token
_LIMIT = np.float32(65000.0)  # float16 ends at 65504


@njit(cache=True, nogil=True, error_model="numpy")
def _half_below(x):
    bits = f32_to_half(x)
    if half_to_f32(bits) > x:
        if bits == 0:
            return np.uint16(0x8001)
        return np.uint16(bits + 1) if bits & 0x8000 else np.uint16(bits - 1)
    return bits


@njit(cache=True, nogil=True, error_model="numpy")
def _half_above(x):
    bits = f32_to_half(x)
    return np.uint16(bits + 1) if half_to_f32(bits) < x else bits


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _key_group(store, at, row, d, bits, words, words_at, scale, bias, params_at):
    """Quantise 64 tokens' keys: rows of `d` elements, `row` apart, from `at`."""
    low = np.full(d, _LIMIT, np.float32)
    high = np.full(d, -_LIMIT, np.float32)
    for t in range(GROUP):
        here = at + t * row
        for c in range(d):
            x = load_f32(store, here + c)
            low[c] = fmin(x, low[c])
            high[c] = fmax(x, high[c])
    top = np.float32((1 << bits) - 1)
    inverse = np.zeros(d, np.float32)
    for c in range(d):
        b = _half_below(fmax(low[c], -_LIMIT))
        low[c] = half_to_f32(b)
        step = _half_above(fmax(fmin(high[c], _LIMIT) - low[c], np.float32(0.0)) / top)
        width = half_to_f32(step)
        inverse[c] = np.float32(1.0) / width if width > 0 else np.float32(0.0)
        bias[params_at + c] = b
        scale[params_at + c] = step
    codes = np.empty((GROUP, d), np.uint8)
    for t in range(GROUP):
        here = at + t * row
        line = codes[t]
        for c in range(d):
            x = (load_f32(store, here + c) - low[c]) * inverse[c] + np.float32(0.5)
            line[c] = np.uint8(np.int32(fmin(fmax(x, np.float32(0.0)), top)))
    quads = codes.view(np.uint32)
    planes = 8 // bits
    for w in range(d * bits // 32):
        for t in range(GROUP):
            word = np.uint32(0)
            for p in range(planes):
                word |= quads[t, w * planes + p] << np.uint32(bits * p)
            words[words_at + w * GROUP + t] = word


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _quantise_keys(store, stride, row, heads, groups, d, bits, words, scale, bias, first, capacity):
    for task in prange(heads * groups):
        h = task // groups
        i = task % groups
        slot = h * capacity + first + i
        _key_group(
            store,
            h * stride + i * GROUP * row,
            row,
            d,
            bits,
            words,
            slot * GROUP * (d * bits // 32),
            scale,
            bias,
            slot * d,
        )


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _value_rows(store, at, row, count, d, bits, codes, codes_at, params, params_at):
    """Quantise `count` tokens' values."""
    top = np.float32((1 << bits) - 1)
    planes = 8 // bits
    line = np.empty(VALUE_GROUP, np.uint8)
    for t in range(count):
        for first in range(0, d, VALUE_GROUP):
            width = min(VALUE_GROUP, d - first)
            here = at + t * row + first
            low = _LIMIT
            high = -_LIMIT
            for c in range(width):
                x = load_f32(store, here + c)
                low = fmin(x, low)
                high = fmax(x, high)
            b = _half_below(fmax(low, -_LIMIT))
            low = half_to_f32(b)
            s = _half_above(fmax(fmin(high, _LIMIT) - low, np.float32(0.0)) / top)
            step = half_to_f32(s)
            inverse = np.float32(1.0) / step if step > 0 else np.float32(0.0)
            params[params_at] = s
            params[params_at + 1] = b
            params_at += 2
            for c in range(width):
                x = (load_f32(store, here + c) - low) * inverse + np.float32(0.5)
                line[c] = np.uint8(np.int32(fmin(fmax(x, np.float32(0.0)), top)))
            per_plane = width // planes
            for i in range(per_plane):
                byte = np.uint8(0)
                for p in range(planes):
                    byte |= np.uint8(line[p * per_plane + i] << (bits * p))
                codes[codes_at + i] = byte
            codes_at += per_plane


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _quantise_values(store, stride, row, heads, tokens, d, bits, codes, params, first, capacity, groups):
    pieces = (tokens + GROUP - 1) // GROUP
    for task in prange(heads * pieces):
        h = task // pieces
        i = task % pieces * GROUP
        slot = h * capacity + first + i
        _value_rows(
            store, h * stride + i * row + d, row, min(GROUP, tokens - i), d, bits,
            codes, slot * (d * bits // 8), params, slot * groups * 2,
        )  # fmt: skip


class LowBitKV:
    """Low-bit copy of the keys and (optionally) values of one batch row and layer, filled incrementally.

    Parameters
    ----------
    kv_heads, head_dim : int
        `head_dim` must be a multiple of 16.
    key_bits : {4, 8, 2}
    value_bits : {2, 4, None}
        ``None`` keeps keys only.

    Attributes
    ----------
    num_tokens : int
    nbytes : int
        Bytes held for the tokens stored, steps, offsets and the unquantised tail included; spare capacity not.
    key_words : Tensor ``[kv_heads, capacity_groups, head_dim * key_bits / 32, 64]`` int32
        Channel-major inside a group, so that tokens are the vector lanes. With ``planes = 8 / key_bits``, word `w` of a
        token holds channels ``4 * planes * w ...``: byte `b`, bits ``p * key_bits ...`` is channel
        ``4 * (planes * w + p) + b``. Four neighbouring channels in the four bytes of a lane is what the 8-bit
        dot-product instructions want.
    key_scale, key_bias : Tensor ``[kv_heads, capacity_groups, head_dim]`` float16
    value_codes : Tensor ``[kv_heads, capacity_tokens, head_dim * value_bits / 8]`` uint8
        Token-major; the channels of a group of 32 are spread over planes: byte `i`, bits ``p * value_bits ...`` is
        channel ``p * bytes_of_the_group + i``.
    value_params : Tensor ``[kv_heads, capacity_tokens, value_groups, 2]`` float16
        Step and offset.
    tail : Tensor ``[kv_heads, 64, head_dim]`` float32
        Keys of the last ``num_tokens % 64`` tokens: a group is quantised once, when it is full, and stays at full
        precision until then. Values are quantised at once (their steps are per token).

    Raises
    ------
    ValueError
        Unsupported bits or head dimension.

    Notes
    -----
    Inputs must be finite; magnitudes beyond 65000 (the float16 range) are clipped. With 4-bit keys and 2-bit values at
    ``head_dim = 128`` a token takes 116 bytes per KV head, 22.7 % of bfloat16.
    """

    def __init__(self, kv_heads: int, head_dim: int, key_bits: int = 4, value_bits: int | None = 2) -> None:
        if key_bits not in (2, 4, 8) or value_bits not in (2, 4, None):
            raise ValueError(
                f"expected key_bits in (2, 4, 8) and value_bits in (2, 4, None), got {key_bits} and {value_bits}"
            )
        if head_dim <= 0 or head_dim % 16:
            raise ValueError(
                f"expected a head_dim that is a multiple of 16, got {head_dim}; keep full precision instead"
            )
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.key_bits, self.value_bits = key_bits, value_bits
        self.value_groups = -(-head_dim // VALUE_GROUP)
        self.num_tokens = 0
        self.tail = torch.zeros(kv_heads, GROUP, head_dim)
        self._allocate(0)

    @property
    def full_groups(self) -> int:
        """Quantised key groups of 64 tokens."""
        return self.num_tokens // GROUP

    @property
    def tail_tokens(self) -> int:
        """Tokens whose keys are still at full precision."""
        return self.num_tokens % GROUP

    @property
    def nbytes(self) -> int:
        per_group = self.head_dim * (self.key_bits * GROUP // 8 + 4)
        per_token = 0 if self.value_bits is None else self.head_dim * self.value_bits // 8 + 4 * self.value_groups
        tail = self.tail.numel() * 4
        return self.kv_heads * (self.full_groups * per_group + self.num_tokens * per_token) + tail

    def _allocate(self, groups: int) -> None:
        h, d, bits = self.kv_heads, self.head_dim, self.value_bits
        self._capacity = groups
        self.key_words = torch.empty(h, groups, d * self.key_bits // 32, GROUP, dtype=torch.int32)
        self.key_scale = torch.empty(h, groups, d, dtype=torch.float16)
        self.key_bias = torch.empty(h, groups, d, dtype=torch.float16)
        tokens = groups * GROUP if bits else 0
        self.value_codes = torch.empty(h, tokens, d * (bits or 0) // 8, dtype=torch.uint8)
        self.value_params = torch.empty(h, tokens, self.value_groups, 2, dtype=torch.float16)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all; capacity at least doubles when it has to grow."""
        needed = -(-tokens // GROUP)
        if needed <= self._capacity:
            return
        names = ("key_words", "key_scale", "key_bias", "value_codes", "value_params")
        old = [getattr(self, name) for name in names]
        self._allocate(needed if not self._capacity else max(needed, 2 * self._capacity))
        for name, before in zip(names, old, strict=True):
            getattr(self, name)[:, : before.shape[1]].copy_(before)

    def append(self, kv_slice: torch.Tensor) -> None:
        """Add tokens at the end.

        Parameters
        ----------
        kv_slice : Tensor ``[kv_heads, tokens, 2, head_dim]`` float32, float16 or bfloat16
            Any number of tokens; read in place.

        Raises
        ------
        ValueError
            Wrong shape, dtype, device or strides.
        """
        check_store(kv_slice)
        if kv_slice.shape[0] != self.kv_heads or kv_slice.shape[3] != self.head_dim:
            raise ValueError(
                f"expected [{self.kv_heads}, tokens, 2, {self.head_dim}] keys and values, got {tuple(kv_slice.shape)}"
            )
        new = kv_slice.shape[1]
        if not new:
            return
        self.reserve(self.num_tokens + new)
        if self.value_bits:
            self._append_values(kv_slice)
        done = 0
        held = self.tail_tokens
        if held:
            done = min(GROUP - held, new)
            self.tail[:, held : held + done] = kv_slice[:, :done, 0].float()
            if held + done == GROUP:
                flat = self.tail.view(-1).numpy()
                self._quantise_keys(flat, GROUP * self.head_dim, self.head_dim, 1, self.full_groups)
        groups = (new - done) // GROUP
        if groups:
            flat, stride = flat_store(kv_slice[:, done:])
            self._quantise_keys(flat, stride, 2 * self.head_dim, groups, (self.num_tokens + done) // GROUP)
            done += groups * GROUP
        if done < new:
            at = (self.num_tokens + done) % GROUP
            self.tail[:, at : at + new - done] = kv_slice[:, done:, 0].float()
        self.num_tokens += new

    def _quantise_keys(self, flat: np.ndarray, stride: int, row: int, groups: int, first: int) -> None:
        _quantise_keys(
            flat, stride, row, self.kv_heads, groups, self.head_dim, self.key_bits,
            self.key_words.view(-1).numpy().view(np.uint32), as_numpy(self.key_scale.view(-1)),
            as_numpy(self.key_bias.view(-1)), first, self._capacity,
        )  # fmt: skip

    def _append_values(self, kv_slice: torch.Tensor) -> None:
        flat, stride = flat_store(kv_slice)
        _quantise_values(
            flat, stride, 2 * self.head_dim, self.kv_heads, kv_slice.shape[1], self.head_dim, self.value_bits,
            self.value_codes.view(-1).numpy(), as_numpy(self.value_params.view(-1)), self.num_tokens,
            self._capacity * GROUP, self.value_groups,
        )  # fmt: skip

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens.

        A cut inside a quantised group leaves its remaining keys dequantised in the tail; they carry their first
        quantisation error and are quantised again when the group fills up.

        Raises
        ------
        ValueError
            `tokens` outside ``[0, num_tokens]``.
        """
        if not 0 <= tokens <= self.num_tokens:
            raise ValueError(f"expected to keep between 0 and {self.num_tokens} tokens, got {tokens}")
        group, left = divmod(tokens, GROUP)
        if left and group < self.full_groups:
            self.tail[:, :left] = self._dequantise_groups(group, group + 1)[:, :left]
        self.num_tokens = tokens

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The copy as tensors without spare capacity; `from_state_dict` reads them in place."""
        groups, n = self.full_groups, self.num_tokens
        state = {name: getattr(self, name)[:, :groups].contiguous() for name in ("key_words", "key_scale", "key_bias")}
        if self.value_bits is not None:
            state |= {name: getattr(self, name)[:, :n].contiguous() for name in ("value_codes", "value_params")}
        return {**state, "tail": self.tail.contiguous()}

    @classmethod
    def from_state_dict(
        cls,
        state: dict[str, torch.Tensor],
        kv_heads: int,
        head_dim: int,
        key_bits: int,
        value_bits: int | None,
        tokens: int,
    ) -> LowBitKV:
        """A copy over tensors that may be mapped read-only, to be read and not appended to.

        Raises
        ------
        ValueError
            If a tensor is missing or of another shape or dtype.
        """
        low = cls(kv_heads, head_dim, key_bits, value_bits)
        groups = tokens // GROUP
        shapes: dict[str, tuple[int, ...]] = {
            "key_words": (kv_heads, groups, head_dim * key_bits // 32, GROUP),
            "key_scale": (kv_heads, groups, head_dim),
            "key_bias": (kv_heads, groups, head_dim),
            "tail": (kv_heads, GROUP, head_dim),
        }
        if value_bits is not None:
            shapes["value_codes"] = (kv_heads, tokens, head_dim * value_bits // 8)
            shapes["value_params"] = (kv_heads, tokens, low.value_groups, 2)
        dtypes = {name: getattr(low, name).dtype for name in shapes}
        for name, tensor in zip(shapes, expect_tensors(state, dtypes, shapes), strict=True):
            setattr(low, name, tensor)
        low.num_tokens, low._capacity = tokens, groups
        return low

    def _dequantise_groups(self, first: int, last: int) -> torch.Tensor:
        h, d, bits = self.kv_heads, self.head_dim, self.key_bits
        words = self.key_words[:, first:last].to(torch.int64) & 0xFFFFFFFF
        shifts = torch.tensor([[8 * b + bits * p for b in range(4)] for p in range(8 // bits)]).view(-1, 1)
        codes = (words.unsqueeze(3) >> shifts) & ((1 << bits) - 1)  # heads, groups, words, channel in word, token
        codes = codes.reshape(h, last - first, d, GROUP).transpose(2, 3).float()
        keys = codes * self.key_scale[:, first:last, None].float() + self.key_bias[:, first:last, None].float()
        return keys.reshape(h, (last - first) * GROUP, d)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys and values as this copy knows them, in plain torch.

        Returns
        -------
        keys : Tensor ``[kv_heads, num_tokens, head_dim]`` float32
        values : Tensor ``[kv_heads, num_tokens, head_dim]`` float32, or ``None`` for a copy of keys only
        """
        n, bits = self.num_tokens, self.value_bits
        keys = torch.cat([self._dequantise_groups(0, self.full_groups), self.tail[:, : self.tail_tokens]], dim=1)
        if bits is None:
            return keys, None
        values = torch.empty(self.kv_heads, n, self.head_dim)
        at = 0
        for i, first in enumerate(range(0, self.head_dim, VALUE_GROUP)):
            width = min(VALUE_GROUP, self.head_dim - first)
            packed = self.value_codes[:, :n, at : at + width * bits // 8]
            codes = torch.cat([(packed >> (bits * p)) & ((1 << bits) - 1) for p in range(8 // bits)], dim=-1)
            step, offset = self.value_params[:, :n, i].float().unsqueeze(-1).unbind(-2)
            values[:, :, first : first + width] = codes.float() * step + offset
            at += width * bits // 8
        return keys, values
