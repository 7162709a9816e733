"""The cache that users pass as ``past_key_values``."""

from __future__ import annotations

import statistics
import time
from collections import deque
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from alaya_hf.attention import CacheLength
from alaya_hf.config import AlayaConfig
from alaya_hf.decode_graph import DecodeGraphs
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device.plan import check_device
from alaya_hf.engine.device.shared import DeviceShared
from alaya_hf.errors import ConfigError, PromptMismatchError, UnsupportedMaskError, UnsupportedModelError
from alaya_hf.layer import AlayaLayer, ForwardState
from alaya_hf.patches import decode_graphs, enable_once
from alaya_hf.planner import ModelShape, Planner
from alaya_hf.planner.explain import Explanation, explain_plan
from alaya_hf.planner.keeper import REVIEW, Keeper
from alaya_hf.planner.layer_plan import LayerPlan
from alaya_hf.probes import Monitor, Probe
from alaya_hf.progress import PrefillProgress


class AlayaCache(Cache):
    """Retrieval-based sparse attention over an offloaded context, as an ordinary Transformers cache.

    ``model.generate(**inputs, past_key_values=AlayaCache())`` is all there is to do. Prefill is exact by default; decoding
    attends to a window and to the critical offloaded tokens of every step. Works with batches, sampling, beams, assisted
    decoding and multi-turn use; layers lie on the devices of their keys.

    Parameters
    ----------
    settings : AlayaConfig or str, optional
        What to do, or the name of a preset. Default: the preset ``"alaya"``.
    config : PreTrainedConfig, optional
        The model's configuration, as for ``DynamicCache``: layers with sliding-window or linear attention get
        Transformers' own layer classes. Without it the cache takes it from the model at the first forward pass.
    probe : bool
        Record what every layer and step does, see :meth:`stats`.
    probe_recovery : bool
        Also record the share of attention mass that was attended exactly; costs a dense pass per step.
    progress : bool
        Show a progress bar with tokens per second over prompts of 4,096 tokens or more. A prompt that comes in chunks outside
        ``generate`` gets one bar if :meth:`reserve` was called, otherwise one per chunk.

    Raises
    ------
    ConfigError
        For an unknown preset, or for settings that ``engine="device"`` does not serve.
    UnsupportedModelError
        If ``config`` is of a model without rotary multi-head or grouped-query attention.

    Notes
    -----
    The first AlayaCache of a process switches on the routing and the prompt guard of :mod:`alaya_hf.patches`, which touch
    nothing unless an AlayaCache is passed.
    """

    def __init__(
        self,
        settings: AlayaConfig | str | None = None,
        *,
        config: PreTrainedConfig | None = None,
        probe: bool = False,
        probe_recovery: bool = False,
        progress: bool = False,
    ) -> None:
        if settings is None:
            settings = "alaya"
        if isinstance(settings, str):
            settings = AlayaConfig.preset(settings)
        if not isinstance(settings, AlayaConfig):
            raise ConfigError(
                f"AlayaCache takes an AlayaConfig or the name of a preset, but got {type(settings).__name__}. Pass a model's "
                "configuration as AlayaCache(config=model.config)."
            )
        check_device(settings)
        self.settings = settings
        self._probe = probe or probe_recovery
        self._probe_recovery = probe_recovery
        self._forward = ForwardState(progress=PrefillProgress() if progress else None)
        self._shared = DeviceShared()
        self.graphs: DecodeGraphs | None = None
        self._use_graphs(settings.cuda_graphs, settings.engines)
        self._config: PreTrainedConfig | None = None
        # With a target: what the planner chose, once the first tokens are known.
        self.keeper: Keeper | None = None
        self._steps = 0
        self._last_step: float | None = None
        self._between: deque[float] = deque(maxlen=32)
        self._bound = False
        self._token_ids: Tensor | None = None
        # Whether the next pass comes from the loop of `generate`, which appends ones to the mask it was checked with.
        self._generated = False
        self._recording = False
        self.layers: list[Any]
        super().__init__(layers=[])
        if config is not None:
            self.bind(config)
        enable_once()

    @classmethod
    def for_model(cls, model: Any, settings: AlayaConfig | str | None = None, **kwargs: Any) -> AlayaCache:
        """A cache with the layer types of ``model``; other arguments as for the constructor."""
        return cls(settings, config=model.config, **kwargs)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        settings: AlayaConfig | str | None = None,
        *,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> AlayaCache:
        """A cache that takes over what a stock cache holds, for example a prefill made on another device.

        Parameters
        ----------
        cache : Cache
            A :class:`~transformers.DynamicCache` whose layers hold every token, without padding. Is not changed; its keys and
            values are copied.
        settings : AlayaConfig or str, optional
        device : torch.device, optional
            Of the model that goes on with it; default: where the keys are.
        **kwargs
            As for the constructor.

        Raises
        ------
        UnsupportedModelError
            For layers that do not hold every token (sliding windows, recurrent states, quantised ones).

        Notes
        -----
        A stock cache keeps no queries, so a graph built on it links near keys only. The token ids are unknown: the check of
        prompts begins with the next call of ``generate``.
        """
        filled = cls(settings, **kwargs)
        for idx, layer in enumerate(cache.layers):
            if type(layer) is not DynamicLayer or not layer.is_initialized:
                raise UnsupportedModelError(
                    f"layer {idx} of the cache is a {type(layer).__name__}"
                    f"{'' if getattr(layer, 'is_initialized', False) else ' without keys'}, and only a filled DynamicLayer, "
                    "which holds every token, can be taken over. Prefill an AlayaCache instead."
                )
            if idx == 0:
                filled.plan_for(layer.keys.to(device or layer.keys.device), layer.keys.shape[2])
            if idx == len(filled.layers):
                filled.layers.append(filled._new_layer(idx))
            where = device or layer.keys.device
            filled.layers[idx].fill(layer.keys.to(where), layer.values.to(where))
        return filled

    def fork(self, settings: AlayaConfig | str | None = None) -> AlayaCache:
        """A copy that shares the offloaded context, optionally with other settings.

        One prefilled document answers many questions, under as many systems as one likes: what comes after goes to each
        copy alone.

        Parameters
        ----------
        settings : AlayaConfig or str, optional
            The copy's settings. Those with another window or ``store_dtype`` copy the context; layers with
            ``engine="device"`` always copy it, but what lies in a stored context's file where they keep it as it is.
        """
        if settings is None:
            return deepcopy(self)
        if isinstance(settings, str):
            settings = AlayaConfig.preset(settings)
        copy = type(self)(
            settings,
            probe=self._probe,
            probe_recovery=self._probe_recovery,
            progress=self._forward.progress is not None,
        )
        copy._bound, copy._token_ids, copy._config = self._bound, self._token_ids, self._config
        held = [layer for layer in self.alaya_layers if layer.is_initialized]
        if settings.plans and held:
            like = torch.empty(held[0].batch_size, 1, 1, 1, dtype=held[0].dtype, device=held[0].device)
            copy.plan_for(like, max(map(max, (layer.token_counts() for layer in held))))
        planned = {i: copy._new_layer(i).config for i, layer in enumerate(self.layers) if isinstance(layer, AlayaLayer)}
        copy._forward.first, copy._forward.layers = self._forward.first, self._forward.layers
        for idx, layer in enumerate(self.layers):
            if isinstance(layer, AlayaLayer):
                if isinstance(layer, DeviceLayer) or planned[idx].engine == "device":
                    forked = copy._new_layer(idx)
                    if isinstance(layer, DeviceLayer):
                        layer.copy_to(forked)
                    elif layer.is_initialized:
                        forked.fill(*layer.contents(), layer._valid)
                else:
                    forked = layer.with_config(planned[idx])
                    forked.forward = copy._forward
                    forked.monitor = None if copy.keeper is None else Monitor()
                    forked.probe = copy._new_probe()
                copy.layers.append(forked)
            else:
                copy.layers.append(deepcopy(layer))
        return copy

    # Plans ------------------------------------------------------------------------------------------------------------

    def _use_graphs(self, how: str, engines: set[str]) -> None:
        if how != "none" and "device" in engines:
            self.graphs = DecodeGraphs(how)
            decode_graphs.enable()

    def _shape(self, keys: Tensor) -> ModelShape:
        """Of the model, whose keys ``[batch, kv_heads, m, head_dim]`` are."""
        if self._config is None:
            raise ConfigError(
                "the planner needs the model's configuration, but the cache has not seen one. Use "
                "AlayaCache.for_model(model, settings), or AlayaCache(settings, config=model.config)."
            )
        return ModelShape.from_config(self._config, keys.dtype, keys.device.type)

    def plan_for(self, keys: Tensor, context: int, reused: int = 0) -> None:
        """Plan, if a target asks for it and no layer holds anything yet; called before the first tokens come in.

        Parameters
        ----------
        keys : Tensor
            ``[batch, kv_heads, m, head_dim]``: their dtype, device and batch size count.
        context : int
            Tokens that are known to come.
        reused : int
            Of them, those of a stored context.

        Raises
        ------
        BudgetError
            If no plan fits into ``gpu_memory``.
        ConfigError
            If the model is not known, or nothing goes with the settings given.
        """
        if not self.settings.plans or self.keeper is not None or self.get_seq_length():
            return
        keeper = Keeper(Planner(self.settings, self._shape(keys)))
        plan = keeper.start(context, keys.shape[0], reused, self._forward.expected)
        self.keeper = keeper
        self.layers = [
            self._new_layer(i) if isinstance(layer, AlayaLayer) else layer for i, layer in enumerate(self.layers)
        ]
        self._use_graphs(plan.cuda_graphs, {layer.engine for layer, _ in plan.layers})

    def _review(self, new: int) -> None:
        """Count a decode step; every :data:`REVIEW` steps let the planner compare estimates with measurements."""
        keeper = self.keeper
        assert keeper is not None
        now, before = time.perf_counter(), self._last_step
        self._last_step = now if new == 1 else None
        if new != 1:
            return
        if before is not None:
            self._between.append(now - before)
        self._steps += 1
        if self._steps % REVIEW:
            return
        layers = self.alaya_layers
        between = statistics.median(self._between) if self._between else None
        moved = keeper.review([layer.monitor for layer in layers], self.get_seq_length(), layers[0].batch_size, between)
        for place in moved:
            layer, config = layers[place], keeper.config_for(place)
            if isinstance(layer, DeviceLayer):
                layer.change_query(config)
                if self.graphs is not None:
                    self.graphs.drop()
            else:
                layer.config = config
            if layer.monitor is not None:
                layer.monitor.clear()

    def explain(self, analyze: bool = False) -> Explanation:
        """What every layer does with its offloaded tokens, why, and what that is estimated to take.

        Parameters
        ----------
        analyze : bool
            Also what it took: needs ``probe=True`` (recovery: ``probe_recovery=True``), or a target, for the last steps.

        Returns
        -------
        Explanation
            ``str()`` of it is a table, ``.json()`` plain data. Totals are those of :meth:`stats`.

        Raises
        ------
        ConfigError
            If the cache has not seen a model's configuration, or holds no tokens yet.
        """
        layers = self.alaya_layers
        held = [layer for layer in layers if layer.is_initialized]
        if not held:
            raise ConfigError(
                "explain() tells of tokens that a cache holds, but this one holds none yet. Run the model first, or use "
                "`alaya-hf explain` for a context to come."
            )
        context, batch = max(map(max, (layer.token_counts() for layer in held))), held[0].batch_size
        if self.keeper is not None:
            assert self.keeper.plan is not None
            plan = self.keeper.plan
        else:
            shape = self._shape(torch.empty(batch, 1, 1, 1, dtype=held[0].dtype, device=held[0].device))
            plan = Planner(self.settings, shape).estimate_all(
                [LayerPlan.of(layer.config) for layer in layers], context, batch
            )
        actual = None
        if analyze:
            actual = (
                self.stats(),
                [
                    {
                        "device_bytes": layer.window_bytes
                        + (layer.lowbit_bytes + layer.index_bytes if isinstance(layer, DeviceLayer) else 0),
                        "host_bytes": layer.offloaded_bytes
                        + (0 if isinstance(layer, DeviceLayer) else layer.lowbit_bytes + layer.index_bytes),
                        **_measured(layer),
                    }
                    for layer in layers
                ],
            )
        return explain_plan(plan, actual)

    # Layers -----------------------------------------------------------------------------------------------------------

    def _new_probe(self) -> Probe | None:
        return Probe(recovery=self._probe_recovery) if self._probe else None

    def _new_layer(self, layer_idx: int) -> AlayaLayer:
        if self.keeper is None:
            config = self.settings.for_layer(layer_idx)
        else:
            shape = self.keeper.planner.shape
            config = self.keeper.config_for(shape.numbers.index(layer_idx) if shape.numbers else layer_idx)
        layer: AlayaLayer
        if config.engine == "device":
            layer = DeviceLayer(config, layer_idx, self._forward, self._new_probe(), self._shared)
        else:
            layer = AlayaLayer(config, layer_idx, self._forward, self._new_probe())
            if self.keeper is not None:
                layer.monitor = Monitor()
        return layer

    def bind(self, config: PreTrainedConfig | None) -> None:
        """Take the layer types from a model's configuration, once; called by the mask functions.

        Raises
        ------
        UnsupportedModelError
            If the model has no rotary multi-head or grouped-query attention.
        """
        if self._bound or config is None:
            return
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                f"AlayaCache serves decoder-only models, but {type(config).__name__} is an encoder-decoder. "
                "Use an EncoderDecoderCache."
            )
        decoder = config.get_text_config(decoder=True)
        rotary = any(
            getattr(decoder, name, None) is not None for name in ("rope_parameters", "rope_theta", "rope_scaling")
        )
        if not rotary:
            raise UnsupportedModelError(
                f"AlayaCache serves models with rotary multi-head or grouped-query attention, but {type(decoder).__name__} "
                "declares no rotary embedding (rope_parameters). Use a DynamicCache for this model."
            )
        for prefill in {settings.prefill: None for settings in self.settings.all_layers}:
            prefill.check_model(decoder)
        layers: list[Any] = list(DynamicCache(config=decoder).layers)
        for idx, layer in enumerate(layers):
            if type(layer) is DynamicLayer:
                # A forward pass may have begun before the model was known.
                known = self.layers[idx] if idx < len(self.layers) else None
                layers[idx] = known if isinstance(known, AlayaLayer) else self._new_layer(idx)
            elif idx < len(self.layers) and self.layers[idx].get_seq_length():
                raise UnsupportedModelError(
                    f"layer {idx} of {type(decoder).__name__} is a {type(layer).__name__}, but the cache already holds tokens "
                    "of it with full attention. Use AlayaCache.for_model(model)."
                )
        self.layers = layers
        self._bound, self._config = True, config
        offloading = [layer.layer_idx for layer in self.alaya_layers]
        if offloading:
            self._forward.first, self._forward.layers = offloading[0], len(offloading)
        if self._recording:
            super().activate_past_recording()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """See :meth:`AlayaLayer.update`; other layer types do what they do in Transformers."""
        if self.settings.plans and layer_idx == self._forward.first:
            held, new = self.get_seq_length(), key_states.shape[2]
            if self.keeper is None:
                known = 0 if self._token_ids is None else self._token_ids.shape[1]
                self.plan_for(key_states, max(held + new, known))
            else:
                self.keeper.check(held + new, key_states.shape[0])
                self._review(new)
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        if layer_idx == 0 or not isinstance(self.layers[layer_idx - 1], AlayaLayer):
            previous = self.layers[-1]
        else:
            previous = self.layers[layer_idx - 1]
        if isinstance(previous, AlayaLayer):
            previous.check_consumed()
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys a mask has to cover; the length carries a reference to this cache."""
        if layer_idx >= len(self.layers):
            return CacheLength.of(query_length, self), 0
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        layer = self.layers[layer_idx]
        if isinstance(layer, AlayaLayer) or not isinstance(layer, CacheLayerMixin):
            return CacheLength.of(length, self), offset
        return length, offset

    def activate_past_recording(self) -> None:
        """Let sliding layers keep what assisted decoding may crop, also those that are not known yet."""
        self._recording = True
        super().activate_past_recording()

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum, unless another kind of layer has one."""
        if layer_idx is None and not self.layers:
            return -1
        return super().get_max_length(layer_idx)

    def note_mask(self, mask: Tensor | None, new: int, length: int) -> None:
        """Called by the mask functions before the layers run.

        Parameters
        ----------
        mask : Tensor or None
            ``[batch, length]`` (or longer), nonzero where a token is.
        new : int
            New tokens of the pass.
        length : int
            Columns with the new ones.

        Raises
        ------
        UnsupportedMaskError
            If the mask does not cover the cached tokens or changes what was padding among them.
        """
        if self.graphs is not None and self.graphs.capturing:
            return  # looked at before
        self._forward.past, self._forward.valid = length - new, None
        if mask is None:
            known = next((layer for layer in self.layers if isinstance(layer, AlayaLayer)), None)
            if known is not None and known._valid is not None:
                raise UnsupportedMaskError(
                    "the cache holds padded sequences, but no attention_mask was given. Pass one that covers the cached and "
                    f"the new tokens: [batch, {length}]."
                )
            return
        if mask.ndim != 2 or mask.shape[1] < length:
            raise UnsupportedMaskError(
                f"attention_mask must be [batch, {length}] (cached and new tokens), but got {tuple(mask.shape)}. Pass the mask "
                "of the whole sequence."
            )
        valid = mask[:, :length].to("cpu", torch.bool)
        self._check_past(valid[:, : length - new])
        valid = valid[:, length - new :]
        if not bool(valid.all()):
            self._forward.valid = valid

    def _check_past(self, past: Tensor) -> None:
        layer = next((layer for layer in self.layers if isinstance(layer, AlayaLayer)), None)
        if layer is None or not past.shape[1]:
            return
        same = bool(past.all()) if layer._valid is None else torch.equal(layer._valid.expand_as(past), past)
        if not same:
            raise UnsupportedMaskError(
                "attention_mask marks other cached tokens as padding than the mask they were cached with. Pass the earlier "
                "mask with the new tokens' mask appended, or start with a fresh AlayaCache."
            )

    # Prompt guard -----------------------------------------------------------------------------------------------------

    def expect(self, ids: Tensor, new: int | None, first: bool) -> None:
        """Check that a prompt continues what the cache holds, and remember it.

        Called by the prompt guard before each forward pass of ``generate``; Transformers slices the prompt by the
        cache's length without looking at it.

        Parameters
        ----------
        ids : Tensor
            ``[batch, n]`` token ids: the whole sequence if ``new`` is given, otherwise only the new tokens.
        new : int or None
            How many of the last ids are new.
        first : bool
            Whether this is the first pass of a call, when ids are compared.

        Raises
        ------
        PromptMismatchError
        """
        held = self.get_seq_length()
        self._generated = not first
        if new is None:
            if (
                self._token_ids is not None
                and self._token_ids.shape[1] >= held
                and ids.shape[0] == len(self._token_ids)
            ):
                ids = torch.cat([self._token_ids[:, :held].to(ids.device), ids], dim=1)
                self._token_ids = ids
            elif held == 0:
                self._token_ids = ids
            return
        advice = (
            "Pass the cached text followed by the new text, crop() the cache back to what both share, or use a fresh "
            "AlayaCache for another prompt."
        )
        if new <= 0 or ids.shape[1] - new != held:
            raise PromptMismatchError(
                f"the prompt has {ids.shape[1]} tokens, but the cache already holds {held}: a prompt must continue the cached "
                f"tokens with at least one new one. {advice}"
            )
        if first and held and self._token_ids is not None and self._token_ids.shape[1] >= held:
            known = self._token_ids[:, :held].to(ids.device)
            given = ids[:, :held]
            if known.shape == given.shape and not torch.equal(known, given):
                at = int((known != given).any(dim=0).nonzero()[0])
                raise PromptMismatchError(
                    f"the prompt differs from the {held} cached tokens from token {at} on (cached "
                    f"{known[:, at].tolist()}, given {given[:, at].tolist()}). {advice}"
                )
        self._token_ids = ids

    def reserve(self, tokens: int) -> None:
        """Say how many tokens a row will hold, before a prompt that comes in chunks: memory is then made once.

        ``generate`` does it by itself. It is a hint: longer contexts grow as they do without. With ``engine="host"``, whose
        memory grows in blocks, it changes nothing.

        Parameters
        ----------
        tokens : int
            Columns of the cache, those that it holds included.

        Raises
        ------
        ConfigError
            For a negative number.
        """
        if tokens < 0:
            raise ConfigError(f"reserve takes the number of tokens that the cache will hold, but got {tokens}.")
        self._forward.expected = tokens

    def pop_generated(self) -> bool:
        """Whether the pass that is about to run comes from the loop of ``generate``, after its first one. Asked once."""
        generated, self._generated = self._generated, False
        return generated

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        if self._token_ids is not None:
            self._token_ids = self._token_ids[:, : self.get_seq_length()]

    def reset(self) -> None:
        """Forget everything but the configuration."""
        super().reset()
        self._token_ids = None
        self._forward.expected = 0
        if self._forward.progress is not None:
            self._forward.progress.close()
        if self.graphs is not None:
            self.graphs.drop()
        self.keeper, self._last_step = None, None  # another context, another plan

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows."""
        super().batch_select_indices(indices)
        if self._token_ids is not None:
            self._token_ids = self._token_ids[indices.to(self._token_ids.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.keeper is not None and self.get_seq_length():
            self.keeper.check(self.get_seq_length(), repeats * self.alaya_layers[0].batch_size)
        super().batch_repeat_interleave(repeats)
        if self._token_ids is not None:
            self._token_ids = self._token_ids.repeat_interleave(repeats, dim=0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was."""
        super().reorder_cache(beam_idx)
        if self._token_ids is not None and len(self._token_ids) == len(beam_idx):
            self._token_ids = self._token_ids[beam_idx.to(self._token_ids.device)]

    # Measurements -----------------------------------------------------------------------------------------------------

    @property
    def alaya_layers(self) -> list[AlayaLayer]:
        """The layers that offload; others are Transformers' own."""
        return [layer for layer in self.layers if isinstance(layer, AlayaLayer)]

    def stats(self) -> dict[str, Any]:
        """What the cache holds and what it did.

        Returns
        -------
        dict
            Always: ``tokens`` (columns cached), ``window_bytes`` and ``lowbit_bytes``, ``workspace_bytes`` (buffers of a step,
            with ``engine="device"``), ``device_bytes`` (on the layers' devices: the windows; with ``engine="device"`` also
            low-bit copies, what stands for blocks, and workspace), ``hot_bytes`` (of the hot sets, beside ``device_bytes``),
            ``offloaded_bytes`` (host memory, shared contexts once), ``index_bytes``, ``total_bytes`` (what a DynamicCache would
            hold for these layers), ``captures`` and ``replays`` (of decode steps as CUDA graphs).
            With hot sets also ``hot_lookups`` (tokens that decode steps fetched, per KV head), ``hot_hits`` (those found on the
            device) and ``hot_hit_rate`` (None before the first lookup); reading them waits for the devices. With
            ``probe=True`` also means over decode steps and layers: ``attended``, ``retrieved``, ``recovery`` (with
            ``probe_recovery``), ``error`` (estimated error of a layer's output relative to its norm, host engine),
            ``skipped_tiles`` (share of the off-diagonal tiles that a sparse prefill skipped),
            ``seconds_per_step`` (attention of all layers), ``steps``, ``bytes_moved``, and per layer
            ``layers[i]`` the same with ``records`` of every step (:class:`alaya_hf.probes.StepRecord`).
        """
        layers = self.alaya_layers
        driven = [layer for layer in layers if isinstance(layer, DeviceLayer)]
        window = sum(layer.window_bytes for layer in layers)
        offloaded = sum(layer.offloaded_bytes for layer in layers)
        stats: dict[str, Any] = {
            "tokens": self.get_seq_length(),
            "window_bytes": window,
            "lowbit_bytes": sum(layer.lowbit_bytes for layer in layers),
            "workspace_bytes": self._shared.nbytes,
            "device_bytes": window
            + sum(layer.lowbit_bytes + layer.index_bytes for layer in driven)
            + self._shared.nbytes,
            "hot_bytes": sum(layer.hot_bytes for layer in driven),
            "captures": self.graphs.captures if self.graphs else 0,
            "replays": self.graphs.replays if self.graphs else 0,
            "offloaded_bytes": offloaded,
            "index_bytes": sum(layer.index_bytes for layer in layers),
            "total_bytes": sum(
                sum(layer.token_counts())
                * 2
                * layer.window._keys.shape[1]
                * layer.window._keys.shape[3]
                * layer.dtype.itemsize
                for layer in layers
                if layer.window is not None
            )
            + sum(sum(layer.token_counts()) * layer.token_bytes for layer in driven),
        }
        if stats["hot_bytes"]:
            lookups, hits = (sum(numbers) for numbers in zip(*(layer.hot_counts() for layer in driven), strict=True))
            stats |= {"hot_lookups": lookups, "hot_hits": hits, "hot_hit_rate": hits / lookups if lookups else None}
        probed = [layer for layer in layers if layer.probe is not None]
        if not probed:
            return stats
        summaries = {}
        for layer in probed:
            assert layer.probe is not None
            summaries[layer.layer_idx] = {**layer.probe.summary(), "records": layer.probe.records()}
        stats["layers"] = summaries
        stats["steps"] = max((int(summary["steps"]) for summary in summaries.values()), default=0)
        for name in ("attended", "retrieved", "fetched", "recovery", "skipped_tiles", "error"):
            values = [summary[name] for summary in summaries.values() if summary[name] is not None]
            stats[name] = sum(values) / len(values) if values else None
        times = [summary["seconds"] for summary in summaries.values() if summary["seconds"] is not None]
        stats["seconds_per_step"] = sum(times) if times else None
        stats["bytes_moved"] = sum(summary["bytes_moved"] for summary in summaries.values())
        return stats

    def retrieved_histogram(self, bins: int = 256) -> Tensor:
        """How often each part of the context was fetched.

        Returns
        -------
        Tensor
            ``[layers, bins]`` int64 counts over token positions; needs ``probe=True``.
        """
        length = max((max(layer.token_counts(), default=0) for layer in self.alaya_layers), default=0)
        rows = [
            layer.probe.histogram(bins, length) if layer.probe is not None else torch.zeros(bins, dtype=torch.int64)
            for layer in self.alaya_layers
        ]
        return torch.stack(rows) if rows else torch.zeros(0, bins, dtype=torch.int64)


def _measured(layer: AlayaLayer) -> dict[str, Any]:
    """Means over a layer's decode steps: all of them with a probe, the last ones where a planner watches."""
    if layer.probe is not None:
        found = layer.probe.summary()
        names = {
            "tokens": "retrieved",
            "fetched": "fetched",
            "recovery": "recovery",
            "seconds": "seconds",
            "error": "error",
        }
        return {**{name: found[of] for name, of in names.items()}, "moved_bytes": found["bytes_moved"]}
    monitor = layer.monitor
    if monitor is None or not monitor.seconds:
        return {}
    kept = {
        "tokens": monitor.retrieved,
        "fetched": monitor.fetched,
        "seconds": monitor.seconds,
        "error": monitor.errors,
    }
    return {name: sum(values) / len(values) for name, values in kept.items() if values}
