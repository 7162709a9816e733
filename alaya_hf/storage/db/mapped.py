"""A segment that lies in a file and is attended there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from alaya_hf.errors import AlayaError
from alaya_hf.kernels.cpu.blocks import BlockMeans
from alaya_hf.kernels.cpu.lowbit import LowBitKV
from alaya_hf.storage.db.parts import Part, lowbit_of, means_of, spec_of
from alaya_hf.storage.db.vector_file import VectorFile
from alaya_hf.storage.segment import Segment


class MappedSegment(Segment):
    """Tokens of a vector file, with what is stored beside them. Nothing is read before it is needed.

    Parameters
    ----------
    file : VectorFile
    start, stop : int
        Tokens of the file.
    part : Part, optional
        What is stored for exactly these tokens; without it indexes are built in memory when they are asked for.

    Attributes
    ----------
    file : VectorFile
        The mapped file, for whoever registers it with a device.
    start : int
        First token within the file.

    Notes
    -----
    A segment in a file is never appended to: new tokens start a segment of their own. Vectors are verified a page at a time,
    before they are read: the pages of the tokens that a search returned, or all of them for an index that walks over
    vectors. What is stored beside them is verified as a whole when it is first used.
    """

    def __init__(self, file: VectorFile, start: int, stop: int, part: Part | None = None) -> None:
        kv = file.tensors["kv"]
        super().__init__(kv.shape[0], kv.shape[3], kv.dtype)
        self.file, self.start = file, start
        self._buffer = kv[:, start:stop]
        self.used = stop - start
        self.shared = True
        self._entries: list[Mapping[str, Any]] = list(part.entries) if part is not None else []
        self._read_up_to = 0

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """See :meth:`Segment.read`."""
        stop = self.used if stop is None else min(stop, self.used)
        if stop > start and stop > self._read_up_to:
            heads, tokens, _, head_dim = self.file.tensors["kv"].shape
            row = 2 * head_dim * self._buffer.element_size()
            first = (np.arange(heads, dtype=np.int64) * tokens + self.start + start) * row
            self.file.check_rows(first, (stop - start) * row)
            if start <= self._read_up_to and self.file._buffers is None:
                self._read_up_to = stop
        return self.view[:, start:stop]

    def check(self, ids: Tensor, offsets: Tensor) -> None:
        """See :meth:`Segment.check`."""
        if not ids.numel() or self._read_up_to >= self.used:
            return
        tokens, head_dim = self.file.tensors["kv"].shape[1], self._buffer.shape[3]
        row = 2 * head_dim * self._buffer.element_size()
        heads = np.repeat(np.arange(offsets.numel() - 1), np.diff(offsets.numpy()))
        self.file.check_rows((heads * tokens + self.start + ids.numpy().astype(np.int64)) * row, row)

    def _refuse(self) -> AlayaError:
        return AlayaError(
            f"{self.file.label}: a stored segment cannot be changed. Expected new tokens to go to a new segment; this is a "
            "defect, please report it."
        )

    def reserve(self, tokens: int) -> None:
        """Refused: the file is read-only."""
        raise self._refuse()

    def truncate(self, tokens: int) -> None:
        """Refused: the file is read-only."""
        raise self._refuse()

    def _stored(self, wanted: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, Tensor]] | None:
        """The entry that says ``wanted``, and its verified tensors without their prefix."""
        for entry in self._entries:
            if all(entry.get(key) == value for key, value in wanted.items()):
                lead = f"{entry['prefix']}."
                names = [name for name in self.file.tensors if name.startswith(lead)]
                for name in names:
                    self.file.prefetch(name)
                for name in names:
                    self.file.check(name)
                return entry, {name.removeprefix(lead): self.file.tensors[name] for name in names}
        return None

    def _damaged(self, error: Exception) -> Exception:
        return self.file._damaged(f"what is stored beside the vectors cannot be used ({error})")

    @property
    def _size(self) -> tuple[int, int, int]:
        return self._buffer.shape[0], self._buffer.shape[3], self.used

    def searcher(self, index: Any) -> Any:
        """See :meth:`Segment.searcher`."""
        if index not in self._searchers:
            state: dict[str, Tensor] | None = {}
            if not index.stateless:
                found = self._stored({"kind": "index", "spec": spec_of(index)})
                state = None if found is None else found[1]
            if state is not None:
                searcher = index.open(self)
                try:
                    searcher.restore(state, self.used)
                except ValueError as error:
                    raise self._damaged(error) from error
                self._searchers[index] = searcher
        return super().searcher(index)

    def lowbit(self, key_bits: int, value_bits: int | None) -> LowBitKV:
        """See :meth:`Segment.lowbit`."""
        if (key_bits, value_bits) not in self._lowbits and not (
            value_bits is None and any(bits == key_bits for bits, _ in self._lowbits)
        ):
            exact = {"kind": "low_bit", "key_bits": key_bits}
            found = self._stored(exact if value_bits is None else {**exact, "value_bits": value_bits})
            if found is not None:
                entry, tensors = found
                try:
                    low = lowbit_of(entry, tensors, *self._size)
                except (ValueError, TypeError, KeyError) as error:
                    raise self._damaged(error) from error
                self._lowbits[key_bits, entry["value_bits"]] = low
        return super().lowbit(key_bits, value_bits)

    def means(self, block: int, with_keys: bool, tokens: int) -> BlockMeans:
        """See :meth:`Segment.means`."""
        if (block, with_keys, None) not in self._means:
            found = self._stored({"kind": "means", "block": block, "keys": with_keys})
            if found is not None:
                try:
                    self._means[block, with_keys, None] = means_of(*found, *self._size)
                except (ValueError, TypeError, KeyError) as error:
                    raise self._damaged(error) from error
        return super().means(block, with_keys, tokens)

    def add_samples(self, queries: Tensor) -> None:
        """Refused: the file is read-only."""
        raise self._refuse()


def copied(pieces: list[Tensor]) -> Segment:
    """Runs of tokens as one segment in memory.

    Parameters
    ----------
    pieces : list of Tensor
        ``[kv_heads, m, 2, head_dim]``, verified.
    """
    heads, _, _, head_dim = pieces[0].shape
    segment = Segment(heads, head_dim, pieces[0].dtype)
    for piece in pieces:
        segment.append(piece[:, :, 0], piece[:, :, 1])
    return segment


def over(view: Tensor) -> Segment:
    """A segment over vectors that lie elsewhere, to build indexes on: ``[kv_heads, m, 2, head_dim]``, not copied."""
    segment = Segment(view.shape[0], view.shape[3], view.dtype)
    segment._buffer, segment.used, segment.shared = view, view.shape[1], True
    return segment
