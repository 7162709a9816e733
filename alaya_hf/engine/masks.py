"""What a prepared attention mask says about padding."""

from __future__ import annotations

import torch
from torch import Tensor

from alaya_hf.errors import UnsupportedMaskError


def padding_of(mask: Tensor, new: int, past: int, batch: int, known: Tensor | None) -> Tensor | None:
    """Which new tokens a 4-D mask treats as padding; it has to be causal + padding.

    Parameters
    ----------
    mask : Tensor
        ``[batch or 1, 1, new, past + new]``, bool (true: visible) or additive (0: visible).
    new, past, batch : int
        New tokens, cached tokens, sequences.
    known : Tensor or None
        ``[batch, past]`` bool: which cached columns are tokens; None: all.

    Returns
    -------
    Tensor or None
        ``[batch, new]`` bool on the host, false where padding; None: no padding.

    Raises
    ------
    UnsupportedMaskError
        For any other pattern or shape, or if the padding of cached tokens changed.
    """
    columns = past + new
    if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[2:] != (new, columns):
        raise UnsupportedMaskError(
            f"AlayaCache takes masks [batch, 1, {new}, {columns}] that are causal + padding, but got shape "
            f"{tuple(mask.shape)}. Pass a 2-D attention_mask [batch, {columns}] instead."
        )
    seen = (mask if mask.dtype == torch.bool else mask == 0).to("cpu")
    seen = seen.expand(batch, 1, new, columns)[:, 0]
    valid = seen[:, -1]
    before = known if known is not None else torch.ones(len(valid), past, dtype=torch.bool)
    causal = torch.ones(new, columns, dtype=torch.bool).tril(past)
    # Rows of padding queries see whatever they like: their output is never used.
    wrong = (seen != causal & valid.unsqueeze(1)) & valid[:, past:].unsqueeze(-1)
    # Unless they look at padding among themselves: then they are a packed sequence of their own.
    packed = (seen & ~valid.unsqueeze(1)).any(dim=-1) & ~seen.all(dim=-1)
    if bool(wrong.any()) or bool(packed.any()) or not torch.equal(valid[:, :past], before):
        raise UnsupportedMaskError(
            "AlayaCache takes attention masks that are causal + padding, but the 4-D mask given is something else "
            "(packed sequences, bidirectional or tree attention). Pass a 2-D attention_mask, or use a DynamicCache."
        )
    return None if bool(valid[:, past:].all()) else valid[:, past:]
