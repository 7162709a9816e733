"""AlayaDB: contexts that outlive the process, found by prefix."""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from alaya_hf.cache import AlayaCache
from alaya_hf.config import AlayaConfig
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.errors import (
    CorruptStoreError,
    FingerprintError,
    ReadOnlyStoreError,
    StoreError,
    UnknownContextError,
    UnsupportedModelError,
)
from alaya_hf.layer import AlayaLayer
from alaya_hf.planner import choose
from alaya_hf.session import Session
from alaya_hf.storage import Piece, Segment
from alaya_hf.storage.db.buffer_manager import BufferManager
from alaya_hf.storage.db.catalog import Catalog, Chain, ContextRow, Link, NewSegment
from alaya_hf.storage.db.fingerprint import differences, fingerprint
from alaya_hf.storage.db.folder import Folder
from alaya_hf.storage.db.mapped import over
from alaya_hf.storage.db.parts import Part, dump, write_parts
from alaya_hf.storage.db.reader import Reader, SegmentGone, lost, refused
from alaya_hf.storage.db.records import NAME as RECORDS
from alaya_hf.storage.db.records import record_source, write_records
from alaya_hf.storage.db.remote import RemoteStore
from alaya_hf.storage.db.remote.tier import RemoteTier
from alaya_hf.storage.db.vector_file import Source, VectorFile, file_bytes
from alaya_hf.storage.db.writer import SegmentWriter, layer_name, new_id

FORMAT = "alaya_hf vectors 1"
MIN_INDEXED = 256
"""Shorter runs of tokens are stored without an index: building one costs less than opening it."""
SHARED_BLOCKS = 4
"""Blocks that a prefix must have in common with a stored one to be shared on disk rather than written again."""

_NAME = re.compile(r"[^\x00-\x1f/]{1,200}")
_ATTEMPTS = 4
# What configurations of models that take images, sound or video have.
_NOT_TEXT = (
    "vision_config",
    "audio_config",
    "image_token_id",
    "image_token_index",
    "audio_token_id",
    "audio_token_index",
    "video_token_id",
    "video_token_index",
)


@dataclass(frozen=True)
class VerifyReport:
    """What :meth:`AlayaDB.verify` found.

    Attributes
    ----------
    segments, nbytes : int
        What was read.
    problems : list of str
        Each names context and layer; empty if all is well.
    """

    segments: int
    nbytes: int
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GcReport:
    """What :meth:`AlayaDB.gc` did.

    Attributes
    ----------
    contexts : list of str
        Names or ids of contexts that were removed.
    leftovers : int
        Folders of interrupted writes that were removed.
    nbytes : int
        Bytes the namespace takes now.
    swept : bool
        False if another process was writing, so that leftovers could not be told from its work.
    """

    contexts: list[str]
    leftovers: int
    nbytes: int
    swept: bool


class AlayaDB:
    """A folder of stored contexts for models of Hugging Face Transformers.

    Parameters
    ----------
    path : str or Path
        Made, for its owner alone, if it does not exist.
    model : PreTrainedModel, optional
        Needed for sessions; without it contexts can be listed, verified and deleted.
    tokenizer : PreTrainedTokenizerBase, optional
        Needed for prompts given as text.
    namespace : str
        Tenant. A prompt never meets another namespace's contexts.
    settings : AlayaConfig or str, optional
        Of its sessions, unless they say otherwise. Default: the preset ``"alaya"``.
    read_only : bool
        Never write, not even when a context was used.
    buffer_bytes : int, optional
        Budget for mapped pages of this process, see :class:`~alaya_hf.storage.db.buffer_manager.BufferManager`. None: the
        system decides.
    remote : RemoteStore or str, optional
        Where contexts are shared with other machines, see :mod:`alaya_hf.storage.db.remote`; a URL is one of fsspec.
    block : int
        Tokens per block of the prefix search, of a new store.

    Raises
    ------
    StoreError
        For a folder that cannot be used.
    UnsupportedModelError
        For a model with layers that do not keep every token, or that takes images or sound: their ids do not tell them apart.

    Notes
    -----
    Processes may share a store. A prefix is found by chained hashes and attached only after its token ids were compared. What
    is stored becomes visible all at once, when the catalog's transaction commits; everything before is written aside and made
    durable.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        model: Any = None,
        tokenizer: Any = None,
        namespace: str = "default",
        settings: AlayaConfig | str | None = None,
        read_only: bool = False,
        buffer_bytes: int | None = None,
        remote: RemoteStore | str | None = None,
        block: int = 64,
    ) -> None:
        if not _NAME.fullmatch(namespace):
            raise StoreError(f"a namespace is 1 to 200 characters without control characters, but got {namespace!r}.")
        self.path = Path(path)
        self.model, self.tokenizer, self.namespace, self.read_only = model, tokenizer, namespace, read_only
        self.settings = AlayaConfig.preset(settings or "alaya") if not isinstance(settings, AlayaConfig) else settings
        self._folder = Folder(self.path, create=not read_only)
        self._catalog = Catalog(self._folder.catalog, read_only=read_only, block=block)
        self._buffers = None if buffer_bytes is None else BufferManager(buffer_bytes)
        self._reader = Reader(self._folder, self._catalog, self._buffers)
        self._remote: RemoteTier | None = None
        if model is not None:
            seen = [key for key in _NOT_TEXT if getattr(model.config, key, None) is not None]
            if seen:
                raise UnsupportedModelError(
                    f"AlayaDB finds contexts by their token ids, but {type(model).__name__} takes more than "
                    f"text ({seen[0]}): two "
                    "images have the same ids. Use an AlayaCache without a database, or the model's text part alone."
                )
            layers = Session(self.settings, config=model.config).layers
            kinds = {type(layer).__name__ for layer in layers if not isinstance(layer, AlayaLayer)}
            if kinds:
                raise UnsupportedModelError(
                    f"AlayaDB stores models whose layers keep every token, but {type(model).__name__} has {sorted(kinds)}. "
                    "Use an AlayaCache without a database."
                )
        if remote is not None:
            if isinstance(remote, str):
                from alaya_hf.storage.db.remote.fsspec import FsspecStore

                remote = FsspecStore(remote)
            self._remote = RemoteTier(remote, self._folder, self._catalog)

    def __enter__(self) -> AlayaDB:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"AlayaDB({str(self.path)!r}, namespace={self.namespace!r})"

    def close(self) -> None:
        """Let go of the catalog and the remote store; sessions go on."""
        self._catalog.close()
        if self._remote is not None:
            self._remote.close()

    # Models and prompts -----------------------------------------------------------------------------------------------

    @property
    def fingerprint(self) -> dict[str, str]:
        """What its contexts depend on besides their tokens, looked at anew each time (some 20,000 numbers).

        Raises
        ------
        UnsupportedModelError
            If Accelerate keeps weights off memory.
        """
        return fingerprint(self._need_model())

    def _need_model(self) -> Any:
        if self.model is None:
            raise StoreError(
                "this needs the model whose contexts are stored. Open AlayaDB(path, model=..., tokenizer=...)."
            )
        return self.model

    def _ids(self, prompt: Any) -> np.ndarray:
        """``[n]`` int32 from text, ids or a tensor of them."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise StoreError(
                    "a prompt given as text needs a tokenizer. Open AlayaDB(path, model=..., tokenizer=...)."
                )
            prompt = self.tokenizer(prompt)["input_ids"]
        ids = torch.as_tensor(prompt).detach().cpu()
        if ids.ndim == 2 and ids.shape[0] == 1:
            ids = ids[0]
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex():
            raise StoreError(
                f"expected one prompt, as text or token ids [n] or [1, n], but got {ids.dtype} {tuple(ids.shape)}."
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < 2**31:
            raise StoreError(f"token ids lie between 0 and 2^31, but got {int(ids.min())} to {int(ids.max())}.")
        return ids.numpy().astype(np.int32)

    def _devices(self) -> list[torch.device]:
        """Of each layer of the model, by its parameters."""
        model = self._need_model()
        count = model.config.get_text_config(decoder=True).num_hidden_layers
        devices: dict[int, torch.device] = {}
        for name, parameter in model.named_parameters():
            found = re.search(r"\b(?:layers|h|blocks)\.(\d+)\.", name)
            if found and parameter.device.type != "meta":
                devices.setdefault(int(found.group(1)), parameter.device)
        return [devices.get(number, model.device) for number in range(count)]

    def _shape(self) -> tuple[int, int | None]:
        """Layers of the model, and KV heads of each where all have as many."""
        config = self._need_model().config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None)
        varied = getattr(config, "num_global_key_value_heads", None) is not None
        return len(self._devices()), heads if isinstance(heads, int) and not varied else None

    # Sessions ---------------------------------------------------------------------------------------------------------

    def create_session(
        self,
        prompt: Any = None,
        *,
        context: str | None = None,
        settings: AlayaConfig | str | None = None,
        **kwargs: Any,
    ) -> tuple[Session, Tensor]:
        """A session on the longest stored prefix of a prompt, or on a stored context.

        Parameters
        ----------
        prompt : str, list of int or Tensor, optional
            Text, or token ids ``[n]`` or ``[1, n]``.
        context : str, optional
            Instead of a prompt: name or id of a context, all of which is attached.
        settings : AlayaConfig or str, optional
            Of this session.
        **kwargs
            As for :class:`~alaya_hf.AlayaCache`.

        Returns
        -------
        session : Session
            To be passed as ``past_key_values`` with the whole prompt; empty if nothing is stored.
        rest : Tensor
            ``[1, m]`` int64: tokens of the prompt that still have to be run. Where there are none, give ``generate`` a longer
            prompt, or ``session.crop(-1)`` first.

        Raises
        ------
        FingerprintError
            If ``context`` was made by another model; says what differs.
        UnknownContextError
        CorruptStoreError
            Naming context and layer.

        Notes
        -----
        Opening reads file headers and each layer's window; the rest is read as queries ask for it. If only part of a stored
        context matches, searches leave out the tokens behind it. With ``engine="device"`` all of the attached context is verified
        and made readable for the device in the background, see :meth:`Session.attach`; it stays in memory until the last session
        on it goes, whatever ``buffer_bytes`` says.
        """
        if (prompt is None) == (context is None):
            raise StoreError("create_session takes a prompt or a context, one of them.")
        model, fields = self._need_model(), self.fingerprint
        session = Session(self.settings if settings is None else settings, config=model.config, **kwargs)
        session.fingerprint = fields
        for _ in range(_ATTEMPTS):
            if context is not None:
                chain, theirs, ids = self._catalog.open(self.namespace, context)
                different = differences(fields, theirs)
                if different:
                    raise FingerprintError(
                        f"the context {context!r} was made by another model; what differs: {different}. Load the model that made "
                        "it, or import the context again with this one."
                    )
            else:
                ids = self._ids(prompt)
                chain = self._catalog.longest(self.namespace, fields, ids)
                if self._remote is not None and self._remote.fetch(self.namespace, fields, ids, chain, self._shape()):
                    chain = self._catalog.longest(self.namespace, fields, ids)
                if not chain.links:
                    self._warn_of_others(ids, fields)
            try:
                if chain.links:
                    self._attach(session, chain, ids)
                break
            except SegmentGone:
                # Deleted by another process since it was found.
                session.reset()
        else:
            raise StoreError(f"contexts of {self.path} vanish faster than they can be opened. Try again.")
        self._catalog.touch(chain)
        return session, torch.from_numpy(ids[chain.tokens :].astype(np.int64))[None]

    def _attach(self, session: Session, chain: Chain, ids: np.ndarray) -> None:
        label = self._label(chain.links[-1].segment)
        layers = self._reader.layers(chain, label)
        devices = self._devices()
        if len(layers) != len(devices):
            raise CorruptStoreError(
                f"{label} has {len(layers)} layers, but the model has {len(devices)}. Delete the context."
            )
        known = torch.from_numpy(ids[: chain.tokens].astype(np.int64))[None]
        session.attach(layers, chain, known, devices, self._need_model().dtype)

    def _label(self, segment: str) -> str:
        return f"context {', '.join(map(repr, self._catalog.readers(segment)))} (segment {segment[:8]})"

    def _warn_of_others(self, ids: np.ndarray, fields: dict[str, str]) -> None:
        found = self._catalog.others(self.namespace, fields, ids)
        if found is not None:
            warnings.warn(
                f"{self.path} has a context that begins like this prompt, made by another model; what differs: "
                f"{differences(fields, found[1])}. It is not used.",
                UserWarning,
                stacklevel=3,
            )

    # Storing ----------------------------------------------------------------------------------------------------------

    def import_context(
        self,
        prompt: Any,
        kv: Cache | Sequence[tuple[Tensor, Tensor]],
        *,
        name: str | None = None,
        settings: AlayaConfig | str | None = None,
    ) -> ContextRow:
        """Store keys and values that were computed elsewhere. (``import`` is a keyword of Python.)

        Parameters
        ----------
        prompt : str, list of int or Tensor
            The tokens.
        kv : DynamicCache, or a pair of Tensors per layer
            ``[1, kv_heads, n, head_dim]`` each, keys after the rotary embedding, one column per token of the prompt.
        name : str, optional
        settings : AlayaConfig or str, optional
            Which indexes to build.

        Returns
        -------
        ContextRow

        Raises
        ------
        StoreError
            If the number of tokens or layers is another, or there is more than one sequence.

        Notes
        -----
        Where a stored context has the same tokens already, its vectors are kept and these are not looked at.
        """
        ids = self._ids(prompt)
        settings = self.settings if settings is None else settings
        if isinstance(kv, Cache):
            session = Session.from_cache(kv, settings)
        else:
            session = Session(settings)
            for number, (keys, values) in enumerate(kv):
                session.layers.append(session._new_layer(number))
                session.layers[number].fill(keys, values)
        held = [layer.keys for layer in kv.layers] if isinstance(kv, Cache) else [keys for keys, _ in kv]
        batch = max((len(keys) for keys in held if isinstance(keys, Tensor)), default=1)
        if batch != 1:
            raise StoreError(
                f"contexts are imported one by one, but the keys and values are of {batch} sequences. Give [1, kv_heads, n, "
                "head_dim] per layer: one row of the batch at a time."
            )
        lengths = {layer.get_seq_length() for layer in session.layers}
        expected = len(self._devices())
        if lengths != {len(ids)} or len(session.layers) != expected:
            raise StoreError(
                f"the prompt has {len(ids)} tokens and the model {expected} layers, but the keys and values are of "
                f"{len(session.layers)} layers with {sorted(lengths)} tokens. Give one column per token, all layers."
            )
        assert isinstance(session, Session)
        session._token_ids = torch.from_numpy(ids.astype(np.int64))[None]
        return self.store(session, name=name)

    def store(
        self, session: AlayaCache, *, name: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> ContextRow:
        """Store what a session holds; what the database has of it already is not written again.

        Parameters
        ----------
        session : Session
            Of one sequence without padding. Goes on as it is and may be stored again when it has grown.
        name : str, optional
            Unique within the namespace. Storing under the name of a context that this one continues takes the name over.
        progress : callable, optional
            Called with layers done and layers in all.

        Returns
        -------
        ContextRow

        Raises
        ------
        StoreError
            If token ids are unknown, there is more than one sequence, or a pass was interrupted between two layers.
        FingerprintError
            If the session was made for another model than the database's, or for the same with other weights or adapters; says
            what differs.
        ContextExistsError
            If the name is taken by a context that this one does not continue.
        DiskFullError, ReadOnlyStoreError
            Before anything visible has changed.

        Notes
        -----
        Keys and values are stored in the precision of the session's store (``store_dtype``), its window too. Indexes and
        low-bit copies are stored beside them as far as the session's settings ask for them; with ``engine="device"`` the low-bit
        records that a later session of that engine brings to its device instead of quantising again. An 8-bit store is stored in
        the model's precision, as it gives its vectors back.
        """
        if self.read_only:
            raise ReadOnlyStoreError(
                f"{self.path} was opened read_only; nothing was stored. Open it without read_only."
            )
        if not isinstance(session, Session):
            raise StoreError(
                f"store takes a Session, as create_session gives it, but got {type(session).__name__}. Fill one, or give a "
                "cache's keys and values to import_context."
            )
        if name is not None and not _NAME.fullmatch(name):
            raise StoreError(f"a name is 1 to 200 characters without slashes and control characters, but got {name!r}.")
        lengths = [layer.get_seq_length() for layer in session.layers]
        if len(set(lengths)) > 1:
            raise StoreError(
                f"the session's layers hold {min(lengths)} to {max(lengths)} tokens: a pass was interrupted. Nothing was stored. "
                "Begin a new session and run the prompt again."
            )
        ids = session.token_ids[0].numpy().astype(np.int32)
        if not ids.size:
            raise StoreError("the session holds no tokens. Run the model with past_key_values=session first.")
        for layer in session.alaya_layers:
            if layer._valid is not None and not bool(layer._valid.all()):
                raise StoreError("the session holds padding; contexts are stored without. Prefill the sequence alone.")
        fields = self._fields_of(session)
        base = self._catalog.longest(self.namespace, fields, ids)
        if session.chain.tokens >= base.tokens:
            base = session.chain
        for attempt in range(_ATTEMPTS):
            if base.tokens < min(len(ids), SHARED_BLOCKS * self._catalog.block):
                base = Chain()
            with self._folder.writer():
                new = [] if base.tokens == len(ids) else [self._write(session, base, len(ids), fields, progress)]
                try:
                    context, removed = self._catalog.commit(self.namespace, fields, ids, base, new, name)
                    break
                except LookupError:
                    # The base was deleted meanwhile.
                    self._discard(new)
                    base = Chain() if attempt else self._catalog.longest(self.namespace, fields, ids)
                except BaseException:
                    self._discard(new)
                    raise
        else:
            raise StoreError(f"contexts of {self.path} vanish while they are continued. Nothing was stored; try again.")
        self._remove(removed)
        links = [Link(segment.id, segment.start, segment.tokens) for segment in new]
        session.chain = Chain((*base.links, *links))
        if self._remote is not None:
            self._remote.push(self.namespace, fields, ids, session.chain)
        return self.info(context)

    def _fields_of(self, session: Session) -> dict[str, str]:
        """The fingerprint of what a session holds, which has to be that of this database's model as it is now."""
        fields = self.fingerprint
        if session.fingerprint is None:
            # Made elsewhere, and nothing of it came from a store: whose it is, is for the caller to know.
            session.fingerprint = fields
        different = differences(fields, session.fingerprint)
        if different:
            raise FingerprintError(
                f"the session was made for another model than the database has now; what differs: {different}. "
                "Nothing was stored: "
                "store it in a database opened with the model it was filled by, or begin a new session with this one."
            )
        return fields

    def _write(
        self,
        session: Session,
        base: Chain,
        total: int,
        fields: dict[str, str],
        progress: Callable[[int, int], None] | None,
    ) -> NewSegment:
        """Write tokens ``base.tokens`` to ``total`` as a segment."""
        start = base.tokens
        layers = session.layers
        about = {
            "format": FORMAT,
            "start": str(start),
            "tokens": str(total - start),
            "layers": str(len(layers)),
            "model": fields["weights"],
        }
        with SegmentWriter(self._folder, new_id(), start, total - start, about) as writer:
            for number, layer in enumerate(layers):
                with torch.no_grad():
                    sources, about_layer = _layer_sources(layer, number, start, total)
                if number == 0:
                    self._folder.check_room(file_bytes(sources) * len(layers))
                writer.write(number, sources, about_layer)
                if progress is not None:
                    progress(number + 1, len(layers))
            return writer.publish()

    def _remove(self, segments: Iterable[str]) -> None:
        for segment in segments:
            self._folder.remove_segment(segment)

    def _discard(self, new: Iterable[NewSegment]) -> None:
        """Remove the files of what was not committed; an interruption may have come just after the commit."""
        self._remove(segment.id for segment in new if not self._catalog.knows(segment.id))

    # Keeping house ----------------------------------------------------------------------------------------------------

    def info(self, context: str) -> ContextRow:
        """One context, by name, id or the beginning of its id.

        Raises
        ------
        UnknownContextError
        """
        context_id, _, _ = self._catalog.find(self.namespace, context)
        rows = self._catalog.contexts(self.namespace, context_id)
        if not rows:
            raise UnknownContextError(f"there is no context {context!r} any more.")
        return rows[0]

    def delete(self, context: str) -> None:
        """Remove a context; what others share stays, and sessions that have it open go on.

        Raises
        ------
        UnknownContextError

        Notes
        -----
        Removes it here only. A remote store keeps what was copied to it, for the fleet: with ``remote=`` the next prompt that
        begins like the context brings it back. To be rid of it, remove it there too, by that store's own means.
        """
        context_id, _, _ = self._catalog.find(self.namespace, context)
        self._remove(self._catalog.delete(context_id))

    def verify(self, context: str | None = None, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
        """Read everything and compare it with its checksums.

        Parameters
        ----------
        context : str, optional
            Only this one; otherwise the namespace.
        progress : callable, optional
            Called with segments done and segments in all.
        """
        only = None
        if context is not None:
            only = {link.segment for link in self._catalog.find(self.namespace, context)[1].links}
        segments = [
            (segment, readers)
            for segment, readers in self._catalog.segments_of(self.namespace)
            if only is None or segment in only
        ]
        problems: list[str] = []
        nbytes = 0
        for number, (segment, readers) in enumerate(segments):
            label = f"context {', '.join(map(repr, readers[:3]))} (segment {segment[:8]})"
            found, size = self._verify_segment(segment, label)
            problems += found
            nbytes += size
            if progress is not None:
                progress(number + 1, len(segments))
        return VerifyReport(len(segments), nbytes, problems)

    def _verify_segment(self, segment: str, label: str) -> tuple[list[str], int]:
        problems: list[str] = []
        nbytes = 0
        expected = self._catalog.files(segment)
        try:
            self._catalog.parts_of(segment)
            folder = self._folder.open_segment(segment)
        except (CorruptStoreError, OSError) as error:
            if not self._catalog.files(segment):
                return [], 0  # deleted meanwhile
            if isinstance(error, OSError) and not lost(error):
                raise refused(label, error) from error
            return [
                str(error) if isinstance(error, CorruptStoreError) else f"{label}: its files are missing ({error})"
            ], 0
        try:
            for file in expected:
                where = f"{label}, layer {file.layer}"
                try:
                    opened = VectorFile(folder, layer_name(file.layer), file, where)
                    problems += opened.damaged_blocks(folder, layer_name(file.layer))
                    nbytes += file.nbytes
                except CorruptStoreError as error:
                    problems.append(str(error))
                except OSError as error:
                    if not lost(error) and error.errno != errno.EIO:
                        raise refused(where, error) from error
                    problems.append(f"{where}: the file cannot be opened ({error.strerror})")
        finally:
            os.close(folder)
        return problems, nbytes

    def gc(self, max_bytes: int | None = None) -> GcReport:
        """Remove what interrupted writes left, and the least recently used contexts of the namespace above a limit.

        Parameters
        ----------
        max_bytes : int, optional
            Bytes that the namespace's segments may take.
        """
        if self.read_only:
            raise ReadOnlyStoreError(f"{self.path} was opened read_only; nothing was removed.")
        gone: list[str] = []
        if max_bytes is not None:
            for row in reversed(self._catalog.contexts(self.namespace)):
                if self.nbytes <= max_bytes:
                    break
                try:
                    self._remove(self._catalog.delete(row.id))
                except UnknownContextError:
                    continue
                gone.append(row.name or row.id)
        with self._folder.sweeper() as alone:
            leftovers = self._folder.leftovers(self._catalog.known()) if alone else []
            for path in leftovers:
                shutil.rmtree(path, ignore_errors=True)
        return GcReport(gone, len(leftovers), self.nbytes, alone)

    @property
    def nbytes(self) -> int:
        """Bytes of the namespace's segments on disk."""
        return self._catalog.total_bytes(self.namespace)

    def list(self) -> list[ContextRow]:
        """The namespace's contexts, most recently used first."""
        return self._catalog.contexts(self.namespace)


def _device_sources(layer: DeviceLayer, start: int, total: int) -> tuple[dict[str, Source], dict[str, str]]:
    """What to write of a layer of the device engine: vectors, and its low-bit records beside them."""
    rows, records, form, tiles = layer.rows_to_store(start, total)
    heads, _, _, head_dim = rows[0].shape
    pieces = [piece[head].contiguous() for head in range(heads) for piece in rows]
    sources = {"kv": Source(rows[0].dtype, (heads, total - start, 2, head_dim), pieces)}
    about = {"parts": write_parts([])}
    if tiles:
        sources[RECORDS], about[RECORDS] = record_source(records), write_records(form, tiles)
    return sources, about


def _layer_sources(layer: Any, number: int, start: int, total: int) -> tuple[dict[str, Source], dict[str, str]]:
    """What to write of one layer, and what its header says: tokens ``start`` to ``total`` and what is built on them."""
    if isinstance(layer, DeviceLayer):
        return _device_sources(layer, start, total)
    first, pieces, recent = layer.parts()
    runs: list[tuple[Tensor, Piece | None]]
    runs = [(first, None), *((piece.view, piece) for piece in pieces), (recent, None)]
    views: list[Tensor] = []
    parts: list[Part] = []
    tensors: dict[str, Tensor] = {}
    dtype = runs[-1][0].dtype
    at = 0
    for view, piece in runs:
        begin, end = at, at + view.shape[1]
        at = end
        if end <= start or begin == end:
            continue
        skipped = max(0, start - begin)
        if piece is not None:
            view = piece.segment.read(skipped, piece.length)
        else:
            view = view[:, skipped:]
        if piece is not None and view.shape[1] >= MIN_INDEXED:
            whole = not skipped and piece.length == piece.segment.used and view.dtype == dtype
            entries, built = _accelerated(
                piece.segment if whole else over(view.to(dtype)), layer, number, f"part{len(parts)}"
            )
            parts.append(Part(begin + skipped - start, end - start, tuple(entries)))
            tensors |= built
        views.append(view.to(dtype))
    heads, _, _, head_dim = views[0].shape
    kv_pieces = [view[head].contiguous() for head in range(heads) for view in views]
    sources = {"kv": Source(dtype, (heads, total - start, 2, head_dim), kv_pieces)}
    beside = {name: Source.of(tensor) for name, tensor in tensors.items()}
    return {**sources, **beside}, {"parts": write_parts(parts)}


def _accelerated(segment: Segment, layer: AlayaLayer, number: int, name: str) -> tuple[list[Any], dict[str, Tensor]]:
    """What a layer's plan reads beside the vectors, brought up to date."""
    plan = choose(layer.config, number, None)
    if plan.query.keeps_all or (plan.query.keeps_none and plan.residual.is_none):
        return [], {}
    plan.residual.accelerate(segment, plan.index)
    segment.searcher(plan.index)
    return dump(segment, name)
