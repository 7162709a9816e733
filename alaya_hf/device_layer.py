"""One layer's keys and values where the device drives decoding."""

from __future__ import annotations

import os
from concurrent.futures import Future
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alaya_hf.config import AlayaConfig
from alaya_hf.engine.device.plan import ADVICE, device_plan
from alaya_hf.engine.device.shared import DeviceShared
from alaya_hf.errors import AlayaError, ConfigError, UnsupportedModelError
from alaya_hf.kernels.gpu.block_layout import BlockLayout
from alaya_hf.kernels.gpu.store_format import EIGHT_BIT, StoreFormat
from alaya_hf.kernels.partial import Partial
from alaya_hf.layer import AlayaLayer, ForwardState, _outside_inference_mode
from alaya_hf.probes import Probe, StepRecord

if TYPE_CHECKING:
    from alaya_hf.engine.device.loader import Loader
    from alaya_hf.engine.device.store import PooledStore
    from alaya_hf.engine.device.tokens import Arrival, DeviceTokens
    from alaya_hf.storage.db.reader import StoredLayer
    from alaya_hf.storage.db.records import RecordFormat


class DeviceLayer(AlayaLayer):
    """Keys and values of one attention layer with ``engine="device"``.

    The window and a low-bit copy of all tokens before it (or, with the index ``coarse``, what stands for their blocks) lie on
    the device, every token's exact vectors in pinned host memory. A forward pass of one token is a chain of kernels that never
    waits for the host, and so, but for ``coarse``, is one of up to ``max_sparse_queries`` tokens over a context of which some
    have left the window: each of its tokens retrieves as if they came one by one. Longer passes, those with padding among the
    new tokens, and those over a context that the window holds as a whole are prefill, as the configuration says: the offloaded
    tokens come to the device in blocks.

    Parameters
    ----------
    config : AlayaConfig
        Of this layer.
    layer_idx : int
        Its number in the model.
    forward : ForwardState, optional
        Shared by the layers of one cache.
    probe : Probe, optional
        Where to record measurements, without an observer. A step with a probe waits for the device.
    shared : DeviceShared, optional
        Buffers and counters of one cache.

    Raises
    ------
    ConfigError
        If the configuration asks for something that the kernels do not do.

    Notes
    -----
    Without an ``allocator`` rows share nothing but what lies in a stored context's file: reordering, selecting or repeating them
    and copies of the cache copy all of their other tokens, in host memory too, and wait for the device. Beam search over a long
    context that is not stored is better served by ``engine="host"``.
    ``window.overflow`` and ``residual.skip`` are not used. In a pass of several tokens, what the low-bit copy held before it is
    estimated and all the rest is attended to exactly, the same for all of them; steps of one token would have moved the oldest
    64 of the window to the low-bit copy on the way, once for every 64 tokens. Such a pass neither reads nor fills the hot set.
    It keeps scores of 2 bytes per query head, position and token, for as many positions at a time as fit in 512 MiB
    (:data:`~alaya_hf.kernels.gpu.short_pass.SCORES_LIMIT`), at least one. The store grows by half when it is full,
    which waits for the device. With an 8-bit store, tokens that leave the low-bit copy for the window again (:meth:`crop`), the
    offloaded tokens of later passes and copies of the layer are what the store gives back; copies quantise it once more. Keys
    and values are checked to be finite in prefill only: the check waits for the device.
    """

    def __init__(
        self,
        config: AlayaConfig | None = None,
        layer_idx: int = 0,
        forward: ForwardState | None = None,
        probe: Probe | None = None,
        shared: DeviceShared | None = None,
    ) -> None:
        self._window: Future[list[Tensor]] | None = None  # of a stored context that is about to be attached
        super().__init__(config, layer_idx, forward, probe)
        self.plan = device_plan(self.config, layer_idx)
        self.shared = shared if shared is not None else DeviceShared()
        self._check_probe()

    def _clear(self) -> None:
        super()._clear()
        self.tokens: DeviceTokens | None = None

    def change_query(self, config: AlayaConfig) -> None:
        """Ask the same low-bit copy another question from the next step on; a captured step has to be dropped.

        Raises
        ------
        ConfigError
            If the kernels do not serve it, or the copy would have to be another one.
        """
        plan = device_plan(config, self.layer_idx)
        if (plan.key_bits, plan.value_bits) != (self.plan.key_bits, self.plan.value_bits):
            raise ConfigError(
                f"layer {self.layer_idx} holds {self.plan.key_bits}-bit keys and {self.plan.value_bits}-bit values, but a plan "
                f"with {plan.key_bits} and {plan.value_bits} was given. Use with_config(), which copies the context."
            )
        self.config, self.plan = config, plan

    def _check_probe(self) -> None:
        probe = self.probe
        if probe is not None and probe.observer is not None:
            raise ConfigError(
                "with engine='device' window and offloaded tokens are attended to in one go, so a probe's observer has nothing "
                "to look at in between. Use engine='host' for it."
            )

    # The cache contract -----------------------------------------------------------------------------------------------

    @_outside_inference_mode
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take device, dtype, batch size and heads from the first keys ``[batch, kv_heads, m, head_dim]``.

        Raises
        ------
        UnsupportedModelError
            For keys of another shape or precision than the kernels serve.
        ConfigError
            Without Triton, away from a CUDA device, or for a ``store_dtype`` that is neither the model's nor 8-bit.
        """
        super().lazy_initialization(key_states, value_states)
        # This layer's tokens lie elsewhere.
        self.window, self.store, self.is_initialized = None, None, False
        batch, kv_heads, _, head_dim = key_states.shape
        # Triton's interpreter runs the kernels on a CPU, for tests; a plan needs the sizes of buffers alone.
        if self.device.type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
            raise ConfigError(
                f"engine='device' needs a model on a CUDA device, but its keys are on {self.device}. {ADVICE}"
            )
        if self.dtype not in (torch.bfloat16, torch.float16):
            raise UnsupportedModelError(
                f"engine='device' serves models in bfloat16 or float16, but this one's keys are {self.dtype}. Load it with "
                "dtype=torch.bfloat16, or use engine='host'."
            )
        name = self.config.store_dtype
        if name not in ("auto", str(self.dtype).removeprefix("torch."), *EIGHT_BIT):
            raise ConfigError(
                f"engine='device' stores the model's {self.dtype}, or 8 bits ({', '.join(EIGHT_BIT)}), but got "
                f"store_dtype={name!r}. {ADVICE}"
            )
        try:
            layout = self.plan.layout(head_dim)
            form = StoreFormat(head_dim, EIGHT_BIT.get(name, self.dtype))
        except ValueError as error:
            raise UnsupportedModelError(f"engine='device': {error}. {ADVICE}") from error
        try:
            from alaya_hf.engine.device.tokens import DeviceTokens

            exact = self._pooled(batch, kv_heads, form)
        except ImportError as error:
            raise ConfigError(
                f"engine='device' needs Triton, which cannot be imported ({error}). CUDA builds of torch bring it: install one, "
                "or use engine='host'."
            ) from error
        self.tokens = DeviceTokens(
            batch, kv_heads, layout, self.config.window, self.config.min_context, self.dtype, self.device, form,
            exact=exact,
        )  # fmt: skip
        self.is_initialized = True

    def _pooled(self, batch: int, kv_heads: int, form: StoreFormat) -> PooledStore | None:
        """A place in the cache's pool, if an allocator is to manage the store."""
        config = self.config
        if config.allocator is None:
            return None
        return self.shared.pools.store(
            self.layer_idx, self.forward.layers, config.allocator, config.pool_size, batch, kv_heads, form, self.device
        )

    @property
    def batch_size(self) -> int:
        """Rows held, -1 before the first keys."""
        return -1 if self.tokens is None else len(self.tokens.counts)

    @_outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; those that become recent again return to the window from the store.

        Parameters
        ----------
        tokens_to_remove : int
            As a negative number, like everywhere in Transformers.
        """
        tokens_to_remove = int(tokens_to_remove)
        if tokens_to_remove > 0:
            raise AlayaError(
                f"crop takes the number of tokens to remove as a negative integer, but got {tokens_to_remove}. "
                f"Use crop({-tokens_to_remove})."
            )
        columns = max(0, self._columns + tokens_to_remove)
        if columns == self._columns or self.tokens is None:
            return
        self.check_consumed()
        self.tokens.truncate([self._tokens_in(row, 0, columns) for row in range(self.batch_size)], columns)
        self._columns = columns
        if self._valid is not None:
            self._valid = self._valid[:, :columns]

    @_outside_inference_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` (integers, or a bool mask over the rows). Copies all of their tokens."""
        if self.tokens is None:
            return
        indices = torch.as_tensor(indices)
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        indices = indices.to("cpu", torch.int64)
        self.tokens.select(indices.tolist())
        if self._valid is not None:
            self._valid = self._valid[indices]

    @_outside_inference_mode
    def with_config(self, config: AlayaConfig) -> AlayaLayer:
        """A copy with another configuration and without the probe.

        Another window, ``min_context``, ``store_dtype``, other bits or blocks or the other engine copy the whole context;
        otherwise what lies in a stored context's file is shared.
        """
        copy = DeviceLayer(config, self.layer_idx) if config.engine == "device" else AlayaLayer(config, self.layer_idx)
        self.copy_to(copy)
        return copy

    @_outside_inference_mode
    def copy_to(self, empty: AlayaLayer) -> None:
        """Give an empty layer what this one holds, see :meth:`with_config`."""
        if self.tokens is None:
            return
        if isinstance(empty, DeviceLayer) and self._keeps_as(empty):
            empty.dtype, empty.device, empty.is_initialized = self.dtype, self.device, True
            empty.tokens, empty._columns = deepcopy(self.tokens), self._columns
            empty._valid = None if self._valid is None else self._valid.clone()
        else:
            empty.fill(*self.contents(), self._valid)

    def _keeps_as(self, other: DeviceLayer) -> bool:
        """Whether another layer would keep the same tokens in the same way."""
        mine, theirs = self.config, other.config
        return (
            (mine.window.init, mine.window.local, mine.min_context, mine.store_dtype, mine.allocator, mine.pool_size)
            == (
                theirs.window.init,
                theirs.window.local,
                theirs.min_context,
                theirs.store_dtype,
                theirs.allocator,
                theirs.pool_size,
            )
        ) and self.plan.layout(16) == other.plan.layout(16)

    # Stored contexts --------------------------------------------------------------------------------------------------

    @_outside_inference_mode
    def expect_stored(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device, loader: Loader) -> None:
        """Begin to read what :meth:`attach_stored` needs at once, beside the other layers; the same arguments."""
        if self._columns:
            raise AlayaError(f"layer {self.layer_idx} holds {self._columns} tokens already. Attach to an empty cache.")
        empty = torch.empty(1, stored.kv_heads, 0, stored.head_dim, dtype=dtype, device=device)
        self.lazy_initialization(empty, empty)
        assert self.tokens is not None
        if self.config.allocator is None and self.tokens.can_attach(stored):
            self._window = self.tokens.read_window(stored, loader)

    @_outside_inference_mode
    def attach_stored(self, stored: StoredLayer, dtype: torch.dtype, device: torch.device, loader: Loader) -> bool:
        """Take a stored context into an empty layer; returns whether it is attended where it lies.

        Its longest run of tokens that lie in one file stays there, its records come to the device from beside it. A context that
        window and ring hold, one in another precision than the model's, and any context where ``store_dtype`` asks for 8 bits or
        an ``allocator`` manages the store is read and copied instead.

        Parameters
        ----------
        stored : StoredLayer
        dtype : torch.dtype
            Of the model's keys and values.
        device : torch.device
        loader : Loader
            Shared by the layers of the session, which ask it in their order.

        Raises
        ------
        AlayaError
            If the layer holds tokens.
        CorruptStoreError
        """
        if self._columns:
            raise AlayaError(f"layer {self.layer_idx} holds {self._columns} tokens already. Attach to an empty cache.")
        if self._window is None:
            self.expect_stored(stored, dtype, device, loader)
        assert self.tokens is not None
        window, self._window = self._window, None
        if window is None:
            kv = stored.read(0, stored.tokens).to(device, dtype)
            self.fill(kv[None, :, :, 0], kv[None, :, :, 1])
            return False
        self.tokens.attach(stored, loader, window)
        self._columns = stored.tokens
        return True

    def rows_to_store(self, start: int, stop: int) -> tuple[list[Tensor], Tensor, RecordFormat, range]:
        """What a database writes of a layer of one row without padding.

        Returns
        -------
        rows : list of Tensor
            Tokens ``start`` to ``stop``, ``[kv_heads, n, 2, head_dim]`` each on the host, in the model's dtype; views where they
            lie there as they are.
        records : Tensor ``[kv_heads, tiles, words]`` int32
            The low-bit tiles whose last token is one of them, on the host.
        format : RecordFormat
        tiles : range
        """
        assert self.tokens is not None
        form = self.tokens.record_format
        if isinstance(self.tokens.layout, BlockLayout):  # built anew from the vectors
            return (
                self.tokens.host_rows(start, stop),
                torch.empty(self.tokens.kv_heads, 0, 0, dtype=torch.int32),
                form,
                range(0),
            )
        tiles = form.tiles(start, stop)
        return self.tokens.host_rows(start, stop), self.tokens.host_records(tiles), form, tiles

    def contents(self) -> tuple[Tensor, Tensor]:
        """Everything cached, in order: two ``[batch, kv_heads, tokens, head_dim]`` on the layer's device.

        Padding columns are zero. Copies the whole context.
        """
        assert self.tokens is not None
        shape = (self.batch_size, self.tokens.kv_heads, self._columns, self.tokens.layout.head_dim)
        keys = torch.zeros(shape, dtype=self.dtype, device=self.device)
        values = torch.zeros_like(keys)
        for row in range(self.batch_size):
            chosen = torch.arange(self._columns) if self._valid is None else self._valid[row].nonzero().flatten()
            for target, found in zip((keys, values), self.tokens.row(row), strict=True):
                target[row][:, chosen.to(self.device)] = found
        return keys, values

    # Memory -----------------------------------------------------------------------------------------------------------

    @property
    def window_bytes(self) -> int:
        """Bytes of the window on the layer's device, free slots included."""
        return 0 if self.tokens is None else self.tokens.window_bytes

    @property
    def offloaded_bytes(self) -> int:
        """Bytes of keys and values in host memory: every token but the first ones, recent ones included."""
        return 0 if self.tokens is None else self.tokens.offloaded_bytes

    @property
    def lowbit_bytes(self) -> int:
        """Bytes of the low-bit copy on the layer's device, room to grow included; zero with blocks."""
        return 0 if self.tokens is None else self.tokens.lowbit_bytes

    @property
    def index_bytes(self) -> int:
        """Bytes of what stands for blocks on the layer's device, room to grow included; zero with a low-bit copy."""
        return 0 if self.tokens is None else self.tokens.index_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in the model's precision."""
        tokens = self.tokens
        return 0 if tokens is None else 2 * tokens.kv_heads * tokens.layout.head_dim * tokens.dtype.itemsize

    @property
    def hot_bytes(self) -> int:
        """Bytes of the hot set on the layer's device."""
        return 0 if self.tokens is None else self.tokens.hot_bytes

    def hot_counts(self) -> tuple[int, int]:
        """Tokens that decode steps looked up in the hot set, and those found. Waits for the device."""
        if self.tokens is None or self.tokens.hot is None:
            return 0, 0
        lookups, hits = self.tokens.hot.counts.tolist()
        return lookups, hits

    def token_counts(self) -> list[int]:
        """Tokens cached per row, padding excluded."""
        return [] if self.tokens is None else list(self.tokens.counts)

    # Attention --------------------------------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """See :meth:`AlayaLayer.attend`; passes of a few tokens without padding run the kernels, others are prefill.

        Raises
        ------
        UnsupportedModelError
            For capped logits and attention sinks.
        """
        if softcap is not None or sinks is not None:
            raise UnsupportedModelError(
                f"layer {self.layer_idx} has {'capped logits' if softcap is not None else 'attention sinks'}, which "
                "engine='device' does not serve. Use engine='host'."
            )
        self._check_probe()
        return super().attend(query, scaling, mask=mask)

    @property
    def _alike(self) -> int:
        """Layers whose memory is about to grow as this one's: all of them when the first one does."""
        return self.forward.layers if self.layer_idx == self.forward.first else 1

    def _keep(self, tokens: int, slack: int) -> int:
        """Not used: the number of tokens says which ones the window keeps."""
        return 0

    def _append(
        self, keys: Tensor, values: Tensor, valid: Tensor | None, keep: int, samples: list[Tensor] | None = None
    ) -> int:
        """Take new columns in; returns the bytes that went to the store."""
        assert self.tokens is not None
        return self._take_in(self.tokens.arrive(keys, values, valid), keys.shape[2], valid)

    def _take_in(self, arrival: Arrival, new: int, valid: Tensor | None) -> int:
        assert self.tokens is not None
        moved = self.tokens.append(arrival, self._columns + new, self._alike, self.forward.expected)
        self._count(new, valid)
        return moved

    def _count(self, new: int, valid: Tensor | None) -> None:
        if valid is not None or self._valid is not None:
            old = self._valid if self._valid is not None else torch.ones(self.batch_size, self._columns).bool()
            added = valid if valid is not None else torch.ones(self.batch_size, new).bool()
            self._valid = torch.cat([old, added], dim=1)
        self._columns += new

    def _prefill(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[list[Partial], StepRecord | None]:
        assert self.tokens is not None
        # Looked at before the attention is in the queue: what follows need not wait for that.
        arrival = self.tokens.arrive(keys, values, valid)
        attention = self._begin_prefill(query, keys, valid, scaling, None)
        # The first offloaded block travels while the new tokens attend to themselves.
        blocks = self.tokens.blocks(self.config.prefill_block) if self._columns else None
        parts = [attention.new(keys, values)]
        context, moved = self._columns + query.shape[2], 0
        if blocks is not None:
            part, moved = self.tokens.attend(attention, blocks)
            parts.append(part)
        moved += self._take_in(arrival, keys.shape[2], valid)
        if self.probe is None:
            return parts, None
        return parts, StepRecord(
            "prefill", query.shape[2], context, context, 0, 0, 0, None, None, None, None, moved, 0.0,
            attention.tiles, attention.skipped(),
        )  # fmt: skip

    def _decode(
        self, query: Tensor, keys: Tensor, values: Tensor, valid: Tensor | None, scaling: float, softcap: float | None
    ) -> tuple[list[Partial], StepRecord | None]:
        assert self.tokens is not None
        new = query.shape[2]
        if valid is not None or (new > 1 and not self.tokens.retrieves(self._columns)):
            return self._prefill(query, keys, values, valid, scaling, softcap)
        record = None
        if self.probe is not None:
            from alaya_hf.engine.device.record import DeviceRecord

            record = DeviceRecord(self.probe, query, self.tokens)
        settings = (scaling, self.plan, self.shared, self._columns, self._alike)
        if new > 1:
            watch = None if record is None else record.add
            part = Partial(*self.tokens.short_pass(query, keys, values, *settings, watch))
        else:
            self.tokens.hot_budget = self.config.hot_bytes // max(1, self.forward.layers)
            work = self.tokens.step(query[:, :, 0], keys[:, :, 0], values[:, :, 0], *settings)
            # The next layer's step overwrites the workspace. In a captured step nobody keeps an output for longer than that.
            captured = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            part = Partial((work.out if captured else work.out.clone()).unsqueeze(2), work.lse.unsqueeze(2))
            if record is not None:
                record.add(work)
        self._count(new, None)
        return [part], None if record is None else record.finish(self.tokens, self.plan, scaling)
