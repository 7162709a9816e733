"""The harness model: against lm_eval's own ``hf``, request by request, and what it refuses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install 'lm_eval[hf,api]==0.4.13'")

import datasets
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from alaya_hf.errors import ConfigError
from eval.harness import main
from eval.harness.model import AlayaLM

CLAUSES = "The Supplier shall deliver the Goods. Either party may terminate on notice. Governing law: Ohio. "
#: Little stays in the window of a context of two hundred tokens, so the store is asked.
SMALL = {
    "alaya.min_context": 0,
    "alaya.window.init": 4,
    "alaya.window.local": 16,
    "alaya.window.overflow": 8,
}
DOCUMENTS = [{"text": CLAUSES * 2 + "abcdefg"[: 2 * i], "label": i % 2} for i in range(3)]
GENERATE = {
    "task": "tiny_generate",
    "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCUMENTS)},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{text}} Law:",
    "doc_to_target": "Ohio",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12},
    "metric_list": [{"metric": "exact_match"}],
}
CHOICES = {
    "task": "tiny_choices",
    "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(DOCUMENTS)},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}} Law:",
    "doc_to_target": "label",
    "doc_to_choice": [" Ohio", " x", " the state of New York"],
}


def evaluated(model: str, task: dict, args: dict) -> list:
    """The model's raw answers to a task's documents, in order."""
    results = simple_evaluate(
        model=model,
        model_args={"device": "cpu", "dtype": "float32", **args},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(results["samples"][task["task"]], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for responses in sample["resps"] for response in responses]


@pytest.fixture(scope="module")
def models(tiny):
    """AlayaLM over the tiny model with given arguments, loaded once per arguments."""
    loaded: dict[str, AlayaLM] = {}

    def get(**args) -> AlayaLM:
        key = json.dumps(args, sort_keys=True)
        if key not in loaded:
            loaded[key] = AlayaLM(pretrained=str(tiny), device="cpu", dtype="float32", **args)
        return loaded[key]

    return get


def requests(kind: str, *pairs) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]


def likelihoods(model, *pairs) -> list[float]:
    return [value for value, _ in model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)]


def test_generation_over_the_full_preset_is_that_of_hf(tiny):
    own = evaluated("alaya", GENERATE, {"pretrained": str(tiny), "preset": "full", **SMALL})
    stock = evaluated("hf", GENERATE, {"pretrained": str(tiny)})
    assert own == stock and any(own)


@pytest.mark.parametrize("tokens_per_pass", [1, 5])
def test_likelihoods_over_the_full_preset_are_those_of_hf(tiny, tokens_per_pass):
    args = {"pretrained": str(tiny), "preset": "full", "tokens_per_pass": tokens_per_pass, **SMALL}
    own, stock = evaluated("alaya", CHOICES, args), evaluated("hf", CHOICES, {"pretrained": str(tiny)})
    assert [value for value, _ in own] == pytest.approx([value for value, _ in stock], abs=1e-3)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in stock]


def test_a_context_longer_than_the_model_is_cut_as_hf_cuts_it(tiny, models):
    pairs = [(CLAUSES * 3, " Ohio"), (CLAUSES * 3, " x")]
    stock = HFLM(pretrained=str(tiny), device="cpu", dtype="float32", max_length=90)
    own = models(preset="full", max_length=90, **SMALL)
    assert likelihoods(own, *pairs) == pytest.approx(likelihoods(stock, *pairs), abs=1e-3)


def test_rolling_likelihoods_over_the_full_preset_are_those_of_hf(tiny, models):
    texts = requests("loglikelihood_rolling", (CLAUSES,), (CLAUSES[:50],))
    stock = HFLM(pretrained=str(tiny), device="cpu", dtype="float32", max_length=70)
    own = models(preset="full", max_length=70, tokens_per_pass=32, **SMALL)
    expected = stock.loglikelihood_rolling(texts, disable_tqdm=True)
    assert own.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)


def test_even_one_token_continuations_are_answered_sparsely(models):
    pair = (CLAUSES * 2, "x")
    exact, window_only = models(preset="full", **SMALL), models(preset="streaming_llm", **SMALL)
    assert abs(likelihoods(exact, pair)[0] - likelihoods(window_only, pair)[0]) > 1e-4


def test_every_request_has_a_fresh_cache(models):
    model = models(preset="streaming_llm", **SMALL)
    prompts = [CLAUSES * 2 + "one", CLAUSES, CLAUSES * 2 + "one"]
    asked = requests("generate_until", *((prompt, {"until": ["\n\n"], "max_gen_toks": 12}) for prompt in prompts))
    answers = model.generate_until(asked, disable_tqdm=True)
    alone = [model.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert answers[0] == answers[2] and answers == alone


def test_requests_that_share_a_prefill_answer_as_if_alone(models):
    model = models(preset="streaming_llm", **SMALL)
    pairs = [(CLAUSES * 2, " Ohio and Kentucky"), (CLAUSES, " x"), (CLAUSES * 2, " x"), (CLAUSES * 2, " Ohio")]
    together = likelihoods(model, *pairs)
    assert together == pytest.approx([likelihoods(model, pair)[0] for pair in pairs], abs=1e-4)
    # Chain rule: the shorter continuation is the beginning of the longer one.
    rest = likelihoods(model, (CLAUSES * 2 + " Ohio", " and Kentucky"))[0]
    assert together[0] < together[3] and together[0] - together[3] == pytest.approx(rest, rel=0.1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"preset": "nonsense"}, "unknown preset 'nonsense'"),
        ({"config": "nowhere.yaml"}, "config=nowhere.yaml is no file"),
        ({"preset": "full", "config": "x.yaml"}, "got both"),
        ({"alaya.nonsense": 1}, "unknown configuration key 'nonsense'"),
        ({"alaya.window.local": 0}, "window.local"),
        ({"alaya.query.alpha": "much"}, "alpha"),
        ({"batch_size": 2}, "batch_size=2"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"backend": "seq2seq"}, "backend=seq2seq"),
        ({"tokens_per_pass": 65}, "from 1 to 64"),
        ({"tokens_per_pass": 0}, "from 1 to 64"),
    ],
)
def test_bad_arguments_are_refused_before_the_model_is_loaded(args, message, monkeypatch):
    monkeypatch.setattr(HFLM, "__init__", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=message):
        AlayaLM.create_from_arg_obj({"pretrained": "any", **args}, {"device": "cpu"})


def test_a_yaml_file_gives_the_settings(tmp_path, tiny):
    path = tmp_path / "own.yaml"
    path.write_text("query: {kind: topk, k: 7}\nindex: flat\nresidual: none\nwindow: {init: 4, local: 16}\n")
    model = AlayaLM(pretrained=str(tiny), device="cpu", config=str(path), **{"alaya.query.k": 9})
    assert (model.settings.query.k, model.settings.window.local) == (9, 16)
    assert model.get_model_info()["alaya"]["query"]["k"] == 9


@pytest.mark.slow  # lm_eval reads every task file it has
def test_the_command_line_runs_a_task_of_ours(tiny, tmp_path, capsys):
    (tmp_path / "rows.py").write_text(
        f"import datasets\n\n\ndef rows(**_):\n    return {{'test': datasets.Dataset.from_list({DOCUMENTS[:1]!r})}}\n"
    )
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_cli\ncustom_dataset: !function rows.rows\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{text}} Law:"\ndoc_to_target: label\ndoc_to_choice: [" Ohio", " x"]\n'
    )
    arguments = f"pretrained={tiny},preset=topk,alaya.min_context=0,alaya.query.k=3,alaya.window.local=16"
    main(
        ["--model", "alaya", "--model_args", arguments, "--tasks", "tiny_cli", "--include_path", str(tmp_path)]
        + ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    )
    assert "|tiny_cli|" in capsys.readouterr().out
    stored = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert stored["config"]["alaya"]["query"] == {"kind": "topk", "k": 3}
