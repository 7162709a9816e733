"""Contexts that outlive the cache that made them, and the process."""

from __future__ import annotations

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from alaya_hf import DIPR, AlayaConfig, AlayaDB, Coarse, Flat, Full, Graph, Quantized, Session, Sign, TopK
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import (
    ContextExistsError,
    CorruptStoreError,
    DiskFullError,
    FingerprintError,
    ReadOnlyStoreError,
    StoreError,
    UnknownContextError,
)
from alaya_hf.storage.db import hashing
from alaya_hf.storage.db.mapped import MappedSegment
from tests.contract.models import VOCABULARY, build, prompt

SMALL: dict[str, Any] = {"window": {"init": 4, "local": 16, "overflow": 4}, "min_context": 0}
SYSTEMS = {
    "flat": AlayaConfig(query=TopK(20), index=Flat(), residual="none", **SMALL),
    "quantized_low_bit": AlayaConfig(index=Quantized(margin=0), residual="low_bit", **SMALL),
    "quantized_rescored": AlayaConfig(index=Quantized(bits=8), residual="block_means", **SMALL),
    "sign": AlayaConfig(query=TopK(20), index=Sign(), residual="none", **SMALL),
    "coarse_bounds": AlayaConfig(
        query=TopK(40),
        index=Coarse(block=16, strategy="bounds"),
        residual={"kind": "block_means", "block": 16},
        **SMALL,
    ),
    "coarse_representatives": AlayaConfig(query=TopK(40), index=Coarse(block=16), residual="none", **SMALL),
    "graph": AlayaConfig(query=DIPR(), index=Graph(), residual={"kind": "block_means", "block": 16}, **SMALL),
    "full": AlayaConfig(query=Full(), **SMALL),
    "layers": AlayaConfig(layers={1: {"query": "topk", "window": {"local": 8}}}, **SMALL),
    "all_in_window": AlayaConfig(),
}
FULL = SYSTEMS["full"]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture
def open_db(tmp_path, model):
    """``open_db(**kwargs)`` on one folder."""
    return lambda **kwargs: AlayaDB(tmp_path / "db", **{"model": model, "settings": FULL, **kwargs})


def run(model: Any, cache: Any, ids: torch.Tensor, new: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and their logits."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **cache_argument(cache),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits)


def contents(cache: Any) -> list[torch.Tensor]:
    return [torch.stack(layer.contents()) for layer in cache.layers]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dense(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values of a plain forward pass."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    return [torch.stack([layer.keys, layer.values]) for layer in cache.layers]


class TestRoundTrip:
    @pytest.mark.parametrize("name", SYSTEMS)
    def test_answers_are_those_of_the_cache_that_was_stored(self, name, model, open_db):
        """Vectors and low-bit copies come back bit by bit; answers to the rounding of the processor's kernels."""
        ids = prompt(700)
        with open_db(settings=SYSTEMS[name]) as db:
            session, rest = db.create_session(ids)
            assert rest.shape == (1, 700) and session.reused == 0
            told, _ = run(model, session, ids)
            db.store(session)
            question = torch.cat([told, prompt(5, 3)], dim=1)
            expected = run(model, copy.deepcopy(session), question)
            before = contents(session)
        with open_db(settings=SYSTEMS[name]) as db:
            again, rest = db.create_session(question)
            assert again.reused == 707 and torch.equal(rest, question[:, 707:])
            assert same(contents(again), before)
            tokens, logits = run(model, again, question)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-4, atol=1e-5)
        for layer, other in zip(session.layers, again.layers, strict=True):
            made, found = layer.store.segments[:1], other.store.segments[:1]
            for a, b in zip(made, found, strict=True):
                for bits, low in a._lowbits.items():
                    state = b.lowbit(*bits).state_dict()
                    assert all(torch.equal(state[key], tensor) for key, tensor in low.state_dict().items())
        stored = any(isinstance(s, MappedSegment) for layer in again.layers for s in layer.store.segments)
        assert stored == (name != "all_in_window")

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_store_dtype(self, dtype, model, open_db):
        settings = SYSTEMS["quantized_low_bit"].replace(store_dtype=dtype)
        ids = prompt(600)
        with open_db(settings=settings) as db:
            session, _ = db.create_session(ids)
            run(model, session, ids)
            row = db.store(session)
            again, _ = db.create_session(context=row.id)
        rounded = [kv.to(getattr(torch, dtype)).float() for kv in contents(session)]
        assert row.dtype == dtype and same(contents(again), rounded)
        run(model, again, torch.cat([again.token_ids, prompt(3)], dim=1))

    def test_in_another_process(self, open_db, tmp_path):
        """Half of a context is reused there, the answer is that of a fresh dense cache."""
        script = (
            "import sys, torch\n"
            "from alaya_hf import AlayaDB\n"
            "from tests.contract.models import build, prompt\n"
            "from tests.test_db import FULL, run\n"
            "model = build('llama')\n"
            "ids = torch.cat([prompt(500)[:, :350], prompt(20, 9)], dim=1)\n"
            f"db = AlayaDB({str(tmp_path / 'db')!r}, model=model, settings=FULL)\n"
            "session, rest = db.create_session(ids)\n"
            "print(session.reused, rest.shape[1], run(model, session, ids)[0].tolist())\n"
        )
        model = build("llama")
        with open_db() as db:
            session, _ = db.create_session(prompt(500))
            run(model, session, prompt(500))
            db.store(session)
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, cwd=root, text=True, capture_output=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        ids = torch.cat([prompt(500)[:, :350], prompt(20, 9)], dim=1)
        expected = run(model, DynamicCache(config=model.config), ids)[0].tolist()
        assert done.stdout.split(maxsplit=2) == ["350", "20", f"{expected}\n"]

    @pytest.mark.parametrize("reused", [1, 3, 15, 17, 120, 555, 689])
    @pytest.mark.parametrize("name", ["quantized_low_bit", "graph", "quantized_rescored"])
    def test_partial_reuse_sees_nothing_behind_it(self, name, reused, model, open_db):
        """Keys behind the reused prefix are so large that one of them in a search would take all of the mass."""
        ids = prompt(700)[0]
        kv = dense(model, prompt(700))
        for layer in kv:
            layer[:, :, :, reused:] *= 1000
        query = TopK(10_000) if name == "graph" else DIPR(beta=1e9)
        settings = SYSTEMS[name].replace(query=query)
        with open_db(settings=settings) as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in kv])
            other = torch.cat([ids[:reused], (ids[reused:] + 1) % VOCABULARY])[None, : reused + 6]
            session, rest = db.create_session(other)
            assert session.reused == reused and rest.shape[1] == 6
            tokens, logits = run(model, session, other)
        expected = run(model, DynamicCache(config=model.config), other)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("window", [(0, 1), (4, 64), (64, 16), (200, 300), (4, 690)])
    def test_another_window_than_it_was_stored_with(self, window, model, open_db):
        ids = prompt(700)
        with open_db(settings=SYSTEMS["quantized_low_bit"]) as db:
            session, _ = db.create_session(ids)
            run(model, session, ids)
            db.store(session)
            question = torch.cat([session.token_ids, prompt(4)], dim=1)
            again, _ = db.create_session(question, settings=FULL.replace(window=window))
        assert same(contents(again), contents(session))
        tokens, logits = run(model, again, question)
        expected = run(model, DynamicCache(config=model.config), question)
        assert torch.equal(tokens, expected[0])
        torch.testing.assert_close(logits, expected[1], rtol=1e-3, atol=1e-3)

    def test_files_are_safetensors(self, model, open_db, tmp_path):
        ids = prompt(500)
        with open_db(settings=SYSTEMS["quantized_low_bit"]) as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
        files = sorted((tmp_path / "db" / "segments").glob("*/*.safetensors"))
        assert len(files) == len(dense(model, ids))
        for file, layer in zip(files, dense(model, ids), strict=True):
            loaded = load_file(file)
            assert torch.equal(loaded["kv"], torch.stack([layer[0, 0], layer[1, 0]], dim=2))
            assert any(name.endswith("key_words") for name in loaded)
        for path in (tmp_path / "db").rglob("*"):
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


class TestInPlace:
    def test_little_is_read(self, model, open_db):
        """Opening verifies the window's pages; a step adds the index and the pages of what it retrieved."""
        torch.manual_seed(0)
        ids = prompt(20_000)
        kv = [tuple(torch.randn(1, 2, 20_000, 16) for _ in range(2)) for _ in range(2)]
        settings = AlayaConfig(query=TopK(4), index=Quantized(margin=0), residual="none", window=(4, 16), min_context=0)
        with open_db(settings=settings) as db:
            db.import_context(ids, kv)
        with open_db(settings=settings) as db:
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
            (segment,) = session.layers[0].store.segments
            assert segment.file._verified.sum() <= 8
            with torch.no_grad():
                model(prompt(1), **cache_argument(session))
            data = 2 * 20_000 * 2 * 16 * 4 // 4096
            assert 0 < segment.file._verified[:data].sum() < 0.1 * data

    def test_a_filled_step_needs_no_vectors_of_the_stored_index(self, open_db, model, monkeypatch):
        """The graph comes from the file: nothing is built when it is opened."""
        ids = prompt(600)
        with open_db(settings=SYSTEMS["graph"]) as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
            monkeypatch.setattr("alaya_hf.index.roargraph.RoarGraph.build", None)
            with torch.no_grad():
                model(prompt(1), **cache_argument(session))

    def test_buffer_budget(self, open_db, model):
        ids = prompt(30_000)
        torch.manual_seed(0)
        kv = [tuple(torch.randn(1, 2, 30_000, 16) for _ in range(2)) for _ in range(2)]
        with open_db(buffer_bytes=2 << 20) as db:
            db.import_context(ids, kv)
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
            for layer, (keys, values) in zip(session.layers, kv, strict=True):
                k, v = layer.contents()
                assert torch.equal(k, keys) and torch.equal(v, values)
                got = [segment.read(0, 100) for segment in layer.store.segments]
                assert torch.equal(got[0][:, :, 0], keys[0, :, 4:104])
            assert db._buffers.resident["data"] <= 9 << 20


class TestStore:
    def test_only_what_is_new_is_written(self, model, open_db):
        ids = prompt(700)
        with open_db() as db:
            session, _ = db.create_session(ids)
            run(model, session, ids)
            first = db.store(session, name="talk")
            assert db.store(session, name="talk").id == first.id
            longer = torch.cat([session.token_ids, prompt(30, 4)], dim=1)
            run(model, session, longer)
            second = db.store(session, name="talk")
            assert [row.id for row in db.list()] == [second.id]
            assert second.bytes == first.bytes + (second.bytes - first.bytes)
            assert second.bytes - first.bytes < 0.2 * first.bytes
            again, _ = db.create_session(context="talk")
            assert same(contents(again), contents(session)) and torch.equal(again.token_ids, session.token_ids)

    def test_branches_share_their_prefix(self, model, open_db, tmp_path):
        ids = prompt(600)
        rows = []
        with open_db() as db:
            for seed in range(3):
                question = torch.cat([ids[:, : 600 - 50 * seed], prompt(20, 10 + seed)], dim=1)
                session, rest = db.create_session(question)
                assert session.reused == (600 - 50 * seed if seed else 0)
                run(model, session, question)
                rows.append(db.store(session, name=str(seed)))
            assert len(list((tmp_path / "db" / "segments").iterdir())) == 3
            assert rows[1].own_bytes < 0.3 * rows[0].bytes
            db.delete("0")
            for seed in (1, 2):
                question = torch.cat([ids[:, : 600 - 50 * seed], prompt(20, 10 + seed)], dim=1)
                session, _ = db.create_session(context=str(seed))
                held = torch.cat([session.token_ids], dim=1)
                assert torch.equal(held[:, : question.shape[1]], question)
                for a, b in zip(contents(session), dense(model, held), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            # What only the deleted context had is not found any more.
            session, _ = db.create_session(torch.cat([ids, prompt(20, 10)], dim=1))
            assert session.reused == 550
            db.delete("1")
            db.delete("2")
            assert db.nbytes == 0 and not list((tmp_path / "db" / "segments").iterdir())

    def test_base_deleted_meanwhile(self, model, open_db):
        ids = prompt(600)
        with open_db() as db:
            row = db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
            question = torch.cat([ids, prompt(4)], dim=1)
            session, _ = db.create_session(question)
            db.delete(row.id)
            run(model, session, question)
            stored = db.store(session)
            again, _ = db.create_session(context=stored.id)
            assert same(contents(again), contents(session)) and not db.verify().problems

    def test_cropped_session_is_stored_as_it_is(self, model, open_db):
        ids = prompt(600)
        with open_db() as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
            session.crop(-200)
            other = torch.cat([ids[:, :400], prompt(40, 7)], dim=1)
            tokens, _ = run(model, session, other)
            row = db.store(session)
            again, _ = db.create_session(context=row.id)
            assert same(contents(again), contents(session)) and torch.equal(again.token_ids, tokens[:, :-1])
            assert torch.equal(tokens, run(model, DynamicCache(config=model.config), other)[0])

    def test_import_from_dynamic_cache(self, model, open_db):
        ids = prompt(300)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, **cache_argument(cache))
        with open_db() as db:
            row = db.import_context(ids[0].tolist(), cache, name="imported")
            session, _ = db.create_session(context="imported")
            assert row.tokens == 300 and same(contents(session), dense(model, ids))
            with pytest.raises(StoreError, match=r"\[300\] tokens"):
                db.import_context(ids[0, :200], cache)

    def test_names(self, model, open_db):
        a, b = prompt(100, 1), prompt(100, 2)
        with open_db() as db:
            db.import_context(a, [(layer[0], layer[1]) for layer in dense(model, a)], name="x")
            with pytest.raises(ContextExistsError, match="'x'"):
                db.import_context(b, [(layer[0], layer[1]) for layer in dense(model, b)], name="x")
            assert len(db.list()) == 1 and db.create_session(b)[0].reused == 0
            with pytest.raises(UnknownContextError, match="'y'"):
                db.info("y")

    def test_what_cannot_be_stored(self, model, open_db):
        with open_db() as db:
            session = Session(FULL)
            with pytest.raises(StoreError, match="no tokens"):
                db.store(session)
            with torch.no_grad():
                model(prompt(30), **cache_argument(session))
            with pytest.raises(StoreError, match="note_tokens"):
                db.store(session)
            session.note_tokens(prompt(30))
            session.batch_repeat_interleave(2)
            with pytest.raises(StoreError, match="2 sequences"):
                db.store(session)

    def test_gc_removes_least_recently_used(self, model, open_db):
        with open_db() as db:
            for seed in range(4):
                ids = prompt(200, seed)
                db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)], name=str(seed))
            db.create_session(prompt(200, 0))
            report = db.gc(db.nbytes // 2)
            assert report.contexts == ["1", "2"] and {row.name for row in db.list()} == {"0", "3"}


class TestMatching:
    def test_another_model_is_refused_by_name(self, model, open_db):
        ids = prompt(200)
        kv = [(layer[0], layer[1]) for layer in dense(model, ids)]
        with open_db() as db:
            db.import_context(ids, kv, name="doc")
        other = build("llama", seed=1)
        with open_db(model=other) as db:
            with pytest.warns(UserWarning, match="weights"):
                session, _ = db.create_session(ids)
            assert session.reused == 0
            with pytest.raises(FingerprintError, match="weights"):
                db.create_session(context="doc")
        rotary = build("llama")
        rotary.config.rope_parameters = {"rope_type": "default", "rope_theta": 5e5}
        with open_db(model=rotary) as db, pytest.raises(FingerprintError, match=r"rope \(rope_parameters"):
            db.create_session(context="doc")
        half = build("llama").to(torch.bfloat16)
        with open_db(model=half) as db, pytest.raises(FingerprintError, match="dtype"):
            db.create_session(context="doc")

    def test_namespaces_are_apart(self, model, open_db):
        ids = prompt(300)
        kv = [(layer[0], layer[1]) for layer in dense(model, ids)]
        with open_db(namespace="a") as a, open_db(namespace="b") as b:
            row = a.import_context(ids, kv, name="doc")
            assert b.create_session(ids)[0].reused == 0 and b.list() == [] and b.nbytes == 0
            for context in ("doc", row.id):
                with pytest.raises(UnknownContextError):
                    b.create_session(context=context)
            with pytest.raises(UnknownContextError):
                b.delete(row.id)
            b.gc(0)
            assert a.create_session(ids)[0].reused == 300

    def test_a_collision_of_hashes_attaches_nothing_wrong(self, model, open_db, monkeypatch):
        """Every block hashes to the same value, so all contexts are nominated for every prompt."""
        monkeypatch.setattr(
            hashing, "chain", lambda ids, block, namespace: [bytes([n]) * 16 for n in range(len(ids) // block)]
        )
        with open_db() as db:
            for seed in (1, 2):
                ids = torch.cat([prompt(100, 9), prompt(300, seed)], dim=1)
                db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)])
            for length in (64, 99, 100, 250):
                ids = torch.cat([torch.cat([prompt(100, 9), prompt(300, 2)], dim=1)[:, :length], prompt(200, 5)], dim=1)
                session, _ = db.create_session(ids)
                assert session.reused == length
                assert torch.equal(session.token_ids, ids[:, :length])
            assert db.create_session(prompt(300, 77))[0].reused == 0

    def test_a_thousand_contexts(self, model, tmp_path):
        """The catalog alone, against a scan of all of them."""
        from alaya_hf.storage.db.catalog import Catalog, NewSegment

        catalog = Catalog(tmp_path / "catalog.sqlite", block=16)
        random = np.random.default_rng(0)
        stored = []
        for number in range(1000):
            ids = random.integers(0, 3, random.integers(5, 80)).astype(np.int32)
            if stored and number % 2:
                old = stored[random.integers(len(stored))]
                ids = np.concatenate([old[: random.integers(1, len(old) + 1)], ids])
            base = catalog.longest("n", {"a": "b"}, ids)
            new = (
                []
                if base.tokens == len(ids)
                else [NewSegment(f"{number:032x}", base.tokens, len(ids) - base.tokens, "float32", [])]
            )
            catalog.commit("n", {"a": "b"}, ids, base, new, None)
            stored.append(ids)
        for _ in range(300):
            old = stored[random.integers(len(stored))]
            ids = np.concatenate([old[: random.integers(0, len(old) + 1)], random.integers(0, 3, 40).astype(np.int32)])
            best = max(int(np.argmin(np.append(s[: len(ids)] == ids[: len(s)], False))) for s in stored)
            chain = catalog.longest("n", {"a": "b"}, ids)
            assert chain.tokens == best
            assert np.array_equal(catalog.ids_of(chain), ids[:best])


class TestOutsideTransformers:
    def test_update_and_attention(self, model, open_db):
        """The paper's interface over a stored context, against dense attention."""
        ids = prompt(400)
        kv = dense(model, ids)
        with open_db() as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in kv])
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
        for number, layer in enumerate(kv):
            q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
            session.update(q, k, v, number)
            out = session.attention(q, number)
            keys, values = torch.cat([layer[0], k], dim=2), torch.cat([layer[1], v], dim=2)
            mask = torch.ones(3, 403, dtype=torch.bool).tril(400)
            expected = torch.nn.functional.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


class TestFaults:
    @pytest.fixture
    def stored(self, model, open_db, tmp_path):
        ids = prompt(600)
        with open_db(settings=SYSTEMS["quantized_low_bit"]) as db:
            db.import_context(ids, [(layer[0], layer[1]) for layer in dense(model, ids)], name="doc")
        (folder,) = (tmp_path / "db" / "segments").iterdir()
        return folder

    def test_a_crafted_file_is_refused(self, stored, open_db, tmp_path):
        file = stored / "layer-0001.safetensors"
        sound = file.read_bytes()
        size = int.from_bytes(sound[:8], "little")
        header = sound[8 : 8 + size]

        def crafted(text: bytes) -> bytes:
            return len(text).to_bytes(8, "little") + text + sound[8 + size :]

        attempts = {
            "header size": (1 << 62).to_bytes(8, "little") + sound[8:],
            "longer": sound + b"x",
            "shape": crafted(header.replace(b'"shape":[2,600,2,16]', b'"shape":[2,601,2,16]')),
            "offset": crafted(header.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')),
        }
        for what, data in attempts.items():
            assert data != sound, what
            file.write_bytes(data)
            with open_db() as db, pytest.raises(CorruptStoreError, match="context 'doc'.*layer 1"):
                db.create_session(context="doc")
        file.unlink()
        secret = tmp_path / "secret"
        secret.write_bytes(sound)
        file.symlink_to(secret)
        with open_db() as db, pytest.raises(CorruptStoreError, match="context 'doc'.*layer 1"):
            db.create_session(context="doc")

    @pytest.mark.parametrize(
        "header",
        [
            b'{"__metadata__":{},"kv":{"dtype":"F32","shape":[4,-1],"data_offsets":[0,4096]}}',
            b'{"__metadata__":{},"../kv":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}',
            b'{"__metadata__":{},"kv":{"dtype":"PICKLE","shape":[1024],"data_offsets":[0,4096]}}',
            b'{"__metadata__":{},"kv":{"dtype":"F32","shape":[1024],"data_offsets":[0,99999999999]}}',
            b'{"__metadata__":{},"kv":{"dtype":"F32","shape":[1025],"data_offsets":[0,4096]}}',
            b'{"__metadata__":{"a":1},"kv":{"dtype":"F32","shape":[1024],"data_offsets":[0,4096]}}',
            b'{"kv":1}',
            b"[" * 3000,
        ],
    )
    def test_a_crafted_header_that_the_catalog_vouches_for(self, header, tmp_path):
        """Sizes, offsets and names are checked whoever wrote them."""
        from alaya_hf.storage.db.vector_file import VectorFile, Written

        text = header + b" " * (-(8 + len(header)) % 4096)
        data = len(text).to_bytes(8, "little") + text + bytes(4096 + 8)
        (tmp_path / "f").write_bytes(data)
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            known = Written(0, len(data), hashing.digest(data[: 8 + len(text)]), b"")
            with pytest.raises(CorruptStoreError, match="header"):
                VectorFile(folder, "f", known, "context 'x', layer 0")
        finally:
            os.close(folder)

    @pytest.mark.parametrize("call", ["posix_fallocate", "write", "fsync", "rename"])
    def test_a_full_disk_changes_nothing(self, call, model, open_db, tmp_path, monkeypatch):
        ids = prompt(300)
        kv = [(layer[0], layer[1]) for layer in dense(model, ids)]
        with open_db() as db:
            db.import_context(ids[:, :200], [(k[:, :, :200], v[:, :, :200]) for k, v in kv], name="earlier")

            def full(*args: Any, **kwargs: Any) -> None:
                raise OSError(28, "No space left on device")

            with monkeypatch.context() as patch:
                patch.setattr(os, call, full)
                with pytest.raises(DiskFullError, match="nothing was stored"):
                    db.import_context(ids, kv, name="later")
            assert [row.name for row in db.list()] == ["earlier"] and db.create_session(ids)[0].reused == 200
            assert not list((tmp_path / "db" / "staging").iterdir())
            assert len(list((tmp_path / "db" / "segments").iterdir())) == 1
            db.import_context(ids, kv, name="later")

    def test_too_little_room_is_seen_before_writing(self, model, open_db, monkeypatch):
        ids = prompt(300)
        kv = [(layer[0], layer[1]) for layer in dense(model, ids)]
        with open_db() as db:
            monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
            with pytest.raises(DiskFullError, match="1,000 left"):
                db.import_context(ids, kv)

    def test_read_only(self, stored, model, open_db):
        ids = prompt(600)
        with open_db(read_only=True, settings=SYSTEMS["quantized_low_bit"]) as db:
            session, _ = db.create_session(torch.cat([ids, prompt(2)], dim=1))
            assert session.reused == 600 and same(contents(session), dense(model, ids))
            session.note_tokens(ids)
            for change in (lambda: db.store(session), lambda: db.delete("doc"), lambda: db.gc(0)):
                with pytest.raises(ReadOnlyStoreError):
                    change()
            assert not db.verify().problems

    @pytest.mark.slow
    def test_kills_and_damages(self, tmp_path):
        """The campaigns of ``python -m eval faults``, in small; its exit code says whether anything was lost or wrong."""
        root = str(Path(__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
        command = [
            sys.executable,
            "-m",
            "eval",
            "faults",
            "--kills",
            "8",
            "--damages",
            "16",
            "--output",
            str(tmp_path / "r"),
        ]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "back after their deletion | 0 |" in done.stdout and "Wrong answers: 0." in done.stdout


@pytest.mark.slow
def test_writers_and_readers_at_once(model, open_db, tmp_path):
    """Two processes store and delete while this one reads."""
    script = (
        "import sys\n"
        "from alaya_hf import AlayaDB\n"
        "from tests.contract.models import build, prompt\n"
        "from tests.test_db import FULL, dense\n"
        "model, seed = build('llama'), int(sys.argv[1])\n"
        f"with AlayaDB({str(tmp_path / 'db')!r}, model=model, settings=FULL) as db:\n"
        "    for number in range(12):\n"
        "        ids = prompt(200 + number, seed)\n"
        "        db.import_context(ids, [(kv[0], kv[1]) for kv in dense(model, ids)], name=f'{seed}-{number}')\n"
        "        if number % 3 == 2:\n"
        "            db.delete(f'{seed}-{number - 1}')\n"
        "            db.gc()\n"
    )
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    workers = [
        subprocess.Popen([sys.executable, "-c", script, str(seed)], cwd=root, env=environment, stderr=subprocess.PIPE)
        for seed in (1, 2)
    ]
    with open_db() as db:
        while any(worker.poll() is None for worker in workers):
            for row in db.list():
                try:
                    session, _ = db.create_session(context=row.id)
                except UnknownContextError:
                    continue  # deleted since it was listed
                ids = prompt(row.tokens, int(row.name.split("-")[0]))
                assert torch.equal(session.token_ids, ids) and same(contents(session), dense(model, ids))
        for worker in workers:
            assert worker.wait() == 0, worker.stderr.read().decode()
            worker.stderr.close()
        expected = {f"{seed}-{n}" for seed in (1, 2) for n in range(12) if n % 3 != 1}
        assert {row.name for row in db.list()} == expected and not db.verify().problems
