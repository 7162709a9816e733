"""One run of offloaded tokens: keys and values side by side in host memory, and the indexes over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alaya_hf.errors import NonFiniteError
from alaya_hf.kernels.cpu.blocks import BlockMeans
from alaya_hf.kernels.cpu.lowbit import LowBitKV
from alaya_hf.storage.memory import check_host_memory


class Segment:
    """Keys and values of consecutive tokens of one context and one layer.

    Segments are shared: batch rows, beams and copies of a cache refer to one segment instead of copying it. Only a
    segment that is referred to once is appended to in place.

    Parameters
    ----------
    kv_heads, head_dim : int
    dtype : torch.dtype
        Of the stored vectors.

    Attributes
    ----------
    used : int
        Tokens stored.
    shared : bool
        Whether a copy of the cache refers to the segment as well, so that it must not change any more.
    """

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self._buffer = torch.empty(kv_heads, 0, 2, head_dim, dtype=dtype)
        self.used = 0
        self.shared = False
        self._searchers: dict[Any, Any] = {}
        self._lowbits: dict[tuple[int, int | None], LowBitKV] = {}
        self._means: dict[tuple[int, bool, int | None], BlockMeans] = {}
        self._samples: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Segment:
        # Copying a cache must not copy the offloaded context: both sides keep reading it, neither writes to it.
        self.shared = True
        return self

    @property
    def view(self) -> Tensor:
        """``[kv_heads, used, 2, head_dim]``, a view: keys at ``[:, :, 0]``, values at ``[:, :, 1]``; see :meth:`check`."""
        return self._buffer[:, : self.used]

    @property
    def kv(self) -> Tensor:
        """:attr:`view`, of vectors that are safe to read as a whole."""
        return self.read()

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Tokens ``start`` to ``stop`` of :attr:`view`, safe to read: a segment in a file verifies them first."""
        return self.view[:, start:stop]

    def check(self, ids: Tensor, offsets: Tensor) -> None:
        """Make single tokens of :attr:`view` safe to read; nothing to do in memory.

        Parameters
        ----------
        ids, offsets : Tensor
            Tokens per KV head, see :class:`alaya_hf.index.Hits`.
        """

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors (spare capacity not counted)."""
        return self.view.numel() * self._buffer.element_size()

    def index_nbytes(self, index: Any) -> int:
        """Bytes of one index over this segment, 0 if it was never asked."""
        searcher = self._searchers.get(index)
        return 0 if searcher is None else searcher.nbytes

    def lowbit_nbytes(self, key_bits: int, value_bits: int | None) -> int:
        """Bytes of a low-bit copy, 0 if it was never asked for."""
        low = self._lowbits.get((key_bits, value_bits))
        return 0 if low is None else low.nbytes

    def means_nbytes(self, block: int) -> int:
        """Bytes of the block means of one block size."""
        return sum(means.nbytes for (size, _, _), means in self._means.items() if size == block)

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in all.

        Raises
        ------
        HostMemoryError
            If the host cannot hold them; the segment stays as it was.
        """
        kv_heads, capacity, _, head_dim = self._buffer.shape
        if tokens <= capacity:
            return
        # Half as much again keeps appending linear in the number of tokens; pages not yet written cost nothing.
        capacity = max(tokens, min(capacity + capacity // 2, capacity + (1 << 16)), 256)
        check_host_memory(kv_heads * capacity * 2 * head_dim * self._buffer.element_size(), "the offloaded context")
        grown = torch.empty(kv_heads, capacity, 2, head_dim, dtype=self._buffer.dtype)
        grown[:, : self.used] = self.view
        self._buffer = grown

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens.

        Parameters
        ----------
        keys, values : Tensor
            ``[kv_heads, m, head_dim]``, any device and dtype.

        Raises
        ------
        NonFiniteError
            If a vector is not finite; the segment stays as it was.
        HostMemoryError
        """
        if not (bool(torch.isfinite(keys).all()) and bool(torch.isfinite(values).all())):
            raise NonFiniteError(
                f"{keys.shape[1]} new tokens have keys or values that are infinite or not a number, which would spoil every "
                "later answer. Expected finite vectors: check the model's precision (float16 overflows; try bfloat16)."
            )
        end = self.used + keys.shape[1]
        self.reserve(end)
        self._buffer[:, self.used : end, 0] = keys.to("cpu")
        self._buffer[:, self.used : end, 1] = values.to("cpu")
        self.used = end

    def truncate(self, tokens: int) -> None:
        """Forget all but the first ``tokens``. Indexes over more than that are dropped and built again when asked."""
        self.used = tokens
        self._searchers = {key: s for key, s in self._searchers.items() if s.num_tokens <= tokens}
        for low in self._lowbits.values():
            low.truncate(min(tokens, low.num_tokens))
        # A block that is cut would have to be averaged again; it is cheaper to start over when they are next asked for.
        self._means = {}

    def add_samples(self, queries: Tensor) -> None:
        """Keep query vectors (``[kv_heads, s, head_dim]``) for building the index."""
        self._samples.append(queries)

    def searcher(self, index: Any) -> Any:
        """The searcher of an index over this segment, brought up to date.

        Parameters
        ----------
        index : Index
            The parameters.
        """
        searcher = self._searchers.get(index)
        if searcher is None:
            searcher = self._searchers[index] = index.open(self)
        if searcher.num_tokens < self.used:
            queries = torch.cat(self._samples, dim=1) if self._samples else None
            searcher.extend(self.read(searcher.num_tokens), queries)
            if not self.shared:
                # Needed once; copies of the cache may still build other indexes from them.
                self._samples = []
        return searcher

    def lowbit(self, key_bits: int, value_bits: int | None) -> LowBitKV:
        """The low-bit copy of this segment, brought up to date.

        Index and residual share one copy: asking for keys alone returns a copy that has values as well, if there is one.

        Parameters
        ----------
        key_bits : {2, 4, 8}
        value_bits : {2, 4} or None
            None: only the keys are needed.
        """
        copies = [low for (bits, _), low in self._lowbits.items() if bits == key_bits]
        low = self._lowbits.get((key_bits, value_bits))
        if low is None and value_bits is None and copies:
            low = copies[0]
        if low is None:
            low = LowBitKV(self._buffer.shape[0], self._buffer.shape[3], key_bits, value_bits)
            self._lowbits[key_bits, value_bits] = low
            if value_bits is not None:
                # A copy of the same keys alone has become superfluous.
                self._lowbits.pop((key_bits, None), None)
        if low.num_tokens < self.used:
            low.append(self.read(low.num_tokens))
        return low

    def means(self, block: int, with_keys: bool, tokens: int) -> BlockMeans:
        """Block means of the values (and keys) of the first ``tokens`` tokens.

        The means over the whole segment grow with it; those over a shorter prefix are kept too, for the rows that read it.
        """
        key = (block, with_keys, None if tokens == self.used else tokens)
        means = self._means.get(key)
        whole = self._means.get((block, with_keys, None))
        if means is None and whole is not None and whole.num_tokens >= tokens:
            done = tokens // block * block
            means = self._means[key] = whole.prefix(done)
        if means is None:
            means = BlockMeans(self._buffer.shape[0], self._buffer.shape[3], block, with_keys)
            self._means[key] = means
        if means.num_tokens < tokens:
            means.append(self.read(means.num_tokens, tokens))
        return means
