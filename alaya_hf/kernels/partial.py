"""Partial attention results and their exact merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Partial:
    """Attention over a subset of the tokens.

    Attributes
    ----------
    out : Tensor
        ``[..., head_dim]`` float32, the softmax-weighted mean of the values of this subset alone. Zero for an empty set.
    lse : Tensor
        ``[...]`` float32, natural logarithm of the sum of ``exp(logit)`` over the subset. ``-inf`` for an empty set.
    """

    out: Tensor
    lse: Tensor

    @staticmethod
    def empty(shape: Sequence[int], head_dim: int, device: torch.device | str = "cpu") -> Partial:
        """The partial of no tokens: merging it changes nothing."""
        return Partial(
            torch.zeros(*shape, head_dim, dtype=torch.float32, device=device),
            torch.full(tuple(shape), float("-inf"), dtype=torch.float32, device=device),
        )

    def reshape(self, *shape: int) -> Partial:
        """Reshape the leading dimensions; ``head_dim`` stays last."""
        return Partial(self.out.reshape(*shape, self.out.shape[-1]), self.lse.reshape(*shape))

    def to(self, device: torch.device | str) -> Partial:
        """Move both tensors."""
        return Partial(self.out.to(device), self.lse.to(device))


def merge(partials: Sequence[Partial]) -> Partial:
    """Merge partials over disjoint token sets into the attention over their union.

    Exact up to rounding and independent of the order. All inputs share one shape and device.

    Parameters
    ----------
    partials : sequence of Partial
        At least one.

    Returns
    -------
    Partial
        Where every input is empty, the result is empty too (zeros and ``-inf``).

    Notes
    -----
    The log-sum-exp merge of FlashAttention's split-KV decoding; also the "data-centric attention" of AlayaDB
    (arXiv 2504.10326, section 7.2).
    """
    if not partials:
        raise ValueError("merge needs at least one partial, but got none")
    if len(partials) == 1:
        return partials[0]
    lses = torch.stack([partial.lse for partial in partials])
    total = torch.logsumexp(lses, dim=0)
    # Where all sets are empty the total is -inf; subtracting it would give nan.
    weights = torch.exp(lses - torch.where(torch.isneginf(total), torch.zeros_like(total), total))
    # float32 rounds the total of large logits too coarsely for weights that sum to one.
    weights = weights / weights.sum(dim=0).clamp_min(torch.finfo(weights.dtype).tiny)
    out = partials[0].out * weights[0].unsqueeze(-1)
    for partial, weight in zip(partials[1:], weights[1:], strict=True):
        out = out + partial.out * weight.unsqueeze(-1)
    return Partial(out, total)


def merge_into(total: Partial, part: Partial) -> Partial:
    """Merge a partial into another one in place: like :func:`merge`, with the memory of one of them.

    Parameters
    ----------
    total : Partial
        Overwritten with the result, which is returned.
    part : Partial
        Of the same shape and device, over other tokens.
    """
    # The share of the part; where both are empty it is 0 instead of nan.
    share = torch.sigmoid(part.lse - total.lse).masked_fill_(torch.isneginf(part.lse), 0.0)
    total.out.lerp_(part.out, share.unsqueeze(-1))
    total.lse = torch.logaddexp(total.lse, part.lse)
    return total
