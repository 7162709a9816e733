"""Decoder blocks compiled one by one, with the cache left as it is."""

from __future__ import annotations

import functools
import threading
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
        before, _running.number = _running.number, self.number
        try:
            return self.compiled(*args, **kwargs)
        finally:
            _running.number = before


class _Running(threading.local):
    """What opaque functions have to know about the block that runs in this thread."""

    #: None outside of compiled blocks, where functions do what they always do.
    number: int | None = None
    #: Between a layer's update and its attention: the compiler cannot carry tensors that refuse computations.
    handles: tuple[Any, Any] | None = None


_running = _Running()

#: Attention functions and the cache's class are everybody's: one at a time.
_LOCK = threading.RLock()

#: A model's blocks: compiled once, whatever the number of caches.
_BLOCKS: WeakKeyDictionary[nn.Module, list[_Block]] = WeakKeyDictionary()


@functools.cache
def _opaque_update(update: Callable[..., Any]) -> Callable[..., Any]:
    """The same update, which the compiler calls and does not look into; the handles stay here."""

    def run(
        cache: Any, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        number = _running.number
        handles = update(cache, keys, values, layer_idx if number is None else number, *args, **kwargs)
        if number is None or not isinstance(handles[0], KVHandle):
            return handles
        _running.handles = handles
        return keys, values

    return torch.compiler.disable(run)


@functools.cache
def _opaque_attention(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The same attention function, given the handles and its number back."""

    def run(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        number = _running.number
        if number is None:
            return attention(module, query, key, value, *args, **kwargs)
        if _running.handles is not None:
            key, value = _running.handles
            _running.handles = None
        before, module.layer_idx = module.layer_idx, number
        try:
            return attention(module, query, key, value, *args, **kwargs)
        finally:
            module.layer_idx = before

    return torch.compiler.disable(run)


def decoder_blocks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Blocks and the modules in them that know its number."""
    # Transformers names the classes that no device map may split: the decoder's blocks.
    names = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in names:
            numbered = [part for part in module.modules() if isinstance(getattr(part, "layer_idx", None), int)]
            if len({part.layer_idx for part in numbered}) == 1:
                yield module, numbered


def _blocks(model: nn.Module, backend: str) -> list[_Block]:
    found, known = list(decoder_blocks(model)), _BLOCKS.get(model)
    if known is None or [block.module for block in known] != [module for module, _ in found]:
        # A step's products have one row: the compiler's own kernels need tuning for that.
        how: dict[str, Any] = {"options": {"coordinate_descent_tuning": True}} if backend == "inductor" else {}
        _BLOCKS[model] = [
            _Block(
                int(numbered[0].layer_idx),  # type: ignore[arg-type]
                module,
                numbered,
                torch.compile(module._call_impl, dynamic=False, backend=backend, **how),
            )
            for module, numbered in found
        ]
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
    make the compiler trace every block anew: while this lasts, blocks do not know theirs, so nobody else may run the model.
    Models whose blocks are not known run as they are.
    """
    import torch._dynamo as dynamo

    with _LOCK, _patched(model, cache_class, backend, dynamo.config):
        yield


@contextmanager
def _patched(model: nn.Module, cache_class: Any, backend: str, compiler: Any) -> Iterator[None]:
    blocks, attention = _blocks(model, backend), AttentionInterface._global_mapping
    if not blocks:
        yield
        return
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    functions = {name: attention[name] for name in {NAME, *ROUTED, implementation} if name in attention}
    update, before = cache_class.update, [block.module._compiled_call_impl for block in blocks]
    # Blocks of other shapes (a hybrid model's) are traced apart.
    limits: dict[str, Any] = {name: 64 for name in ("recompile_limit", "accumulated_recompile_limit")}
    limits = {name: max(value, getattr(compiler, name)) for name, value in limits.items() if hasattr(compiler, name)}
    try:
        attention.update({name: _opaque_attention(function) for name, function in functions.items()})
        cache_class.update = _opaque_update(update)
        for block in blocks:
            block.module._compiled_call_impl = block.call  # type: ignore[assignment]
            for part in block.numbered:
                part.layer_idx = _ANY  # type: ignore[assignment]
        with compiler.patch(**limits):
            yield
    finally:
        _running.handles = None
        attention.update(functions)
        cache_class.update = update
        for block, own in zip(blocks, before, strict=True):
            block.module._compiled_call_impl = own  # type: ignore[assignment]
            for part in block.numbered:
                part.layer_idx = block.number  # type: ignore[assignment]
