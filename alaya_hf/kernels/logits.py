"""From scores to logits."""

from __future__ import annotations

import torch
from torch import Tensor


def logits_of(scores: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Logits from unscaled scores, with the tanh cap of Gemma 2 where the model has one."""
    logits = scores * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
