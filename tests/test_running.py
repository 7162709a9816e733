"""The evaluation's runner: answers, resuming, budgets; on a small random model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache

pytest.importorskip("datasets", reason="the evaluation needs the extra 'eval'")

from alaya_hf import AlayaCache, AlayaConfig, TopK
from alaya_hf.cache_argument import cache_argument
from alaya_hf.errors import ConfigError, UnsupportedModelError
from eval.ablate import settings_of, write_tidy
from eval.legal import Item, Task
from eval.legal_command import take_shard
from eval.running.answer import Decoder, Reader, draft, verify
from eval.running.run import Runner
from eval.running.store import Results, ResultsError, read
from eval.systems import Context, System

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<unk>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def words(count: int, seed: int) -> str:
    picks = torch.randint(len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in picks)


def items(documents: int = 2, questions: int = 3) -> list[Item]:
    found = []
    for d in range(documents):
        context = words(200, d)
        for q in range(questions):
            start = context.index(" ", 100 * q) + 1
            spans = ((start, context.index(" ", start + 20)),)
            found.append(Item(f"{d}/{q}", str(d), context, " " + words(5, 100 + q), ("w1",), spans=spans))
    return found


def build(*_, **__):
    raise AssertionError("not used")


TASK = Task("words", "generate", build, lambda item, out: {"length": len(out.text) / 100}, "length", max_new_tokens=9)
SYSTEMS = [
    System.named(name, (4, 16), matched=True)
    for name in (
        "full",
        "streaming_llm",
        "infllm",
        "quest",
        "topk",
        "alaya",
        "alaya_block_means",
        "retrieval_attention",
    )
]


def runner(model, tokenizer, folder, **options) -> Runner:
    return Runner(model, tokenizer, "tiny", SYSTEMS, Results(folder), (4, 16), "alaya", **options)


@pytest.mark.parametrize(
    "name",
    # optimum-quanto compiles an extension the first time
    ["alaya", "topk", "streaming_llm", "full", pytest.param("quantized_cache", marks=pytest.mark.slow)],
)
def test_verified_answer_is_the_greedy_answer(model, tokenizer, name):
    """One pass over the draft, then going on alone, gives what decoding token by token gives."""
    if name == "quantized_cache":
        pytest.importorskip("optimum.quanto", reason="Transformers' quantised cache needs optimum-quanto")
    differs = 0
    for item in items(2, 3):
        ids = tokenizer(item.context + item.question, return_tensors="pt").input_ids
        split = ids.shape[1] - 5
        context = Context(model, ids[:, :split], (4, 16))
        *head, last = ids[0, split:].tolist()
        decoder = Decoder(tokenizer, TASK)
        full = Reader(model, System("full").cache(context))
        full.read(head)
        reference = draft(full, decoder, item, last)
        system = System.named(name, (4, 16))
        if name == "topk":
            system = dataclasses.replace(system, settings=system.settings.replace(query=TopK(2)))
        reader = Reader(model, system.cache(context))
        reader.read(head)
        answer = verify(reader, decoder, item, last, reference)

        cache = system.cache(context)
        with torch.no_grad():
            model(input_ids=torch.tensor([head]), **cache_argument(cache))
            token, expected = last, []
            while not decoder.finished(expected):
                logits = model(input_ids=torch.tensor([[token]]), **cache_argument(cache)).logits[0, -1]
                token = int(logits.argmax())
                expected.append(token)
        assert answer.output.text == decoder.text(expected)
        differs += answer.output.text != reference.output.text
    # Otherwise the way past the first disagreement was never taken.
    assert differs or name in ("alaya", "full", "quantized_cache")


def test_reference_is_dense_generation(model, tokenizer):
    item = items(1, 1)[0]
    ids = tokenizer(item.context + item.question, return_tensors="pt").input_ids
    context = Context(model, ids[:, :-3], (4, 16))
    full = Reader(model, System("full").cache(context))
    *head, last = ids[0, -3:].tolist()
    full.read(head)
    decoder = Decoder(tokenizer, TASK)
    found = draft(full, decoder, item, last).scored[0]
    expected = model.generate(ids, **cache_argument(DynamicCache()), max_new_tokens=9, do_sample=False, pad_token_id=0)
    assert found.ids == expected[0, ids.shape[1] :].tolist()[: len(found.ids)]


def test_interrupted_run_loses_and_repeats_nothing(model, tokenizer, tmp_path):
    whole = runner(model, tokenizer, tmp_path / "whole")
    whole.run(TASK, 200, items())
    expected = {(row["system"], row["item"]): row for row in whole.results.rows()}
    assert len(expected) == len(SYSTEMS) * 6

    class Interrupted(Exception):
        pass

    for stop in (1, 9, 20):
        steps = iter(range(1000))

        def interrupt(stop=stop, steps=steps):
            if next(steps) == stop:
                raise Interrupted

        with pytest.raises(Interrupted):
            runner(model, tokenizer, tmp_path / "parts", on_row=interrupt).run(TASK, 200, items())
        # The machine went down in the middle of a write.
        with (tmp_path / "parts" / "rows.jsonl").open("a") as handle:
            handle.write('{"model": "tiny", "task"')
    runner(model, tokenizer, tmp_path / "parts").run(TASK, 200, items())
    rows = list(Results(tmp_path / "parts").rows())
    assert len(rows) == len(expected)
    for row in rows:
        other = expected[row["system"], row["item"]]
        assert row["answer"] == other["answer"]
        assert row["retrieval"] == pytest.approx(other["retrieval"])


def test_rows_say_what_was_attended(model, tokenizer, tmp_path):
    run = runner(model, tokenizer, tmp_path)
    run.run(TASK, 200, items())
    rows = list(run.results.rows())
    by = {name: [row for row in rows if row["system"] == name] for name in {row["system"] for row in rows}}
    mean = {name: sum(r["retrieval"]["attended"] for r in rows) / len(rows) for name, rows in by.items()}
    assert all(row["retrieval"]["evidence_recall"] == 1 for row in by["full"])
    # Matched systems attend to as many tokens as the one they follow, up to a block.
    for ours, *others in zip(*(by[name] for name in ("alaya", "topk", "streaming_llm", "quest")), strict=True):
        for other, slack in zip(others, (0.51, 0.51, 16), strict=True):
            difference = other["retrieval"]["attended"] - ours["retrieval"]["attended"]
            assert abs(difference) <= slack, (other["system"], other["item"])
    assert mean["full"] > mean["alaya"]
    for row in rows:
        assert 0 <= row["retrieval"]["evidence_recall"] <= row["retrieval"]["evidence_coverage"] <= 1
        assert ("fidelity" in row) == (row["system"] != "full")
        assert row["device_bytes"] <= row["full_bytes"]
    closer = sum(row["fidelity"]["kl"] for row in by["alaya"])
    assert closer < sum(row["fidelity"]["kl"] for row in by["streaming_llm"])


def test_a_prefill_taken_over_answers_like_ones_own(model, tokenizer, tmp_path):
    systems = [System.named(name, (4, 16)) for name in ("alaya", "topk", "full")]
    rows = []
    for name, other in (("own", None), ("taken", model)):
        results = Results(tmp_path / name)
        Runner(model, tokenizer, "tiny", systems, results, (4, 16), timing=False, prefill_model=other).run(
            TASK, 200, items(1, 2)
        )
        rows.append(list(results.rows()))
    for own, taken in zip(*rows, strict=True):
        assert own["answer"] == taken["answer"]
        assert own["retrieval"] == pytest.approx(taken["retrieval"])


def test_answers_not_completed_are_not_scored(model, tokenizer, tmp_path):
    run = runner(model, tokenizer, tmp_path, answers=["alaya"])
    run.run(TASK, 200, items(1, 2))
    for row in run.results.rows():
        known = row["system"] in ("alaya", "full")
        assert bool(row["metrics"]) == known and (row["answer"] is None) != known
        assert known or row["fidelity"]["steps"]


def test_only_caches_of_every_token_are_taken_over(model):
    with pytest.raises(UnsupportedModelError, match="StaticLayer"):
        AlayaCache.from_cache(StaticCache(config=model.config, max_cache_len=32))
    with pytest.raises(UnsupportedModelError, match="without keys"):
        AlayaCache.from_cache(DynamicCache(config=model.config))


def test_settings_of_a_folder_cannot_change(tmp_path):
    Results(tmp_path).begin({"config": {"items": 60, "window": (4, 16)}})
    Results(tmp_path).begin({"config": {"items": 60, "window": [4, 16]}})
    Results(tmp_path).begin({"config": {"items": 60, "window": [4, 16], "systems": ["full"]}, "command": "more"})
    assert json.loads((tmp_path / "run.json").read_text())["later_runs"][0]["command"] == "more"
    with pytest.raises(ResultsError, match="items differ"):
        Results(tmp_path).begin({"config": {"items": 61, "window": (4, 16)}})


@given(
    st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none(), max_size=3)), st.integers(0)
)
@settings(max_examples=40, deadline=None)
def test_rows_survive_a_cut_anywhere(tmp_path_factory, rows, cut):
    folder = tmp_path_factory.mktemp("rows")
    results = Results(folder)
    for row in rows:
        results.add(row)
    assert list(read(folder, "rows")) == rows
    path = folder / "rows.jsonl"
    data = path.read_bytes() if path.exists() else b""
    path.write_bytes(data[: cut % (len(data) + 1)])
    results = Results(folder)
    left = list(results.rows())
    assert left == rows[: len(left)]
    results.add({"new": 1})
    assert list(results.rows()) == [*left, {"new": 1}]


def test_corrupt_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": \n{"c": 1}\n')
    with pytest.raises(ResultsError, match="line 2"):
        list(read(tmp_path, "rows"))


def test_unknown_system_is_refused():
    with pytest.raises(ConfigError, match="unknown system 'alya'"):
        System.named("alya")


def test_shards_part_the_documents():
    work = [(TASK, 200, items(5, 2)), (TASK, 400, items(4, 3))]
    parts = [take_shard(work, rank, 3) for rank in range(3)]
    documents = [[(length, item.document) for _, length, items in part for item in items] for part in parts]
    assert sorted(sum(documents, [])) == sorted((length, i.document) for _, length, items in work for i in items)
    assert not set(documents[0]) & set(documents[1]) and not set(documents[1]) & set(documents[2])
    assert [len(set(part)) for part in documents] == [3, 3, 3]


def test_ablation_sweeps_every_combination(model, tokenizer, tmp_path):
    config = {
        "base": "alaya", "window": [4, 16],
        "sweep": {"query.beta": [5, 50], "index": ["flat", "quantized"], "layers.0.index": ["flat"]},
    }  # fmt: skip
    systems = settings_of(config)
    assert len({system.name for system in systems}) == 4
    assert {system.settings.for_layer(0).index.kind for system in systems} == {"flat"}
    assert {system.settings.for_layer(1).index.kind for system in systems} == {"flat", "quantized"}
    results = Results(tmp_path)
    Runner(model, tokenizer, "tiny", systems, results, (4, 16)).run(TASK, 200, items(1, 2))
    write_tidy(results, tmp_path / "tidy.csv")
    lines = (tmp_path / "tidy.csv").read_text().splitlines()
    header = lines[0].split(",")
    assert header[:3] == ["query.beta", "index", "layers.0.index"]
    # Two layers and the whole, for every setting; recovery is measured on a document's first item.
    recall = [line for line in lines if ",recovery," in line]
    assert len(recall) == 4 * 1 * 3
    wider = {row["setting"]["query.beta"]: row["retrieval"]["retrieved"] for row in results.rows()}
    assert wider[50] > wider[5]
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["setting"]["query.beta"] == 5


def test_ablation_refuses_unknown_fields():
    with pytest.raises(ConfigError, match="betta"):
        settings_of({"base": "alaya", "window": [4, 16], "sweep": {"query.betta": [1]}})


def test_preset_windows_are_replaced():
    assert System.named("infllm", (4, 16)).settings.window.local == 16
    assert AlayaConfig.preset("infllm").window.local == 4096
