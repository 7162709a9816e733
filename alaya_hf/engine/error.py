"""An estimate of how far a step's output is from exact attention's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from alaya_hf.engine.residual import BlockMean, LowBit
from alaya_hf.index import Hits
from alaya_hf.kernels import host
from alaya_hf.kernels.cpu.lowbit import GROUP, VALUE_GROUP
from alaya_hf.kernels.cpu.select import row_max
from alaya_hf.storage import Piece

_BLOCKS = 16  # blocks of 64 tokens looked at per segment


@dataclass(frozen=True)
class Spread:
    """How values, and what stands for them, are spread in a segment; root mean squares of norms, ``[kv_heads]``.

    Attributes
    ----------
    values : Tensor
        Distance of a value from the mean of all.
    stand_in : Tensor
        Distance of a value from what the residual reads in its place.
    keys : Tensor or None
        ``[kv_heads, head_dim]``, variance of the error of a key's channel; None: masses come from exact keys.
    """

    values: Tensor
    stand_in: Tensor
    keys: Tensor | None


_known: WeakKeyDictionary[Any, dict[Any, tuple[int, Spread]]] = WeakKeyDictionary()


def spread_of(segment: Any, residual: Any) -> Spread:
    """The spread in a segment, from some of its tokens; looked at again when it has doubled.

    Parameters
    ----------
    segment : Segment
    residual : Residual
    """
    kept = _known.setdefault(segment, {})
    found = kept.get(residual)
    if found is None or segment.used >= 2 * found[0]:
        found = kept[residual] = segment.used, _measure(segment, residual)
    return found[1]


def _measure(segment: Any, residual: Any) -> Spread:
    blocks = max(1, segment.used // GROUP)
    chosen = torch.linspace(0, blocks - 1, min(_BLOCKS, blocks)).long().unique().tolist()
    parts = [segment.read(b * GROUP, min(segment.used, (b + 1) * GROUP)).float() for b in chosen]
    values = torch.cat([part[:, :, 1] for part in parts], dim=1)
    spread = (values - values.mean(1, keepdim=True)).square().sum(-1).mean(1).sqrt()
    if isinstance(residual, LowBit):
        channels = values.split(VALUE_GROUP, dim=-1)
        top = (1 << residual.value_bits) - 1
        # Rounding to a step is uniform within it: variance step^2 / 12 per channel.
        variance = sum(((c.amax(-1) - c.amin(-1)) / top).square() / 12 * c.shape[-1] for c in channels)
        assert isinstance(variance, Tensor)
        steps = torch.stack([part[:, :, 0].amax(1) - part[:, :, 0].amin(1) for part in parts]) / (
            (1 << residual.key_bits) - 1
        )
        return Spread(spread, variance.mean(1).sqrt(), steps.square().mean(0) / 12)
    if isinstance(residual, BlockMean):
        width = min(residual.block, values.shape[1])
        whole = values[:, : values.shape[1] // width * width].unflatten(1, (-1, width))
        return Spread(spread, (whole - whole.mean(2, keepdim=True)).square().sum(-1).mean((1, 2)).sqrt(), None)
    return Spread(spread, spread, None)


def piece_error(
    q: Tensor, piece: Piece, hits: Hits, mask: Tensor | None, residual: Any, left: Tensor | None, total: Tensor, scaling: float
) -> Tensor:  # fmt: skip
    """Root mean square of the error of the output that one piece of a row's context brings.

    Parameters
    ----------
    q : Tensor
        ``[kv_heads, group, head_dim]`` float32.
    piece, hits, mask
        As for :meth:`Residual.estimate`, after it; the scores of ``hits`` are used up.
    residual : Residual
    left : Tensor or None
        ``[kv_heads, group]`` log-sum-exp of the left-out tokens as the residual sees them; None without a residual.
    total : Tensor
        ``[kv_heads, group]`` log-sum-exp of everything.
    scaling : float

    Returns
    -------
    Tensor
        ``[kv_heads, group]`` float32, in units of values; nan where nothing is known of the tokens left out.

    Notes
    -----
    With weights ``p_j`` of the left-out tokens and independent errors of size `e`, the error is ``e * sqrt(sum p_j^2)``, at most
    ``e * sqrt(m * p_max)`` with their mass `m` and largest weight. `e` is the spread of values within a block (block means), or
    the rounding of a value and the spread of values times the error of a logit (low bit). Without a residual the mass is missing
    altogether: ``m`` times the spread of values. Costs a pass over the scores of the tokens left out.
    """
    spread = spread_of(piece.segment, residual)
    top: Tensor | None = None
    scores = hits.all_scores
    if scores is not None:
        host.leave_out(scores, hits.ids, hits.offsets, mask)
        top = row_max(scores.contiguous()) * scaling
        if left is None:
            left = torch.logsumexp(scores * scaling, dim=-1)
    if left is None:
        return torch.full(q.shape[:2], math.nan)
    mass = torch.exp(left - total).clamp(max=1.0)
    if residual.is_none:
        return mass * spread.values.unsqueeze(1)
    largest = mass if top is None else torch.minimum(mass, torch.exp(top - total))
    error = spread.stand_in.unsqueeze(1)
    if spread.keys is not None:
        logit = scaling * torch.einsum("hgd,hd->hg", q.square(), spread.keys).sqrt()
        error = torch.sqrt(error.square() + (logit.clamp(max=1.0) * spread.values.unsqueeze(1)).square())
    return torch.sqrt(mass * largest) * error


def relative(error: Tensor, out: Tensor) -> Tensor:
    """Errors as shares of the norm of the output.

    Parameters
    ----------
    error : Tensor
        ``[batch, heads, q_len]``.
    out : Tensor
        ``[batch, heads, q_len, head_dim]``.
    """
    return error / out.float().norm(dim=-1).to(error.device).clamp(min=1e-12)
