"""The hot set: rows of the store that recent steps fetched, kept on the device and looked up by the gather kernel.

A set-associative cache per batch row and KV head. Token `t` belongs to set ``t % sets`` and may lie in any of its ways. A
step's gather reads the tags, takes what it finds from the device and everything else from the host; what it fetched goes to a
staging buffer. Only then, in a launch of its own, is it inserted: no program can read a row while another one writes it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.op import check, next_power_of_2, operator
from alaya_hf.kernels.gpu.store_format import StoreFormat

WAYS = 8


class HotSet:
    """Rows kept on the device.

    Parameters
    ----------
    batch, kv_heads : int
    sets : int
        Per row and KV head, each of :data:`WAYS` tokens.
    form : StoreFormat
        Rows lie here as they do in the store.
    device : torch.device

    Attributes
    ----------
    rows : Tensor ``[batch, kv_heads, sets * WAYS, *tail]``
    tags : Tensor ``[batch, kv_heads, sets, WAYS]`` int32
        Place in the store of what a way holds, -1: nothing.
    stamps : Tensor ``[batch, kv_heads, sets, WAYS]`` int32
        When it was used last, in tokens of the row; 0: never. The oldest one makes room, the first of those that tie.
    claims : Tensor ``[batch, kv_heads, sets]`` int64
        Of the tokens of a set that a step missed, the first one is inserted: the step in the upper half, in the lower half
        the more the smaller the token. Later steps outbid earlier ones, so that nothing has to be reset.
    counts : Tensor ``[2]`` int64
        Tokens looked up and tokens found so far; :meth:`clear` leaves them alone.
    """

    def __init__(self, batch: int, kv_heads: int, sets: int, form: StoreFormat, device: torch.device) -> None:
        self.batch, self.kv_heads, self.sets, self.form = batch, kv_heads, sets, form
        self.rows = torch.empty(batch, kv_heads, sets * WAYS, *form.tail, dtype=form.dtype, device=device)
        self.tags = torch.full((batch, kv_heads, sets, WAYS), -1, dtype=torch.int32, device=device)
        self.stamps = torch.zeros_like(self.tags)
        self.claims = torch.zeros(batch, kv_heads, sets, dtype=torch.int64, device=device)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    @classmethod
    def within(cls, budget: int, batch: int, kv_heads: int, form: StoreFormat, device: torch.device) -> HotSet | None:
        """As many sets as `budget` bytes hold; None where they do not hold one per row and KV head."""
        sets = budget // (batch * kv_heads * (WAYS * (form.row_bytes + 8) + 8))
        return cls(batch, kv_heads, sets, form, device) if sets else None

    def clear(self) -> None:
        """Forget all rows, because places of the store are about to get other contents. In place: graphs stay valid."""
        self.tags.fill_(-1)
        self.stamps.zero_()
        self.claims.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        tensors = (self.rows, self.tags, self.stamps, self.claims)
        return sum(x.numel() * x.element_size() for x in tensors)


@triton.jit
def bid(now, token):
    """What a missed token enters as its claim on a place in its set, int64."""
    return ((now + 1).to(tl.int64) << 32) + (0x7FFFFFFF - token)


@triton.jit
def look_up(tags, bh, token, there, sets, WAYS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The set of each token, and the way of it that holds the token, -1 where none does."""
    home = bh * sets + token % sets
    w = tl.arange(0, WAYS)
    tag = tl.load(tags + home[:, None] * WAYS + w[None, :], mask=there[:, None], other=-1)
    return home, tl.max(tl.where(there[:, None] & (tag == token[:, None]), w[None, :], -1), 1)


@triton.jit
def _insert(  # type: ignore[no-untyped-def]
    staged, missed, total, rows, tags, stamps, claims, sets,
    H: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr, WORDS: tl.constexpr, WP2: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    at = (bh * tl.num_programs(0) + tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(missed + at)
    now = tl.load(total + bh // H)
    home = bh * sets + tl.maximum(token, 0) % sets
    won = (token >= 0) & (tl.load(claims + home, mask=token >= 0, other=0) == bid(now, token))
    if tl.sum(won.to(tl.int32)) > 0:
        # One token per set and step: nobody else touches this set.
        w = tl.arange(0, WAYS)
        stamp = tl.load(stamps + home[:, None] * WAYS + w[None, :], mask=won[:, None], other=0)
        oldest = tl.min(stamp.to(tl.int64) * WAYS + w[None, :], 1) % WAYS
        slot = home * WAYS + oldest
        tl.store(tags + slot, token, mask=won)
        tl.store(stamps + slot, (token * 0 + now) + 1, mask=won)
        c = tl.arange(0, WP2)
        inside = won[:, None] & (c < WORDS)[None, :]
        words = tl.load(staged + at[:, None] * WORDS + c[None, :], mask=inside, other=0)
        tl.store(rows + slot[:, None] * WORDS + c[None, :], words, mask=inside)


@operator("insert_hot", mutates=["rows", "tags", "stamps"])
def insert_hot(
    staged: Tensor, missed: Tensor, total: Tensor, rows: Tensor, tags: Tensor, stamps: Tensor, claims: Tensor
) -> None:
    """Put what a step fetched into the hot set: of each set the first token missed, in place of the one not used longest.

    Parameters
    ----------
    staged : Tensor ``[batch, kv_heads, parts, block, *tail]``
    missed : Tensor ``[batch, kv_heads, parts, block]`` int32
        Places of the staged rows, -1: none. Each place at most once per KV head.
    total : Tensor ``[batch]`` int32
        As the step's gather had it.
    rows, tags, stamps, claims
        See :class:`HotSet`.
    """
    batch, heads, parts, block = missed.shape
    sets = claims.shape[2]
    check(missed, "missed", (batch, heads, parts, block), torch.int32)
    check(tags, "tags", (batch, heads, sets, WAYS), torch.int32)
    words = staged.view(torch.int32)
    size = words[0, 0, 0, 0].numel()
    _insert[(parts, batch * heads)](
        words, missed, total, rows.view(torch.int32), tags, stamps, claims, sets,
        H=heads, BLOCK=block, WAYS=WAYS, WORDS=size, WP2=next_power_of_2(size), num_warps=4,
    )  # fmt: skip


def insert_hot_reference(
    staged: Tensor, missed: Tensor, total: Tensor, rows: Tensor, tags: Tensor, stamps: Tensor, claims: Tensor
) -> None:
    """:func:`insert_hot` in plain torch."""
    batch, heads, sets = claims.shape
    for row in range(batch):
        for head in range(heads):
            found = missed[row, head].flatten().tolist()
            first: dict[int, tuple[int, int]] = {}
            for at, token in sorted(enumerate(found), key=lambda pair: pair[1]):
                if token >= 0:
                    first.setdefault(token % sets, (at, token))
            for home, (at, token) in first.items():
                way = stamps[row, head, home].tolist().index(int(stamps[row, head, home].min()))
                tags[row, head, home, way], stamps[row, head, home, way] = token, total[row] + 1
                rows[row, head, home * WAYS + way] = staged[row, head].flatten(0, 1)[at]


__all__ = ["WAYS", "HotSet", "bid", "insert_hot", "insert_hot_reference", "look_up"]
