"""Peers: the compressed-cache loop against dense attention, the files between environments, servers and what they refuse."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError
from eval.legal.items import Item, Output, Task
from eval.peers import kvpress
from eval.peers.kvpress import KVPressSettings, PeerUnavailable, run_kvpress
from eval.peers.rows import cut
from eval.running.store import Results

LEGAL = Path(__file__).parents[2] / "shared" / "legal"
CONTEXT = "The Supplier shall deliver the Goods to the Buyer. Either party may terminate on notice of thirty days. "


def score(item: Item, output: Output) -> dict[str, float]:
    if output.logprobs:
        best = max(range(len(output.logprobs)), key=output.logprobs.__getitem__)
        return {"score": float(item.choices[best] == item.answers[0])}
    return {"score": float(output.text == item.answers[0])}


GENERATE = Task("tiny_generate", "generate", lambda *_, **__: [], score, "score", max_new_tokens=6, stop=("\n",))
CHOICES = Task("tiny_choices", "choices", lambda *_, **__: [], score, "score")
ITEMS = [
    Item("a/1", "a", CONTEXT, " Who?", (" Ohio",), (" Ohio", " the Buyer"), labels={"depth": 0.5}),
    Item("a/2", "a", CONTEXT, "", (" x",), (" x", " yes")),
    Item("b/1", "b", CONTEXT[::-1], " When?", (" now",), (" now", " never")),
]


class NoPress:
    """A press that keeps everything."""

    def __init__(self, compression_ratio: float = 0.0) -> None:
        self.compression_ratio = compression_ratio

    @contextlib.contextmanager
    def __call__(self, model: Any) -> Iterator[None]:
        yield


@pytest.fixture(scope="module")
def script() -> Any:
    """kvpress_run.py, imported over a stand-in for kvpress."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            sys.modules, "kvpress", types.SimpleNamespace(ExpectedAttentionPress=NoPress, SnapKVPress=NoPress)
        )
        spec = importlib.util.spec_from_file_location("kvpress_run", kvpress.SCRIPT)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def loaded(tiny) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny).eval(), AutoTokenizer.from_pretrained(tiny)


@torch.no_grad()
def dense_likelihood(model: Any, prompt: list[int], continuation: list[int]) -> float:
    logprobs = model(torch.tensor([[*prompt, *continuation]])).logits[0].log_softmax(dim=-1)[len(prompt) - 1 : -1]
    return float(sum(row[token] for row, token in zip(logprobs, continuation, strict=True)))


def dense_answer(model: Any, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, **cache_argument(DynamicCache())
    )
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


# kvpress --------------------------------------------------------------------------------------------------------------


@given(kept=st.integers(1, 200_000), context=st.integers(1, 200_000))
def test_the_compression_ratio_keeps_the_tokens_asked_for(script, kept, context):
    ratio = script.ratio(kept, context)
    assert 0 <= ratio < 1
    # kvpress 0.5.5, utils.compute_n_kept; a ratio of 0 leaves the cache alone.
    found = max(1, int(context * (1 - ratio))) if ratio else context
    assert found == min(kept, context)


@torch.no_grad()
def test_over_an_uncompressed_cache_answers_are_dense_attentions(script, loaded):
    model, tokenizer = loaded
    ids = tokenizer(CONTEXT).input_ids
    compressed = script.Compressed(model, tokenizer, NoPress(), ids, "cpu")
    # Twice: an answer must leave nothing behind.
    for question in (tokenizer(" Who?").input_ids, [], tokenizer(" Who?").input_ids):
        text, _, _ = compressed.generate(question, 6, ["\n\n\n"])
        assert text == dense_answer(model, tokenizer, [*ids, *question], 6)
        for words in (" Ohio", "x"):
            ending = tokenizer(words).input_ids
            expected = dense_likelihood(model, [*ids, *question], ending)
            assert compressed.likelihood(question, ending) == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def environment(tmp_path, monkeypatch, script) -> Path:
    """A cache folder whose environment is this process, with a kvpress that keeps everything."""
    home = tmp_path / f"kvpress-{kvpress.VERSION}"
    home.mkdir()
    (home / ".ready").write_text(f"{kvpress.TORCH}\n{kvpress.REQUIREMENTS.read_text()}")
    run = subprocess.run

    def inside(command: list[str], **kwargs: Any) -> Any:
        if not Path(command[0]).exists():
            # Isolated: otherwise eval/peers/kvpress.py would be imported as kvpress.
            assert command[:3] == [str(home / "bin" / "python"), "-I", str(kvpress.SCRIPT)]
            script.main(*command[3:])
            return subprocess.CompletedProcess(command, 0, "", "")
        return run(command, **kwargs)

    monkeypatch.setattr(kvpress.subprocess, "run", inside)
    return tmp_path


def test_items_go_out_and_rows_come_back(environment, tiny, loaded):
    model, tokenizer = loaded
    results = Results(environment / "results")
    settings = KVPressSettings(attended=40, cache_dir=environment)
    rows = run_kvpress(ITEMS, GENERATE, str(tiny), 128, ["snapkv"], results, settings)
    assert [(row["item"], row["system"]) for row in rows] == [(item.id, "snapkv") for item in ITEMS]
    for row, item in zip(rows, ITEMS, strict=True):
        prompt = tokenizer(item.context + item.question).input_ids
        answer = dense_answer(model, tokenizer, prompt, 6)
        assert row["answer"] == cut(answer, GENERATE.stop) and row["metrics"] == score(item, Output(row["answer"]))
        assert row["retrieval"] == {"attended": len(prompt), "context": len(prompt)}
        # 2 layers, 2 KV heads of dimension 16, keys and values in float32.
        assert row["device_bytes"] == row["full_bytes"] == len(item.context) * 2 * 2 * 16 * 2 * 4
    assert rows[0]["labels"] == {"depth": 0.5}
    assert list(results.rows()) == json.loads(json.dumps(rows))
    # All there: nothing is asked again.
    assert run_kvpress(ITEMS, GENERATE, str(tiny), 128, ["snapkv"], results, settings) == []


def test_likelihoods_come_back_for_choices(environment, tiny, loaded):
    model, tokenizer = loaded
    settings = KVPressSettings(attended=40, cache_dir=environment)
    rows = run_kvpress(
        ITEMS, CHOICES, str(tiny), 128, ["expected_attention"], Results(environment / "results"), settings
    )
    for row, item in zip(rows, ITEMS, strict=True):
        prompt = tokenizer(item.context + item.question).input_ids
        expected = [dense_likelihood(model, prompt, tokenizer(choice).input_ids) for choice in item.choices]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)


def test_the_budget_follows_a_system_and_leaves_room_for_the_question(tmp_path, loaded):
    results = Results(tmp_path)
    key = {"model": "m", "task": "t", "length": 8, "system": "alaya"}
    for attended in (300.0, 311.0):
        results.add({**key, "item": str(attended), "retrieval": {"attended": attended}})
    results.add({**key, "item": "x", "system": "topk", "retrieval": {"attended": 999.0}})
    assert KVPressSettings().budget(results, "m", "t", 8) == 306
    with pytest.raises(PeerUnavailable, match="no result of alaya .* at 9 tokens"):
        KVPressSettings().budget(results, "m", "t", 9)
    kvpress.export_items(ITEMS, GENERATE, loaded[1], 60, tmp_path / "documents.jsonl")
    kept = [json.loads(line)["kept"] for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    # Questions of 5 and 0 bytes over the first document, of 6 over the second.
    assert kept == [58, 54]


def test_what_keeps_kvpress_from_running_is_said(environment, tiny, monkeypatch, tmp_path):
    settings = KVPressSettings(attended=40, cache_dir=environment)
    results = Results(tmp_path / "results")
    python = environment / f"kvpress-{kvpress.VERSION}" / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 'RuntimeError: no such model' >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(PeerUnavailable, match="failed: RuntimeError: no such model"):
        run_kvpress(ITEMS, GENERATE, str(tiny), 128, ["snapkv"], results, settings)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(PeerUnavailable, match="cannot build the environment"):
        run_kvpress(ITEMS, GENERATE, str(tiny), 128, ["snapkv"], results, KVPressSettings(40, cache_dir=tmp_path / "c"))
    short = [Item("c/1", "c", "Too short.", " Who?", ("x",))]
    with pytest.raises(PeerUnavailable, match="observation window"):
        kvpress.export_items(short, GENERATE, AutoTokenizer.from_pretrained(tiny), 40, tmp_path / "documents.jsonl")
    with pytest.raises(ValueError, match="unknown press quest"):
        run_kvpress(ITEMS, GENERATE, str(tiny), 128, ["quest"], results, settings)
    assert list(results.rows()) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" 7391\nNext", "7391"), ("\n\n7391. And", "7391"), ("7391", "7391"), ("\n ", ""), (".x", "")],
)
def test_an_answer_ends_at_the_first_stop_string_after_it_began(text, expected):
    assert cut(text, ("\n", ".")) == expected


# Servers --------------------------------------------------------------------------------------------------------------

pytest.importorskip("requests", reason="needs requests")

from eval.peers.openai_api import CompletionsServer  # noqa: E402
from eval.peers.openai_rows import run_openai  # noqa: E402


def logprob(place: int, token: int) -> float:
    """What the stub claims about token ``token`` at place ``place``."""
    return -((place * 31 + token * 17) % 23 + 1) / 10


class Stub(ThreadingHTTPServer):
    """A completions server that always answers " Ohio\\n...", with or without log-probabilities of prompts."""

    def __init__(self, echoes: bool) -> None:
        self.echoes, self.requests = echoes, []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/completions"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        if self.path != "/v1/completions":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        if body.get("stream"):
            for piece in (" Oh", "io", "\nmore"):
                self._event({"choices": [{"text": piece}]})
            self._event({"choices": [], "usage": {"completion_tokens": 4}})
            self.wfile.write(b"data: [DONE]\n\n")
            return
        choice: dict[str, Any] = {"index": 0, "text": "x"}
        if body.get("echo") and self.server.echoes:
            prompt = body["prompt"]
            ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
            values = [None, *(logprob(place, token) for place, token in enumerate(ids) if place), -9.0]
            choice["logprobs"] = {"token_logprobs": values}
        elif body.get("logprobs"):
            choice["logprobs"] = {"token_logprobs": [-9.0]}
        self.wfile.write(json.dumps({"choices": [choice]}).encode())

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(data)}\n\n".encode())


@pytest.fixture
def stub() -> Iterator[Any]:
    """Starts stub servers, ends them after the test."""
    started = []

    def start(echoes: bool) -> Stub:
        server = Stub(echoes)
        started.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_a_server_gets_the_prompt_and_its_answer_becomes_a_row(stub, loaded, tmp_path):
    server, tokenizer = stub(False), loaded[1]
    results = Results(tmp_path)
    for encoder in (tokenizer, None):
        system = "vllm" if encoder else "sglang"
        rows = run_openai(
            ITEMS, GENERATE, "m", 128, system, CompletionsServer(server.url, "served"), results, "an H100", encoder
        )
        asked = server.requests[-3:]
        texts = [item.context + item.question for item in ITEMS]
        assert [body["prompt"] for body in asked] == [encoder(text).input_ids if encoder else text for text in texts]
        assert {(body["model"], body["temperature"], body["max_tokens"], *body["stop"]) for body in asked} == {
            ("served", 0, 6, "\n")
        }
        assert [row["answer"] for row in rows] == ["Ohio"] * 3
        assert all(row["system"] == system and row["hardware"] == "an H100" for row in rows)
        assert all(0 <= row["seconds_per_token"] < 10 and "device_bytes" not in row for row in rows)
    assert len(list(results.rows())) == 6
    # All there: nothing is asked again.
    client = CompletionsServer(server.url, "served")
    assert run_openai(ITEMS, GENERATE, "m", 128, "vllm", client, results, "an H100") == []
    assert len(server.requests) == 6


def test_choices_are_scored_by_the_servers_log_probabilities(stub, loaded, tmp_path):
    server, tokenizer = stub(True), loaded[1]
    client = CompletionsServer(server.url, "m")
    rows = run_openai(ITEMS, CHOICES, "m", 128, "lmcache", client, Results(tmp_path), "an H100", tokenizer)
    for row, item in zip(rows, ITEMS, strict=True):
        begins = len(tokenizer(item.context + item.question).input_ids)
        endings = [tokenizer(choice).input_ids for choice in item.choices]
        expected = [sum(logprob(begins + i, token) for i, token in enumerate(ids)) for ids in endings]
        assert row["logprobs"] == pytest.approx(expected)


def test_likelihood_tasks_are_refused_where_no_likelihoods_are(stub, loaded, tmp_path):
    client, results = CompletionsServer(stub(False).url, "m"), Results(tmp_path)
    with pytest.raises(ConfigError, match="tiny_choices needs log-probabilities"):
        run_openai(ITEMS, CHOICES, "m", 128, "vllm", client, results, "an H100", loaded[1])
    with pytest.raises(ConfigError, match="Pass the model's tokenizer"):
        run_openai(ITEMS, CHOICES, "m", 128, "vllm", client, results, "an H100")
    with pytest.raises(ConfigError, match="unknown system 'alaya'"):
        run_openai(ITEMS, GENERATE, "m", 128, "alaya", client, results, "an H100")
    assert list(results.rows()) == []


def test_a_server_that_is_not_there_or_fails_is_named(stub, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1/completions"
    with pytest.raises(ConnectionError, match="Start the server first"):
        CompletionsServer(url, "m").complete("text", 1)
    wrong = stub(True).url.replace("completions", "nothing")
    with pytest.raises(ConnectionError, match="answered 404"):
        CompletionsServer(wrong, "m").complete("text", 1)


def test_the_harness_asks_a_server_before_it_runs_likelihood_tasks(stub):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm_eval[hf,api]==0.4.13'")
    from eval.harness import require_prompt_logprobs

    tasks = {"writes": "generate_until", "compares": "multiple_choice", "reads": "loglikelihood_rolling"}
    without, having = stub(False), stub(True)
    with pytest.raises(ConfigError, match="the tasks compares, reads need log-probabilities"):
        require_prompt_logprobs("local-completions", tasks, {"base_url": without.url, "model": "m"})
    require_prompt_logprobs("local-completions", tasks, {"base_url": having.url, "model": "m"})
    require_prompt_logprobs("hf", tasks)
    with pytest.raises(ConfigError, match="a chat endpoint"):
        require_prompt_logprobs("local-chat-completions", tasks, {"base_url": having.url})
    require_prompt_logprobs("local-chat-completions", {"writes": "generate_until"}, {"base_url": having.url})
    assert [len(without.requests), len(having.requests)] == [1, 1]


@pytest.fixture(scope="module")
def served(tiny) -> Iterator[str]:
    """``transformers serve`` with the tiny model; its completions endpoint."""
    pytest.importorskip("fastapi", reason="needs pip install 'transformers[serving]'")
    pytest.importorskip("uvicorn", reason="needs pip install 'transformers[serving]'")
    pytest.importorskip("openai", reason="needs pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(tiny)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            assert server.poll() is None, "transformers serve ended by itself"
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1/completions"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_transformers_serve_answers_as_the_model_does(served, tiny, loaded, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm_eval[hf,api]==0.4.13'")
    from eval.harness import main

    client = CompletionsServer(served, str(tiny))
    prompts = [item.context + item.question for item in ITEMS]
    expected = [dense_answer(*loaded, loaded[1](prompt).input_ids, 6) for prompt in prompts]
    rows = run_openai(ITEMS, GENERATE, "tiny", 128, "transformers_serve", client, Results(tmp_path / "rows"), "a CPU")
    assert [row["answer"] for row in rows] == [cut(text, GENERATE.stop) for text in expected]

    documents = [{"prompt": prompt} for prompt in prompts]
    (tmp_path / "rows.py").write_text(
        f"import datasets\n\n\ndef rows(**_):\n    return {{'test': datasets.Dataset.from_list({documents!r})}}\n"
    )
    common = 'custom_dataset: !function rows.rows\ntest_split: test\ndoc_to_text: "{{prompt}}"\n'
    (tmp_path / "writes.yaml").write_text(
        f"task: tiny_writes\n{common}output_type: generate_until\ndoc_to_target: Ohio\n"
        'generation_kwargs: {until: ["\\n\\n\\n"], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n'
    )
    (tmp_path / "compares.yaml").write_text(
        f'task: tiny_compares\n{common}output_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: [" a", " b"]\n'
    )
    arguments = f"model={tiny},base_url={served},tokenized_requests=False"
    common = ["--model", "local-completions", "--model_args", arguments, "--include_path", str(tmp_path)]
    with pytest.raises(ConfigError, match="the tasks tiny_compares need log-probabilities"):
        main([*common, "--tasks", "tiny_compares,tiny_writes"])
    main([*common, "--tasks", "tiny_writes", "--log_samples", "--output_path", str(tmp_path / "out")])
    lines = next((tmp_path / "out").rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    assert [sample["resps"][0][0] for sample in samples] == expected


@pytest.mark.slow
def test_a_legal_task_runs_against_transformers_serve(served, tiny, loaded, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm_eval[hf,api]==0.4.13'")
    if not LEGAL.is_dir():
        pytest.skip("needs the legal data of ../shared/legal")
    from eval.harness import main
    from eval.legal import TASKS, Source

    arguments = f"model={tiny},base_url={served},tokenized_requests=False"
    metadata = json.dumps({"data_dir": str(LEGAL), "length": 1500, "items": 2, "tokenizer": str(tiny)})
    command = ["--model", "local-completions", "--model_args", arguments, "--tasks", "legal_needle_single"]
    main([*command, "--metadata", metadata, "--log_samples", "--output_path", str(tmp_path)])
    lines = next(tmp_path.rglob("samples_*.jsonl")).read_text().splitlines()
    samples = {sample["doc"]["id"]: sample for sample in map(json.loads, lines)}
    task = TASKS["legal_needle_single"]
    items = task.build(Source(LEGAL), loaded[1], 1500, items=2)
    assert len(samples) == len(items) == 2
    for item in items:
        prompt = loaded[1](item.context + item.question).input_ids
        answer = cut(dense_answer(*loaded, prompt, task.max_new_tokens), task.stop)
        assert cut(samples[item.id]["resps"][0][0], task.stop) == answer
        assert samples[item.id]["score"] == task.score(item, Output(text=answer))["score"]
