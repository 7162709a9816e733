"""Traces of legal workloads for memory allocators: documents arrive, questions branch from them, some leave early."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.data import contracts

#: Tokens of CUAD's contracts (Qwen2.5's tokenizer): half have fewer than the first, the longest of 260 has the second.
CUAD_MEDIAN, CUAD_LONGEST = 6900, 82000


@dataclass(frozen=True)
class Event:
    """One request to an allocator.

    Attributes
    ----------
    kind : str
        ``allocate``, ``extend``, ``fork`` (of ``parent``), ``store`` (copy to the second pool) or ``free``.
    sequence : int
        Number in the trace.
    tokens : int
        New tokens; of a fork those shared with ``parent``.
    parent : int
    """

    kind: str
    sequence: int
    tokens: int = 0
    parent: int = -1


def document_lengths(
    count: int, rng: np.random.Generator, shortest: int, longest: int, data_dir: Path | None
) -> list[int]:
    """Lengths distributed like CUAD's, stretched so that the longest of them has ``longest`` tokens.

    Without a folder, from a log-normal distribution with CUAD's median and the width that puts its longest of 260 where it is;
    with one, drawn from the contracts in it. Shorter ones count as ``shortest``.
    """
    if data_dir is None:
        width = np.log(CUAD_LONGEST / CUAD_MEDIAN) / 2.66  # the 1 - 1/260 quantile of a standard normal
        drawn = np.exp(np.log(CUAD_MEDIAN) + width * rng.standard_normal(count))
    else:
        sizes = np.array([len(contract["text"]) for contract in contracts(data_dir)], float)
        drawn = rng.choice(sizes, count, replace=count > len(sizes))
    return np.clip(np.rint(drawn / drawn.max() * longest), shortest, longest).astype(int).tolist()


def legal_trace(lengths: Sequence[int], rng: np.random.Generator, live: int, questions: int, chunk: int) -> list[Event]:
    """What happens to memory while ``live`` documents at a time are read and asked about.

    Documents arrive in chunks of prefill, whose turns alternate with other documents' chunks and with answers. Each is copied to
    a second pool when it is complete (a prefill server's hand-over, or the store), and then has up to ``2 * questions - 1``
    questions, several of them open at a time. A question of 16 to 128 tokens forks the document and grows by 16 to 256 tokens of
    answer, one by one. A quarter of the questions is cancelled half way. A fifth of the documents leaves while questions are
    still open: what they share has to stay.

    Parameters
    ----------
    lengths : sequence of int
        Tokens per document.
    rng : numpy.random.Generator
    live, questions, chunk : int
    """
    events: list[Event] = []
    waiting = deque(enumerate(lengths))
    number = len(lengths)
    busy: list[_Document] = []
    while waiting or busy:
        while waiting and len(busy) < live:
            name, length = waiting.popleft()
            busy.append(_Document(name, length, int(rng.integers(1, 2 * questions)), bool(rng.random() < 0.2)))
        document = busy[int(rng.integers(len(busy)))]
        if document.read < document.length:
            tokens = min(chunk, document.length - document.read)
            events.append(Event("extend" if document.read else "allocate", document.name, tokens))
            document.read += tokens
            if document.read == document.length:
                events.append(Event("store", document.name))
            continue
        if document.left and len(document.open) < 4:
            document.left -= 1
            events.append(Event("fork", number, document.length, document.name))
            events.append(Event("extend", number, int(rng.integers(16, 129))))
            answer = int(rng.integers(16, 257))
            document.open.append([number, answer // 2 if rng.random() < 0.25 else answer])
            number += 1
            if not document.left and document.early:
                events.append(Event("free", document.name))
        elif document.open:
            question = document.open[int(rng.integers(len(document.open)))]
            step = min(16, question[1])  # a turn of the scheduler
            events += [Event("extend", question[0], 1)] * step
            question[1] -= step
            if not question[1]:
                events.append(Event("free", question[0]))
                document.open.remove(question)
        else:
            if not document.early:
                events.append(Event("free", document.name))
            busy.remove(document)
    return events


@dataclass
class _Document:
    name: int
    length: int
    left: int
    early: bool
    read: int = 0

    def __post_init__(self) -> None:
        self.open: list[list[int]] = []  # number, tokens of the answer to come


class Needed:
    """Tokens that have to be in memory, whatever the allocator: what several sequences share counts once."""

    def __init__(self) -> None:
        self._own: dict[int, int] = {}
        self._root: dict[int, int] = {}
        self._users: dict[int, int] = {}
        self._size: dict[int, int] = {}
        self.tokens = 0

    def apply(self, event: Event) -> None:
        """Take an event in."""
        if event.kind == "allocate":
            self._root[event.sequence] = event.sequence
            self._users[event.sequence], self._size[event.sequence] = 1, event.tokens
            self.tokens += event.tokens
        elif event.kind == "extend":
            if event.sequence in self._own:
                self._own[event.sequence] += event.tokens
            else:
                self._size[event.sequence] += event.tokens
            self.tokens += event.tokens
        elif event.kind == "fork":
            self._root[event.sequence] = event.parent
            self._users[event.parent] += 1
            self._own[event.sequence] = 0
        elif event.kind == "free":
            root = self._root.pop(event.sequence)
            self.tokens -= self._own.pop(event.sequence, 0)
            self._users[root] -= 1
            if not self._users[root]:
                self.tokens -= self._size.pop(root)
