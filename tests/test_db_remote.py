"""Contexts that another machine stored, through every backend, and remote stores that fail."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alaya_hf import AlayaDB
from alaya_hf.storage.db.remote import tier
from alaya_hf.storage.db.remote.fsspec import FsspecStore
from tests.contract.models import build, prompt
from tests.test_db import FULL, SYSTEMS, contents, dense, run, same


class Memory:
    """A remote store in memory whose calls can be counted, damaged or held up."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls = 0
        self.fail: BaseException | None = None
        self.hang: threading.Event | None = None

    def _call(self) -> None:
        self.calls += 1
        if self.hang is not None:
            self.hang.wait(30)
        if self.fail is not None:
            raise self.fail

    def put(self, key: str, value: bytes) -> None:
        self._call()
        self.values[key] = bytes(value)

    def get(self, key: str) -> bytes | None:
        self._call()
        return self.values.get(key)

    def exists(self, key: str) -> bool:
        self._call()
        return key in self.values

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def mooncake() -> Iterator[Any]:
    """A client of a real master on loopback."""
    pytest.importorskip(
        "mooncake.store",
        reason="needs mooncake-transfer-engine-non-cuda and its system libraries",
        exc_type=ImportError,
    )
    master = shutil.which("mooncake_master") or shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    if master is None:
        pytest.skip("mooncake.store is installed, but mooncake_master is not on the path")
    from alaya_hf.storage.db.remote.mooncake import MooncakeStore

    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for free in (a, b, c):
            free.bind(("127.0.0.1", 0))
        port, http, metrics = (free.getsockname()[1] for free in (a, b, c))
    arguments = [
        f"--rpc_port={port}",
        f"--metrics_port={metrics}",
        "--enable_http_metadata_server=true",
        f"--http_metadata_server_port={http}",
    ]
    server = subprocess.Popen([master, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for wanted in (port, http):
            for _ in range(150):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", wanted)) == 0:
                        break
                time.sleep(0.2)
        store = MooncakeStore(
            f"127.0.0.1:{port}", f"http://127.0.0.1:{http}/metadata", segment_bytes=1 << 28, buffer_bytes=1 << 26
        )
        yield store
        store.close()
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(params=["memory", "file", "object", "mooncake"])
def remote(request, tmp_path) -> Any:
    if request.param == "memory":
        return Memory()
    if request.param == "file":
        return FsspecStore((tmp_path / "share").as_uri())
    if request.param == "object":
        return FsspecStore(f"memory://{os.urandom(8).hex()}")
    store = request.getfixturevalue("mooncake")
    store_close = type(
        "Shared", (), {"put": store.put, "get": store.get, "exists": store.exists, "close": lambda: None}
    )
    return store_close


def machine(folder: Path, model: Any, remote: Any, **kwargs: Any) -> AlayaDB:
    return AlayaDB(folder, model=model, **{"settings": SYSTEMS["quantized_low_bit"], "remote": remote, **kwargs})


def test_a_fleet_shares_contexts(model, remote, tmp_path):
    """What one machine stored and continued, another attaches, answers from, and continues in turn."""
    ids = prompt(700)
    a, b = machine(tmp_path / "a", model, remote), machine(tmp_path / "b", model, remote)
    a.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
    question = torch.cat([ids[:, :600], prompt(40, 3)], dim=1)
    session, _ = a.create_session(question)
    expected = run(model, session, question)
    a.store(session)
    # The branch, and with it what it branches from.
    longer = torch.cat([expected[0], prompt(60, 4)], dim=1)
    there, rest = b.create_session(longer)
    assert there.reused == 647 and same(contents(there), contents(session))
    again = torch.cat([ids, prompt(1, 5)], dim=1)
    assert b.create_session(again)[0].reused == 700 and not b.verify().problems
    run(model, there, longer)
    b.store(there)
    back, _ = a.create_session(torch.cat([there.token_ids, prompt(1, 5)], dim=1))
    assert back.reused >= there.get_seq_length() - 63
    for layer, kv in zip(contents(back), contents(there), strict=True):
        assert torch.equal(layer, kv[:, :, :, : back.reused])
    # Neither another tenant nor another model sees any of it.
    assert machine(tmp_path / "c", model, remote, namespace="other").create_session(ids)[0].reused == 0
    assert machine(tmp_path / "d", build("llama", seed=1), remote).create_session(ids)[0].reused == 0


@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 31, 33])
def test_the_longest_prefix_is_found(blocks, model, tmp_path):
    remote, ids = Memory(), prompt(33 * 16)
    kv = [(layer[0], layer[1]) for layer in dense(model, ids)]
    n = blocks * 16
    machine(tmp_path / "a", model, remote, block=16).import_context(
        ids[:, :n], [(k[:, :, :n], v[:, :, :n]) for k, v in kv]
    )
    b = machine(tmp_path / "b", model, remote, block=16)
    assert b.create_session(torch.cat([ids, prompt(3)], dim=1))[0].reused == n


class TestFailing:
    @pytest.fixture
    def shared(self, model, tmp_path):
        remote, ids = Memory(), prompt(400)
        machine(tmp_path / "a", model, remote).import_context(ids, [(kv[0], kv[1]) for kv in dense(model, ids)])
        return remote, ids

    @pytest.mark.parametrize("how", ["absent", "slow"])
    def test_local_contexts_go_on(self, how, shared, model, tmp_path, monkeypatch):
        remote, ids = shared
        with machine(tmp_path / "b", model, remote, settings=FULL) as db:
            db._remote.timeout = db._remote.transfer_timeout = 0.2
            if how == "absent":
                remote.fail = ConnectionError("no route")
            else:
                remote.hang = threading.Event()
            with pytest.warns(RuntimeWarning, match="no route" if how == "absent" else "no answer within"):
                session, _ = db.create_session(ids)
            assert session.reused == 0
            # It is not asked again for a while.
            calls = remote.calls
            run(model, session, ids)
            db.store(session)
            again, _ = db.create_session(ids)
            assert again.reused == 400 and remote.calls == calls
        if remote.hang is not None:
            remote.hang.set()

    def test_damaged_content_is_not_used(self, shared, model, tmp_path):
        remote, ids = shared
        sound = dict(remote.values)
        random = torch.Generator().manual_seed(0)
        for number, key in enumerate(sorted(sound)):
            if key.startswith("marks"):
                continue
            remote.values = dict(sound)
            at = int(torch.randint(len(sound[key]), (1,), generator=random))
            data = bytearray(sound[key])
            data[at] ^= 4
            remote.values[key] = bytes(data)
            if key.endswith("manifest"):
                crafted = json.loads(sound[key])
                crafted["files"][0][1] = 1 << 60
                remote.values[key] = json.dumps(crafted).encode()
            with machine(tmp_path / f"b{number}", model, remote, settings=FULL) as db:
                if "/ids/" in key:
                    # Other tokens than the prompt's: as if nothing was there.
                    assert db.create_session(ids)[0].reused == 0
                else:
                    with pytest.warns(RuntimeWarning, match="remote store"):
                        assert db.create_session(ids)[0].reused == 0
                assert db.list() == [] and db.gc().leftovers == 0

    def test_an_interrupted_fetch_is_not_in_the_way(self, shared, model, tmp_path):
        """Kills leave a folder under the segment's own name, published but never committed, and staged ones."""
        remote, ids = shared
        name = next(key.split("/")[1] for key in remote.values if key.startswith("segments/"))
        with machine(tmp_path / "b", model, remote) as db:
            for left in (tmp_path / "b" / "segments" / name, tmp_path / "b" / "staging" / name):
                left.mkdir()
                (left / "layer-0000.safetensors").write_bytes(b"half")
            with db._folder.writer():
                # Perhaps the work of whoever is storing: left alone, and not held against the remote store.
                assert db.create_session(ids)[0].reused == 0
            assert db.create_session(ids)[0].reused == 400 and not db.verify().problems

    def test_a_failing_local_disk_is_not_the_remotes_fault(self, shared, model, tmp_path, monkeypatch):
        remote, ids = shared
        with machine(tmp_path / "b", model, remote) as db:

            def fail(*args: Any) -> None:
                raise OSError(errno.EIO, "Input/output error")

            with monkeypatch.context() as patch:
                patch.setattr(db._folder, "publish", fail)
                with pytest.warns(RuntimeWarning, match="this machine failed"):
                    assert db.create_session(ids)[0].reused == 0
            assert db.create_session(ids)[0].reused == 400

    @pytest.mark.parametrize("what", ["tokens", "dtype", "layers", "heads"])
    def test_sound_content_of_another_shape(self, what, shared, model, tmp_path):
        """Digests are right, so only a look at what they vouch for tells."""
        remote, ids = shared
        key = next(key for key in remote.values if key.endswith("manifest"))
        manifest = json.loads(remote.values[key])
        with machine(tmp_path / "b", model, remote) as db:
            if what == "tokens":
                manifest["tokens"] -= 1
                ids_key = key.replace("manifest", "ids/000000")
                remote.values[ids_key] = remote.values[ids_key][:-4]
            elif what == "dtype":
                manifest["dtype"] = "float16"
            elif what == "layers":
                manifest["files"].pop()
            else:
                db._shape = lambda: (2, 4)
            remote.values[key] = json.dumps(manifest).encode()
            with pytest.warns(
                RuntimeWarning, match="has 1 layers" if what == "layers" else "keys and values are float32"
            ):
                assert db.create_session(ids[:, :390])[0].reused == 0
            assert db.list() == [] and db.gc().leftovers == 0

    def test_missing_pieces(self, shared, model, tmp_path):
        remote, ids = shared
        key = next(key for key in remote.values if key.endswith("0001/000000"))
        del remote.values[key]
        with machine(tmp_path / "b", model, remote) as db, pytest.warns(RuntimeWarning, match="has nothing"):
            assert db.create_session(ids)[0].reused == 0


def test_values_are_cut(model, tmp_path, monkeypatch):
    monkeypatch.setattr(tier, "CHUNK", 10_000)
    remote, ids = Memory(), prompt(400)
    machine(tmp_path / "a", model, remote).import_context(ids, [(kv[0], kv[1]) for kv in dense(model, ids)])
    assert max(map(len, remote.values.values())) <= 10_000
    session, _ = machine(tmp_path / "b", model, remote).create_session(ids)
    # Announced up to the last whole block; the segment behind it has the rest.
    assert session.reused == 400 and same(contents(session), dense(model, ids))


def test_a_shared_folder_is_its_owners_alone(tmp_path):
    store = FsspecStore((tmp_path / "a" / "share").as_uri())
    store.put("segments/x/y", b"1")
    store.put("segments/x/y", b"1")
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in (tmp_path / "a").rglob("*")}
    assert modes == {
        "a/share": 0o700,
        "a/share/segments": 0o700,
        "a/share/segments/x": 0o700,
        "a/share/segments/x/y": 0o600,
    }
