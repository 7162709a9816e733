"""One layer's keys and values: a window on the device, everything else offloaded."""

from __future__ import annotations

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from alaya_hf.config import STORE_DTYPES_8BIT, AlayaConfig
from alaya_hf.engine.error import relative
from alaya_hf.engine.masks import padding_of
from alaya_hf.engine.plan import Plan
from alaya_hf.engine.prefill import Exact, PrefillPass
from alaya_hf.engine.prefill.base import Chunk
from alaya_hf.engine.record import decode_record
from alaya_hf.engine.retrieval import RetrievalStats, retrieve
from alaya_hf.engine.sampling import sample_queries
from alaya_hf.errors import AlayaError, BatchSizeError, IgnoredCacheError, UnsupportedModelError
from alaya_hf.handle import KVHandle
from alaya_hf.kernels.attention import window_attention
from alaya_hf.kernels.partial import Partial, merge
from alaya_hf.planner.choose import choose
from alaya_hf.planner.layer_plan import wider
from alaya_hf.probes import Monitor, Probe, StepRecord
from alaya_hf.progress import PrefillProgress
from alaya_hf.storage import HostStore, Piece, Window
from alaya_hf.storage.memory import check_room


def _outside_inference_mode(method: Callable[..., Any]) -> Callable[..., Any]:
    """What the cache allocates outlives the pass: tensors made in inference mode could not be written to later."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*args, **kwargs)

    return run


@dataclass
class ForwardState:
    """What the layers of a cache have to know about the current forward pass, set by the mask function.

    Attributes
    ----------
    valid : Tensor or None
        ``[batch, new]`` bool on the host, false where a new token is padding; None: no padding.
    past : int
        Columns the cache held when the mask was made, -1 if no mask function ran.
    first, layers : int
        The first layer that offloads, and how many do; of one model once it is known.
    expected : int
        Columns that the caller said the cache will hold; 0: not known.
    progress : PrefillProgress or None
        Told what each layer has attended to.
    warned : bool
        Whether a doubtful step was warned about.
    """

    valid: Tensor | None = None
    past: int = -1
    first: int = 0
    layers: int = 1
    expected: int = 0
    progress: PrefillProgress | None = None
    warned: bool = False


@dataclass
class _Pending:
    keys: Tensor
    values: Tensor


class AlayaLayer(CacheLayerMixin):
    """Keys and values of one attention layer.

    The first and the most recent tokens form the window, on the device of the first keys this layer sees; all others
    live in host memory. Nothing is allocated before the first :meth:`update`.

    Parameters
    ----------
    config : AlayaConfig
        Of this layer.
    layer_idx : int
        Its number in the model.
    forward : ForwardState, optional
        Shared by the layers of one cache.
    probe : Probe, optional
        Where to record measurements.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(
        self,
        config: AlayaConfig | None = None,
        layer_idx: int = 0,
        forward: ForwardState | None = None,
        probe: Probe | None = None,
    ) -> None:
        super().__init__()
        self.config = config if config is not None else AlayaConfig()
        self.layer_idx = layer_idx
        self.forward = forward if forward is not None else ForwardState()
        self.probe = probe
        self.monitor: Monitor | None = None
        self._clear()

    def __repr__(self) -> str:
        return f"AlayaLayer({self.get_seq_length()} tokens, {self.offloaded_bytes:,} bytes offloaded)"

    def _clear(self) -> None:
        self.is_initialized = False
        self.window: Window | None = None
        self.store: HostStore | None = None
        self._columns = 0
        # [batch, columns] on the host once there has been padding: which column of which row is a token.
        self._valid: Tensor | None = None
        self._pending: _Pending | None = None

    # The cache contract -----------------------------------------------------------------------------------------------

    @_outside_inference_mode
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take device, dtype, batch size and heads from the first keys ``[batch, kv_heads, m, head_dim]``.

        Raises
        ------
        UnsupportedModelError
            If keys and values have different shapes (latent attention) or are not 4-D.
        """
        if key_states.ndim != 4 or key_states.shape != value_states.shape:
            raise UnsupportedModelError(
                "AlayaCache serves multi-head and grouped-query attention, whose keys and values share one shape "
                f"[batch, kv_heads, tokens, head_dim], but layer {self.layer_idx} gave keys {tuple(key_states.shape)} and "
                f"values {tuple(value_states.shape)}. Use a DynamicCache for this model."
            )
        batch, kv_heads, _, head_dim = key_states.shape
        if head_dim % 16 and (self.config.residual.kind == "low_bit" or self.config.index.kind == "quantized"):
            raise UnsupportedModelError(
                f"low-bit copies need a head dimension that is a multiple of 16, but this model's is {head_dim}. Use "
                "AlayaConfig(index='flat', residual='none') or residual='block_means'."
            )
        self.dtype, self.device = key_states.dtype, key_states.device
        # Only the device engine has 8-bit stores, and it makes them itself.
        name = self.config.store_dtype
        store_dtype = self.dtype if name in ("auto", *STORE_DTYPES_8BIT) else getattr(torch, name)
        self.window = Window(batch, kv_heads, head_dim, self.config.window.init, self.dtype, self.device)
        self.store = HostStore(batch, kv_heads, head_dim, store_dtype)
        self.is_initialized = True

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first keys."""
        return len(self.store.rows) if self.store is not None else -1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in the new keys and values of a forward pass.

        Parameters
        ----------
        key_states, value_states : Tensor
            ``[batch, kv_heads, m, head_dim]``, keys after the rotary embedding.

        Returns
        -------
        tuple of KVHandle
            The new keys and values alone, as handles that an attention function passes to :meth:`attend`.

        Raises
        ------
        IgnoredCacheError
            If the handles of the previous forward pass were never used.
        BatchSizeError
            If the batch size changed.
        """
        self.check_consumed()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[0] != self.batch_size:
            raise BatchSizeError(
                f"the cache holds {self.batch_size} sequences, but {key_states.shape[0]} were given. Use one AlayaCache per "
                "batch, or batch_select_indices / batch_repeat_interleave to change the rows it holds."
            )
        self._pending = _Pending(key_states, value_states)
        return KVHandle.wrap(key_states, self), KVHandle.wrap(value_states, self)

    def check_consumed(self) -> None:
        """Raise if an attention implementation ignored the handles of the previous forward pass.

        Raises
        ------
        IgnoredCacheError
        """
        if self._pending is not None:
            self._pending = None
            raise IgnoredCacheError(
                f"layer {self.layer_idx} was given new keys, but no attention implementation asked the AlayaCache for the "
                'earlier ones. Call model.set_attn_implementation("alaya").'
            )

    def get_seq_length(self) -> int:
        """Columns cached, padding included."""
        return self._columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask has to cover."""
        return self._columns + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    @_outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Parameters
        ----------
        tokens_to_remove : int
            As a negative number, like everywhere in Transformers. Offloaded tokens that become recent return to the
            window.
        """
        # Transformers 5.17 gives a tensor here, which must not become a length.
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise AlayaError(
                f"crop takes the number of tokens to remove as a negative integer, but got {tokens_to_remove}. "
                f"Use crop({-tokens_to_remove})."
            )
        count = min(-tokens_to_remove, self._columns)
        if count == 0 or not self.is_initialized:
            return
        assert self.window is not None and self.store is not None
        self.check_consumed()
        target = self._columns - count
        dropped = min(count, self.window.recent)
        self.window.drop_last(dropped)
        self._columns -= dropped
        if self._columns > target:
            self._drop_offloaded(self._columns - target)
        if self._valid is not None:
            self._valid = self._valid[:, : self._columns]

    def _tokens_in(self, row: int, start: int, stop: int) -> int:
        if self._valid is None:
            return stop - start
        return int(self._valid[row, start:stop].sum())

    def _drop_offloaded(self, columns: int) -> None:
        """Drop the last columns that have left the window, then bring ``local`` columns back into it."""
        assert self.window is not None and self.store is not None
        target = self._columns - columns
        back = max(0, target - self.config.window.local)
        width = target - back
        batch, kv_heads = len(self.store.rows), self.store.kv_heads
        keys = torch.zeros(batch, kv_heads, width, self.store.head_dim, dtype=self.dtype, device=self.device)
        values = torch.zeros_like(keys)
        for row in range(batch):
            returning = self._tokens_in(row, back, target)
            leaving = self._tokens_in(row, back, self._columns)
            offloaded = min(leaving, self.store.length(row))
            taken = self.store.take_last(row, offloaded).to(self.device, self.dtype)
            k, v = taken[:, :, 0], taken[:, :, 1]
            if leaving > offloaded:
                first_k, first_v = self.window.take_init(row, leaving - offloaded)
                k, v = torch.cat([first_k, k], dim=1), torch.cat([first_v, v], dim=1)
            slots = torch.arange(width) if self._valid is None else self._valid[row, back:target].nonzero().flatten()
            keys[row][:, slots.to(self.device)] = k[:, :returning]
            values[row][:, slots.to(self.device)] = v[:, :returning]
        self.window.append(keys, values, None if self._valid is None else self._valid[:, back:target])
        self._columns = target

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was. Offloaded tokens are not copied."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times. Offloaded tokens are not copied."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    @_outside_inference_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a bool mask over the rows). Offloaded tokens are not copied."""
        if not self.is_initialized:
            return
        assert self.window is not None and self.store is not None
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        indices = indices.to("cpu", torch.int64)
        self.window.select(indices)
        self.store.select(indices.tolist())
        if self._valid is not None:
            self._valid = self._valid[indices]

    def offload(self) -> None:
        """Nothing: this layer offloads by itself."""

    def prefetch(self) -> None:
        """Nothing: this layer offloads by itself."""

    @_outside_inference_mode
    def with_config(self, config: AlayaConfig) -> AlayaLayer:
        """A copy that shares the offloaded context and asks other questions of it.

        Parameters
        ----------
        config : AlayaConfig
            Another window or ``store_dtype`` copies the context; anything else shares it.
        """
        copy = deepcopy(self)
        old, copy.config = copy.config, config
        same = (config.window.init, config.window.local) == (old.window.init, old.window.local)
        if not copy.is_initialized or (same and config.store_dtype == old.store_dtype):
            return copy
        keys, values = copy.contents()
        valid = copy._valid
        copy._clear()
        copy.fill(keys, values, valid)
        return copy

    @_outside_inference_mode
    def fill(self, keys: Tensor, values: Tensor, valid: Tensor | None = None) -> None:
        """Take a context that was computed elsewhere into an empty layer, without attending to anything.

        Parameters
        ----------
        keys, values : Tensor
            ``[batch, kv_heads, n, head_dim]``, keys after the rotary embedding; their device becomes the layer's.
        valid : Tensor, optional
            ``[batch, n]`` bool on the host, false where padding.

        Raises
        ------
        AlayaError
            If the layer holds tokens.
        """
        if self._columns:
            raise AlayaError(f"layer {self.layer_idx} holds {self._columns} tokens already. Fill an empty cache.")
        self.lazy_initialization(keys, values)
        self._append(keys, values, valid, self._keep(keys.shape[2], 0))

    @_outside_inference_mode
    def attach(
        self, first: Tensor, recent: Tensor, pieces: list[Piece], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take a stored context into an empty layer of one row, to be attended where it lies.

        Parameters
        ----------
        first, recent : Tensor
            ``[kv_heads, m, 2, head_dim]``: the context's first tokens (at most ``window.init``) and its most recent ones; copied.
        pieces : list of Piece
            All tokens between them.
        dtype, device
            Of the model's keys and values.

        Raises
        ------
        AlayaError
            If the layer holds tokens.
        """
        if self._columns:
            raise AlayaError(f"layer {self.layer_idx} holds {self._columns} tokens already. Attach to an empty cache.")
        recent = recent.to(device, dtype)
        self.lazy_initialization(recent[None, :, :, 0], recent[None, :, :, 1])
        assert self.window is not None and self.store is not None
        self.window.restore(first.to(device, dtype), recent)
        self.store.rows[0] = pieces
        self._columns = first.shape[1] + sum(piece.length for piece in pieces) + recent.shape[1]

    def parts(self) -> tuple[Tensor, list[Piece], Tensor]:
        """What a layer of one row without padding holds, in order: first tokens, pieces of the store, recent tokens.

        Returns
        -------
        first, recent : Tensor
            ``[kv_heads, m, 2, head_dim]`` in the dtype of the store, on the host.
        pieces : list of Piece
        """
        assert self.window is not None and self.store is not None and self._valid is None
        keys, values = self.window.row(0)
        count = self.window.init_lengths[0]
        window = torch.stack([keys, values], dim=2).to("cpu", self.store.dtype)
        return window[:, :count], [piece for piece in self.store.rows[0] if piece.length], window[:, count:]

    def contents(self) -> tuple[Tensor, Tensor]:
        """Everything cached, in order: two ``[batch, kv_heads, tokens, head_dim]`` on the layer's device.

        Padding columns are zero. Copies the whole context.
        """
        assert self.window is not None and self.store is not None
        shape = (self.batch_size, self.store.kv_heads, self._columns, self.store.head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.zeros_like(keys)
        for row in range(self.batch_size):
            k, v = self.window.row(row)
            first = self.window.init_lengths[row]
            for side, (target, parts) in enumerate(((keys, k), (values, v))):
                stored = [piece.kv[:, :, side].to(self.device, self.dtype) for piece in self.store.rows[row]]
                tokens = torch.cat([parts[:, :first], *stored, parts[:, first:]], dim=1)
                if self._valid is None:
                    target[row] = tokens
                else:
                    target[row][:, self._valid[row].to(self.device)] = tokens
        return keys, values

    # Memory -----------------------------------------------------------------------------------------------------------

    @property
    def window_bytes(self) -> int:
        """Bytes of keys and values in the window, on the layer's device."""
        return 0 if self.window is None else self.window.nbytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of keys and values in host memory; rows that share a context count once."""
        return 0 if self.store is None else self.store.nbytes

    @property
    def lowbit_bytes(self) -> int:
        """Bytes of the low-bit copies and block means, which answer for the tokens that a query leaves out."""
        if self.store is None:
            return 0
        return sum(self.config.residual.nbytes(segment) for segment in self.store.segments)

    @property
    def index_bytes(self) -> int:
        """Bytes of the indexes over the offloaded tokens."""
        return 0 if self.store is None else sum(s.index_nbytes(self.config.index) for s in self.store.segments)

    def token_counts(self) -> list[int]:
        """Tokens cached per row, padding excluded."""
        if self.window is None or self.store is None:
            return []
        return [a + b for a, b in zip(self.window.lengths, self.store.lengths, strict=True)]

    # Attention --------------------------------------------------------------------------------------------------------

    def _new_valid(self, tokens: int, mask: Tensor | None) -> Tensor | None:
        if mask is not None:
            return padding_of(mask, tokens, self._columns, self.batch_size, self._valid)
        forward = self.forward
        if forward.past != self._columns or forward.valid is None or forward.valid.shape[1] != tokens:
            return None
        return forward.valid

    @_outside_inference_mode
    def attend(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention of the pass's queries to everything cached, the new tokens of :meth:`update` included.

        Passes of up to ``max_sparse_queries`` tokens over a non-empty cache retrieve; others are prefill.

        Parameters
        ----------
        query : Tensor
            ``[batch, heads, m, head_dim]`` after the rotary embedding.
        scaling : float
            Factor from scores to logits.
        softcap : float, optional
            Cap on the logits.
        sinks : Tensor, optional
            ``[heads]``, the logit of each head's learned attention sink.
        mask : Tensor, optional
            A prepared 4-D mask; has to be causal + padding.

        Returns
        -------
        Tensor
            ``[batch, m, heads, head_dim]`` in the dtype of ``query``.

        Raises
        ------
        AlayaError
            If there are no new keys waiting, for example because two layers share them.
        UnsupportedMaskError
            For a mask that is not causal + padding.
        """
        pending = self._pending
        if pending is None:
            raise AlayaError(
                f"layer {self.layer_idx}: the keys of this forward pass were already attended to. Models whose layers share "
                "keys and values are not supported; use a DynamicCache."
            )
        began = time.perf_counter() if self.probe is not None or self.monitor is not None else 0.0
        keys, values = pending.keys, pending.values
        if query.shape[0] != keys.shape[0] or query.shape[1] % keys.shape[1]:
            raise UnsupportedModelError(
                f"layer {self.layer_idx}: {query.shape[1]} query heads over {keys.shape[1]} key-value heads is not grouped-"
                "query attention. Use a DynamicCache for this model."
            )
        tokens = query.shape[2]
        valid = self._new_valid(tokens, mask)
        sparse = self._columns > 0 and tokens <= self.config.max_sparse_queries
        self._pending = None
        run = self._decode if sparse else self._prefill
        parts, record = run(query, keys, values, valid, scaling, softcap)
        if self.forward.progress is not None:
            past = self._columns - tokens
            self.forward.progress.advance(tokens, past, self.forward.expected, self.forward.layers)
        if sinks is not None:
            lse = sinks.float().view(1, -1, 1).expand(query.shape[:3])
            parts.append(Partial(torch.zeros(*query.shape, device=query.device), lse))
        out = merge(parts).out
        if self.probe is not None and record is not None:
            record.seconds = time.perf_counter() - began
            self.probe.steps.append(record)
        if self.monitor is not None and sparse and tokens == 1:
            self.monitor.seconds.append(time.perf_counter() - began)
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def _check_room(self, keys: Tensor, keep: int) -> None:
        """Refuse a pass whose tokens the host cannot hold in all layers, before any of them has stored its part.

        Raises
        ------
        HostMemoryError
        """
        assert self.window is not None and self.store is not None
        leaving = self.window.recent + keys.shape[2] - keep
        if leaving > 0 and self.layer_idx == self.forward.first:
            per_row = leaving * self.store.kv_heads * 2 * self.store.head_dim * self.store.dtype.itemsize
            check_room(per_row * self.forward.layers, keys)

    def _append(
        self, keys: Tensor, values: Tensor, valid: Tensor | None, keep: int, samples: list[Tensor] | None = None
    ) -> int:
        """Take new columns in; returns the bytes that went to the store."""
        self._check_room(keys, keep)
        assert self.window is not None and self.store is not None
        if valid is not None or self._valid is not None:
            batch, _, tokens, _ = keys.shape
            old = self._valid if self._valid is not None else torch.ones(batch, self._columns, dtype=torch.bool)
            new = valid if valid is not None else torch.ones(batch, tokens, dtype=torch.bool)
            self._valid = torch.cat([old, new], dim=1)
        leaving = self.window.push(keys, values, valid, keep)
        self._columns += keys.shape[2]
        return self.store.append(*leaving, queries=samples)

    def _keep(self, tokens: int, slack: int) -> int:
        """Recent columns to keep after ``tokens`` more have come in."""
        total = self._columns + tokens
        assert self.window is not None
        if total <= self.config.min_context or self.window.recent + tokens <= self.config.window.local + slack:
            return total
        return self.config.window.local

    def _begin_prefill(
        self, query: Tensor, keys: Tensor, valid: Tensor | None, scaling: float, softcap: float | None
    ) -> PrefillPass:
        chunk = Chunk(query, keys.shape[1], valid, self.token_counts(), scaling, softcap, self.layer_idx)
        return (Exact() if self.layer_idx in self.config.dense_layers else self.config.prefill).begin(chunk)

    def _prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[list[Partial], StepRecord | None]:
        assert self.window is not None and self.store is not None
        attention = self._begin_prefill(query, keys, valid, scaling, softcap)
        parts = [attention.new(keys, values)]
        moved = 0
        context = self._columns + query.shape[2]
        if self._columns:
            parts.append(attention.window(self.window))
            part, moved = attention.offloaded(self.store, self.config.prefill_block)
            parts.append(part)
        ratio = self.config.sample_queries
        ratio = self.config.index.sample_ratio if ratio is None else ratio
        samples = sample_queries(query, self.store.kv_heads, ratio, valid) if ratio else None
        moved += self._append(keys, values, valid, self._keep(query.shape[2], 0), samples)
        if self.probe is None:
            return parts, None
        return parts, StepRecord(
            "prefill", query.shape[2], context, context, 0, 0, 0, None, None, None, None, moved, 0.0,
            attention.tiles, attention.skipped(),
        )  # fmt: skip

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[list[Partial], StepRecord | None]:
        assert self.window is not None and self.store is not None
        tokens = query.shape[2]
        self._append(keys, values, valid, self._columns + tokens)
        window_keys, window_values, visible = self.window.view()
        mask = None if visible is None else visible[:, None, None, :]
        if tokens > 1:
            width = window_keys.shape[2]
            causal = torch.ones(tokens, width, dtype=torch.bool, device=query.device).tril(width - tokens)
            mask = causal if mask is None else mask & causal
        window, best = window_attention(query, window_keys, window_values, scaling, mask, softcap)
        if self.probe is not None and self.probe.observer is not None:
            self.probe.observer(self, query, best, window.lse)
        parts = [window]
        residual, stats, doubt, widened = None, RetrievalStats(), None, False
        if any(self.store.lengths):
            plan = choose(self.config, self.layer_idx, softcap)
            retrieved, residual, stats = self._retrieve(query, plan, best, window.lse, scaling, softcap)
            doubt = self._doubt(stats, [window, retrieved, residual])
            if doubt is not None and doubt > self.config.doubt and self.config.on_doubt != "ignore":
                if self.config.on_doubt == "warn":
                    self._warn(doubt)
                elif wider(plan.query) != plan.query:
                    # Once: what is still doubtful then is left as it is, so that a step's time stays bounded.
                    plan = dataclasses.replace(plan, query=wider(plan.query))
                    retrieved, residual, stats = self._retrieve(query, plan, best, window.lse, scaling, softcap)
                    doubt, widened = self._doubt(stats, [window, retrieved, residual]), True
            parts.append(retrieved)
        if self.monitor is not None:
            self._note(stats, doubt, widened)
        record = None
        if self.probe is not None:
            record = decode_record(self.probe, tokens, self.token_counts(), self.window, parts, stats, query.shape[1])
            record.error, record.widened = doubt, widened
        if residual is not None:
            parts.append(residual)
        # Late materialisation: tokens leave the window in batches, after the step that filled it.
        moved = self._append(keys[:, :, :0], values[:, :, :0], None, self._keep(0, self.config.window.overflow))
        if record is not None:
            record.bytes_moved = moved + stats.bytes_read
        return parts, record

    def _retrieve(
        self, query: Tensor, plan: Plan, best: Tensor, lse: Tensor, scaling: float, softcap: float | None
    ) -> tuple[Partial, Partial | None, RetrievalStats]:
        assert self.store is not None
        probe, monitor = self.probe, self.monitor
        return retrieve(
            query,
            self.store,
            plan,
            best,
            lse,
            scaling,
            self.config.group_mode,
            softcap,
            probe is not None or monitor is not None,
            probe is not None and probe.recovery,
            self.config.on_doubt != "ignore" or probe is not None or (monitor is not None and monitor.want_error),
        )

    def _doubt(self, stats: RetrievalStats, parts: list[Partial | None]) -> float | None:
        """Estimated error of the step relative to its output, mean over rows and heads; None where it is not known."""
        if stats.error is None:
            return None
        share = relative(stats.error, merge([part for part in parts if part is not None]).out)
        known = share[~share.isnan()]
        return float(known.mean()) if known.numel() else None

    def _warn(self, doubt: float) -> None:
        if not self.forward.warned:
            self.forward.warned = True
            warnings.warn(
                f"layer {self.layer_idx}: the estimated error of a decode step is {doubt:.2g} of its output, more than "
                f"doubt={self.config.doubt:g}. Use on_doubt='widen', a wider query, or a larger doubt. Said once.",
                stacklevel=2,
            )

    def _note(self, stats: RetrievalStats, doubt: float | None, widened: bool) -> None:
        monitor = self.monitor
        assert monitor is not None
        monitor.steps += 1
        monitor.widened += widened
        monitor.doubtful += doubt is not None and doubt > self.config.doubt
        if stats.retrieved is not None and stats.fetched is not None:
            monitor.retrieved.append(float(stats.retrieved.mean()))
            monitor.fetched.append(float(stats.fetched.mean()))
        if doubt is not None:
            monitor.errors.append(doubt)
