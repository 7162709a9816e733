"""What a store refuses, and what interruptions, other processes and damaged folders must not do to it."""

from __future__ import annotations

import copy
import errno
import os
import sys
from typing import Any

import numpy as np
import pytest
import torch

from alaya_hf import AlayaDB, Session
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ContextExistsError, CorruptStoreError, FingerprintError, StoreError, UnsupportedModelError
from alaya_hf.storage.db.catalog import Catalog, Chain, NewSegment
from alaya_hf.storage.db.fingerprint import fingerprint
from alaya_hf.storage.db.vector_file import Source, VectorFile, write_vectors
from tests.contract.models import build, prompt
from tests.test_db import FULL, dense


def pairs(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer[0], layer[1]) for layer in dense(model, ids)]


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture
def open_db(tmp_path, model):
    return lambda **kwargs: AlayaDB(tmp_path / "db", **{"model": model, "settings": FULL, **kwargs})


class TestFingerprint:
    @pytest.mark.parametrize("made", ["created", "forked", "deepcopied"])
    def test_a_session_is_not_stored_as_another_models(self, made, model, open_db):
        ids = prompt(40)
        with open_db() as db, open_db(model=build("llama", seed=1)) as other:
            session, _ = db.create_session(ids)
            session = {"created": session, "forked": session.fork(FULL), "deepcopied": copy.deepcopy(session)}[made]
            with torch.no_grad():
                model(ids, **cache_argument(session))
            session.note_tokens(ids)
            session.crop(-1)
            with pytest.raises(FingerprintError, match="weights"):
                other.store(session)
            assert other.list() == []
            assert db.store(session).tokens == 39

    def test_a_session_made_elsewhere_takes_the_databases(self, model, open_db):
        session = Session(FULL, config=model.config)
        with torch.no_grad():
            model(prompt(40), **cache_argument(session))
        session.note_tokens(prompt(40))
        with open_db() as db:
            db.store(session)
            assert session.fingerprint == db.fingerprint

    def test_every_change_is_seen(self):
        """Changes that leave no trace on parameters, that is, neither their addresses nor their versions."""
        model = build("llama")
        attention = model.model.layers[0].self_attn
        attention.register_buffer("packed", torch.zeros(64, 64, dtype=torch.int32))
        attention.register_buffer("scratch", torch.zeros(3), persistent=False)
        seen = [fingerprint(model)]

        def changed(*parts: str) -> None:
            seen.append(fingerprint(model))
            assert {name for name in seen[-1] if seen[-1][name] != seen[-2][name]} == set(parts)

        attention.k_proj.weight.data.copy_(attention.k_proj.weight.data + 1)
        changed("weights")
        attention.packed += 1 << 30
        changed("weights")
        attention.scratch += 1
        changed()
        model.model.rotary_emb.inv_freq.data.mul_(2)
        changed("rope")
        model.model.rotary_emb.attention_scaling = 1.5
        changed("rope")
        # Most columns of a matrix with a power of two of them are looked at.
        weight = torch.nn.Linear(1024, 1024, bias=False).weight
        model.extra = torch.nn.Linear(1024, 1024, bias=False)
        model.extra.weight.data.copy_(weight)
        seen.append(fingerprint(model))
        model.extra.weight.data[:, 1:] += 1
        changed("weights")

    def test_the_state_of_adapters(self):
        """By what PEFT's tuner layers have, which is all that is asked of them."""
        model = build("llama")
        tuner = model.model.layers[0].self_attn.q_proj
        model.peft_config, model.active_adapters = {"a": None}, lambda: ["a"]
        tuner.disable_adapters, tuner.merged, tuner.merged_adapters, tuner.scaling = False, False, [], {"a": 2.0}
        seen = [fingerprint(model)["adapter"]]
        for name, value in (("scaling", {"a": 1.0}), ("disable_adapters", True), ("merged_adapters", ["a"])):
            setattr(tuner, name, value)
            seen.append(fingerprint(model)["adapter"])
        assert len(set(seen)) == 4

    def test_weights_that_are_not_there_are_refused(self, open_db):
        model = build("llama")
        model.lm_head.to("meta")
        with open_db(model=model) as db, pytest.raises(UnsupportedModelError, match=r"lm_head\.weight"):
            db.create_session(prompt(4))

    def test_models_of_images_are_refused(self, open_db):
        model = build("llama")
        model.config.image_token_id = 7
        with pytest.raises(UnsupportedModelError, match="image_token_id"):
            open_db(model=model)


class TestInterrupted:
    @pytest.mark.parametrize("committed", [False, True])
    def test_commit(self, committed, model, open_db, tmp_path, monkeypatch):
        ids = prompt(40)
        commit = Catalog.commit

        def interrupted(self: Catalog, *args: Any) -> None:
            if committed:
                commit(self, *args)
            raise KeyboardInterrupt

        with open_db() as db:
            with monkeypatch.context() as patch:
                patch.setattr(Catalog, "commit", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    db.import_context(ids, pairs(model, ids))
            assert db.create_session(ids)[0].reused == 40 * committed and not db.verify().problems
            assert len(list((tmp_path / "db" / "segments").iterdir())) == committed

    def test_layers_of_unequal_length_are_not_stored(self, model, open_db):
        with open_db() as db:
            session, _ = db.create_session(prompt(40))
            for number, n in enumerate((40, 30)):
                q, kv = torch.randn(1, 4, n, 16), torch.randn(2, 1, 2, n, 16)
                session.update(q, kv[0], kv[1], number)
                session.attention(q, number)
            session.note_tokens(prompt(40))
            with pytest.raises(StoreError, match="30 to 40 tokens"):
                db.store(session)

    def test_one_sequence_is_imported(self, model, open_db):
        kv = [(torch.cat([k, k]), torch.cat([v, v])) for k, v in pairs(model, prompt(40))]
        with open_db() as db, pytest.raises(StoreError, match="of 2 sequences"):
            db.import_context(prompt(40), kv)

    def test_pieces_that_do_not_fill_a_tensor(self):
        with pytest.raises(StoreError, match="takes 64 bytes, but 32"):
            write_vectors(-1, 0, {"kv": Source(torch.float32, (1, 2, 2, 4), [torch.zeros(8)])}, {})


def segment(number: int, start: int, tokens: int) -> NewSegment:
    return NewSegment(f"{number:032x}", start, tokens, "float32", [])


class TestCatalog:
    @pytest.fixture
    def catalog(self, tmp_path):
        catalog = Catalog(tmp_path / "catalog.sqlite", block=4)
        yield catalog
        catalog.close()

    def test_names_belong_to_a_model(self, catalog):
        """The same tokens continued under another model do not take the name, nor delete what has it."""
        ids = np.arange(20, dtype=np.int32)
        first, _ = catalog.commit("n", {"weights": "a"}, ids[:10], Chain(), [segment(1, 0, 10)], "x")
        for length in (10, 20):
            with pytest.raises(ContextExistsError, match="another model.*weights"):
                catalog.commit("n", {"weights": "b"}, ids[:length], Chain(), [segment(2, 0, length)], "x")
        assert [row.id for row in catalog.contexts("n")] == [first]
        assert catalog.longest("n", {"weights": "a"}, ids).tokens == 10

    def test_the_same_context_stored_twice_at_once(self, catalog):
        ids = np.arange(10, dtype=np.int32)
        stored = [catalog.commit("n", {}, ids, Chain(), [segment(number, 0, 10)], "x") for number in (1, 2)]
        assert stored[0][0] == stored[1][0] and stored[1][1] == [f"{1:032x}"]
        assert catalog.known() == {f"{2:032x}"} and catalog.longest("n", {}, ids).tokens == 10

    def test_a_segment_that_is_there_is_no_damage(self, catalog):
        ids = np.arange(10, dtype=np.int32)
        catalog.commit("n", {}, ids, Chain(), [segment(1, 0, 10)], None)
        with pytest.raises(StoreError, match="stored by another process") as caught:
            catalog.commit("n", {}, ids + 1, Chain(), [segment(1, 0, 10)], None)
        assert not isinstance(caught.value, CorruptStoreError)

    def test_a_miss_reads_no_token_ids(self, catalog):
        """All contexts begin alike and leave the prompt within their first block."""
        for number in range(20):
            ids = np.array([7, 7, number, *range(1000)], np.int32)
            catalog.commit("n", {}, ids, Chain(), [segment(number, 0, len(ids))], None)
        statements: list[str] = []
        catalog._connection().set_trace_callback(statements.append)
        assert catalog.longest("n", {}, np.array([7, 7, 99, 5, 5], np.int32)).tokens == 2
        assert sum("tokens t" in statement for statement in statements) == 1
        statements.clear()
        assert len(catalog.contexts("n")) == 20 and catalog.total_bytes("n") == 0
        assert not any("tokens t" in statement for statement in statements)

    def test_a_damaged_first_block_attaches_nothing(self, catalog):
        catalog.commit("n", {}, np.array([1, 2, 3, 4, 5], np.int32), Chain(), [segment(1, 0, 5)], None)
        catalog._connection().execute("UPDATE segments SET first = ?", (np.array([9, 9, 9, 9], np.int32).tobytes(),))
        with pytest.raises(CorruptStoreError, match="contradicts itself"):
            catalog.longest("n", {}, np.array([9, 9, 9, 9, 9], np.int32))

    def test_a_schema_that_is_no_text(self, tmp_path):
        """Sqlite's own complaint about it cannot be decoded either."""
        path = tmp_path / "catalog.sqlite"
        Catalog(path).close()
        whole = path.read_bytes()
        places = [at for at in range(len(whole)) if whole.startswith(b"CREATE", at)]
        assert places
        for at in (place + offset for place in places for offset in (0, 9, 30)):
            path.write_bytes(whole[:at] + b"\xa0" + whole[at + 1 :])
            try:
                Catalog(path).close()
            except (CorruptStoreError, StoreError):
                pass
        path.write_bytes(whole)
        Catalog(path).close()

    def test_a_log_that_cannot_be_read_along(self, tmp_path, monkeypatch):
        import sqlite3

        catalog = Catalog(tmp_path / "catalog.sqlite")
        catalog.commit("n", {}, np.arange(10, dtype=np.int32), Chain(), [segment(1, 0, 10)], None)
        assert (tmp_path / "catalog.sqlite-wal").stat().st_size
        connect = sqlite3.connect

        def unwritable(where: str, **kwargs: Any) -> Any:
            # As on a medium without room for the log's index.
            if "immutable" not in where:
                raise_on = type("Connection", (), {"close": lambda self: None})()

                def execute(*args: Any) -> None:
                    raise sqlite3.OperationalError("unable to open database file")

                raise_on.execute = execute
                return raise_on
            return connect(where, **kwargs)

        monkeypatch.setattr(sqlite3, "connect", unwritable)
        with pytest.raises(StoreError, match="catalog.sqlite-wal"):
            Catalog(tmp_path / "catalog.sqlite", read_only=True)
        monkeypatch.undo()
        catalog.close()

    def test_deleted_while_it_is_opened(self, model, open_db, monkeypatch):
        """A deletion between the look-up by name and the reading of ids is seen as one or the other, never half."""
        ids = prompt(40)
        with open_db() as db, open_db() as other:
            db.import_context(ids, pairs(model, ids), name="x")
            find = Catalog.find

            def deleted_after(self: Catalog, *args: Any) -> Any:
                found = find(self, *args)
                if self is db._catalog and other.list():
                    other.delete("x")
                return found

            monkeypatch.setattr(Catalog, "find", deleted_after)
            with pytest.raises(StoreError, match="has 0 contexts 'x'"):
                db.create_session(context="x")


class TestSystem:
    @pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EIO, errno.ENOMEM])
    def test_a_refusal_is_no_damage(self, code, model, open_db, monkeypatch):
        ids = prompt(40)
        with open_db() as db:
            db.import_context(ids, pairs(model, ids), name="x")

            def refuse(*args: Any) -> None:
                raise OSError(code, os.strerror(code))

            monkeypatch.setattr(db._folder, "open_segment", refuse)
            with pytest.raises(StoreError, match=os.strerror(code)) as caught:
                db.create_session(context="x")
            assert not isinstance(caught.value, CorruptStoreError)


class TestFolder:
    @pytest.mark.parametrize("name", ["segments", "staging"])
    def test_links_are_refused(self, name, open_db, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "db").mkdir()
        (tmp_path / "db" / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match="is a link"):
            open_db()

    def test_sweeping_touches_only_what_a_store_makes(self, open_db, tmp_path):
        with open_db() as db:
            for name in ("segments/notes", "staging/notes", f"segments/{1:032x}", f"staging/{1:032x}.{2:016x}"):
                (tmp_path / "db" / name).mkdir()
            (tmp_path / "db" / "segments" / f"{3:032x}").symlink_to(tmp_path)
            assert db.gc().leftovers == 2
            left = {path.name for folder in ("segments", "staging") for path in (tmp_path / "db" / folder).iterdir()}
            assert left == {"notes", f"{3:032x}"} and tmp_path.is_dir()

    def test_verify_survives_a_file_that_is_cut(self, model, open_db, tmp_path, monkeypatch):
        """After its header was read and before its content is: a mapping would end the process."""
        ids = prompt(400)
        with open_db() as db:
            db.import_context(ids, pairs(model, ids), name="x")
            damaged = VectorFile.damaged_blocks

            def cut(self: VectorFile, folder: int, name: str) -> Any:
                os.truncate(next((tmp_path / "db" / "segments").glob(f"*/{name}")), 8192)
                return damaged(self, folder, name)

            monkeypatch.setattr(VectorFile, "damaged_blocks", cut)
            problems = db.verify().problems
            assert len(problems) == 2 and all("context 'x'" in said and "ends before" in said for said in problems)

    @pytest.mark.skipif(sys.version_info >= (3, 13), reason="mappings keep no descriptor")
    def test_an_open_file_that_is_cut(self, model, open_db, tmp_path):
        ids = prompt(4000)
        with open_db() as db:
            db.import_context(ids, pairs(model, ids))
            session, _ = db.create_session(torch.cat([ids, prompt(1)], dim=1))
            for path in (tmp_path / "db" / "segments").glob("*/*"):
                os.truncate(path, 8192)
            with pytest.raises(CorruptStoreError, match="was cut to 8,192"):
                session.layers[0].contents()
