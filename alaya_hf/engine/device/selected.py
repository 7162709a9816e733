"""What a step selected, in tokens, whatever its kernels count in. Waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.coarse_step import CoarseWorkspace
from alaya_hf.kernels.gpu.step import Workspace


def selected_tokens(work: Workspace | CoarseWorkspace, lows: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens that each query head selected, on the host.

    Parameters
    ----------
    work : Workspace or CoarseWorkspace
        As the step left it.
    lows : list of int
        Tokens of each row that it chose from.

    Returns
    -------
    counts : Tensor ``[batch, kv_heads, group]`` int32
    ids : Tensor ``[batch, kv_heads, group, most]`` int64
        Places in the store, ascending; the first `counts` are meant.
    """
    counts, ids = work.counts.to("cpu"), work.ids.to("cpu").long()
    if not isinstance(work.layout, BlockLayout):
        return counts, ids
    block, low = work.layout.tokens, torch.tensor(lows, dtype=torch.int32).view(-1, 1, 1)
    if not work.cap:
        return counts, ids
    last = ids.gather(3, (counts.long() - 1).clamp_min(0).unsqueeze(3)).squeeze(3)
    # A row's last block may be short; it comes last in every list.
    short = torch.where(counts > 0, (block * (last + 1) - low).clamp_min(0), 0)
    tokens = (ids.unsqueeze(4) * block + torch.arange(block)).flatten(3)
    return counts * block - short.int(), tokens
