"""The tensors that a cache returns in place of keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alaya_hf.errors import IgnoredCacheError

# Reading these tells nothing about the values, so model code may do it freely.
_METADATA = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.__len__,
    Tensor.__repr__,
}


class KVHandle(Tensor):
    """The new keys or values of a forward pass, carrying the layer that knows all the earlier ones.

    ``Cache.update`` never sees the query and the attention function never sees the cache: this handle is the link. An
    attention function that knows it asks ``handle.layer`` to attend. Every other computation on it would be attention to
    the new tokens alone, so it raises.

    Attributes
    ----------
    layer : AlayaLayer
        The layer to ask.
    """

    layer: Any

    @staticmethod
    def wrap(tensor: Tensor, layer: Any) -> KVHandle:
        """A handle over ``tensor``; shares its memory."""
        handle = tensor.detach().as_subclass(KVHandle)
        handle.layer = layer
        return handle

    def plain(self) -> Tensor:
        """The tensor itself."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise IgnoredCacheError(
            f"an attention implementation computed with the keys of an AlayaCache itself ({_name(func)}), although they are "
            "only the new tokens: everything earlier would be ignored. Expected the attention implementation 'alaya' (or "
            "'sdpa' / 'flash_attention_2' while the routing patch is on). Call model.set_attn_implementation(\"alaya\")."
        )


def _name(func: Any) -> str:
    return getattr(func, "__name__", None) or str(func)
