"""Decoder blocks compiled one by one, with the cache left as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from alaya_hf.attention import NAME
from alaya_hf.handle import KVHandle
from alaya_hf.patches.routing import ROUTED

#: What the modules of all blocks say their number is.
_ANY = 0


@dataclass
class _Block:
    """A decoder block: its number, the modules in it that know the number, and its compiled call."""

    number: int
    module: nn.Module
    numbered: list[nn.Module]
    compiled: Callable[..., Any]

    def call(self, *args: Any, **kwargs: Any) -> Any:
        _running.number = self.number
        return self.compiled(*args, **kwargs)


@dataclass
class _Running:
    """What opaque functions have to know about the block that runs."""

    number: int = 0
    #: Between a layer's update and its attention: the compiler cannot carry tensors that refuse computations.
    handles: tuple[Any, Any] | None = None


_running = _Running()

#: A model's blocks: compiled once, whatever the number of caches.
_BLOCKS: WeakKeyDictionary[nn.Module, list[_Block]] = WeakKeyDictionary()


@functools.cache
def _opaque_update(update: Callable[..., Any]) -> Callable[..., Any]:
    """The same update, which the compiler calls and does not look into; the handles stay here."""

    def run(
        cache: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        handles = update(cache, keys, values, _running.number, *args, **kwargs)
        if not isinstance(handles[0], KVHandle):
            return handles
        _running.handles = handles
        return keys, values

    return torch.compiler.disable(run)


@functools.cache
def _opaque_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention function, given the handles and its number back."""

    def run(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if _running.handles is not None:
            key, value = _running.handles
            _running.handles = None
        module.layer_idx = _running.number
        try:
            return attention(module, query, key, value, *args, **kwargs)
        finally:
            module.layer_idx = _ANY

    return torch.compiler.disable(run)


def _blocks(model: nn.Module, backend: str) -> list[_Block]:
    if model not in _BLOCKS:
        # Transformers names the classes that no device map may split: the decoder's blocks.
        names = set(getattr(model, "_no_split_modules", None) or ())
        found = []
        # Products of one row with a weight: tuned kernels read it 10 % faster.
        how: dict[str, Any] = {"options": {"coordinate_descent_tuning": True}} if backend == "inductor" else {}
        for module in model.modules():
            numbered = [part for part in module.modules() if isinstance(getattr(part, "layer_idx", None), int)]
            if type(module).__name__ not in names or len({part.layer_idx for part in numbered}) != 1:
                continue
            compiled = torch.compile(module._call_impl, dynamic=False, backend=backend, **how)
            found.append(_Block(int(numbered[0].layer_idx), module, numbered, compiled))  # type: ignore[arg-type]
        _BLOCKS[model] = found
    return _BLOCKS[model]


@contextmanager
def compiled_blocks(model: nn.Module, cache_class: Any, backend: str = "inductor") -> Iterator[None]:
    """Run a model's blocks compiled while this lasts; what an AlayaCache does stays outside of the compiled parts.

    Parameters
    ----------
    model : nn.Module
        A Transformers model. Its blocks are compiled at the first call, in this process once.
    cache_class : type
        Of the cache in use, whose ``update`` the compiler is not to look into.
    backend : str
        Of ``torch.compile``.

    Notes
    -----
    Compiled in parts, around the cache's update and the attention function, which run as they are. A number of its own would
    make the compiler trace every block anew: while this lasts, blocks do not know theirs.
    """
    import torch._dynamo as dynamo

    blocks, attention = _blocks(model, backend), AttentionInterface._global_mapping
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    functions = {name: attention[name] for name in {NAME, *ROUTED, implementation} if name in attention}
    update, before = cache_class.update, [block.module._compiled_call_impl for block in blocks]
    # Blocks of other shapes (a hybrid model's) are traced apart.
    limits: dict[str, Any] = {name: 64 for name in ("recompile_limit", "accumulated_recompile_limit")}
    limits = {
        name: max(value, getattr(dynamo.config, name)) for name, value in limits.items() if hasattr(dynamo.config, name)
    }
    try:
        attention.update({name: _opaque_attention(function) for name, function in functions.items()})
        cache_class.update = _opaque_update(update)
        for block in blocks:
            block.module._compiled_call_impl = block.call  # type: ignore[assignment]
            for part in block.numbered:
                part.layer_idx = _ANY  # type: ignore[assignment]
        with dynamo.config.patch(**limits):
            yield
    finally:
        _running.handles = None
        attention.update(functions)
        cache_class.update = update
        for block, own in zip(blocks, before, strict=True):
            block.module._compiled_call_impl = own  # type: ignore[assignment]
            for part in block.numbered:
                part.layer_idx = block.number  # type: ignore[assignment]
