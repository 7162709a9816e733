"""A session: a cache that may begin with a stored context."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from alaya_hf.cache import AlayaCache
from alaya_hf.config import AlayaConfig
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device.loader import Loader
from alaya_hf.errors import AlayaError, StoreError
from alaya_hf.storage.db.catalog import Chain
from alaya_hf.storage.db.reader import StoredLayer


class Session(AlayaCache):
    """An :class:`~alaya_hf.AlayaCache` over a stored prefix, made by :meth:`alaya_hf.AlayaDB.create_session`.

    Pass it as ``past_key_values``. The prefix is attended where it lies, in mapped files; what comes after it goes to memory
    until :meth:`alaya_hf.AlayaDB.store` writes it. Several sessions may share one stored context.

    Attributes
    ----------
    chain : Chain
        What of the tokens held is in the database, as far as is known here.
    fingerprint : dict or None
        Of the model that its keys and values are of, see :func:`alaya_hf.storage.db.fingerprint.fingerprint`; None for a session
        that no database made. Copies keep it.
    """

    def __init__(self, settings: AlayaConfig | str | None = None, **kwargs: Any) -> None:
        super().__init__(settings, **kwargs)
        self.chain = Chain()
        self.fingerprint: dict[str, str] | None = None

    @property
    def reused(self) -> int:
        """Tokens at the beginning that came from the database, or went there."""
        return self.chain.tokens

    @property
    def token_ids(self) -> Tensor:
        """``[1, n]`` int64 on the host: the tokens held.

        Raises
        ------
        StoreError
            If there is more than one sequence, or some tokens were never shown: forward passes outside ``generate`` do not
            carry ids.
        """
        held = self.get_seq_length()
        known = self._token_ids
        if held == 0:
            return torch.empty(1, 0, dtype=torch.int64)
        if known is None or known.shape[1] < held:
            raise StoreError(
                f"the cache holds {held} tokens, but the ids of only {0 if known is None else known.shape[1]} are known: forward "
                "passes outside generate() do not show them. Call session.note_tokens(ids) with all of them."
            )
        if len(known) != 1:
            raise StoreError(
                f"the cache holds {len(known)} sequences; contexts are stored one by one. Keep one with "
                "session.batch_select_indices(torch.tensor([row]))."
            )
        return known[:, :held].to("cpu", torch.int64)

    def note_tokens(self, ids: Tensor) -> None:
        """Say which tokens the session holds, after forward passes outside ``generate``.

        Parameters
        ----------
        ids : Tensor
            ``[1, n]`` or ``[n]``, all of them.

        Raises
        ------
        StoreError
            If their number is another, or they differ from what is known to be stored.
        """
        ids = torch.as_tensor(ids).reshape(1, -1).to("cpu", torch.int64)
        held = self.get_seq_length()
        if ids.shape[1] != held:
            raise StoreError(
                f"the cache holds {held} tokens, but {ids.shape[1]} ids were given. Give one id per token."
            )
        known = self._token_ids
        if known is not None and self.reused and not torch.equal(known[:, : self.reused].cpu(), ids[:, : self.reused]):
            raise StoreError(
                f"the ids given differ from those of the {self.reused} tokens that came from the database. Give the ids of what "
                "the session holds."
            )
        self._token_ids = ids

    # Outside Transformers ---------------------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: Any, *args: Any, **kwargs: Any) -> Any:
        """New keys and values of a layer: ``update(k, v, layer)`` as in Transformers, or ``update(q, k, v, layer)``.

        Parameters
        ----------
        q, k, v : Tensor
            ``[batch, heads, m, head_dim]`` and twice ``[batch, kv_heads, m, head_dim]``, after the rotary embedding.
        layer : int

        Notes
        -----
        The second form is that of the paper (AlayaDB, arXiv 2504.10326, section 4) for engines of one's own: follow it with
        :meth:`attention`, which is where the queries are used.
        """
        if isinstance(layer_idx, Tensor):
            if len(args) != 1 or isinstance(args[0], Tensor):
                raise AlayaError(
                    f"update(q, k, v, layer) takes three tensors and a layer, but got {3 + len(args)} arguments."
                )
            super().update(value_states, layer_idx, int(args[0]), **kwargs)
            return None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def attention(self, q: Tensor, layer: int, scaling: float | None = None) -> Tensor:
        """Attention of a pass's queries to everything held by a layer, the tokens of the last :meth:`update` included.

        Parameters
        ----------
        q : Tensor
            ``[batch, heads, m, head_dim]`` after the rotary embedding, the queries of the updated tokens.
        layer : int
        scaling : float, optional
            Factor from scores to logits, ``head_dim ** -0.5`` by default.

        Returns
        -------
        Tensor
            ``[batch, heads, m, head_dim]``.
        """
        if layer >= len(self.layers):
            raise AlayaError(f"layer {layer} was never updated. Call update(q, k, v, {layer}) first.")
        out: Tensor = self.layers[layer].attend(q, q.shape[-1] ** -0.5 if scaling is None else scaling)
        return out.transpose(1, 2)

    # What happens to a cache ------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        self.chain = self.chain.cut(self.get_seq_length())

    def reset(self) -> None:
        """Forget everything but the configuration."""
        super().reset()
        self.chain = Chain()

    def fork(self, settings: AlayaConfig | str | None = None) -> AlayaCache:
        """See :meth:`AlayaCache.fork`."""
        if settings is None:
            return deepcopy(self)
        copy = super().fork(settings)
        assert isinstance(copy, Session)
        copy.chain, copy.fingerprint = self.chain, self.fingerprint
        return copy

    def attach(
        self, layers: list[StoredLayer], chain: Chain, ids: Tensor, where: list[Any], dtype: torch.dtype
    ) -> None:
        """Begin with a stored prefix.

        Parameters
        ----------
        layers : list of StoredLayer
        chain : Chain
        ids : Tensor
            ``[1, n]`` int64, the tokens of the prefix.
        where : list of torch.device
            Of each layer's keys.
        dtype : torch.dtype
            Of the model's keys and values.

        Notes
        -----
        Reads each layer's window. With ``engine="device"`` the low-bit records go to the device in the background, layer by
        layer; the first work on a layer waits for that layer alone. The first pass that retrieves reads the vectors that it
        selected through the host; the second one begins to verify all of them and to register their pages with the device,
        which reads them in place from then on. A block that does not match its checksum raises CorruptStoreError: nothing
        is attended to before it was verified. See :meth:`DeviceLayer.attach_stored` for what is copied instead.
        """
        if layers:
            tokens = layers[0].tokens
            self.plan_for(torch.empty(1, 1, 1, 1, dtype=dtype, device=where[0]), tokens, tokens)
        loader: Loader | None = None
        for number, (stored, device) in enumerate(zip(layers, where, strict=True)):
            if number == len(self.layers):
                self.layers.append(self._new_layer(number))
            layer = self.layers[number]
            if isinstance(layer, DeviceLayer):
                if loader is None:
                    loader = Loader()
                    loader.expect(run.file for each in layers for run in each.files())
                layer.expect_stored(stored, dtype, torch.device(device), loader)
        for layer, stored, device in zip(self.layers, layers, where, strict=True):
            if isinstance(layer, DeviceLayer):
                assert loader is not None
                layer.attach_stored(stored, dtype, torch.device(device), loader)
                continue
            config = layer.config
            total, window = stored.tokens, config.window
            if total <= config.min_context:
                first, last = 0, 0
            else:
                # As the context was left, if the window may still hold what came after it.
                last = stored.settled(window.local + window.overflow)
                last = last if last >= 0 and total - last >= window.local else max(0, total - window.local)
                first = min(window.init, last)
            layer.attach(
                stored.read(0, first), stored.read(last, total), stored.pieces(first, last), dtype, torch.device(device)
            )
        if loader is not None:
            loader.attached()
        self._token_ids = ids
        self.chain = chain
