"""The decode step of a whole model, or a pass of a few tokens, as one CUDA graph, behind an ordinary cache."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.utils import ModelOutput

from alaya_hf.cache_argument import CACHE_ARGUMENT, CACHE_ARGUMENTS, cache_argument
from alaya_hf.compiled_blocks import compiled_blocks, decoder_blocks
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device.shared import Counters
from alaya_hf.probes import Probe
from alaya_hf.segment_graphs import SegmentGraphs, captured

if TYPE_CHECKING:
    from alaya_hf.engine.device.tokens import DeviceTokens

Forward = Callable[..., Any]

_PLAIN = (bool, int, float, str, type(None))


def _one_device(model: Any) -> bool:
    """Whether Accelerate left the model on one device: a graph belongs to one.

    Weights that are offloaded come to the device for a pass, each time elsewhere: their modules hold meta tensors in between.
    """
    if len(set(getattr(model, "hf_device_map", {None: 0}).values())) != 1:
        return False
    return not any(weight.is_meta for weight in model.parameters())


def _several_devices(model: Any) -> bool:
    """Whether Accelerate spread the model over GPUs, and left no part of it elsewhere."""
    devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
    return (
        len(devices) > 1 and not devices & {"cpu", "disk"} and not any(weight.is_meta for weight in model.parameters())
    )


@dataclass
class _Inputs:
    """What a step is called with: fixed values, and tensors that change from step to step."""

    fixed: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, kwargs: Mapping[str, Any], columns: int) -> _Inputs | None:
        """None where a graph could not stand in for the call."""
        ids = kwargs.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1] or not ids.is_cuda:
            return None
        fixed: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, value in kwargs.items():
            if name in (CACHE_ARGUMENT, "attention_mask"):
                continue
            if isinstance(value, Tensor) and value.device == ids.device:
                tensors[name] = value
            elif isinstance(value, _PLAIN):
                fixed[name] = value
            else:
                return None
        asked = ("output_attentions", "output_hidden_states", "labels", "inputs_embeds")
        if any(fixed.get(name) not in (None, False) or name in tensors for name in asked):
            return None
        if fixed.get("return_dict") is False or fixed.get("use_cache") is False:
            return None
        if "position_ids" not in tensors:
            if any("rope_deltas" in module.__dict__ for module in model.modules()):
                return None  # its positions are not the cache's length
            # The model would take it from the cache's length, a number on the host.
            fixed.pop("position_ids", None)
            positions = torch.arange(columns, columns + ids.shape[1], device=ids.device, dtype=ids.dtype)
            tensors["position_ids"] = positions.expand_as(ids).contiguous()
        return cls(fixed, tensors)

    @property
    def new(self) -> int:
        """Tokens of each row."""
        return self.tensors["input_ids"].shape[1]

    def key(self, model: Any) -> tuple[Any, ...]:
        """What a graph was captured for."""
        shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items())
        return id(model), tuple(self.fixed.items()), shapes, torch.is_autocast_enabled("cuda")


@dataclass
class _Group:
    """Layers that count alike: the same window over the same tokens, with the same room."""

    tokens: list[DeviceTokens]
    counters: Counters

    def bring(self) -> None:
        """Let the device's counters say what the host's do."""
        first = self.tokens[0]
        self.counters.bring_to(first.counts, first.lows, first.init, first.keeps, first.room)


def _stamp(model: Any) -> tuple[Any, ...]:
    """What a captured step depends on besides its inputs: weights, adapters, hooks."""
    weights = tuple(x.data_ptr() for x in (*model.parameters(), *model.buffers()))
    state: list[Any] = []
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                state.append((id(module), tuple(map(id, hooks.values()))))
        own = module.__dict__
        if "_disable_adapters" in own:  # a layer of PEFT
            merged = len(own.get("merged_adapters", ()))
            state.append((id(module), own["_disable_adapters"], str(own.get("_active_adapter")), merged))
    return weights, tuple(state)


class DecodeGraph:
    """A captured step: its kernels over fixed buffers.

    Parameters
    ----------
    model
    forward : callable
        The model's own call.
    inputs : _Inputs
    cache : AlayaCache
        Its layers' buffers and counters become part of the graph.
    blocks : context manager
        In which the model runs.
    """

    def __init__(self, model: Any, forward: Forward, inputs: _Inputs, cache: Any, blocks: Any) -> None:
        self.layers: list[DeviceLayer] = cache.alaya_layers
        self.new = inputs.new
        self.key, self.stamp, self.model = inputs.key(model), _stamp(model), weakref.ref(model)
        self.groups = self._grouped(cache)
        self.held = [tokens.buffers for tokens in self._tokens()]
        self.workspaces = list(cache._shared.workspaces)
        with torch.inference_mode(False):
            self.inputs = {name: tensor.clone() for name, tensor in inputs.tensors.items()}
        for tokens in self._tokens():
            tokens.settle()
        for group in self.groups:
            group.bring()
        before = [(layer, layer._columns, layer._valid) for layer in self.layers]
        numbers = [(tokens, tokens.counts, tokens.lows) for tokens in self._tokens()]
        try:
            with torch.inference_mode(False), torch.no_grad():
                output = self._capture(model, forward, inputs, cache, blocks)
        finally:
            # Nothing ran: the host's numbers are what they were.
            for layer, columns, valid in before:
                layer._columns, layer._valid, layer._pending = columns, valid, None
            for tokens, counts, lows in numbers:
                tokens.counts, tokens.lows = counts, lows
        if not isinstance(output, ModelOutput):
            raise TypeError(f"expected the model to return a ModelOutput, got {type(output).__name__}")
        # Without the cache, which holds this graph.
        self.kind = type(output)
        self.output = {name: value for name, value in output.items() if name not in CACHE_ARGUMENTS}
        self.cache_outputs = [name for name in CACHE_ARGUMENTS if name in output.keys()]  # noqa: SIM118

    def _capture(self, model: Any, forward: Forward, inputs: _Inputs, cache: Any, blocks: Any) -> Any:
        """The call's kernels, not run; returns the outputs they will write."""
        self.graph = torch.cuda.CUDAGraph()
        with blocks, captured(self.graph, self.layers[0].device):
            output = forward(model, **inputs.fixed, **self.inputs, **cache_argument(cache))
            self._count_on(self.layers[0].device)
        return output

    def _run(self, inputs: _Inputs, cache: Any) -> Any:
        """The call's outputs, nobody else's."""
        for name, tensor in inputs.tensors.items():
            self.inputs[name].copy_(tensor)
        self.graph.replay()
        # The next replay overwrites the graph's own tensors.
        found = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, self.output)
        return self.kind(**found, **dict.fromkeys(self.cache_outputs, cache))

    def _count_on(self, device: torch.device) -> None:
        """Let a device count what it takes in; becomes part of a graph."""
        for group in self.groups:
            first = group.tokens[0]
            if first.device == device:
                group.counters.count_on_device(first.init, first.keeps, first.room, self.new)

    def _tokens(self) -> Iterator[DeviceTokens]:
        for layer in self.layers:
            assert layer.tokens is not None
            yield layer.tokens

    def _grouped(self, cache: Any) -> list[_Group]:
        groups: dict[Any, _Group] = {}
        for tokens in self._tokens():
            key = (tokens.device, *tokens.rule, tokens.keeps, tokens.room, tokens.capacity)
            if key not in groups:
                groups[key] = _Group([], cache._shared.counters(len(tokens.counts), tokens.device, tokens.rule))
            groups[key].tokens.append(tokens)
        if len({id(group.counters) for group in groups.values()}) != len(groups):
            raise RuntimeError("layers with one window have different room: they cannot share counters")
        return list(groups.values())

    def fits(self, key: tuple[Any, ...], model: Any, begins: bool) -> bool:
        """Whether the next step is this one: the same call over the same buffers, with room in them.

        Parameters
        ----------
        begins : bool
            Whether weights, adapters and hooks may have changed since the last step, which takes a look at all of them.
        """
        if key != self.key or self.model() is not model or (begins and _stamp(model) != self.stamp):
            return False
        for layer in self.layers:
            if layer.tokens is not None:
                layer.tokens.extend(self.new)
        for layer, held in zip(self.layers, self.held, strict=True):
            if layer.tokens is None or any(a is not b for a, b in zip(layer.tokens.buffers, held, strict=True)):
                return False
        columns = self.layers[0]._columns
        for group in self.groups:
            first = group.tokens[0]
            if not first.settled(columns, self.new) or any(
                t.counts != first.counts or t.lows != first.lows for t in group.tokens
            ):
                return False
        return True

    def replay(self, inputs: _Inputs, cache: Any) -> Any:
        """Run the step; host numbers follow while the device works."""
        for tokens in self._tokens():
            tokens.settle()
        for group in self.groups:
            group.bring()
        for group in self.groups:
            group.counters.forget()
        output = self._run(inputs, cache)
        for group in self.groups:
            counts, lows = group.tokens[0].after(self.new)
            group.counters.counted(counts, lows)
            for tokens in group.tokens:
                tokens.counts, tokens.lows = counts, lows
        for layer in self.layers:
            layer._count(self.new, None)
        return output


class SegmentedDecodeGraph(DecodeGraph):
    """A step of a model over several devices: a graph for each run of blocks on one of them, the rest of the model as it is."""

    def _capture(self, model: Any, forward: Forward, inputs: _Inputs, cache: Any, blocks: Any) -> Any:
        found = list(decoder_blocks(model))
        if [numbered[0].layer_idx for _, numbered in found] != list(range(len(self.layers))):
            raise RuntimeError("the model's blocks are not its layers in their order")
        self.forward, self.fixed = forward, inputs.fixed
        devices = [layer.device for layer in self.layers]
        self.segments = SegmentGraphs([block for block, _ in found], devices, self._count_on)
        with self.segments.capturing():
            return forward(model, **inputs.fixed, **inputs.tensors, **cache_argument(cache))

    def _run(self, inputs: _Inputs, cache: Any) -> Any:
        model = self.model()
        # Masks were looked at before, as for a step that is captured.
        cache.graphs.capturing = True
        try:
            with self.segments.replaying():
                return self.forward(model, **self.fixed, **inputs.tensors, **cache_argument(cache))
        finally:
            cache.graphs.capturing = False


@dataclass
class _Kept:
    """A graph, or how far it is from being captured: the last call's key and buffers, and how often they were the same."""

    graph: DecodeGraph | None = None
    last: tuple[Any, list[tuple[Any, ...]]] | None = None
    warm: int = 0


class DecodeGraphs:
    """When to capture a step, when to replay it, and when to let the model run as it is.

    The first step over new buffers runs as usual, which also compiles the kernels; with ``mode="compile"`` the second one
    runs with compiled blocks. The next one is captured, and replayed from then on while its buffers stay what they are.
    Cropping leaves the graph valid; a longer context than there was room for, other rows (beams) or another model do not, and
    the step is captured again once two steps in a row have had the same buffers.

    Passes of several tokens that retrieve (up to ``max_sparse_queries``: drafts to verify, questions of one length) have a graph
    of their own, without compiled blocks, for the last number of tokens that came twice. It keeps its buffers.

    A model over several GPUs has a graph for each run of blocks on one of them (:class:`SegmentedDecodeGraph`), never compiled.

    Parameters
    ----------
    mode : {"capture", "compile"}
        See :class:`~alaya_hf.AlayaConfig`.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.capturing = False
        # A model calls the models in it, with the same cache.
        self._inside = False
        self.captures = self.replays = 0
        self._step_graph, self._pass_graph = _Kept(), _Kept()
        self._off = self._only_steps = False

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodeGraphs:
        """A copy of the cache has other buffers."""
        memo[id(self)] = copy = DecodeGraphs(self.mode)
        return copy

    def drop(self) -> None:
        """Free the graphs and their memory."""
        self._step_graph, self._pass_graph = _Kept(), _Kept()

    def _serves(self, cache: Any, model: Any) -> bool:
        if self._off or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        one = _one_device(model)
        if not one and not _several_devices(model):
            return False
        layers = cache.layers
        if not layers or not all(isinstance(layer, DeviceLayer) and layer.tokens is not None for layer in layers):
            return False
        probe: Probe | None = next((layer.probe for layer in layers if layer.probe is not None), None)
        first = layers[0]
        return (
            probe is None
            and all(layer.device.type == "cuda" and layer._pending is None for layer in layers)
            and (not one or all(layer.device == first.device for layer in layers))
        )

    def __call__(self, cache: Any, model: Any, forward: Forward, kwargs: dict[str, Any]) -> Any:
        """The model's outputs for `kwargs`: the graph's where it serves, the model's own otherwise.

        Notes
        -----
        A mask is looked at as usual: one that changes what was padding raises. Between the steps of one ``generate``, which
        appends ones to it, it is not. New tokens that are padding, and prepared 4-D masks, are the model's own business.
        """
        if self._inside:
            return forward(model, **kwargs)
        generated = cache.pop_generated()
        if not self._serves(cache, model):
            return forward(model, **kwargs)
        self._inside = True
        try:
            return self._step(cache, model, forward, kwargs, generated)
        finally:
            self._inside = False

    def _step(self, cache: Any, model: Any, forward: Forward, kwargs: dict[str, Any], generated: bool) -> Any:
        columns = cache.get_seq_length()
        inputs, mask = _Inputs.of(model, kwargs, columns), kwargs.get("attention_mask")
        if inputs is None or (mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2)):
            return forward(model, **kwargs)
        new, key = inputs.new, inputs.key(model)
        if new > 1 and (self._only_steps or any(new > layer.config.max_sparse_queries for layer in cache.layers)):
            return forward(model, **kwargs)
        kept = self._step_graph if new == 1 else self._pass_graph
        if not (generated and kept.graph is not None):
            # Looking at a mask waits for the device.
            cache.note_mask(mask, new, columns + new)
            if cache._forward.valid is not None:
                return forward(model, **kwargs)
        if kept.graph is not None:
            if kept.graph.fits(key, model, not generated):
                self.replays += 1
                return kept.graph.replay(inputs, cache)
            if new == 1 or kept.graph.key == key:
                self.drop()  # another model or other buffers: no graph is worth keeping
                kept = self._step_graph if new == 1 else self._pass_graph
            else:
                kept = self._pass_graph = _Kept()
        tokens = [layer.tokens for layer in cache.layers]
        buffers = [each.buffers for each in tokens]
        same = kept.last is not None and kept.last[0] == key and _same(kept.last[1], buffers)
        settled = all(each.settled(columns, new) for each in tokens)
        kept.warm = kept.warm + 1 if same and settled else 0
        one = _one_device(model)
        compiled = self.mode == "compile" and new == 1 and one
        if kept.warm == 0 or (compiled and kept.warm == 1):
            # The call that will be captured: compiled blocks are made for its shapes.
            call = {**inputs.fixed, **inputs.tensors, "attention_mask": mask, CACHE_ARGUMENT: cache}
            with self._blocks(cache, model) if kept.warm else nullcontext():
                out = forward(model, **call)
            kept.last = (key, [layer.tokens.buffers for layer in cache.layers])
            return out
        try:
            self.capturing = True
            blocks = self._blocks(cache, model) if new == 1 and one else nullcontext()
            kept.graph = (DecodeGraph if one else SegmentedDecodeGraph)(model, forward, inputs, cache, blocks)
        except Exception as error:
            # Whatever the model does that a graph cannot hold, it can go on without one.
            self.drop()
            self._off, self._only_steps = new == 1, True
            what = "decode step" if new == 1 else f"pass of {new} tokens"
            warnings.warn(
                f"the {what} of {type(model).__name__} could not be captured in a CUDA graph ({error}); going on without. "
                "AlayaConfig(cuda_graphs='none') does so from the start.",
                stacklevel=2,
            )
            return forward(model, **kwargs)
        finally:
            self.capturing = False
        self.captures += 1
        return kept.graph.replay(inputs, cache)

    @contextmanager
    def _blocks(self, cache: Any, model: Any) -> Iterator[None]:
        if self.mode == "compile":
            # The same modes when compiling and when capturing: the compiler looks at them.
            with torch.inference_mode(False), torch.no_grad(), compiled_blocks(model, type(cache)):
                yield
        else:
            yield


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return len(one) == len(other) and all(
        a is b for mine, theirs in zip(one, other, strict=True) for a, b in zip(mine, theirs, strict=True)
    )
