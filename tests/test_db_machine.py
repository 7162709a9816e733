"""Random stores, sessions, branches and deletions against a list of what is stored."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alaya_hf import AlayaConfig, AlayaDB, Session
from tests.contract.models import build

HEADS, DIM, LAYERS = 2, 16, 2
SETTINGS = [
    AlayaConfig(window=(2, 8), min_context=0),
    AlayaConfig(window=(0, 1), min_context=0, index="flat", residual="none"),
    AlayaConfig(window=(16, 4), min_context=30, layers={1: {"window": {"local": 20}}}),
]
# Three tokens and short runs: prefixes meet often.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def vectors(ids: list[int], layer: int) -> torch.Tensor:
    """``[2, 1, kv_heads, n, head_dim]``: follow from the tokens up to each, as a model's do."""
    token = torch.tensor(ids, dtype=torch.float32)
    history = (token * torch.arange(1, len(ids) + 1)).cumsum(0).view(1, 1, 1, -1, 1)
    side = torch.arange(2.0).view(2, 1, 1, 1, 1) + 3 * layer
    head = torch.arange(float(HEADS)).view(1, 1, HEADS, 1, 1)
    return torch.sin(history + side + head * 0.5 + torch.arange(float(DIM)) * 0.1)


def common(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class DatabaseMachine(RuleBasedStateMachine):
    """One store, two namespaces, sessions that live on; reopened at any time."""

    model = build("llama")

    @initialize(block=st.sampled_from([1, 2, 4, 8]))
    def start(self, block: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.block = block
        self.dbs: dict[str, AlayaDB] = {}
        self.stored: dict[tuple[str, str], list[int]] = {}
        self.sessions: list[tuple[Session, list[int]]] = []
        self.reopen()

    def teardown(self) -> None:
        for db in getattr(self, "dbs", {}).values():
            db.close()
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    @rule()
    def reopen(self) -> None:
        for db in self.dbs.values():
            db.close()
        self.dbs = {name: AlayaDB(self.folder, model=self.model, namespace=name, block=self.block) for name in "ab"}

    def _prompt(self, number: int, cut: int, more: list[int]) -> list[int]:
        """What is stored or held somewhere, cut, and something else."""
        known = [*self.stored.values(), *(ids for _, ids in self.sessions)]
        return [*(known[number % len(known)][:cut] if known else []), *more]

    def _add(self, session: Session, ids: list[int], more: list[int]) -> None:
        """Run tokens: their vectors follow from all before them."""
        total = ids + more
        for number in range(LAYERS):
            new = vectors(total, number)[:, :, :, len(ids) :]
            session.update(torch.zeros(1, 4, len(more), DIM), new[0], new[1], number)
            session.attention(torch.zeros(1, 4, len(more), DIM), number)

    @rule(
        ns=st.sampled_from("ab"),
        number=st.integers(0, 20),
        cut=st.integers(0, 60),
        more=TOKENS,
        which=st.integers(0, 2),
    )
    def import_context(self, ns: str, number: int, cut: int, more: list[int], which: int) -> None:
        ids = self._prompt(number, cut, more)
        kv = [tuple(vectors(ids, layer)) for layer in range(LAYERS)]
        row = self.dbs[ns].import_context(ids, kv, settings=SETTINGS[which])
        assert row.tokens == len(ids)
        self.stored[ns, row.id] = ids

    @precondition(lambda self: len(self.sessions) < 4)
    @rule(
        ns=st.sampled_from("ab"),
        number=st.integers(0, 20),
        cut=st.integers(0, 60),
        more=TOKENS,
        which=st.integers(0, 2),
    )
    def create(self, ns: str, number: int, cut: int, more: list[int], which: int) -> None:
        """The longest prefix of what the namespace holds, neither more nor less; then the rest is run."""
        ids = self._prompt(number, cut, more)
        session, rest = self.dbs[ns].create_session(ids, settings=SETTINGS[which])
        best = max((common(ids, known) for (name, _), known in self.stored.items() if name == ns), default=0)
        assert session.reused == best and rest[0].tolist() == ids[best:]
        if best < len(ids):
            self._add(session, ids[:best], ids[best:])
        session.note_tokens(torch.tensor(ids))
        self.sessions.append((session, ids))

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 3), more=TOKENS)
    def grow(self, number: int, more: list[int]) -> None:
        number %= len(self.sessions)
        session, ids = self.sessions[number]
        self._add(session, ids, more)
        session.note_tokens(torch.tensor(ids + more))
        self.sessions[number] = (session, ids + more)

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 3), count=st.integers(1, 30))
    def crop(self, number: int, count: int) -> None:
        number %= len(self.sessions)
        session, ids = self.sessions[number]
        count = min(count, len(ids) - 1)
        if count:
            session.crop(-count)
            self.sessions[number] = (session, ids[:-count])

    @precondition(lambda self: self.sessions and len(self.sessions) < 4)
    @rule(number=st.integers(0, 3))
    def branch(self, number: int) -> None:
        session, ids = self.sessions[number % len(self.sessions)]
        copy = session.fork()
        assert isinstance(copy, Session)
        self.sessions.append((copy, list(ids)))

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 3), ns=st.sampled_from("ab"))
    def store(self, number: int, ns: str) -> None:
        session, ids = self.sessions[number % len(self.sessions)]
        row = self.dbs[ns].store(session)
        self.stored[ns, row.id] = list(ids)

    @precondition(lambda self: self.sessions)
    @rule(number=st.integers(0, 3))
    def close(self, number: int) -> None:
        del self.sessions[number % len(self.sessions)]

    @precondition(lambda self: self.stored)
    @rule(number=st.integers(0, 20))
    def delete(self, number: int) -> None:
        ns, context = list(self.stored)[number % len(self.stored)]
        self.dbs[ns].delete(context)
        del self.stored[ns, context]

    @rule(ns=st.sampled_from("ab"), share=st.sampled_from([0.0, 0.5, 1.0]))
    def gc(self, ns: str, share: float) -> None:
        db = self.dbs[ns]
        order = [row.id for row in reversed(db.list())]
        limit = int(db.nbytes * share)
        report = db.gc(limit)
        assert report.contexts == order[: len(report.contexts)] and report.leftovers == 0
        assert db.nbytes <= limit
        for context in report.contexts:
            del self.stored[ns, context]

    @precondition(lambda self: self.stored)
    @rule(number=st.integers(0, 20), which=st.integers(0, 2))
    def attach(self, number: int, which: int) -> None:
        """Every stored vector comes back, under any settings."""
        (ns, context), ids = list(self.stored.items())[number % len(self.stored)]
        session, _ = self.dbs[ns].create_session(context=context, settings=SETTINGS[which])
        self._check(session, ids)

    def _check(self, session: Any, ids: list[int]) -> None:
        assert session.token_ids[0].tolist() == ids
        for number, layer in enumerate(session.layers):
            assert torch.equal(torch.stack(layer.contents()), vectors(ids, number))

    @invariant()
    def what_is_listed_is_what_is_stored(self) -> None:
        for ns, db in getattr(self, "dbs", {}).items():
            listed = {(ns, row.id): row.tokens for row in db.list()}
            assert listed == {key: len(ids) for key, ids in self.stored.items() if key[0] == ns}

    @invariant()
    def sessions_hold_what_they_held(self) -> None:
        for session, ids in getattr(self, "sessions", []):
            self._check(session, ids)

    @invariant()
    def files_are_those_of_the_catalog(self) -> None:
        if hasattr(self, "dbs"):
            known = self.dbs["a"]._catalog.known()
            assert {path.name for path in (self.folder / "segments").iterdir()} == known


DatabaseMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
TestDatabase = DatabaseMachine.TestCase
