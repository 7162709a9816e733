"""What a stored context under ``engine="device"`` must do, on any device: attended in place, it is what it was in memory."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from alaya_hf import DIPR, AlayaDB, AlayaLayer, Session, TopK
from alaya_hf.device_layer import DeviceLayer
from alaya_hf.engine.device import tokens as tokens_of
from alaya_hf.errors import CorruptStoreError
from alaya_hf.storage.db import registered
from tests.gpu import layer_cases as cases

#: Keeps every token of these tests.
ALL = cases.ALL.replace(query=TopK(512), cuda_graphs="none")
LOSSY = cases.DEFAULT.replace(query=DIPR(cap=16), cuda_graphs="none")

_OTHER_PROCESS = """
import sys, torch
from alaya_hf import AlayaDB
from tests.gpu import layer_cases as cases, stored_cases
model = cases.tiny_model(sys.argv[2])
ids = cases.prompt(model, 260)
with AlayaDB(sys.argv[1], model=model, settings=stored_cases.LOSSY, read_only=True) as db:
    session, rest = db.create_session(ids)
    assert session.reused == 250 and stored_cases.in_place(session)
    print(cases.generate(model, session, ids, 4))
"""


def in_place(session: Any) -> bool:
    """Whether every layer reads its file's mapping, and its own store has room for what came after it alone."""
    found = []
    for layer in session.layers:
        layer.tokens.settle()
        run = layer.tokens.stored
        mapped = run.registered.file.tensors["kv"].data_ptr() == run.view.data_ptr() == run.registered.file.address
        found.append(mapped and layer.tokens.capacity < run.last - run.first + tokens_of._STORE_STEP)
    return all(found)


def document(model: Any, tokens: int, seed: int = 0) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Ids, and the keys and values that a dense cache has of them."""
    ids, cache = cases.prompt(model, tokens, seed), DynamicCache()
    cases.logits(model, cache, ids)
    return ids, [(layer.keys, layer.values) for layer in cache.layers]


def same_contents(one: Any, other: Any, exact: bool = True) -> None:
    """Without `exact`, layers behind the first one depend a little on how it attended: parts merge in another order."""
    for number, (mine, theirs) in enumerate(zip(one.layers, other.layers, strict=True)):
        for x, y in zip(mine.contents(), theirs.contents(), strict=True):
            slack = 0.0 if exact or number == 0 else 0.05
            torch.testing.assert_close(x, y, atol=slack, rtol=slack)


def alike(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0.05)


def check_round_trip(model: Any, folder: Path) -> None:
    """Another process attaches what this one stored and answers as this one does; nothing is copied."""
    ids, extra = cases.prompt(model, 260), cases.prompt(model, 5, 7)
    with AlayaDB(folder, model=model, settings=LOSSY) as db:
        session, rest = db.create_session(ids[:, :250])
        assert rest.shape == (1, 250)
        cases.logits(model, session, ids[:, :250])
        session.note_tokens(ids[:, :250])
        db.store(session, name="document")
        attached, rest = db.create_session(ids)
        assert attached.reused == 250 and rest.shape == (1, 10) and in_place(attached)
        for mine, theirs in zip(attached.layers, session.layers, strict=True):
            tiles = theirs.tokens.lows[0] // 64
            assert mine.tokens.lows == theirs.tokens.lows and tiles == 3
            assert torch.equal(mine.tokens.records[:, :, :tiles], theirs.tokens.records[:, :, :tiles])
        same_contents(attached, session)
        done = subprocess.run(
            [sys.executable, "-c", _OTHER_PROCESS, str(folder), str(model.device)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == str(cases.generate(model, attached, ids, 4))
        for cache in (session, attached):  # the same tokens in both, with other ways of having come in
            cache.crop(250 - cache.get_seq_length())
        for token in range(5):
            alike(*(cases.logits(model, cache, extra[:, token : token + 1]) for cache in (attached, session)))


def check_shared(model: Any, folder: Path) -> None:
    """Sessions on one file, also of two databases, share its registration, which goes with the last of them."""
    ids, kv = document(model, 250)
    with AlayaDB(folder, model=model, settings=ALL) as one, AlayaDB(folder, model=model, settings=ALL) as two:
        one.import_context(ids, kv)
        a, b = one.create_session(ids)[0], two.create_session(ids)[0]
        assert in_place(a) and in_place(b)
        runs = [layer.tokens.stored.registered for layer in a.layers]
        assert all(run is layer.tokens.stored.registered for run, layer in zip(runs, b.layers, strict=True))
        keys = [run.key for run in runs]
        assert all(run.registered for run in runs)
        twin = copy.deepcopy(b)
        del a, b, runs
        gc.collect()
        assert all(key in registered._KNOWN for key in keys)
        same = twin.layers[0].contents()[0]
        assert torch.equal(same, kv[0][0])
        del twin
        gc.collect()
        assert not any(key in registered._KNOWN for key in keys)
        registered.settle()
        again = one.create_session(ids)[0]
        assert in_place(again) and torch.equal(again.layers[1].contents()[1], kv[1][1])


def check_branches(model: Any, folder: Path, prefer: int) -> None:
    """A context of several files: the longest one is read in place, wherever it lies, and every prefix is what it should be.

    `prefer`: which of three runs is the longest.
    """
    lengths = [150, 150, 150]
    lengths[prefer] = 280
    stops = [sum(lengths[: number + 1]) for number in range(3)]
    ids, kv = document(model, stops[-1])
    other = torch.cat([ids[:, : stops[1] - 20], cases.prompt(model, 90, 5)], dim=1)
    with AlayaDB(folder, model=model, settings=ALL, block=16) as db:
        session = db.create_session(ids)[0]
        bytes_before = 0
        for number, stop in enumerate(stops):
            cases.logits(model, session, ids[:, session.get_seq_length() : stop])
            session.note_tokens(ids[:, :stop])
            row = db.store(session)
            written, bytes_before = row.bytes - bytes_before, row.bytes
            # Vectors of the new tokens, and tiles that end among them.
            tokens_bytes = lengths[number] * 2 * 2 * 2 * 16 * 2
            assert tokens_bytes < written < 2 * tokens_bytes + 4 * 4096 * 2
        branch = db.create_session(other)[0]
        assert branch.reused == stops[1] - 20
        cases.logits(model, branch, other[:, branch.reused :])
        branch.note_tokens(other)
        db.store(branch)
        for wanted, whole in ((ids, session), (ids[:, : stops[1] + 30], None), (ids[:, :170], None), (other, branch)):
            found, rest = db.create_session(wanted)
            assert rest.shape[1] == 0
            fresh = _filled(whole, session, wanted.shape[1])
            same_contents(found, fresh)
            run = found.layers[0].tokens.stored
            if wanted is ids:
                assert run.last - run.first == lengths[prefer] - (4 if prefer == 0 else 0)
            more = cases.prompt(model, 74, 9)
            for step in (slice(0, 1), slice(1, 4), slice(4, 74)) if whole is not None else ():
                alike(*(cases.logits(model, cache, more[:, step]) for cache in (found, fresh)))
            same_contents(found, fresh, exact=False)


def _filled(whole: Any, session: Any, tokens: int) -> Session:
    """A session in memory with the same tokens."""
    fresh = Session(ALL)
    for number, layer in enumerate((whole or session).layers):
        keys, values = layer.contents()
        fresh.layers.append(fresh._new_layer(number))
        fresh.layers[number].fill(keys[:, :, :tokens].contiguous(), values[:, :, :tokens].contiguous())
    return fresh


def check_operations(model: Any, folder: Path, steps: list[tuple[str, int]]) -> None:
    """Whatever happens to an attached session happens to one in memory: logits and contents stay equal.

    `steps`: "decode", "append" and "crop" with a number of tokens, "repeat" with rows, "select", "copy", "store".
    """
    ids, kv = document(model, 250)
    with AlayaDB(folder, model=model, settings=ALL) as db:
        if not db.list():
            db.import_context(ids, kv)
        attached = db.create_session(ids)[0]
        assert attached.reused == 250
        memory: Any = Session(ALL)
        for number, (keys, values) in enumerate(kv):
            memory.layers.append(memory._new_layer(number))
            memory.layers[number].fill(keys, values)
        known = ids
        for number, (step, count) in enumerate(steps):
            both, rows = (attached, memory), attached.layers[0].batch_size
            if step in ("decode", "append"):
                new = cases.prompt(model, count, number, rows)
                for part in [new[:, i : i + 1] for i in range(count)] if step == "decode" else [new]:
                    alike(*(cases.logits(model, cache, part) for cache in both))
                known = torch.cat([known, new], dim=1)
            elif step == "crop":
                for cache in both:
                    cache.crop(-min(count, cache.get_seq_length() - 1))
                known = known[:, : attached.get_seq_length()]
            elif step == "repeat":
                for cache in both:
                    cache.batch_repeat_interleave(count)
                known = known.repeat_interleave(count, dim=0)
            elif step == "select":
                chosen = torch.arange(rows - 1, -1, -1)[: max(1, rows - count)]
                for cache in both:
                    cache.batch_select_indices(chosen)
                known = known[chosen]
            elif step == "copy":
                attached = copy.deepcopy(attached)
            elif step == "settings":
                attached = attached.fork(ALL.replace(query=TopK(500)))
                assert all(layer.tokens.stored is not None for layer in attached.layers)
            elif step == "store" and rows == 1:
                attached.note_tokens(known)
                db.store(attached)
                again = db.create_session(known)[0]
                assert again.reused == known.shape[1]
                same_contents(again, attached)
                host = db.create_session(known, settings=ALL.replace(engine="host"))[0]
                assert type(host.layers[0]) is AlayaLayer
                for x, y in zip(host.layers[1].contents(), attached.layers[1].contents(), strict=True):
                    assert torch.equal(x, y)
            same_contents(attached, memory, exact=False)


def check_other_makers(model: Any, folder: Path) -> None:
    """What was stored without records, or for other bits, is quantised when it is attached; what is not exact is copied."""
    ids, kv = document(model, 250)
    host = ALL.replace(engine="host")
    other_bits = LOSSY.replace(
        index={"kind": "quantized", "bits": 8, "margin": 0}, residual={"kind": "low_bit", "key_bits": 8}
    )
    with AlayaDB(folder, model=model, settings=host) as db:
        db.import_context(ids, kv)
        made = db.create_session(ids, settings=LOSSY)[0]
        assert in_place(made)
        bits = db.create_session(ids, settings=other_bits)[0]
        assert in_place(bits)
        for session, settings in ((made, LOSSY), (bits, other_bits)):
            memory = Session(settings)
            for number, (keys, values) in enumerate(kv):
                memory.layers.append(memory._new_layer(number))
                memory.layers[number].fill(keys, values)
            for mine, theirs in zip(session.layers, memory.layers, strict=True):
                assert isinstance(mine, DeviceLayer)
                assert torch.equal(mine.tokens.records[:, :, :3], theirs.tokens.records[:, :, :3])
        eight = db.create_session(ids, settings=LOSSY.replace(store_dtype="int8"))[0]
        assert eight.layers[0].tokens.stored is None
        keys = eight.layers[0].contents()[0]
        assert 0 < (keys - kv[0][0]).abs().max() < 0.02 * kv[0][0].abs().max()


def check_damage(model: Any, folder: Path, where: str) -> None:
    """A file that was changed raises before anything of that layer is attended to; the layers before it serve.

    `where`: "kv" or "records".
    """
    ids, kv = document(model, 250)
    with AlayaDB(folder, model=model, settings=LOSSY) as db:
        db.import_context(ids, kv)
    (path,) = folder.glob("segments/*/layer-0001.safetensors")
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    import json

    start, stop = json.loads(data[8 : 8 + size])[where]["data_offsets"]
    # In the middle of the vectors: neither among the first tokens nor in the window.
    data[8 + size + start + (stop - start) // 4] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    with AlayaDB(folder, model=model, settings=LOSSY) as db:
        session = db.create_session(ids)[0]
        session.layers[0].contents()
        for _ in range(2):
            with pytest.raises(CorruptStoreError, match="layer 1"):
                session.layers[1].contents()
        with pytest.raises(CorruptStoreError):
            cases.logits(model, session, ids[:, :1])
