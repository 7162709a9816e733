"""Stored contexts with ``engine="device"`` on a CUDA device: files registered with it, read in place."""

from __future__ import annotations

import gc
import os
import warnings

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

from alaya_hf import AlayaDB  # noqa: E402
from alaya_hf.kernels.gpu.host_memory import device_view  # noqa: E402
from alaya_hf.storage.db import registered  # noqa: E402
from tests.gpu import layer_cases  # noqa: E402
from tests.gpu import stored_cases as cases  # noqa: E402


@pytest.fixture(scope="module")
def model():
    return layer_cases.tiny_model("cuda")


@pytest.fixture(autouse=True)
def refusals():
    """A refused registration is served by a copy, with a warning: here it is a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CUDA refuses.*")
        yield


def test_round_trip(model, tmp_path):
    cases.check_round_trip(model, tmp_path)


def test_shared(model, tmp_path):
    cases.check_shared(model, tmp_path)


@pytest.mark.parametrize("prefer", [0, 1, 2])
def test_branches(model, tmp_path, prefer):
    cases.check_branches(model, tmp_path, prefer)


@pytest.mark.parametrize(
    "steps",
    [
        [("decode", 2), ("crop", 40), ("append", 70), ("store", 0), ("repeat", 2), ("decode", 1), ("select", 1)],
        [("crop", 200), ("append", 80), ("copy", 0), ("crop", 10), ("settings", 0), ("decode", 1), ("store", 0)],
        [("decode", 90), ("store", 0), ("crop", 130), ("decode", 70)],
    ],
)
def test_operations(model, tmp_path, steps):
    cases.check_operations(model, tmp_path, steps)


def test_other_makers(model, tmp_path):
    cases.check_other_makers(model, tmp_path)


@pytest.mark.parametrize("where", ["kv", "records"])
def test_damage(model, tmp_path, where):
    cases.check_damage(model, tmp_path, where)


def test_the_device_reads_the_mapping_until_the_last_reader_goes(model, tmp_path):
    """Registered pages are those of the file; letting go twice, and registering again, leaves no error behind."""
    ids, kv = cases.document(model, 250)
    with AlayaDB(tmp_path, model=model, settings=cases.ALL) as db:
        db.import_context(ids, kv)
        for _ in range(3):
            session = db.create_session(ids)[0]
            assert cases.in_place(session)
            run = session.layers[0].tokens.stored
            assert run.registered.kv.is_pinned() and not run.registered.copied
            assert torch.equal(run.view[:, :, 0].cpu(), kv[0][0][0].cpu())
            address = run.registered.kv
            del session, run
            gc.collect()
            registered.settle()
            assert not address.is_pinned()
            torch.cuda.synchronize()
            with pytest.raises(ValueError, match="registered"):
                device_view(address, "cuda")


def test_captured_steps_read_the_file(model, tmp_path):
    """Steps of a captured graph over a stored context equal those over memory, also after a crop into the file."""
    ids, kv = cases.document(model, 250)
    settings = cases.ALL.replace(cuda_graphs="capture")
    with AlayaDB(tmp_path, model=model, settings=settings) as db:
        db.import_context(ids, kv)
        session = db.create_session(ids)[0]
        wanted = layer_cases.generate(model, cases.DynamicCache(), torch.cat([ids, ids[:, :1]], dim=1), 24)
        assert layer_cases.generate(model, session, torch.cat([ids, ids[:, :1]], dim=1), 24) == wanted
        assert session.stats()["replays"] > 10
        session.crop(200 - session.get_seq_length())
        short = torch.cat([ids[:, :200], ids[:, :1]], dim=1)
        wanted = layer_cases.generate(model, cases.DynamicCache(), short, 24)
        assert layer_cases.generate(model, session, short, 24) == wanted


def test_cold_file(model, tmp_path):
    """A file that is not in the page cache is read by whoever verifies it."""
    ids, kv = cases.document(model, 250)
    with AlayaDB(tmp_path, model=model, settings=cases.ALL) as db:
        db.import_context(ids, kv)
        for path in tmp_path.rglob("*.safetensors"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        session = db.create_session(ids)[0]
        assert cases.in_place(session) and torch.equal(session.layers[1].contents()[0], kv[1][0])
