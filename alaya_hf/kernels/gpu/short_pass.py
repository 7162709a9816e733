"""One layer's share of a pass of a few tokens: each retrieves for itself, and all read the low-bit copy together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from alaya_hf.kernels.gpu import cut as cut_
from alaya_hf.kernels.gpu import gather, lowbit, merge
from alaya_hf.kernels.gpu.append import append_tokens
from alaya_hf.kernels.gpu.prefix import Prefix
from alaya_hf.kernels.gpu.step import Workspace
from alaya_hf.kernels.gpu.store_table import StoreTable
from alaya_hf.kernels.gpu.window_rows import window_rows_attention

#: Bytes of scores that a pass may keep at a time: the rows of 16 positions over 512K tokens, with 32 query heads.
SCORES_LIMIT = 1 << 29


def positions_at_a_time(batch: int, heads: int, tokens: int, new: int) -> int:
    """Positions of a pass whose scores stay within :data:`SCORES_LIMIT`, in shares as even as it gets.

    A score takes 2 bytes per query head and token. One position is always worked on, as in a step of one token.

    Parameters
    ----------
    heads : int
        Query heads.
    tokens : int
        Capacity of the low-bit copy.
    new : int
        Positions of the pass.
    """
    most = max(1, min(new, SCORES_LIMIT // max(1, 2 * batch * heads * tokens)))
    return -(-new // -(-new // most))


def short_pass(
    work: Workspace, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor | StoreTable,
    records: Tensor, total: Tensor, low: Tensor, init: int, local: int, scaling: float, beta: float, ratio: float = 1.0,
    union: bool = True, watch: Callable[[Workspace, int], None] | None = None, prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with several new tokens, each as :func:`~alaya_hf.kernels.gpu.step.decode_step` would, then append them.

    No host synchronisation: capturable in a CUDA graph. After the last layer, call
    :func:`~alaya_hf.kernels.gpu.window.advance` once, with the number of tokens.

    Parameters
    ----------
    work : Workspace
        Made for ``new`` tokens.
    q : Tensor ``[batch, heads, new, head_dim]``
    k, v : Tensor ``[batch, kv_heads, new, head_dim]``
    window_k, window_v, store, records, total, low, init, local, scaling, beta, ratio, union
        See :func:`~alaya_hf.kernels.gpu.step.decode_step`.
    watch : callable, optional
        Called with the buffers and the first position after each share of the positions.
    prefix : Prefix, optional
        Places whose rows lie elsewhere than in `store`.

    Returns
    -------
    out : Tensor ``[batch, heads, new, head_dim]``
    lse : Tensor ``[batch, heads, new]`` float32
        Both newly made.

    Notes
    -----
    What the low-bit copy held before the pass is estimated, everything behind it attended to exactly: where a step in the
    middle of the pass would have moved tokens to the low-bit copy, later positions see up to ``new + 63`` more tokens exactly
    than steps would. The copy is read once per share of the positions, the store once per position that selected a token.
    """
    batch, heads, new, d = q.shape
    kv_heads = work.kv_heads
    bits = (work.layout.key_bits, work.layout.value_bits)
    # The query heads of a position side by side.
    by_position = q.view(batch, kv_heads, work.group, new, d).transpose(2, 3)
    out = torch.empty(batch, kv_heads, work.group, new, d, dtype=work.dtype, device=q.device)
    lse = torch.empty(batch, kv_heads, work.group, new, device=q.device)
    for start in range(0, new, work.positions):
        count = min(work.positions, new - start)
        part = work if count == work.positions else work.first(count)
        rows = by_position[:, :, start : start + count].reshape(batch, -1, d).contiguous()
        _attend(
            part, rows, k, v, window_k, window_v, store, records, total, low, init, start, scaling, beta, ratio, union, bits,
            prefix,
        )  # fmt: skip
        here = slice(start, start + count)
        out[:, :, :, here] = part.out.view(batch, kv_heads, count, work.group, d).transpose(2, 3)
        lse[:, :, :, here] = part.lse.view(batch, kv_heads, count, work.group).transpose(2, 3)
        if watch is not None:
            watch(part, start)
    to, *blocks = store if isinstance(store, StoreTable) else (store, None, 0)
    append_tokens(
        k, v, window_k, window_v, to, records, total, low, work.left_k, work.left_v, work.first_tile, work.leaving, init,
        local, *bits, None if prefix is None else prefix.bounds, *blocks,
    )  # fmt: skip
    return out.view(batch, heads, new, d), lse.view(batch, heads, new)


def _attend(
    work: Workspace, q: Tensor, k: Tensor, v: Tensor, window_k: Tensor, window_v: Tensor, store: Tensor | StoreTable,
    records: Tensor, total: Tensor, low: Tensor, init: int, first: int, scaling: float, beta: float, ratio: float, union: bool,
    bits: tuple[int, int], prefix: Prefix | None,
) -> None:  # fmt: skip
    """One share of the positions: ``work.out`` and ``work.lse``."""
    positions, main = work.positions, torch.cuda.current_stream(q.device) if work.side is not None else None

    def at_the_window() -> None:
        window_rows_attention(
            q, k, v, window_k, window_v, total, low, work.best, work.acc, work.ml, 0, init, first, positions, scaling
        )

    if work.side is None or main is None:
        at_the_window()
    else:
        work.side.wait_stream(main)
        with torch.cuda.stream(work.side):
            at_the_window()
    lowbit.lowbit_pass(
        records, q, low, work.best, work.tile_max, work.scores, work.acc, work.ml, work.window_parts, work.parts, scaling,
        beta if ratio == 1 else float("inf"), *bits, positions,
    )  # fmt: skip
    if work.side is not None and main is not None:
        main.wait_stream(work.side)
    cut_.cut(
        work.tile_max, work.scores, work.best, work.ml, low, work.ids, work.counts, work.thresholds, work.limits, work.chosen,
        work.window_parts, work.parts, scaling, beta, ratio,
    )  # fmt: skip
    selected = (q, work.ids, work.counts, work.thresholds, work.limits, work.scores, records)
    to, how = (
        (work.acc, work.ml, work.fetched),
        (work.window_parts + work.parts, scaling, *bits, union, True, positions),
    )
    if isinstance(store, StoreTable):
        gather.gather_attention_blocks(store.rows, store.blocks, *selected, *to, store.block_tokens, *how)
    else:
        where = (None, None) if prefix is None else prefix.selected(work.ids, work.counts)
        gather.gather_attention(store, *selected, *to, *how, *where)
    merge.merge_partials(work.acc, work.ml, work.out, work.lse, work.best)
