"""Residual attention from block means: one mean value (and mean key) stands for every token of a block."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange

from alaya_hf.kernels.cpu.gather import check_selection
from alaya_hf.kernels.cpu.numeric import (
    FASTMATH,
    LOG2E,
    as_numpy,
    check_queries,
    check_store,
    exp2_f32,
    flat_store,
    fmax,
    splits,
)
from alaya_hf.kernels.cpu.tiles import NO_MAX, TILE, combine, pad_queries, padded_group, tile_scores, tile_update
from alaya_hf.kernels.partial import Partial
from alaya_hf.kernels.state import expect_tensors

__all__ = ["BlockMeans", "block_mean_attention", "block_mean_attention_reference"]

_CHUNK = 8192  # tokens averaged at a time, to bound the float32 copy


class BlockMeans:
    """Means of the values (and keys) of blocks of neighbouring tokens, one batch row and layer, filled incrementally.

    Parameters
    ----------
    kv_heads, head_dim : int
    block : int
        Tokens per block.
    with_keys : bool
        Keep key means too, for when no scores of single tokens exist.
    dtype : torch.dtype
        float16, bfloat16 or float32 for the means; the last, unfinished block is summed in float32.

    Attributes
    ----------
    num_tokens : int
    num_blocks : int
        The unfinished block included.
    nbytes : int
        Bytes of the means stored, spare capacity not counted, and of the running sum.
    value_means, key_means : Tensor ``[kv_heads, capacity, head_dim]``
        `key_means` is ``None`` without keys.
    """

    def __init__(
        self, kv_heads: int, head_dim: int, block: int = 32, with_keys: bool = False, dtype: torch.dtype = torch.float16
    ) -> None:
        if block < 1 or dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"expected block >= 1 and a floating dtype of 16 or 32 bits, got {block} and {dtype}")
        self.kv_heads, self.head_dim, self.block = kv_heads, head_dim, block
        self.num_tokens = 0
        self.value_means = torch.empty(kv_heads, 0, head_dim, dtype=dtype)
        self.key_means = torch.empty(kv_heads, 0, head_dim, dtype=dtype) if with_keys else None
        self._sum = torch.zeros(kv_heads, 2, head_dim)

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block)

    @property
    def nbytes(self) -> int:
        sides = 1 if self.key_means is None else 2
        means = self.kv_heads * self.num_blocks * self.head_dim * self.value_means.element_size() * sides
        return means + self._sum.numel() * 4

    def _reserve(self, blocks: int) -> None:
        capacity = self.value_means.shape[1]
        if blocks <= capacity:
            return
        for name in ("value_means", "key_means"):
            before = getattr(self, name)
            if before is not None:
                after = before.new_empty(self.kv_heads, max(blocks, 2 * capacity), self.head_dim)
                after[:, :capacity] = before
                setattr(self, name, after)

    def _write(self, at: int, means: torch.Tensor) -> None:
        """Store means ``[kv_heads, blocks, 2, head_dim]`` from block `at` on."""
        span = slice(at, at + means.shape[1])
        self.value_means[:, span] = means[:, :, 1]
        if self.key_means is not None:
            self.key_means[:, span] = means[:, :, 0]

    def append(self, kv_slice: torch.Tensor) -> None:
        """Add tokens at the end.

        Parameters
        ----------
        kv_slice : Tensor ``[kv_heads, tokens, 2, head_dim]`` float32, float16 or bfloat16

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
        new, b = kv_slice.shape[1], self.block
        self._reserve(-(-(self.num_tokens + new) // b))
        done = 0
        while done < new:
            held = self.num_tokens % b
            if held or new - done < b:  # into the unfinished block
                take = min(b - held, new - done)
                part = kv_slice[:, done : done + take].float().sum(1)
                self._sum = self._sum + part if held else part
                self._write(self.num_tokens // b, (self._sum / (held + take)).unsqueeze(1))
            else:
                blocks = max(1, min(new - done, _CHUNK) // b)
                take = blocks * b
                whole = kv_slice[:, done : done + take].reshape(self.kv_heads, blocks, b, 2, self.head_dim)
                self._write(self.num_tokens // b, whole.float().mean(2))
            done += take
            self.num_tokens += take

    def prefix(self, tokens: int) -> BlockMeans:
        """A copy of the means of the first `tokens` tokens, a multiple of the block."""
        if tokens % self.block or not 0 <= tokens <= self.num_tokens:
            raise ValueError(
                f"expected a multiple of {self.block} between 0 and {self.num_tokens}, got {tokens}; cut at a block"
            )
        copy = BlockMeans(self.kv_heads, self.head_dim, self.block, self.key_means is not None, self.value_means.dtype)
        copy.value_means = self.value_means[:, : tokens // self.block].clone()
        if self.key_means is not None:
            copy.key_means = self.key_means[:, : tokens // self.block].clone()
        copy.num_tokens = tokens
        return copy

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The means as tensors without spare capacity; `from_state_dict` reads them in place."""
        state = {"values": self.value_means[:, : self.num_blocks].contiguous(), "sum": self._sum.contiguous()}
        if self.key_means is not None:
            state["keys"] = self.key_means[:, : self.num_blocks].contiguous()
        return state

    @classmethod
    def from_state_dict(
        cls, state: dict[str, torch.Tensor], kv_heads: int, head_dim: int, block: int, with_keys: bool, tokens: int
    ) -> BlockMeans:
        """Means over tensors that may be mapped read-only, to be read and not appended to.

        Raises
        ------
        ValueError
            If a tensor is missing or of another shape or dtype.
        """
        means = cls(kv_heads, head_dim, block, with_keys)
        shape = (kv_heads, -(-tokens // block), head_dim)
        names = {"values": torch.float16, "sum": torch.float32, **({"keys": torch.float16} if with_keys else {})}
        shapes = {"values": shape, "sum": (kv_heads, 2, head_dim), "keys": shape}
        means.value_means, means._sum, *keys = expect_tensors(state, names, shapes)
        means.key_means = keys[0] if keys else None
        means.num_tokens = tokens
        return means

    def truncate(self, tokens: int, kv: torch.Tensor) -> None:
        """Keep the first `tokens` tokens.

        Parameters
        ----------
        tokens : int
        kv : Tensor ``[kv_heads, >= tokens, 2, head_dim]``
            The store; a block that is cut is averaged again from it.

        Raises
        ------
        ValueError
            `tokens` outside ``[0, num_tokens]``.
        """
        if not 0 <= tokens <= self.num_tokens:
            raise ValueError(f"expected to keep between 0 and {self.num_tokens} tokens, got {tokens}")
        first = tokens // self.block * self.block
        self.num_tokens = first
        if first < tokens:
            self.append(kv[:, first:tokens])


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _lower_bound(ids, first, last, token):
    while first < last:
        middle = (first + last) // 2
        if ids[middle] < token:
            first = middle + 1
        else:
            last = middle
    return first


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _block_range(
    q, q_at, group, d, n, block, values, keys, use_keys, means_at, scores, scores_at, factor, store, head_at, ids,
    cursor, ids_end, mask, masked, total, first, last, m, norm, acc, at,
):  # fmt: skip
    rows = group + 1 if group % 4 == 3 else group
    tops = np.zeros(rows * TILE, np.float32)  # largest logit of a block
    masses = np.zeros(rows * TILE, np.float32)  # mass under it; then the weight of the block's mean
    per_left = np.zeros(rows * TILE, np.float32)
    taken = np.zeros(rows * TILE, np.int32)
    weights = np.zeros(rows * TILE, np.float32)
    logits = np.empty(TILE * block, np.float32)
    base = np.zeros(TILE, np.int64)
    picked = np.zeros(TILE, np.int64)
    i = first
    while i < last:
        count = min(TILE, last - i)
        token = i * block
        stop = min(n, token + count * block)
        cursor_end = _lower_bound(ids, cursor, ids_end, stop)
        for b in range(count):
            base[b] = (means_at + i + b) * d
        if use_keys:
            tile_scores(tops, q, q_at, group, d, keys, base, count, base, 0)
        taken[:] = 0
        for g in range(group):
            row = g * TILE
            for j in range(cursor, cursor_end):
                if not masked or mask[g * total + j] != 0:
                    taken[row + (ids[j] - token) // block] += 1
            if not use_keys:
                source = scores[scores_at + g * n + token : scores_at + g * n + stop]
                for t in range(source.size):
                    logits[t] = source[t] * factor
                for j in range(cursor, cursor_end):
                    if not masked or mask[g * total + j] != 0:
                        logits[ids[j] - token] = -np.inf
            best = m[at + g]
            for b in range(count):
                size = min(block, n - token - b * block)
                left = size - taken[row + b]
                if use_keys:
                    masses[row + b] = left
                    if left == 0:
                        tops[row + b] = NO_MAX
                else:
                    top = NO_MAX
                    inside = logits[b * block : b * block + size]
                    for t in range(size):
                        top = fmax(inside[t], top)
                    mass = np.float32(0.0)
                    for t in range(size):
                        mass += exp2_f32(inside[t] - top)
                    tops[row + b] = top
                    masses[row + b] = mass
                best = fmax(tops[row + b], best)
            rescale = exp2_f32(m[at + g] - best)
            m[at + g] = best
            norm[at + g] *= rescale
            for c in range(d):
                acc[(at + g) * d + c] *= rescale
            for b in range(count):
                size = min(block, n - token - b * block)
                left = size - taken[row + b]
                p = np.float32(0.0)
                if left > 0:
                    p = masses[row + b] * exp2_f32(tops[row + b] - best)
                norm[at + g] += p
                per_left[row + b] = p / np.float32(max(left, 1))
                masses[row + b] = per_left[row + b] * np.float32(size)
            for b in range(count, (count + 3) // 4 * 4):
                masses[row + b] = 0
        for b in range(count, (count + 3) // 4 * 4):
            base[b] = base[count - 1]
        tile_update(acc, at * d, group, d, masses, values, base, count, 0, base, False)
        # The block's mean still holds the tokens that are attended elsewhere: take their exact values out.
        j = cursor
        while j < cursor_end:
            some = min(TILE, cursor_end - j)
            padded = (some + 3) // 4 * 4
            for t in range(padded):
                picked[t] = head_at + np.int64(ids[min(j + t, cursor_end - 1)]) * 2 * d
            for g in range(group):
                for t in range(padded):
                    w = np.float32(0.0)
                    if t < some and (not masked or mask[g * total + j + t] != 0):
                        w = -per_left[g * TILE + (ids[j + t] - token) // block]
                    weights[g * TILE + t] = w
            tile_update(acc, at * d, group, d, weights, store, picked, some, d, picked, False)
            j += some
        cursor = cursor_end
        i += count


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _blocks(
    q, heads, group, rows, d, n, block, values, keys, use_keys, capacity, scores, factor, store, stride, ids, offsets,
    mask, masked, total, parts, m, norm, acc,
):  # fmt: skip
    blocks = (n + block - 1) // block
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        first = blocks * part // parts
        last = blocks * (part + 1) // parts
        cursor = _lower_bound(ids, offsets[h], offsets[h + 1], first * block)
        _block_range(
            q, h * rows * d, group, d, n, block, values, keys, use_keys, h * capacity, scores, h * group * n, factor,
            store, h * stride, ids, cursor, offsets[h + 1], mask, masked, total, first, last, m, norm, acc, task * rows,
        )  # fmt: skip


def _check(q, means, scores, kv, ids, offsets):  # type: ignore[no-untyped-def]
    check_queries(q, means.kv_heads, means.head_dim)
    if scores is None and means.key_means is None:
        raise ValueError("expected scores, or block means with keys (with_keys=True), got neither; masses need one")
    if scores is not None and tuple(scores.shape) != (*q.shape[:2], means.num_tokens):
        raise ValueError(f"expected scores of shape {(*q.shape[:2], means.num_tokens)}, got {tuple(scores.shape)}")
    if ids is not None:
        if offsets is None or kv is None:
            raise ValueError("expected offsets and the store together with ids: their exact values are taken out")
        check_store(kv)
        check_selection(kv[:, : means.num_tokens], ids, offsets)


def block_mean_attention(
    q: torch.Tensor,
    means: BlockMeans,
    scaling: float,
    scores: torch.Tensor | None = None,
    kv: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Estimated attention to the tokens that were not selected, a block at a time.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    means : BlockMeans
    scaling : float
        Positive.
    scores : Tensor ``[kv_heads, group, num_tokens]`` float32, optional
        (Approximate) raw scores: a block's mass is ``sum exp(logit)`` over its tokens that are left. Without them the
        mass is ``tokens left * exp(q . mean key * scaling)``, which needs `means` with keys.
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]``, optional
        The store; needed with `ids`.
    ids, offsets, mask
        The selected tokens as in :func:`~alaya_hf.kernels.cpu.gather.gather_attention`, **ascending** within a head.
        A query head whose mask is 0 for a token keeps it in the residual.

    Returns
    -------
    Partial
        ``out`` ``[kv_heads, group, head_dim]`` and ``lse`` ``[kv_heads, group]``. Empty for a head with no token left.

    Raises
    ------
    ValueError
        Neither scores nor key means; wrong shapes or dtypes.

    Notes
    -----
    The value of a block is the mean over the tokens left: ``(size * mean - sum of selected values) / left``.
    """
    _check(q, means, scores, kv, ids, offsets)
    heads, group, d = q.shape
    n = means.num_tokens
    out, lse = torch.zeros(heads, group, d), torch.full((heads, group), float("-inf"))
    if not n or not q.numel():
        return Partial(out, lse)
    if ids is None or kv is None or offsets is None:
        kv = torch.empty(heads, 0, 2, d)
        ids, offsets, mask = torch.empty(0, dtype=torch.int32), torch.zeros(heads + 1, dtype=torch.int64), None
    store, stride = flat_store(kv)
    rows, parts = padded_group(group), splits(heads, n)
    m = np.full(heads * parts * rows, NO_MAX, np.float32)
    norm = np.zeros(heads * parts * rows, np.float32)
    acc = np.zeros(heads * parts * rows * d, np.float32)
    values = as_numpy(means.value_means.view(-1))
    keys = values if means.key_means is None else as_numpy(means.key_means.view(-1))
    nothing = np.empty(0, np.float32)
    _blocks(
        pad_queries(q, scaling * LOG2E), heads, group, rows, d, n, means.block, values, keys, scores is None,
        means.value_means.shape[1], nothing if scores is None else scores.contiguous().view(-1).numpy(),
        np.float32(scaling * LOG2E), store, stride, ids.numpy(), offsets.numpy(),
        np.empty(0, np.uint8) if mask is None else mask.contiguous().view(-1).numpy(), mask is not None, ids.numel(),
        parts, m, norm, acc,
    )  # fmt: skip
    combine(m, norm, acc, heads, parts, group, rows, d, out.view(-1).numpy(), lse.view(-1).numpy())
    return Partial(out, lse)


def block_mean_attention_reference(
    q: torch.Tensor,
    means: BlockMeans,
    scaling: float,
    scores: torch.Tensor | None = None,
    kv: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Partial:
    """:func:`block_mean_attention` in plain torch, in the precision of `q`."""
    heads, group, d = q.shape
    n, blocks, size = means.num_tokens, means.num_blocks, means.block
    if not n:
        return Partial(torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf))
    padded = blocks * size
    left = torch.zeros(heads, group, padded, dtype=q.dtype)
    left[:, :, :n] = 1
    removed = torch.zeros(heads, group, blocks, d, dtype=q.dtype)
    if ids is not None and offsets is not None and kv is not None:
        for h in range(heads):
            span = slice(int(offsets[h]), int(offsets[h + 1]))
            tokens = ids[span].long()
            chosen = torch.ones(group, tokens.numel()) if mask is None else mask[:, span]
            left[h, :, tokens] = 1 - chosen.to(q.dtype)
            values = kv[h, tokens, 1].to(q.dtype)
            removed[h].index_add_(1, tokens // size, chosen.to(q.dtype).unsqueeze(-1) * values)
    counts = left.view(heads, group, blocks, size).sum(-1)
    sizes = torch.full((blocks,), size, dtype=q.dtype)
    sizes[-1] = n - (blocks - 1) * size
    if scores is not None:
        logits = torch.full((heads, group, padded), -torch.inf, dtype=q.dtype)
        logits[:, :, :n] = scores.to(q.dtype) * scaling
        logits = logits.masked_fill(left == 0, -torch.inf)
        masses = torch.logsumexp(logits.view(heads, group, blocks, size), dim=-1)
    else:
        assert means.key_means is not None
        masses = q @ means.key_means[:, :blocks].to(q.dtype).transpose(-1, -2) * scaling + counts.log()
    mean = means.value_means[:, :blocks].to(q.dtype).unsqueeze(1)
    values = (mean * sizes[:, None] - removed) / counts.clamp_min(1).unsqueeze(-1)
    weights = torch.softmax(masses, dim=-1).nan_to_num(0.0)
    return Partial((weights.unsqueeze(-1) * values).sum(2), torch.logsumexp(masses, dim=-1))
