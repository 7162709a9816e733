"""One of the processes of the test of sharded evaluation: ``python -m tests.legal_process FOLDER [DEVICE]``."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

import eval.legal_command
from eval.__main__ import app
from tests.test_running import TASK, items, model, tokenizer

if __name__ == "__main__":
    torch.set_num_threads(1)
    network, words = model.__wrapped__(), tokenizer.__wrapped__()
    eval.legal_command.TASKS = {"words": replace(TASK, build=lambda *_, **__: items(2, 2))}

    def load(name, device="cpu"):
        print("device", device)
        return network.to(device), words

    eval.legal_command.load = load
    eval.legal_command.load_tokenizer = lambda name: words
    given = ["--tasks", "words", "--systems", "full,alaya", "--window", "4,16", "--lengths", "220", "--no-peers"]
    app(["legal", *given, "--device", *(sys.argv[2:] or ["cpu"]), "--output", sys.argv[1]])
