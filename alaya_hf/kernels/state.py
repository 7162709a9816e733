"""Tensors that come back from a file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def expect_tensors(
    state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], shapes: Mapping[str, tuple[int, ...]] | None = None
) -> list[Tensor]:
    """The tensors of a stored state, in the order of ``dtypes``, after a look at what they are.

    Parameters
    ----------
    state : mapping of str to Tensor
    dtypes : mapping of str to dtype
        The names expected.
    shapes : mapping of str to tuple, optional
        Their shapes, where known.

    Raises
    ------
    ValueError
        If one is missing, or of another dtype or shape: kernels take both on trust.
    """
    tensors = []
    for name, dtype in dtypes.items():
        tensor = state.get(name)
        if tensor is None or tensor.dtype != dtype or (shapes is not None and tuple(tensor.shape) != shapes[name]):
            given = "nothing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            wanted = f"{dtype}" + ("" if shapes is None else f" {shapes[name]}")
            raise ValueError(f"expected {name} as {wanted}, but the stored state has {given}.")
        tensors.append(tensor)
    return tensors
