"""The legal trace for allocators, its books and the command that replays it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from typer.testing import CliRunner

from alaya_hf.storage.allocators import KVShape, Paged
from eval.__main__ import app
from eval.legal_trace import Event, Needed, document_lengths, legal_trace
from eval.replay import replay
from eval.speed_alloc import needed_tokens

SHAPE = KVShape(2, 1, 8)


def made(seed=0):
    rng = np.random.default_rng(seed)
    return legal_trace(document_lengths(9, rng, 50, 800, None), rng, live=3, questions=3, chunk=100)


def test_the_seed_makes_the_trace():
    assert made() == made() != made(1)
    lengths = document_lengths(300, np.random.default_rng(0), 8192, 524288, None)
    assert min(lengths) == 8192 and max(lengths) == 524288 and 20000 < np.median(lengths) < 90000


def test_what_is_needed_against_sets_of_tokens():
    """Every event makes sense when it comes, and the books agree with the tokens' identities."""
    held: dict[int, set] = {}
    needed, early, seen = Needed(), 0, set()
    for event in made():
        needed.apply(event)
        if event.kind in ("allocate", "fork"):
            assert event.sequence not in seen
            seen.add(event.sequence)
            held[event.sequence] = set(held[event.parent]) if event.kind == "fork" else set()
            assert event.kind == "allocate" or len(held[event.sequence]) == event.tokens
        if event.kind in ("allocate", "extend"):
            begin = len(held[event.sequence])
            held[event.sequence] |= {(event.sequence, begin + i) for i in range(event.tokens)}
        if event.kind == "free":
            del held[event.sequence]
            early += event.sequence < 9 and any((event.sequence, 0) in tokens for tokens in held.values())
        assert needed.tokens == len(set().union(*held.values()))
    assert not held and early and len(seen) > 9


def test_a_replay_needs_what_the_books_say_and_gives_up_what_does_not_fit():
    events = made()
    pool = Paged(block=1).open(SHAPE, 1 << 24)
    result = replay(events, pool)
    assert result.refused == 0 and pool.stats.reserved == 0 and result.points
    for point in result.points:  # blocks of one token: nothing is wasted
        assert point["reserved"] == point["used"] == pytest.approx(point["needed"])
    most = needed_tokens(events) * SHAPE.token_bytes
    tight = Paged(block=1).open(SHAPE, most)
    assert replay(events, tight).refused == 0
    assert replay(events, Paged(block=1).open(SHAPE, most // 2)).refused > 0
    lost = [Event("allocate", 0, 50), Event("extend", 0, 10**6), Event("fork", 1, 50, 0), Event("extend", 1, 1)]
    result = replay(lost, tight)
    assert result.refused == 2 and tight.stats.reserved == 0


def test_the_command_writes_tables_plot_and_trace(tmp_path):
    options = (
        "--documents 3 --live 2 --questions 2 --shortest 40 --longest 300 --chunk 64 --transfer-tokens 512 --repeats 1"
    )
    found = CliRunner().invoke(app, ["speed", "alloc", *options.split(), "--output", str(tmp_path)])
    assert found.exit_code == 0, found.output
    assert {path.name for path in tmp_path.iterdir()} >= {
        "alloc.md",
        "alloc.png",
        "trace.json",
        "memory.csv",
        "times.csv",
    }
    with (tmp_path / "transfers.csv").open() as handle:
        rows = {row["allocator"]: row for row in csv.DictReader(handle)}
    assert int(rows["segment"]["calls"]) < int(rows["paged, block by block"]["calls"]) == 512 // 16 * 32
    assert CliRunner().invoke(app, ["speed", "alloc", "--allocators", "slab"]).exit_code == 2
