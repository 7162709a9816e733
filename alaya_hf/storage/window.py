"""The window: the tokens of a layer that stay on its device at full precision."""

from __future__ import annotations

import torch
from torch import Tensor


class Window:
    """The first ``init`` tokens and the most recent ones of every batch row.

    Two parts share one buffer: ``init`` columns for the first tokens (left aligned, filled when tokens leave the recent
    part for the first time), then the recent tokens, whose columns are the same for every row, padding included.

    Parameters
    ----------
    batch, kv_heads, head_dim : int
    init : int
        Size of the first part.
    dtype, device
        Of the buffers.

    Attributes
    ----------
    init_lengths : list of int
        First tokens held per row.
    recent : int
        Columns of the recent part.
    """

    def __init__(
        self, batch: int, kv_heads: int, head_dim: int, init: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.init = init
        self.recent = 0
        self.init_lengths = [0] * batch
        # Zeros: a row with fewer than init tokens has columns that are masked but read, and 0 * nan is nan.
        self._keys = torch.zeros(batch, kv_heads, init, head_dim, dtype=dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        # [batch, recent] on the host, true where a recent column is a token and not padding; None: all are.
        self._valid: Tensor | None = None

    def reserve(self, recent: int) -> None:
        """Make room for ``recent`` columns in the recent part."""
        batch, kv_heads, capacity, head_dim = self._keys.shape
        if self.init + recent <= capacity:
            return
        for name in ("_keys", "_values"):
            old = getattr(self, name)
            grown = old.new_empty(batch, kv_heads, self.init + recent, head_dim)
            grown[:, :, : old.shape[2]] = old
            setattr(self, name, grown)

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> None:
        """Append columns to the recent part.

        Parameters
        ----------
        keys, values : Tensor
            ``[batch, kv_heads, m, head_dim]``.
        valid : Tensor or None
            ``[batch, m]`` bool on the host; None: no padding.
        """
        m = keys.shape[2]
        needed = self.recent + m
        if self.init + needed > self._keys.shape[2]:
            self.reserve(needed + max(64, needed // 4))
        start = self.init + self.recent
        self._keys[:, :, start : start + m] = keys
        self._values[:, :, start : start + m] = values
        if valid is not None or self._valid is not None:
            batch = keys.shape[0]
            old = self._valid if self._valid is not None else torch.ones(batch, self.recent, dtype=torch.bool)
            new = valid if valid is not None else torch.ones(batch, m, dtype=torch.bool)
            self._valid = torch.cat([old, new], dim=1)
        self.recent += m

    def drop_last(self, columns: int) -> None:
        """Forget the last columns of the recent part."""
        self.recent -= columns
        if self._valid is not None:
            self._valid = self._valid[:, : self.recent]

    def _keep_first(self, keys: Tensor, values: Tensor, valid: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Drop padding, fill the first tokens; what is left per row."""
        left = []
        for row in range(keys.shape[0]):
            k, v = keys[row], values[row]
            if valid is not None:
                kept = valid[row].to(keys.device)
                k, v = k[:, kept], v[:, kept]
            have = self.init_lengths[row]
            first = min(self.init - have, k.shape[1])
            if first > 0:
                self._keys[row, :, have : have + first] = k[:, :first]
                self._values[row, :, have : have + first] = v[:, :first]
                self.init_lengths[row] = have + first
            left.append((k[:, first:], v[:, first:]))
        return left

    def push(self, keys: Tensor, values: Tensor, valid: Tensor | None, keep: int) -> tuple[list[Tensor], list[Tensor]]:
        """Append columns and take the oldest ones out, so that ``keep`` recent columns remain.

        Tokens that leave fill the first part before anything else. Prompts pass through without being copied into the
        window as a whole.

        Parameters
        ----------
        keys, values, valid
            See :meth:`append`; may have no columns.
        keep : int
            Recent columns to keep.

        Returns
        -------
        keys, values : list of Tensor
            Per row ``[kv_heads, m, head_dim]``: the tokens that left, oldest first, padding excluded.
        """
        leaving = max(0, self.recent + keys.shape[2] - keep)
        old = min(self.recent, leaving)
        begin, end = self.init, self.init + old
        parts = []
        if old:
            # Cloned: the columns are about to be overwritten.
            old_keys, old_values = self._keys[:, :, begin:end].clone(), self._values[:, :, begin:end].clone()
            old_valid = None if self._valid is None else self._valid[:, :old]
            parts.append(self._keep_first(old_keys, old_values, old_valid))
            rest = self.recent - old
            for tensor in (self._keys, self._values):
                tensor[:, :, begin : begin + rest] = tensor[:, :, end : end + rest].clone()
            self.recent = rest
            if self._valid is not None:
                self._valid = self._valid[:, old:]
        new = leaving - old
        if new:
            head = None if valid is None else valid[:, :new]
            parts.append(self._keep_first(keys[:, :, :new], values[:, :, :new], head))
        if new < keys.shape[2]:
            self.append(keys[:, :, new:], values[:, :, new:], None if valid is None else valid[:, new:])
        if self._valid is not None and bool(self._valid.all()):
            self._valid = None
        if not parts:
            empty = [keys.new_empty(keys.shape[1], 0, keys.shape[3])] * keys.shape[0]
            return empty, empty
        rows = [parts[0]] if len(parts) == 1 else parts
        joined = [
            tuple(
                torch.cat([part[row][side] for part in rows], dim=1) if len(rows) > 1 else rows[0][row][side]
                for side in (0, 1)
            )
            for row in range(keys.shape[0])
        ]
        return [pair[0] for pair in joined], [pair[1] for pair in joined]

    def restore(self, first: Tensor, recent: Tensor) -> None:
        """Fill an empty window of one row.

        Parameters
        ----------
        first, recent : Tensor
            ``[kv_heads, m, 2, head_dim]``: the first tokens, at most ``init``, and the most recent ones.
        """
        count = first.shape[1]
        self._keys[0, :, :count], self._values[0, :, :count] = first[:, :, 0], first[:, :, 1]
        self.init_lengths = [count]
        # Room for the tokens to come, as they are pushed one by one.
        self.append(recent[None, :, :, 0], recent[None, :, :, 1], None)

    def take_init(self, row: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Remove the last of a row's first tokens: two ``[kv_heads, tokens, head_dim]``, copies."""
        have = self.init_lengths[row]
        self.init_lengths[row] = have - tokens
        span = slice(have - tokens, have)
        return self._keys[row, :, span].clone(), self._values[row, :, span].clone()

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """The tokens of one row, padding excluded: two ``[kv_heads, w, head_dim]``, copies."""
        end = self.init + self.recent
        places = torch.arange(self.init_lengths[row])
        recent = torch.arange(self.init, end)
        if self._valid is not None:
            recent = recent[self._valid[row]]
        places = torch.cat([places, recent]).to(self._keys.device)
        return self._keys[row][:, places], self._values[row][:, places]

    def view(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the window holds now.

        Returns
        -------
        keys, values : Tensor
            ``[batch, kv_heads, w, head_dim]``, views.
        mask : Tensor or None
            ``[batch, w]`` bool on the device, true where a column is a token; None: all are.
        """
        end = self.init + self.recent
        if not any(self.init_lengths):
            keys, values = self._keys[:, :, self.init : end], self._values[:, :, self.init : end]
            mask = self._valid
        else:
            keys, values = self._keys[:, :, :end], self._values[:, :, :end]
            mask = None
            if self._valid is not None or min(self.init_lengths) < self.init:
                lengths = torch.tensor(self.init_lengths).unsqueeze(1)
                first = torch.arange(self.init).unsqueeze(0) < lengths
                recent = self._valid if self._valid is not None else torch.ones(len(lengths), self.recent).bool()
                mask = torch.cat([first, recent], dim=1)
        return keys, values, None if mask is None else mask.to(keys.device)

    def select(self, indices: Tensor) -> None:
        """Row ``i`` becomes what row ``indices[i]`` was (``[new_batch]`` int64)."""
        on_device = indices.to(self._keys.device)
        self._keys = self._keys.index_select(0, on_device)
        self._values = self._values.index_select(0, on_device)
        rows = indices.tolist()
        self.init_lengths = [self.init_lengths[row] for row in rows]
        if self._valid is not None:
            self._valid = self._valid[indices.to("cpu")]

    @property
    def lengths(self) -> list[int]:
        """Tokens held per row, padding not counted."""
        if self._valid is None:
            return [have + self.recent for have in self.init_lengths]
        counts = self._valid.sum(dim=1).tolist()
        return [have + int(count) for have, count in zip(self.init_lengths, counts, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held (spare capacity not counted)."""
        per_column = self._keys.shape[1] * self._keys.shape[3] * 2 * self._keys.element_size()
        return per_column * (sum(self.init_lengths) + self._keys.shape[0] * self.recent)
