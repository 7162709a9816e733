"""How the low-bit copy of a context lies in device memory: one record of bytes per KV head and 64 tokens.

A record holds the keys' codes, their steps and zeros, and the values' codes, steps and zeros (or, instead of all value
data, two means of 32 values each), one after the other, so that a tile is one contiguous read. Inside, words lie in the
order in which the 32 lanes of a warp hold the operands of ``mma.m16n8k16``: a lane reads its part with 16-byte loads
and masks two codes at once into a half2. Codes become numbers without a conversion: a code of up to 8 bits in the low
bits of a half is the subnormal ``code * 2**-24``, which tensor cores multiply exactly; the power of two is undone on the
float32 sums. (OR-ing codes under the exponent 0x6400 costs as much and adds 1024 to each, to be subtracted again.)

With ``J = padded head_dim / 8``, ``lane = 4 * gid + tig``, and ``fields = 8 / bits`` codes to a byte:

* key of token ``8 * nt + gid``, channel ``8 * j + 2 * tig + e``: word ``(nt, lane, j // (2 * fields))``, halfword `e`, byte
  ``j // fields % 2``, field ``j % fields``. Steps and zeros: half ``(j // 4, tig, j % 4, e)``. The step is stored divided by
  ``2**(bits * field)``: a field is masked where it stands.
* value of token ``16 * ks + 8 * byte + 2 * tig + e``, channel ``8 * i + gid``: word ``(ks, lane, i // fields)``, halfword `e`,
  that byte, field ``i % fields``. Steps and zeros of channel group `c`: half ``(ks, tig, c, byte, e)``.
* mean of block `b` (of 2), channel `c`: half ``(c, b)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TILE = 64  # tokens of a record; they share a key step per channel
VALUE_GROUP = 32  # channels that share a value step per token
MEAN_BLOCK = 32  # tokens that share a mean value


@dataclass(frozen=True)
class Layout:
    """Sizes and places inside a record.

    Parameters
    ----------
    head_dim : int
        A multiple of 16, at most 256. Padded to a multiple of 32 inside the record.
    key_bits : {4, 8, 2}
    value_bits : {2, 4, 8, 0}
        0: means of 32 values instead of codes.

    Raises
    ------
    ValueError
        Unsupported bits or head dimension.
    """

    head_dim: int
    key_bits: int = 4
    value_bits: int = 2

    def __post_init__(self) -> None:
        if self.head_dim <= 0 or self.head_dim % 16 or self.head_dim > 256:
            raise ValueError(
                f"expected a head_dim that is a multiple of 16 up to 256, got {self.head_dim}; keep full precision instead"
            )
        if self.key_bits not in (2, 4, 8) or self.value_bits not in (0, 2, 4, 8):
            raise ValueError(
                f"expected key_bits in (2, 4, 8) and value_bits in (0, 2, 4, 8), got {self.key_bits} and {self.value_bits}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a record."""
        return TILE

    def scored(self, tokens: int) -> int:
        """Scores that a query head computes over so many tokens: one for each."""
        return tokens

    @property
    def padded(self) -> int:
        """Channels inside a record."""
        return -(-self.head_dim // 32) * 32

    @property
    def groups(self) -> int:
        """Groups of channels with a value step of their own."""
        return self.padded // VALUE_GROUP

    @property
    def key_words(self) -> int:
        """Words of keys that a lane holds for 8 tokens."""
        return -(-self.padded // 8 // (2 * (8 // self.key_bits)))

    @property
    def value_words(self) -> int:
        """Words of values that a lane holds for 16 tokens."""
        return self.padded // 8 // (8 // self.value_bits) if self.value_bits else 0

    @property
    def key_params(self) -> int:
        """Byte offset of the keys' steps; their zeros follow."""
        return 8 * 32 * self.key_words * 4

    @property
    def values(self) -> int:
        """Byte offset of the values' codes, or of the means."""
        return self.key_params + 2 * self.padded * 2

    @property
    def value_params(self) -> int:
        """Byte offset of the values' steps; their zeros follow."""
        return self.values + 4 * 32 * self.value_words * 4

    @property
    def record(self) -> int:
        """Bytes of a record, a multiple of 16."""
        if not self.value_bits:
            return self.values + 2 * self.padded * 2
        return self.value_params + 2 * TILE * self.groups * 2

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token and KV head."""
        return self.record / TILE

    def allocate(self, batch: int, kv_heads: int, tokens: int, device: torch.device | str) -> Tensor:
        """Records for `tokens` tokens: ``[batch, kv_heads, tiles, record / 4]`` int32, uninitialised."""
        return torch.empty(batch, kv_heads, -(-tokens // TILE), self.record // 4, dtype=torch.int32, device=device)

    @cached_property
    def _places(self) -> tuple[Tensor, ...]:
        """Word and shift of every key and value code, half of every parameter, all ``[64, head_dim]`` or broadcastable."""
        t, c = torch.arange(TILE)[:, None], torch.arange(self.head_dim)[None, :]
        fields = 8 // self.key_bits
        j, tig, e = c // 8, c % 8 // 2, c % 2
        key_word = (t // 8 * 32 + t % 8 * 4 + tig) * self.key_words + j // (2 * fields)
        key_shift = (16 * e + 8 * (j // fields % 2) + self.key_bits * (j % fields)).expand_as(key_word)
        key_half = self.key_params // 2 + ((j // 4 * 4 + tig) * 4 + j % 4) * 2 + e
        key_power = (2.0 ** (self.key_bits * (j % fields))).float()
        if not self.value_bits:
            mean_half = self.values // 2 + c * 2 + t // MEAN_BLOCK
            return key_word, key_shift, key_half, key_power, mean_half
        fields = 8 // self.value_bits
        ks, byte, tig, e = t // 16, t % 16 // 8, t % 8 // 2, t % 2
        value_word = self.values // 4 + (ks * 32 + c % 8 * 4 + tig) * self.value_words + c // 8 // fields
        value_shift = 16 * e + 8 * byte + self.value_bits * (c // 8 % fields)
        value_half = self.value_params // 2 + (((ks * 4 + tig) * self.groups + c // VALUE_GROUP) * 2 + byte) * 2 + e
        return key_word, key_shift, key_half, key_power, value_word, value_shift, value_half

    def unpack(self, records: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all tiles: two ``[batch, kv_heads, tokens, head_dim]`` float32. In plain torch, for checking.

        Parameters
        ----------
        records : Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
        """
        places = [place.to(records.device) for place in self._places]
        halves = records.view(torch.float16)

        def codes(word: Tensor, shift: Tensor, bits: int) -> Tensor:
            return (records[..., word].bitwise_right_shift(shift) & ((1 << bits) - 1)).float()

        word, shift, half, power = places[:4]
        k = codes(word, shift, self.key_bits) * (halves[..., half].float() * power)
        k = k + halves[..., half + self.padded].float()
        if self.value_bits:
            word, shift, half = places[4:]
            v = codes(word, shift, self.value_bits) * halves[..., half].float()
            v = v + halves[..., half + TILE * self.groups].float()
        else:
            v = halves[..., places[4]].float()
        return k.flatten(2, 3), v.flatten(2, 3)

    def pack(self, keys: Tensor, values: Tensor) -> Tensor:
        """Quantise whole tiles. In plain torch, for checking.

        Parameters
        ----------
        keys, values : Tensor ``[batch, kv_heads, tokens, head_dim]``
            The last tile may be short: its steps then come from the tokens there are.

        Returns
        -------
        Tensor ``[batch, kv_heads, tiles, record / 4]`` int32
        """
        batch, heads, n, d = keys.shape
        tiles = -(-n // TILE)
        records = torch.zeros(batch, heads, tiles, self.record // 4, dtype=torch.int32, device=keys.device)
        halves = records.view(torch.float16)
        places = [place.to(keys.device) for place in self._places]
        missing = (torch.arange(tiles * TILE, device=keys.device) >= n).view(tiles, TILE, 1)

        def tiled(x: Tensor) -> Tensor:
            x = torch.nn.functional.pad(x.float().clamp(-65000, 65000), (0, 0, 0, tiles * TILE - n))
            return x.view(batch, heads, tiles, TILE, d)

        def bounds(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
            low = x.masked_fill(missing_of(x), torch.inf).amin(dim, keepdim=True)
            high = x.masked_fill(missing_of(x), -torch.inf).amax(dim, keepdim=True)
            return low.nan_to_num(0.0, 0.0, 0.0), high.nan_to_num(0.0, 0.0, 0.0)

        def missing_of(x: Tensor) -> Tensor:
            return missing if x.dim() == 5 else missing.unsqueeze(-1)

        def add(word: Tensor, shift: Tensor, code: Tensor) -> None:
            flat = (code.int() << shift.int()).flatten(-2)
            records.index_add_(3, word.flatten().int(), flat)

        k = tiled(keys)
        low, high = bounds(k, 3)
        word, shift, half, power = places[:4]
        zero = low.half()
        step = ((high - zero.float()) / ((1 << self.key_bits) - 1) / power).half()
        halves[..., half[0]], halves[..., half[0] + self.padded] = step[..., 0, :], zero[..., 0, :]
        scale = step.float() * power
        code = ((k - zero.float()) / scale.clamp_min(1e-30) + 0.5).floor().clamp(0, (1 << self.key_bits) - 1)
        add(word, shift, code.masked_fill((scale <= 0) | missing, 0))
        v = tiled(values)
        if not self.value_bits:
            v = v.masked_fill(missing, 0).view(batch, heads, tiles, 2, MEAN_BLOCK, d)
            count = (~missing).view(tiles, 2, MEAN_BLOCK).sum(-1).clamp_min(1)
            mean = v.sum(-2) / count[None, None, :, :, None]
            halves[..., places[4][::MEAN_BLOCK]] = mean.half()
            return records
        v = torch.nn.functional.pad(v, (0, self.padded - d)).unflatten(-1, (self.groups, VALUE_GROUP))
        real = (torch.arange(self.padded, device=v.device) < d).view(self.groups, VALUE_GROUP)
        low = v.masked_fill(~real, torch.inf).amin(-1).masked_fill(missing, 0)
        high = v.masked_fill(~real, -torch.inf).amax(-1).masked_fill(missing, 0)
        word, shift, half = places[4:]
        zero = low.half()
        step = ((high - zero.float()) / ((1 << self.value_bits) - 1)).half()
        first = half[:, ::VALUE_GROUP]
        halves[..., first], halves[..., first + TILE * self.groups] = step, zero
        code = ((v - zero.float()[..., None]) / step.float()[..., None].clamp_min(1e-30) + 0.5).floor()
        code = code.clamp(0, (1 << self.value_bits) - 1).masked_fill((step <= 0)[..., None], 0)
        add(word, shift, code.flatten(-2)[..., :d].masked_fill(missing, 0))
        return records
