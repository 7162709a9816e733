"""What of the mapped files stays in this process's memory."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Protocol
from weakref import ReferenceType, ref

from alaya_hf.errors import ConfigError

FRAME = 1 << 20
"""Bytes that come and go together."""

#: What goes first when memory is short: data blocks are read a few tokens at a time, an index as a whole at every step.
KINDS = ("data", "index")


class Evictable(Protocol):
    """What a frame lies in."""

    def release(self, start: int, stop: int) -> None:
        """Give the pages of a byte range back; they are read, and verified, again when they are next asked for."""


class BufferManager:
    """A byte budget over the frames of mapped files, least recently used first within a kind.

    Parameters
    ----------
    budget : int
        Bytes that may stay. What one read asks for is held together, also where it is more.

    Raises
    ------
    ConfigError
        For less than one frame.

    Notes
    -----
    The pages themselves belong to the system's page cache, which is shared by all processes that read the store. Without a
    manager the system alone decides what stays.
    """

    def __init__(self, budget: int) -> None:
        if budget < FRAME:
            raise ConfigError(f"a buffer budget must be at least {FRAME:,} bytes (one frame), but got {budget!r}.")
        self.budget = budget
        # Weakly: a file that no session has open any more is unmapped, and its frames with it.
        self._frames: dict[str, OrderedDict[tuple[int, int], ReferenceType[Evictable]]] = {
            kind: OrderedDict() for kind in KINDS
        }
        self._lock = threading.Lock()

    @property
    def resident(self) -> dict[str, int]:
        """Bytes held per kind."""
        return {kind: len(frames) * FRAME for kind, frames in self._frames.items()}

    def touch(self, file: Evictable, kind: str, frames: list[int]) -> None:
        """Frames of a file are about to be read.

        Parameters
        ----------
        file : Evictable
        kind : {"data", "index"}
        frames : list of int
            Numbers of the frames, byte offset divided by :data:`FRAME`.
        """
        with self._lock:
            held = self._frames[kind]
            wanted = {(id(file), frame) for frame in frames}
            reference = ref(file)
            for key in wanted:
                held[key] = reference
                held.move_to_end(key)
            count = sum(len(frames) for frames in self._frames.values())
            excess = count - self.budget // FRAME
            for victim in KINDS:
                frames_of = self._frames[victim]
                for key in list(frames_of):
                    if excess <= 0:
                        return
                    if key in wanted:
                        continue
                    victim_file = frames_of.pop(key)()
                    if victim_file is not None:
                        victim_file.release(key[1] * FRAME, (key[1] + 1) * FRAME)
                    excess -= 1
