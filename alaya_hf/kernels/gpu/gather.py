"""Exact attention to the selected tokens, straight from host memory, in place of their approximate terms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from alaya_hf.kernels.gpu.eight_bit import decode
from alaya_hf.kernels.gpu.hot_set import WAYS, bid, look_up
from alaya_hf.kernels.gpu.layout import TILE, Layout
from alaya_hf.kernels.gpu.op import LOG2E, check, next_power_of_2, operator
from alaya_hf.kernels.gpu.prefix import Prefix, check_prefix, locate
from alaya_hf.kernels.gpu.store_format import StoreFormat
from alaya_hf.kernels.gpu.store_table import table_format
from alaya_hf.kernels.gpu.unpack import constants, load_values


def block(cap: int) -> int:
    """Places of a head's list that one program serves."""
    return 16 if cap <= 128 else 32


def splits(group: int, cap: int) -> int:
    """Partials per head."""
    return group * -(-cap // block(cap)) if cap else 0


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    store, scales, blocks, q_ptr, ids, counts, thresholds, limits, scores, words, halves, acc, ml, fetched,
    hot, hot_scales, tags, stamps, claims, looked_up, staged, staged_scales, missed, total, prefix, bounds,
    store_capacity, block_count, capacity, partials, slot0, factor, sets, positions, prefix_tokens,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP2: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
    UNION: tl.constexpr, LOWBIT: tl.constexpr,
    FORMAT: tl.constexpr, ROW: tl.constexpr, SCALES: tl.constexpr, HOT: tl.constexpr, H: tl.constexpr, WAYS: tl.constexpr,
    TABLE: tl.constexpr, PAGE: tl.constexpr, PREFIX: tl.constexpr, SELECTED: tl.constexpr,
    PADDED: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUE_WORDS: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUES: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)  # the query heads of one position
    bh = group // positions
    CHUNKS: tl.constexpr = (CAP + BLOCK - 1) // BLOCK
    owner = part // CHUNKS  # the query head whose list this program serves
    x = part % CHUNKS * BLOCK + tl.arange(0, BLOCK)
    g = tl.arange(0, GP)
    c = tl.arange(0, DP2)
    heads = g < G
    row = group * G + g
    there = x < tl.load(counts + group * G + owner)
    place = row * partials + slot0 + part
    token = tl.load(ids + (group * G + owner) * CAP + x, mask=there, other=0)
    approximate = tl.load(
        scores + row[:, None] * capacity * 64 + token[None, :],
        mask=heads[:, None] & there[None, :],
        other=float("-inf"),
    ).to(tl.float32)
    threshold = tl.load(thresholds + row, mask=heads, other=float("inf"))[:, None]
    limit = tl.load(limits + row, mask=heads, other=-1)[:, None]
    chosen = (approximate > threshold) | ((approximate == threshold) & (token[None, :] <= limit))
    # A token that several heads selected is served once, by the first of them.
    there = there & (tl.max((chosen & (g < owner)[:, None]).to(tl.int32), 0) == 0)
    fetch = tl.sum(there.to(tl.int32))
    tl.store(fetched + group * tl.num_programs(0) + part, fetch)
    far = there
    if HOT:
        now = tl.load(total + bh // H)
        home, way = look_up(tags, bh, token, there, sets, WAYS)
        near = way >= 0
        far = there & (near == 0)
        slot = home * WAYS + tl.maximum(way, 0)
        stage = (bh * tl.num_programs(0) + part) * BLOCK + tl.arange(0, BLOCK)
        tl.store(missed + stage, tl.where(far, token, -1))
        tl.store(stamps + slot, token * 0 + now + 1, mask=near)
        tl.atomic_max(claims + home, bid(now, token), mask=far, sem="relaxed")
        tl.atomic_add(looked_up, fetch.to(tl.int64), sem="relaxed")
        tl.atomic_add(looked_up + 1, tl.sum(near.to(tl.int64)), sem="relaxed")
    if fetch > 0:
        inside = there[:, None] & (c < D)[None, :]
        if TABLE:
            # Rows of a pool: all heads of a token side by side, tokens in blocks, or in one run.
            which = token // PAGE if PAGE > 0 else token * 0
            start = tl.load(blocks + bh // H * block_count + which, mask=there, other=0)
            within = token % PAGE if PAGE > 0 else token
            line = within.to(tl.int64) * H + bh % H
            row_at = tl.multiple_of(start, 8) + line * ROW
        else:
            line = bh * store_capacity + token
            row_at = line * ROW
        over_bus = far[:, None] & (c < D)[None, :]
        if PREFIX:
            own, in_prefix, there_line = locate(bounds, bh // H, token)
            row_at = (bh * store_capacity + own) * ROW
            mine = over_bus & (in_prefix == 0)[:, None]
            theirs = over_bus & in_prefix[:, None]
            k = tl.load(store + row_at[:, None] + c[None, :], mask=mine, other=0)
            v = tl.load(store + row_at[:, None] + D + c[None, :], mask=mine, other=0)
            if SELECTED:
                prefix_at = ((group * G + owner) * CAP + x) * ROW
            else:
                prefix_at = (bh % H * prefix_tokens + there_line) * ROW
            k = tl.where(theirs, tl.load(prefix + prefix_at[:, None] + c[None, :], mask=theirs, other=0), k)
            v = tl.where(theirs, tl.load(prefix + prefix_at[:, None] + D + c[None, :], mask=theirs, other=0), v)
        else:
            k = tl.load(store + row_at[:, None] + c[None, :], mask=over_bus, other=0)
            v = tl.load(store + row_at[:, None] + D + c[None, :], mask=over_bus, other=0)
        if FORMAT > 0:
            scale_at = row_at // 4 if TABLE else line * (ROW // 4)
            k_scale = tl.load(scales + scale_at + SCALES, mask=far, other=0.0)
            v_scale = tl.load(scales + scale_at + SCALES + 1, mask=far, other=0.0)
        if HOT:
            tl.store(staged + stage[:, None] * ROW + c[None, :], k, mask=over_bus)
            tl.store(staged + stage[:, None] * ROW + D + c[None, :], v, mask=over_bus)
            here = near[:, None] & (c < D)[None, :]
            k = tl.where(here, tl.load(hot + slot[:, None] * ROW + c[None, :], mask=here, other=0), k)
            v = tl.where(here, tl.load(hot + slot[:, None] * ROW + D + c[None, :], mask=here, other=0), v)
            if FORMAT > 0:
                tl.store(staged_scales + stage * (ROW // 4) + SCALES, k_scale, mask=far)
                tl.store(staged_scales + stage * (ROW // 4) + SCALES + 1, v_scale, mask=far)
                near_scale = hot_scales + slot * (ROW // 4) + SCALES
                k_scale = tl.where(near, tl.load(near_scale, mask=near, other=0.0), k_scale)
                v_scale = tl.where(near, tl.load(near_scale + 1, mask=near, other=0.0), v_scale)
        q = tl.load(q_ptr + row[:, None] * D + c[None, :], mask=heads[:, None] & (c < D)[None, :], other=0.0)
        mask = there[None, :] & heads[:, None]
        if not UNION:
            mask = mask & chosen
        # tf32 holds codes and 16-bit numbers exactly.
        s = tl.dot(q.to(tl.float32), tl.trans(decode(k, FORMAT)), input_precision="tf32")
        if FORMAT > 0:
            s *= k_scale[None, :]
        s = tl.where(mask, s, float("-inf"))
        approximate = tl.where(mask, approximate, float("-inf"))
        top = tl.max(tl.maximum(s, approximate), 1)
        some = tl.where(top > float("-inf"), top, 0.0)
        p = tl.exp2((s - some[:, None]) * factor)
        weight = tl.sum(p, 1)
        if FORMAT > 0:
            out = tl.dot(p * v_scale[None, :], decode(v, FORMAT), input_precision="tf32")
        else:
            out = tl.dot(p, v.to(tl.float32), input_precision="tf32")
        if LOWBIT:
            minus = tl.exp2((approximate - some[:, None]) * factor)
            tile = (bh * capacity + token // 64) * RECORD
            rough = load_values(
                words, halves, tile[:, None], (token % 64)[:, None], c[None, :], inside,
                PADDED, VALUE_BITS, VALUE_WORDS, VALUES, VALUE_PARAMS,
            )  # fmt: skip
            weight -= tl.sum(minus, 1)
            out -= tl.dot(minus, rough, input_precision="tf32")
        tl.store(acc + place[:, None] * D + c[None, :], out, mask=heads[:, None] & (c < D)[None, :])
        tl.store(ml + place * 2, top * factor, mask=heads)
        tl.store(ml + place * 2 + 1, weight, mask=heads)
    else:
        tl.store(ml + place * 2, tl.full([GP], float("-inf"), tl.float32), mask=heads)
        tl.store(ml + place * 2 + 1, tl.zeros([GP], tl.float32), mask=heads)


def _launch(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, hot: tuple[Tensor, ...] | None, slot0: int, scaling: float, key_bits: int,
    value_bits: int, union: bool, replace: bool, positions: int = 1, blocks: Tensor | None = None, block_tokens: int = 0,
    prefix: Tensor | None = None, bounds: Tensor | None = None,
) -> None:  # fmt: skip
    batch, heads, rows, cap = ids.shape
    group = rows // positions
    d = q.shape[2]
    if cap == 0:
        return
    layout = Layout(d, key_bits, value_bits)
    form = StoreFormat.of(store, d) if blocks is None else StoreFormat(d, store.dtype)
    check(fetched, "fetched", (batch, heads, positions * splits(group, cap)), torch.int32)
    check_prefix(prefix, bounds, form, batch, heads, ids)
    selected = prefix is not None and prefix.dim() > ids.dim()
    elements, scales = form.kernel_views(store)
    # Without a hot set, anything will do for its pointers.
    places: tuple[Tensor, ...] = (ids,) * 10
    if hot is not None:
        kept, tags, stamps, claims, looked_up, staged, missed, total = hot
        check(missed, "missed", (batch, heads, splits(group, cap), block(cap)), torch.int32)
        check(tags, "tags", (batch, heads, None, WAYS), torch.int32)
        check(kept, "rows", (batch, heads, WAYS * tags.shape[2], *form.tail), form.dtype)
        check(staged, "staged", (*missed.shape, *form.tail), form.dtype)
        check(claims, "claims", (batch, heads, tags.shape[2]), torch.int64)
        places = (*form.kernel_views(kept), tags, stamps, claims, looked_up, *form.kernel_views(staged), missed, total)
    _gather[(splits(group, cap), batch * heads * positions)](
        elements, scales, ids if blocks is None else blocks, q, ids, counts, thresholds, limits, scores, records,
        records.view(torch.float16), acc, ml, fetched,
        *places, elements if prefix is None else prefix, ids if bounds is None else bounds,
        store.shape[2] if blocks is None else 0, 0 if blocks is None else blocks.shape[1], records.shape[2],
        acc.shape[3], slot0, scaling * LOG2E, 1 if hot is None else hot[1].shape[2], positions,
        0 if prefix is None else prefix.shape[1],
        G=group, GP=max(16, next_power_of_2(group)), D=d, DP2=next_power_of_2(d), CAP=cap, BLOCK=block(cap),
        UNION=union, LOWBIT=replace, FORMAT=form.code, ROW=form.row, SCALES=form.scale_place, HOT=hot is not None, H=heads,
        WAYS=WAYS, TABLE=blocks is not None, PAGE=block_tokens, PREFIX=prefix is not None,
        SELECTED=selected, **constants(layout), num_warps=4,
    )  # fmt: skip


@operator("gather_attention", mutates=["acc", "ml", "fetched"])
def gather_attention(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool, positions: int = 1, prefix: Tensor | None = None, bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """Attend to the selected tokens, and take their approximate terms out of the low-bit pass's sums.

    Parameters
    ----------
    store : Tensor ``[batch, kv_heads, capacity, *tail]``
        Rows of a :class:`~alaya_hf.kernels.gpu.store_format.StoreFormat`, which its dtype tells; host memory through
        :func:`~alaya_hf.kernels.gpu.host_memory.device_view`.
    ids, counts, thresholds, limits : from `cut`; scores, records : from and for the pass
    acc, ml : Tensor
        Partials ``slot0 ... slot0 + splits(group, cap)`` are written: exact terms minus approximate ones, so single
        weights may be negative; the sum over all partials is not.
    fetched : Tensor ``[batch, kv_heads, positions * splits(group, cap)]`` int32
        Tokens read; their sum over the last dimension is a KV head's.
    union : bool
        Each token serves every query head of its KV head, not only those that selected it.
    replace : bool
        False: nothing is taken out (no residual).
    positions : int
        Positions of the pass, which share nothing: where other shapes say group, there are the query heads of each position
        side by side. ``splits`` is of one position's group.
    prefix, bounds : Tensor, optional
        See :class:`~alaya_hf.kernels.gpu.prefix.Prefix`: a run of places is read from there instead, and `store` has the others.
        `prefix` may also be the rows of the listed places alone, ``[*ids.shape, *tail]``, read where `bounds` says the run is.
    """
    _launch(
        store, q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, None, slot0, scaling, key_bits,
        value_bits, union, replace, positions, prefix=prefix, bounds=bounds,
    )  # fmt: skip


def gather_attention_reference(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool, positions: int = 1, prefix: Tensor | None = None, bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`gather_attention` in plain torch, float32: one partial, the others empty."""
    batch, heads, group, cap = ids.shape
    if positions > 1:
        queries = q.view(batch, heads, positions, group // positions, -1)
        parts = (x.chunk(positions, 2) for x in (ids, counts, thresholds, limits, scores, acc, ml, fetched))
        share = [prefix] * positions
        if prefix is not None and prefix.dim() > ids.dim():
            share = list(prefix.chunk(positions, 2))
        for i, (of_ids, count, threshold, limit, score, sums, weight, reads) in enumerate(zip(*parts, strict=True)):
            gather_attention_reference(
                store, queries[:, :, i].flatten(1, 2), of_ids, count, threshold, limit, score, records, sums, weight, reads,
                slot0, scaling, key_bits, value_bits, union, replace, 1, share[i], bounds,
            )  # fmt: skip
        return
    d, n = q.shape[2], scores.shape[3]
    place = torch.arange(cap, device=ids.device) < counts.unsqueeze(-1)
    listed = torch.zeros(batch, heads, group, n + 1, dtype=torch.bool, device=ids.device)
    listed.scatter_(-1, ids.long().masked_fill(~place, n).clamp(0, n), True)
    listed = listed[..., :n].any(2, keepdim=True)
    above, equal = scores.float() > thresholds.unsqueeze(-1), scores.float() == thresholds.unsqueeze(-1)
    chosen = above | (equal & (torch.arange(n, device=ids.device) <= limits.unsqueeze(-1)))
    mask = listed.expand(-1, -1, group, -1) if union else listed & chosen
    fetched.zero_()
    fetched[..., 0] = listed.sum((2, 3))
    if prefix is not None and bounds is not None:
        if prefix.dim() > ids.dim():
            prefix, bounds = _as_run(prefix, bounds, ids, place, n)
        both = Prefix(prefix, bounds)
        store = torch.stack([both.place_rows(row, store[row], n) for row in range(batch)])
    some = min(n, store.shape[2])
    kv = torch.zeros(batch, heads, n, 2, d, device=q.device)
    kv[:, :, :some] = StoreFormat.of(store, d).unpack(store[:, :, :some].to(q.device))
    kv = torch.where(listed.squeeze(2)[..., None, None], kv, 0.0)
    exact = torch.einsum("bhgd,bhtd->bhgt", q.view(batch, heads, group, d).float(), kv[:, :, :, 0])
    count = splits(group, cap)
    ml[..., slot0 : slot0 + count, 0], ml[..., slot0 : slot0 + count, 1] = float("-inf"), 0.0
    rough = Layout(d, key_bits, value_bits).unpack(records)[1]
    exact = exact.masked_fill(~mask, float("-inf"))
    approximate = scores.float().masked_fill(~mask, float("-inf"))
    top = torch.maximum(exact, approximate).amax(-1)
    shift, factor = top.nan_to_num(neginf=0.0).unsqueeze(-1), scaling * LOG2E
    weights = torch.exp2((exact - shift) * factor)
    acc[..., slot0, :], ml[..., slot0, 1] = weights @ kv[:, :, :, 1], weights.sum(-1)
    if replace:
        weights = torch.exp2((approximate - shift) * factor)
        acc[..., slot0, :] -= weights @ torch.where(listed.squeeze(2)[..., None], rough, 0.0)
        ml[..., slot0, 1] -= weights.sum(-1)
    ml[..., slot0, 0] = top * factor


def _as_run(prefix: Tensor, bounds: Tensor, ids: Tensor, there: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Selected rows as a run of places per batch row, one behind the other; zero where nothing was selected."""
    rows = torch.zeros(ids.shape[1], ids.shape[0] * n, *prefix.shape[4:], dtype=prefix.dtype, device=prefix.device)
    limits = bounds.tolist()
    for b, h, g, x in there.nonzero().tolist():
        if limits[b][0] <= int(ids[b, h, g, x]) < limits[b][1]:
            rows[h, b * n + int(ids[b, h, g, x])] = prefix[b, h, g, x]
    bounds = bounds.clone()
    bounds[:, 2] = torch.arange(ids.shape[0], device=bounds.device) * n
    return rows, bounds


@operator("gather_attention_hot", mutates=["acc", "ml", "fetched", "stamps", "claims", "looked_up", "staged", "missed"])
def gather_attention_hot(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, rows: Tensor, tags: Tensor, stamps: Tensor, claims: Tensor, looked_up: Tensor,
    staged: Tensor, missed: Tensor, total: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool, prefix: Tensor | None = None, bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`gather_attention` with a hot set: the same result, over the bus only what is not in it.

    :func:`~alaya_hf.kernels.gpu.hot_set.insert_hot` has to follow, with the same `total`.

    Parameters
    ----------
    rows, tags, stamps, claims, looked_up
        See :class:`~alaya_hf.kernels.gpu.hot_set.HotSet` (`looked_up`: its ``counts``). What is found is stamped with
        ``total + 1``.
    staged : Tensor ``[batch, kv_heads, splits(group, cap), block(cap), *tail]``
        Receives the rows that came over the bus.
    missed : Tensor ``[batch, kv_heads, splits(group, cap), block(cap)]`` int32
        Receives their places, -1: none.
    total : Tensor ``[batch]`` int32
        Tokens of each row before this step. Must grow from step to step.
    """
    hot = (rows, tags, stamps, claims, looked_up, staged, missed, total)
    _launch(
        store, q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, hot, slot0, scaling, key_bits,
        value_bits, union, replace, prefix=prefix, bounds=bounds,
    )  # fmt: skip


def gather_attention_hot_reference(
    store: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor, records: Tensor,
    acc: Tensor, ml: Tensor, fetched: Tensor, rows: Tensor, tags: Tensor, stamps: Tensor, claims: Tensor, looked_up: Tensor,
    staged: Tensor, missed: Tensor, total: Tensor, slot0: int, scaling: float, key_bits: int, value_bits: int,
    union: bool, replace: bool, prefix: Tensor | None = None, bounds: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`gather_attention_hot` in plain torch; what was missed is staged in ascending order."""
    if prefix is not None and bounds is not None:
        both, n = Prefix(prefix, bounds), scores.shape[3]
        store = torch.stack([both.place_rows(row, store[row], n) for row in range(len(store))])
    known, sets = store.clone(), tags.shape[2]
    missed.fill_(-1)
    for row, head in [(row, head) for row in range(ids.shape[0]) for head in range(ids.shape[1])]:
        listed = {
            token
            for each, count in zip(ids[row, head], counts[row, head], strict=True)
            for token in each[:count].tolist()
        }
        place = 0
        looked_up[0] += len(listed)
        for token in sorted(listed):
            home = token % sets
            ways = tags[row, head, home].tolist()
            if token in ways:
                way = ways.index(token)
                looked_up[1] += 1
                stamps[row, head, home, way] = total[row] + 1
                known[row, head, token] = rows[row, head, home * WAYS + way].to(store.device)
                continue
            claim = ((int(total[row]) + 1) << 32) + 0x7FFFFFFF - token
            claims[row, head, home] = max(claim, int(claims[row, head, home]))
            missed[row, head].view(-1)[place] = token
            staged[row, head].flatten(0, 1)[place] = store[row, head, token].to(staged.device)
            place += 1
    gather_attention_reference(
        known, q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, slot0, scaling, key_bits, value_bits,
        union, replace,
    )  # fmt: skip


__all__ = ["TILE", "block", "gather_attention", "gather_attention_hot", "gather_attention_hot_reference",
           "gather_attention_reference", "splits"]  # fmt: skip


@operator("gather_attention_blocks", mutates=["acc", "ml", "fetched"])
def gather_attention_blocks(
    pool: Tensor, blocks: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor,
    records: Tensor, acc: Tensor, ml: Tensor, fetched: Tensor, block_tokens: int, slot0: int, scaling: float, key_bits: int,
    value_bits: int, union: bool, replace: bool, positions: int = 1,
) -> None:  # fmt: skip
    """:func:`gather_attention` over tokens that lie where an allocator put them: through a block table, nothing is copied.

    Parameters
    ----------
    pool : Tensor
        Flat: the lines of a :class:`~alaya_hf.kernels.gpu.store_table.StoreTable`, where the table's offsets count from; in
        memory that kernels read.
    blocks : Tensor ``[batch, n]`` int64
        Elements from the beginning of `pool` to the first row of each block of a sequence, multiples of 8; a row is a token's
        ``[kv_heads, 2, head_dim]``. :func:`alaya_hf.storage.allocators.block_table` makes them.
    block_tokens : int
        Tokens of a block; 0: a sequence is one run, and has one entry.
    q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, slot0, scaling, key_bits, value_bits, union, replace, \
    positions
        As for :func:`gather_attention`; token ids count from the sequence's first token.

    Raises
    ------
    ValueError
    """
    table_format(pool, blocks, block_tokens, ids.shape[0], q.shape[2])
    _launch(
        pool, q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, None, slot0, scaling, key_bits,
        value_bits, union, replace, positions, blocks, block_tokens,
    )  # fmt: skip


def gather_attention_blocks_reference(
    pool: Tensor, blocks: Tensor, q: Tensor, ids: Tensor, counts: Tensor, thresholds: Tensor, limits: Tensor, scores: Tensor,
    records: Tensor, acc: Tensor, ml: Tensor, fetched: Tensor, block_tokens: int, slot0: int, scaling: float, key_bits: int,
    value_bits: int, union: bool, replace: bool, positions: int = 1,
) -> None:  # fmt: skip
    """:func:`gather_attention_blocks` in plain torch: the listed tokens' rows are brought to where a store has them."""
    batch, heads = ids.shape[:2]
    form = table_format(pool, blocks, block_tokens, batch, q.shape[2])
    row = form.row
    place = torch.arange(ids.shape[3], device=ids.device) < counts.unsqueeze(-1)
    token = torch.where(place, ids.long(), 0)
    which, within = (token // block_tokens, token % block_tokens) if block_tokens else (token * 0, token)
    start = blocks.gather(1, which.view(batch, -1)).view_as(token)
    line = within * heads + torch.arange(heads, device=ids.device).view(1, -1, 1, 1)
    store = pool.new_zeros(batch, heads, int(token.max()) + 1, *form.tail)
    for b, h, g, x in place.nonzero().tolist():
        # Offsets may be negative, of a sequence that lies before the one they count from.
        at = pool.storage_offset() + int(start[b, h, g, x] + line[b, h, g, x] * row)
        store[b, h, token[b, h, g, x]] = torch.as_strided(pool, (row,), (1,), at).view(form.tail)
    gather_attention_reference(
        store, q, ids, counts, thresholds, limits, scores, records, acc, ml, fetched, slot0, scaling, key_bits, value_bits,
        union, replace, positions,
    )  # fmt: skip
