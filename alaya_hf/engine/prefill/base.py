"""What a way to prefill is: how a pass of many tokens attends in one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alaya_hf.kernels.partial import Partial, merge_into
from alaya_hf.storage import HostStore, Window


@dataclass(frozen=True)
class Chunk:
    """The new tokens of a pass, as one layer sees them.

    Attributes
    ----------
    q : Tensor
        ``[batch, heads, m, head_dim]``, after the rotary embedding.
    kv_heads : int
    valid : Tensor or None
        ``[batch, m]`` bool on the host, false where padding.
    held : sequence of int
        Per row: tokens before the chunk, padding excluded.
    scaling : float
        Factor from scores to logits.
    softcap : float or None
        Cap on the logits.
    layer_idx : int
    """

    q: Tensor
    kv_heads: int
    valid: Tensor | None
    held: Sequence[int]
    scaling: float
    softcap: float | None
    layer_idx: int


class PrefillPass(ABC):
    """One pass in one layer: partials over disjoint tokens. The new tokens come first, the offloaded ones last."""

    #: Off-diagonal tiles that could have been skipped.
    tiles: int = 0

    def __init__(self, chunk: Chunk) -> None:
        self.chunk = chunk

    @abstractmethod
    def new(self, k: Tensor, v: Tensor) -> Partial:
        """The chunk among itself, causally.

        Parameters
        ----------
        k, v : Tensor
            ``[batch, kv_heads, m, head_dim]``.

        Returns
        -------
        Partial
            ``[batch, heads, m]``; empty for padding.
        """

    @abstractmethod
    def window(self, window: Window) -> Partial:
        """The chunk to the window that it follows."""

    @abstractmethod
    def block(self, row: int, k: Tensor, v: Tensor) -> Partial:
        """One row of the chunk to some of its earlier tokens, which every new token sees.

        Parameters
        ----------
        k, v : Tensor
            ``[1, kv_heads, n, head_dim]`` on the chunk's device, no padding.

        Returns
        -------
        Partial
            ``[1, heads, m]``.
        """

    def offloaded(self, store: HostStore, size: int) -> tuple[Partial, int]:
        """The chunk to the offloaded context, which comes to the device block by block.

        Parameters
        ----------
        size : int
            Tokens on the device at a time.

        Returns
        -------
        partial : Partial
        bytes_moved : int
            Bytes of keys and values read from the store.
        """
        q = self.chunk.q
        rows, moved = [], 0
        for row in range(q.shape[0]):
            total = Partial.empty((1, *q.shape[1:3]), q.shape[3], q.device)
            for piece in store.rows[row]:
                for start in range(0, piece.length, size):
                    part = piece.segment.read(start, min(start + size, piece.length))
                    moved += part.numel() * part.element_size()
                    part = part.to(q.device, q.dtype).unsqueeze(0)
                    merge_into(total, self.block(row, part[:, :, :, 0], part[:, :, :, 1]))
            rows.append(total)
        return Partial(torch.cat([part.out for part in rows]), torch.cat([part.lse for part in rows])), moved

    def skipped(self) -> int:
        """Tiles skipped so far. Waits for the device."""
        return 0


class Prefill(ABC):
    """Parameters of a way to prefill: a frozen dataclass registered by name."""

    kind: str

    def check(self, engine: str) -> None:  # noqa: B027  (most serve both engines)
        """Refuse an engine that this cannot serve.

        Raises
        ------
        ConfigError
        """

    def check_model(self, config: Any) -> None:  # noqa: B027  (most serve every model)
        """Refuse a model (its text configuration) that this was not made for.

        Raises
        ------
        ConfigError
        """

    @abstractmethod
    def begin(self, chunk: Chunk) -> PrefillPass:
        """Start a pass.

        Raises
        ------
        ConfigError
            If the layer is not one that the parameters were made for.
        UnsupportedModelError
            For capped logits, where they are not served.
        """
