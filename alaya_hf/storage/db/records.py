"""The device engine's low-bit records beside the vectors of a file.

Records are tiles of :data:`~alaya_hf.kernels.gpu.layout.TILE` tokens, counted from token ``init`` of the context (what lies
before is the window's). A file has the tiles whose last token is its own: a tile that begins in an earlier segment is there as
a whole, so every prefix of a chain of segments finds each of its tiles exactly once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alaya_hf.storage.db.vector_file import Source, VectorFile

NAME = "records"
TILE = 64


@dataclass(frozen=True)
class RecordFormat:
    """What records depend on besides their tokens.

    Parameters
    ----------
    init : int
        First tokens of the context that are in no tile.
    key_bits, value_bits : int
    words : int
        int32 of a record.
    """

    init: int
    key_bits: int
    value_bits: int
    words: int

    def last_token(self, tile: int) -> int:
        """The last token of a tile."""
        return self.init + TILE * (tile + 1) - 1

    def tiles(self, start: int, stop: int) -> range:
        """The tiles whose last token is one of ``start`` to ``stop - 1``."""
        first = max(0, -(-(start - self.init - TILE + 1) // TILE))
        return range(first, max(first, (stop - self.init) // TILE))


@dataclass(frozen=True)
class StoredRecords:
    """Tiles that a file has.

    Parameters
    ----------
    file : VectorFile
    tensor : Tensor ``[kv_heads, tiles, words]`` int32
        Mapped; to be read after ``file.check("records")``.
    tiles : range
        The wanted ones.
    offset : int
        Where the first of them lies in the tensor.
    """

    file: VectorFile
    tensor: Tensor
    tiles: range
    offset: int

    @property
    def view(self) -> Tensor:
        """The wanted tiles: ``[kv_heads, n, words]``."""
        return self.tensor[:, self.offset : self.offset + len(self.tiles)]


def record_source(records: Tensor) -> Source:
    """What to write: ``[kv_heads, tiles, words]`` int32 on the host."""
    return Source(records.dtype, tuple(records.shape), [head.contiguous() for head in records])


def write_records(form: RecordFormat, tiles: range) -> str:
    """As text for the header of a file."""
    about = {"init": form.init, "key_bits": form.key_bits, "value_bits": form.value_bits}
    return json.dumps({**about, "words": form.words, "first": tiles.start, "tiles": len(tiles)})


def find_records(file: VectorFile, form: RecordFormat, wanted: range) -> StoredRecords | None:
    """The wanted tiles that a file has in this format, None if it has none.

    Raises
    ------
    CorruptStoreError
        If the header says something else than the tensor is.
    """
    text = file.metadata.get(NAME)
    if text is None:
        return None
    try:
        about = json.loads(text)
        found = RecordFormat(*(about[key] for key in ("init", "key_bits", "value_bits", "words")))
        held = range(about["first"], about["first"] + about["tiles"])
        tensor = file.tensors[NAME]
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != (
            file.tensors["kv"].shape[0],
            len(held),
            found.words,
        ):
            raise ValueError(f"low-bit records are {tensor.dtype} {tuple(tensor.shape)}")
    except (ValueError, KeyError, TypeError) as error:
        raise file._damaged(f"the low-bit records beside the vectors cannot be used ({error})") from error
    tiles = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
    if found != form or not tiles:
        return None
    return StoredRecords(file, tensor, tiles, tiles.start - held.start)


def missing(wanted: range, found: Sequence[StoredRecords]) -> list[range]:
    """The wanted tiles that nobody has, as runs; those found are in order."""
    gaps, at = [], wanted.start
    for piece in found:
        if piece.tiles.start > at:
            gaps.append(range(at, piece.tiles.start))
        at = piece.tiles.stop
    if at < wanted.stop:
        gaps.append(range(at, wanted.stop))
    return gaps
