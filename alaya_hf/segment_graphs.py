"""Runs of a model's decoder blocks as CUDA graphs, one for each run of blocks on one device."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from alaya_hf.storage.pinned import CAPTURING

_PLAIN = (bool, int, float, str, type(None))

#: A model's blocks are everybody's: one replay at a time.
_LOCK = threading.RLock()


@functools.lru_cache(maxsize=16)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Capture what is done on `device`; whatever happens, stream and allocator are then as they were."""
    # One capture at a time: what a second one does meanwhile could end up in the first.
    with CAPTURING, torch.cuda.device(device), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA Graph is empty.*")
        before, pool = torch.cuda.current_stream(device), torch.cuda.graph_pool_handle()
        stream = _capture_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield
        except BaseException:
            # An invalidated capture leaves the allocator giving memory to its pool.
            with suppress(Exception):
                torch._C._cuda_endAllocateToPool(device.index, pool)
            raise
        finally:
            torch.cuda.set_stream(before)


class _Segment:
    """A run of blocks on one device: what it is called with, in buffers that stay, and what it returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # A cache does not keep a model.
        self.blocks: list[weakref.ref[nn.Module]] = []
        self.graph = torch.cuda.CUDAGraph()
        self._open: Any = None
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self.tensors: list[Tensor] = []
        self.plain: list[Any] = []
        self.out: Tensor | None = None

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Make the buffers, before anything is captured: what comes from another device cannot be part of the graph."""
        leaves = tree_flatten((args, kwargs))[0]
        for given in leaves:
            if isinstance(given, Tensor) and id(given) not in self._known:
                # The original stays too, so that nobody else gets its identity.
                self._known[id(given)] = given, torch.empty_like(given, device=self.device).copy_(given)
        self.tensors = [self._known[id(given)][1] for given in leaves if isinstance(given, Tensor)]
        self.plain = [given for given in leaves if isinstance(given, _PLAIN)]
        self._open = captured(self.graph, self.device)
        self._open.__enter__()

    def inside(self, value: Any) -> Any:
        """A block's argument, tensors from outside replaced by their buffers."""
        if not isinstance(value, Tensor) or value is self.out:
            return value
        if id(value) not in self._known:
            raise RuntimeError("a block was called with a tensor that the first one on its device was not called with")
        return self._known[id(value)][1]

    def run(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Call a block with the buffers, captured."""
        if not args or not isinstance(args[0], Tensor):
            raise RuntimeError("a block was not called with the hidden states first")
        if self.out is not None and args[0] is not self.out:
            raise RuntimeError("the model changes hidden states between its blocks")
        args, kwargs = tree_map(self.inside, args), tree_map(self.inside, kwargs)
        found = self.compute(block, args, kwargs)
        if not isinstance(found, Tensor):
            raise RuntimeError(f"a block returned a {type(found).__name__}, and not its hidden states alone")
        self.out = found
        return found

    @staticmethod
    def compute(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block's call returns, hooks included."""
        return block._call_impl(*args, **kwargs)

    def end(self) -> None:
        """Close the graph."""
        opened, self._open = self._open, None
        opened.__exit__(None, None, None)
        self._known.clear()

    def give_up(self) -> None:
        """Leave a capture that did not come to its end."""
        opened, self._open = self._open, None
        if opened is not None:
            with suppress(Exception):
                error = RuntimeError("the pass ended inside a run of blocks")
                opened.__exit__(type(error), error, None)

    def replay(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """All of its blocks, over new inputs; on the current streams of their devices, which wait for each other.

        Raises
        ------
        RuntimeError
            If it is called with something else than what was captured.
        """
        leaves = tree_flatten((args, kwargs))[0]
        given = [value for value in leaves if isinstance(value, Tensor)]
        plain = [value for value in leaves if isinstance(value, _PLAIN)]
        if plain != self.plain or [x.shape for x in given] != [x.shape for x in self.tensors]:
            raise RuntimeError("a block is called with other arguments than those it was captured with")
        copied = set()
        for target, value in zip(self.tensors, given, strict=True):
            if id(target) not in copied:
                copied.add(id(target))
                target.copy_(value, non_blocking=True)
        self.graph.replay()
        assert self.out is not None
        return self.out


class SegmentGraphs:
    """A model's blocks, captured during one of its calls and replayed during others.

    The model's own forward pass runs every time, with Accelerate's hooks: embedding, rotary embedding, norm and head as they
    are. Of the blocks on one device the first replays the graph of all of them; the others hand on what they are given. Hidden
    states go from device to device by copies between the devices' current streams.

    Parameters
    ----------
    blocks : sequence of Module
        Decoder blocks in the order of the layers.
    devices : sequence of device
        Of each.
    at_end : callable
        Called with a device where the last graph on it ends; what it does becomes part of that graph.

    Notes
    -----
    Blocks have to take hidden states as their first argument, return them alone, and hand them on unchanged; all tensors that
    blocks of one device are called with have to be the first one's. Other models raise while they are captured.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], devices: Sequence[torch.device], at_end: Callable[[torch.device], None]
    ) -> None:
        self.segments: list[_Segment] = []
        for block, device in zip(blocks, devices, strict=True):
            if not self.segments or self.segments[-1].device != device:
                self.segments.append(_Segment(device))
            self.segments[-1].blocks.append(weakref.ref(block))
        last = {segment.device: segment for segment in self.segments}
        self._at_end = [at_end if last[segment.device] is segment else None for segment in self.segments]
        self._last = len(self.segments) - 1, len(self.segments[-1].blocks) - 1

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Capture the blocks of the call inside; nothing of them is computed.

        Raises
        ------
        RuntimeError
            If they cannot be, or the call did not run all of them.
        """
        try:
            with self._patched(self._capture):
                yield
            if any(segment.out is None or segment._open is not None for segment in self.segments):
                raise RuntimeError("the model did not run all of its blocks")
        finally:
            self._at_end = [None] * len(self.segments)  # whose owner owns this
            for segment in self.segments:
                segment.give_up()

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Replay the blocks of the call inside."""
        with self._patched(self._replay):
            yield

    def _capture(
        self, number: int, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        segment, at_end = self.segments[number], self._at_end[number]
        if place == 0:
            segment.begin(args, kwargs)
        found = segment.run(block, args, kwargs)
        if place == len(segment.blocks) - 1:
            if at_end is not None:
                at_end(segment.device)
            segment.end()
        return found

    def _replay(
        self, number: int, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        segment = self.segments[number]
        if place == 0:
            found = segment.replay(args, kwargs)
        else:
            found = args[0]
            if found is not segment.out:
                raise RuntimeError("the model changes hidden states between its blocks, and did not when captured")
        # What leaves the last block may leave the model: the next replay overwrites the graph's own.
        return found.clone() if (number, place) == self._last else found

    @contextmanager
    def _patched(self, call: Callable[..., Tensor]) -> Iterator[None]:
        before: list[tuple[nn.Module, Any]] = []
        with _LOCK:
            try:
                for number, segment in enumerate(self.segments):
                    for place, reference in enumerate(segment.blocks):
                        block = reference()
                        if block is None:
                            raise RuntimeError("the model whose blocks were captured is gone")
                        before.append((block, block._compiled_call_impl))
                        mine = functools.partial(call, number, place, block)
                        # Where torch.compile puts itself: around the block's own call and its hooks.
                        block._compiled_call_impl = _Mine(mine, before[-1][1] or block._call_impl)  # type: ignore[assignment]
                yield
            finally:
                for block, own in before:
                    block._compiled_call_impl = own


class _Mine:
    """One call in the thread that made this, another one in others."""

    def __init__(self, mine: Callable[..., Tensor], others: Callable[..., Any]) -> None:
        self._mine, self._others, self._thread = mine, others, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return self._others(*args, **kwargs)
        return self._mine(args, kwargs)
