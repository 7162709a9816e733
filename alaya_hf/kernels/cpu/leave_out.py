"""Takes tokens out of a table of scores."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit

__all__ = ["leave_out", "leave_out_reference"]

_ALL = np.empty((0, 0), np.uint8)


@njit(cache=True, nogil=True, error_model="numpy")
def _leave_out(scores, ids, offsets, mask, masked):
    for head in range(scores.shape[0]):
        for place in range(offsets[head], offsets[head + 1]):
            token = ids[place]
            for g in range(scores.shape[1]):
                if not masked or mask[g, place]:
                    scores[head, g, token] = -np.inf


def leave_out(
    scores: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Set the scores of chosen tokens to ``-inf``, in place.

    Parameters
    ----------
    scores : Tensor ``[kv_heads, group, tokens]`` float32
        Changed.
    ids, offsets, mask
        As in :func:`~alaya_hf.kernels.cpu.gather.gather_attention`; without a mask for every query head of the group.

    Returns
    -------
    Tensor
        ``scores``.
    """
    _leave_out(scores.numpy(), ids.numpy(), offsets.numpy(), _ALL if mask is None else mask.numpy(), mask is not None)
    return scores


def leave_out_reference(
    scores: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Plain torch, see :func:`leave_out`."""
    counts = offsets[1:] - offsets[:-1]
    head = torch.repeat_interleave(torch.arange(len(counts)), counts)
    if mask is None:
        scores[head, :, ids.long()] = float("-inf")
    else:
        group, place = mask.nonzero(as_tuple=True)
        scores[head[place], group, ids[place].long()] = float("-inf")
    return scores
