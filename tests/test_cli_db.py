"""``alaya-hf db`` from storing a document to sweeping it."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from alaya_hf.cli import app

TEXT = "This agreement shall be governed by the laws of Norway. " * 20


@pytest.fixture
def command(tiny, tmp_path):
    """``command(*arguments, code=0)``: what it printed."""

    def run(name: str, *arguments: str, code: int = 0) -> str:
        model = ["--model", str(tiny)] if name in ("put", "ask") else []
        done = CliRunner().invoke(app, ["db", name, *arguments, *model, "--db", str(tmp_path / "db")])
        assert done.exit_code == code, done.output
        return done.output

    return run


def test_put_ask_and_keep_house(command, tmp_path):
    document = tmp_path / "contract.txt"
    document.write_text(TEXT, encoding="utf-8")
    assert f"contract.txt: {len(TEXT.strip()):,} tokens" in command("put", str(document))
    first = command("ask", "contract.txt", "Which law?", "--max-new-tokens", "4")
    assert re.search(r"1,119 of \d,\d+ tokens from the store", first)
    # A file is found by its text, whatever it was stored as.
    again = command("ask", str(document), "Which law?", "--max-new-tokens", "4")
    assert again.splitlines()[0] == first.splitlines()[0]
    assert "contract.txt" in command("ls") and "weights" in command("info", "contract.txt")
    assert "0 problems" in command("verify")
    (file, *_) = sorted((tmp_path / "db" / "segments").glob("*/layer-0001*"))
    data = bytearray(file.read_bytes())
    data[9000] ^= 1
    file.write_bytes(data)
    assert "layer 1" in command("verify", code=1)
    assert "Error: context 'contract.txt'" in command("ask", "contract.txt", "Which law?", code=2)
    command("rm", "contract.txt")
    assert "0 bytes stored" in command("gc")
    assert "neither a file nor a stored context" in command("ask", "contract.txt", "Which law?", code=2)


def test_a_new_file_is_stored_first(command, tmp_path):
    document = tmp_path / "other.txt"
    document.write_text(TEXT, encoding="utf-8")
    command("ask", str(document), "Which law?", "--max-new-tokens", "2")
    assert "other.txt" in command("ls")


def test_missing_file(command):
    assert "cannot be read" in command("put", "nowhere.txt", code=2)
