"""Legal tasks: spans through every cut, prompts within their length, readable data errors, and the harness's files."""

from __future__ import annotations

import gzip
import json
import logging
import zipfile
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eval.legal import TASKS, DataError, Item, MissingData, Output, Source, sources, with_chat
from eval.legal.text import (
    GAP,
    Encoder,
    Passage,
    Span,
    excerpt,
    fitted,
    join,
    surround,
    token_spans,
    truncate,
    truncate_middle,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "legal"
YAMLS = ROOT / "eval" / "tasks"
LENGTH = 1024
VOCABULARY = (
    "party shall agreement the of to and in any other license term notice services product payment under this such by "
    "for with written Seller Buyer affiliate days information right obligation “confidential” § naïve"
).split()

CLAUSES = {
    "Parties": "Alpha {n} Corporation",
    "Agreement Date": "March {n}, 2019",
    "Governing Law": "This Agreement shall be governed by the laws of the State of Number {n}.",
    "Expiration Date": "This Agreement ends {n} years after its effective date.",
    "Audit Rights": "Party {n} may audit the books of the other once a year.",
    "Insurance": "Party {n} shall keep liability insurance of {n} million dollars.",
    "Anti-Assignment": "Neither party may assign this Agreement without the consent of party {n}.",
}


def _sentences(rng: Random, count: int) -> list[str]:
    return [" ".join(rng.choices(VOCABULARY, k=rng.randint(6, 20))).capitalize() + "." for _ in range(count)]


def _contract(number: int) -> dict:
    rng = Random(number)
    name = f"SUPPLY AGREEMENT {number}"
    parts = [name, *_sentences(rng, 20 + 40 * (number % 3))]
    clauses = {category: text.format(n=number + 1) for category, text in CLAUSES.items()}
    for clause in clauses.values():
        parts.insert(rng.randint(1, len(parts)), clause)
    text = "\n".join(parts)
    labels = {"Document Name": {"clauses": [name], "answer": name, "spans": [[0, len(name)]]}}
    for category, clause in clauses.items():
        at = text.index(clause)
        labels[category] = {"clauses": [clause], "answer": clause, "spans": [[at, at + len(clause)]]}
    return {"id": f"FILER{number}_2020_EX-1_Supply", "text": text, "labels": labels}


def _nda(number: int) -> dict:
    rng = Random(number)
    text, spans = "", []
    for sentence in _sentences(rng, 20):
        spans.append([len(text), len(text) + len(sentence)])
        text += sentence + "\n"
    choices = ["Entailment", "Contradiction", "NotMentioned"]
    marks = {
        f"nda-{k}": {"choice": choices[k % 3], "spans": [] if k % 3 == 2 else [rng.randrange(20)]} for k in range(9)
    }
    return {"id": number, "text": text, "spans": spans, "annotation_sets": [{"annotations": marks}]}


LONGBENCH = [
    {
        "_id": f"q{n}",
        "domain": "Single-Document QA",
        "sub_domain": sub_domain,
        "question": "Which party pays?",
        **{f"choice_{letter}": f"party {letter}" for letter in "ABCD"},
        "answer": "C",
        "context": " ".join(_sentences(Random(n), 400)),
    }
    for n, sub_domain in enumerate(("Legal", "Financial", "Legal"))
]
LEXSUM = [
    {
        "case_id": f"c{n}",
        "case_documents": [f"c{n}-1", f"c{n}-2"],
        "summary/long": "It went on for long.",
        "summary/short": "The court dismissed the case." if n else None,
        "summary/tiny": "Case dismissed.",
    }
    for n in range(2)
]
LEXSUM_SOURCES = {
    name: {"doc_text": " ".join(_sentences(Random(name), 200))} for row in LEXSUM for name in row["case_documents"]
}
NLI = {
    "documents": [_nda(number) for number in range(12)],
    "labels": {f"nda-{k}": {"hypothesis": f"Statement {k} holds."} for k in range(9)},
}
CONTRACTS = [_contract(number) for number in range(24)]
LEVAL = [
    {
        "input": contract["text"],
        "instructions": [f'Highlight the parts related to "{key}".' for key in ("Governing Law", "Insurance")],
        "outputs": [contract["labels"][key]["clauses"][0] for key in ("Governing Law", "Insurance")],
    }
    for contract in CONTRACTS[:4]
]


def _write(path: Path, rows: list) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a small data set of every kind."""
    folder = tmp_path_factory.mktemp("legal")
    _write(folder / "cuad.jsonl.gz", CONTRACTS)
    _write(folder / "leval_legal_contract_qa.jsonl.gz", LEVAL)
    _write(folder / "longbench_v2_legal.jsonl.gz", [row for row in LONGBENCH if row["sub_domain"] == "Legal"])
    cases = [
        {**row, "id": row["case_id"], "sources": [LEXSUM_SOURCES[name]["doc_text"] for name in row["case_documents"]]}
        for row in LEXSUM
    ]
    _write(folder / "multi_lexsum.jsonl.gz", cases)
    (folder / "contract_nli_test.json").write_text(json.dumps(NLI), encoding="utf-8")
    return folder


def _bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a first token of its own, learned from the contracts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((contract["text"] for contract in CONTRACTS), trainer)
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


TOKENIZER = _bpe()
ENCODER = Encoder(TOKENIZER)


def _build(name: str, folder: Path, length: int = LENGTH, **arguments) -> list[Item]:
    return TASKS[name].build(Source(folder), TOKENIZER, length, **arguments)


# Text and spans -------------------------------------------------------------------------------------------------------

TEXT = st.lists(st.sampled_from([*VOCABULARY, "\n", "—", "\u2003", "…"]), min_size=30, max_size=200).map(" ".join)


@st.composite
def passages(draw):
    text = draw(TEXT)
    spans = draw(st.lists(st.tuples(st.integers(0, len(text) - 1), st.integers(1, 25)), min_size=1, max_size=4))
    return Passage(text, tuple(Span(s, min(s + n, len(text)), str(i)) for i, (s, n) in enumerate(spans)))


def _marked(passage: Passage) -> dict[str, str]:
    return {key: passage.text[start:end] for start, end, key in passage.spans}


@given(passages(), passages(), st.data())
def test_spans_mark_the_same_text_after_slicing_and_joining(first, second, data):
    both = join([first, "header", second], "\n\n")
    assert both.text == f"{first.text}\n\nheader\n\n{second.text}"
    texts = [both.text[start:end] for start, end, _ in both.spans]
    assert texts == [*_marked(first).values(), *_marked(second).values()]
    start = data.draw(st.integers(0, len(first.text)))
    end = data.draw(st.integers(start, len(first.text)))
    part = first.slice(start, end)
    assert part.text == first.text[start:end]
    inside = {key for s, e, key in first.spans if start <= s and e <= end}
    assert _marked(part) == {key: text for key, text in _marked(first).items() if key in inside}


@given(passages(), passages(), st.integers(0, 5), st.floats(0, 1))
@settings(max_examples=50)
def test_excerpts_keep_every_span_and_the_number_of_tokens(passage, filler, seed, share):
    size = ENCODER.count(passage.text)
    tokens = int(10 + share * size)
    try:
        cut = excerpt(passage, ENCODER, tokens, Random(seed))
    except ValueError as error:
        assert "larger length" in str(error)
        # Each span, and a gap next to it, is all that an excerpt must hold; joints may cost a few tokens.
        gaps = len(passage.spans) * ENCODER.count(GAP)
        assert len(token_spans(ENCODER.offsets(passage.text), passage.spans)) + gaps > tokens - 16
        return
    assert ENCODER.count(cut.text) <= tokens
    assert _marked(cut) == _marked(passage)
    assert cut == excerpt(passage, ENCODER, tokens, Random(seed))
    pieces = cut.text.split(GAP)
    assert all(piece in passage.text for piece in pieces)
    # Words are whole but for those that a span begins or ends in.
    wide = surround(cut, [filler] * 3, ENCODER, tokens + 200, Random(seed))
    assert ENCODER.count(wide.text) <= tokens + 200
    assert _marked(wide) == _marked(cut)


@given(passages())
@settings(max_examples=50)
def test_token_spans_are_the_tokens_that_share_a_character(passage):
    offsets = ENCODER.offsets(passage.text)
    indices = token_spans(offsets, passage.spans)
    wanted = {place for start, end, _ in passage.spans for place in range(start, end)}
    assert indices == [i for i, (start, end) in enumerate(offsets) if wanted & set(range(start, end))]
    assert wanted <= {place for i in indices for place in range(*offsets[i])}
    assert token_spans([(0, 0), (0, 4), (4, 9)], [(3, 5)]) == [1, 2]


def test_encoder_counts_as_the_tokenizer_does():
    text = CONTRACTS[0]["text"]
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    assert ENCODER.count(text) == len(encoded.input_ids)
    assert ENCODER.offsets(text).tolist() == [list(pair) for pair in encoded.offset_mapping]
    assert ENCODER.special == len(TOKENIZER("").input_ids) == 1


def test_truncation_keeps_the_beginning_or_both_ends():
    passage = Passage(CONTRACTS[2]["text"])
    head, ends = truncate(passage, ENCODER, 100), truncate_middle(passage, ENCODER, 101)
    assert passage.text.startswith(head.text) and 95 <= ENCODER.count(head.text) <= 100
    first, last = ends.text.split(GAP)
    assert passage.text.startswith(first) and passage.text.endswith(last)
    assert 90 <= ENCODER.count(ends.text) <= 101
    assert truncate(passage, ENCODER, 10**6) is passage


def test_text_errors_say_what_to_do():
    with pytest.raises(ValueError, match="fast tokenizer"):
        Encoder(object())
    with pytest.raises(ValueError, match="Ask for 85 tokens or more"):
        ENCODER.room(50, [], 19)
    with pytest.raises(ValueError, match="outside the text"):
        Passage("abc", ((2, 4),))
    with pytest.raises(ValueError, match="larger length"):
        fitted(lambda budget: Passage("party " * 50), ENCODER, 10)


# Tasks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(TASKS))
def test_items_of_every_task(name, folder):
    task, items = TASKS[name], _build(name, folder, items=18)
    assert items and items == _build(name, folder, items=18)
    assert len({item.id for item in items}) == len(items)
    contexts: dict[str, str] = {}
    for item in items:
        assert contexts.setdefault(item.document, item.context) == item.context
        assert all(0 <= start < end <= len(item.context) for start, end in item.spans)
        prompt = TOKENIZER(item.context + item.question).input_ids
        apart = TOKENIZER(item.question, add_special_tokens=False).input_ids
        assert len(prompt) <= len(TOKENIZER(item.context).input_ids) + len(apart)
        texts = [TOKENIZER(text, add_special_tokens=False).input_ids for text in item.choices or item.answers]
        # A chunk of text on its own may have a token or two more than within the text.
        answer = task.max_new_tokens if task.kind == "generate" else max(map(len, texts)) - 2
        assert len(TOKENIZER(item.context).input_ids) + len(apart) + answer <= LENGTH
        assert bool(item.choices) == (task.kind == "choices")
        if item.choices:
            assert set(item.answers) <= set(item.choices)
    if name not in ("legal_longbench_v2", "legal_multilexsum"):
        assert len(items) / len(contexts) >= 2
    gold = Output(
        text=items[0].answers[0],
        logprobs=tuple(float(choice in items[0].answers) for choice in items[0].choices) or (-1.0,),
        tokens=1,
    )
    values = task.score(items[0], gold)
    assert task.metric in values
    if name not in ("legal_needle_multivalue", "legal_ppl"):
        assert values[task.metric] == 1


@pytest.mark.parametrize("name", ["legal_cuad_extract", "legal_cross_contract", "legal_leval_contract_qa"])
@pytest.mark.parametrize("length", [1024, 3072, 12288])
def test_evidence_is_the_clause(name, length, folder):
    items = _build(name, folder, length=length, items=18)
    assert any(item.spans for item in items)
    for item in items:
        assert {item.context[start:end] for start, end in item.spans} <= set(item.answers)
        if name != "legal_leval_contract_qa":
            assert item.spans


def test_cross_contract_asks_for_the_contract_it_names(folder):
    for item in _build("legal_cross_contract", folder, items=12):
        assert item.context.count("Contract: ") >= 3
        (start, _), *_ = item.spans
        header = item.context.rindex("Contract: ", 0, start)
        name = item.context[header : item.context.index("\n", header)].removeprefix("Contract: ")
        assert name in item.question


@pytest.mark.parametrize("kind, values", [("single", 1), ("multikey", 1), ("multivalue", 4)])
def test_needles_are_in_order_of_depth_and_found_once(kind, values, folder):
    items = _build(f"legal_needle_{kind}", folder, length=2048, items=24)
    assert len(items) == 24
    for document in {item.document for item in items}:
        own = [item for item in items if item.document == document]
        assert len({item.question for item in own}) == len(own)
        places = []
        for item in own:
            assert len(item.answers) == len(item.spans) == values
            for answer, (start, end) in zip(item.answers, item.spans, strict=True):
                assert answer in item.context[start:end] and item.context.count(answer) == 1
            # The question is the sentence up to the number, so that the model completes it.
            lead = item.question.rpartition("\n")[2]
            assert item.context[slice(*item.spans[0])].startswith(lead)
            places.append(sum(start for start, _ in item.spans) / values / len(item.context))
            assert abs(places[-1] - item.labels["depth"]) < 0.15
        assert places == sorted(places)


def test_contract_nli_evidence_and_classes(folder):
    items = _build("legal_contract_nli", folder, items=36)
    assert {item.labels["class"] for item in items} == {"Entailment", "Contradiction", "NotMentioned"}
    by_id = {str(document["id"]): document for document in NLI["documents"]}
    for item in items:
        document = by_id[item.document]
        annotation = document["annotation_sets"][0]["annotations"][item.labels["hypothesis"]]
        sentences = [document["text"][slice(*document["spans"][index])] for index in annotation["spans"]]
        assert [item.context[start:end] for start, end in item.spans] == sentences
        assert (
            item.answers[0]
            == {"Entailment": " True", "Contradiction": " False", "NotMentioned": " Neither"}[annotation["choice"]]
        )


def test_perplexity_chunks_continue_the_context(folder):
    for length in (512, 6000):
        items = _build("legal_ppl", folder, length=length, items=12)
        for first in items[::6]:
            document = [item for item in items if item.document == first.document]
            assert [item.question for item in document] == [
                "".join(item.answers[0] for item in document[:j]) for j in range(6)
            ]
            whole = document[-1].context + document[-1].question + document[-1].answers[0]
            text = next(c["text"] for c in CONTRACTS if c["id"] == first.document)
            assert whole[-400:] in text
            assert ENCODER.count(whole) == length - 1
            assert ENCODER.count(whole) - ENCODER.count(first.context) == pytest.approx(192, abs=2)


def test_fewer_items_than_asked_for_are_logged_and_too_short_a_length_raises(folder, caplog):
    with caplog.at_level(logging.WARNING):
        found = _build("legal_longbench_v2", folder)
    assert len(found) == 2 and "allow 2 items, 60 were asked for" in caplog.text
    for name in TASKS:
        with pytest.raises(ValueError, match="length|Ask for"):
            _build(name, folder, length=70)


def test_another_seed_asks_something_else(folder):
    first = _build("legal_needle_multikey", folder, items=6)
    assert first != _build("legal_needle_multikey", folder, items=6, seed=1)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the legal data in ../shared/legal")
@pytest.mark.parametrize("name", ["legal_cuad_extract", "legal_contract_nli", "legal_leval_contract_qa"])
def test_real_documents(name):
    items = TASKS[name].build(Source(SHARED), TOKENIZER, 4096, items=18)
    assert len(items) == 18
    for item in items:
        size = len(TOKENIZER(item.context + item.question).input_ids)
        room = TASKS[name].max_new_tokens if TASKS[name].kind == "generate" else 8
        assert 3500 - room < size <= 4096
        if name == "legal_cuad_extract":
            # The copy's offsets were matched with punctuation folded: compare letters and digits.
            golds = "".join(c for answer in item.answers for c in answer.lower() if c.isalnum())
            for start, end in item.spans:
                assert "".join(c for c in item.context[start:end].lower() if c.isalnum()) in golds


# Data -----------------------------------------------------------------------------------------------------------------


def test_missing_data_is_told_apart(tmp_path):
    with pytest.raises(MissingData, match="not a folder"):
        Source(tmp_path / "nowhere")
    source = Source(tmp_path)
    for read, name in [
        (source.contracts, "cuad.jsonl"),
        (source.contract_nli, "contract_nli_test.json"),
        (source.leval_contract_qa, "leval_legal_contract_qa.jsonl"),
        (source.longbench_v2_legal, "longbench_v2_legal.jsonl"),
        (source.multi_lexsum, "multi_lexsum.jsonl"),
    ]:
        with pytest.raises(MissingData, match=name):
            read()
    with pytest.raises(DataError, match="no split 'validation'.*train, dev, test"):
        source.contract_nli("validation")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text": ...}, "line 2: field 'text' is missing"),
        ({"text": 3}, "line 2: field 'text' is int, expected str"),
        ({"labels": []}, "line 2: field 'labels' is list, expected dict"),
        (
            {"labels": {"Parties": {"clauses": ["a"], "answer": ""}}},
            "line 2, category 'Parties': field 'spans' is miss",
        ),
        ({"labels": {"Parties": {"clauses": ["a"], "answer": "", "spans": [[5, 10**6]]}}}, "outside the text"),
        ({"labels": {"Parties": {"clauses": [1], "answer": "", "spans": []}}}, "not text"),
    ],
)
def test_a_malformed_contract_names_its_line_and_field(tmp_path, change, message):
    bad = {key: value for key, value in {**CONTRACTS[1], **change}.items() if value is not ...}
    _write(tmp_path / "cuad.jsonl.gz", [CONTRACTS[0], bad])
    with pytest.raises(DataError, match=message) as raised:
        Source(tmp_path).contracts()
    assert not isinstance(raised.value, MissingData)
    assert "cuad.jsonl.gz" in str(raised.value) and "Correct" in str(raised.value)


def test_other_malformed_rows(tmp_path):
    (tmp_path / "cuad.jsonl").write_text('{"id": "a"\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 1 is not valid JSON"):
        Source(tmp_path).contracts()
    (tmp_path / "cuad.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="has no rows"):
        Source(tmp_path).contracts()
    (tmp_path / "leval_legal_contract_qa.jsonl").write_text(
        json.dumps({"input": "a", "instructions": ["?"], "outputs": []}), encoding="utf-8"
    )
    with pytest.raises(DataError, match="1 instructions but 0 outputs"):
        Source(tmp_path).leval_contract_qa()
    (tmp_path / "longbench_v2_legal.jsonl").write_text(json.dumps({**LONGBENCH[0], "answer": "E"}), encoding="utf-8")
    with pytest.raises(DataError, match="'E' is none of A, B, C, D"):
        Source(tmp_path).longbench_v2_legal()
    document = _nda(0)
    document["annotation_sets"][0]["annotations"]["nda-0"]["spans"] = [99]
    (tmp_path / "contract_nli_test.json").write_text(json.dumps({**NLI, "documents": [document]}), encoding="utf-8")
    with pytest.raises(DataError, match="document 1, hypothesis 'nda-0'.*not among the 20 spans"):
        Source(tmp_path).contract_nli()


def test_published_files_give_the_same_rows(tmp_path, folder, monkeypatch):
    squad = {
        "data": [
            {
                "title": contract["id"],
                "paragraphs": [
                    {
                        "context": contract["text"],
                        "qas": [
                            {
                                "id": f"{contract['id']}__{category}",
                                "answers": [
                                    {"text": contract["text"][start:end], "answer_start": start}
                                    for start, end in label["spans"]
                                ],
                            }
                            for category, label in contract["labels"].items()
                        ],
                    }
                ],
            }
            for contract in CONTRACTS
        ]
    }
    files = {
        "CUAD_v1/CUAD_v1.json": json.dumps(squad),
        "LEval/Generation/legal_contract_qa.jsonl": "\n".join(map(json.dumps, LEVAL)),
        "data.json": json.dumps(LONGBENCH),
        "releases/v20230518/test.json": "\n".join(map(json.dumps, LEXSUM)),
        "releases/v20230518/sources.json": json.dumps(LEXSUM_SOURCES),
    }

    def hub(repository: str, name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name], encoding="utf-8")
        return path

    archive = tmp_path / "contract-nli.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("contract-nli/test.json", json.dumps(NLI))
    monkeypatch.setattr(sources, "_hub", hub)
    monkeypatch.setattr(sources, "_download", lambda url: archive)
    published, local = Source(None), Source(folder)
    for contract in local.contracts():
        for label in contract["labels"].values():
            label["answer"] = ""
    assert published.contracts() == local.contracts()
    assert published.contract_nli() == local.contract_nli()
    assert published.leval_contract_qa() == local.leval_contract_qa()
    assert published.longbench_v2_legal() == local.longbench_v2_legal()
    assert published.multi_lexsum() == local.multi_lexsum()
    with pytest.raises(DataError, match="contract-nli/dev.json"):
        published.contract_nli("dev")


def test_a_failed_download_is_missing_data(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(MissingData, match="L4NLP/LEval.*no network.*local copy"):
        Source(None).leval_contract_qa()


# Chat -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_chat_keeps_the_split_and_the_spans(trim, folder):
    tokenizer = _bpe()
    item = _build("legal_contract_nli", folder, items=6)[0]
    with pytest.raises(ValueError, match="no chat template"):
        with_chat(item, tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n{{ m['content']" + trim + " }}[end]\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    )
    chat = with_chat(item, tokenizer)
    assert chat.context == f"[user]\n{item.context}"
    assert chat.question == f"{item.question}[end]\n[assistant]\n"
    assert [chat.context[s:e] for s, e in chat.spans] == [item.context[s:e] for s, e in item.spans]
    assert chat.choices == ("True", "False", "Neither") and chat.answers[0] in chat.choices
    # One first token, not two.
    assert tokenizer(chat.context + chat.question).input_ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match="changes the text"):
        with_chat(item, tokenizer)


# lm-evaluation-harness ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(folder, tmp_path_factory):
    """The tasks as the harness loads them."""
    pytest.importorskip("lm_eval", reason="needs lm-eval")
    from lm_eval.tasks import TaskManager

    tokenizer = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(tokenizer)
    metadata = {"data_dir": str(folder), "length": LENGTH, "items": 6, "pretrained": str(tokenizer), "batch_size": 1}
    manager = TaskManager(include_path=str(YAMLS), include_defaults=False, metadata=metadata)
    assert "legal" in manager.all_groups
    return manager.load(["legal"])["tasks"]


def test_the_harness_has_every_task(harness):
    assert set(harness) == set(TASKS)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_harness_asks_and_scores_as_the_task_does(name, harness, folder):
    theirs, ours = harness[name], TASKS[name]
    items = _build(name, folder, items=6)
    docs = list(theirs.test_docs())
    assert len(docs) == len(items)
    config = theirs.config
    kinds = {"generate": "generate_until", "choices": "multiple_choice", "continuation": "loglikelihood"}
    assert config.output_type == kinds[ours.kind] and config.target_delimiter == ""
    if ours.kind == "generate":
        assert config.generation_kwargs["until"] == list(ours.stop)
        assert config.generation_kwargs["max_gen_toks"] == ours.max_new_tokens
    item, doc = items[-1], docs[-1]
    assert theirs.doc_to_text(doc) == item.context + item.question
    if ours.kind == "choices":
        assert theirs.doc_to_choice(doc) == list(item.choices)
        assert item.choices[theirs.doc_to_target(doc)] == item.answers[0]
    else:
        assert theirs.doc_to_target(doc) == item.answers[0]
    logprobs = tuple(-1.0 - i for i in range(len(item.choices) or 1))
    tokens = len(TOKENIZER(item.answers[0], add_special_tokens=False).input_ids)
    expected = ours.score(item, Output(text=item.answers[0], logprobs=logprobs, tokens=tokens))
    results = [item.answers[0] + ours.stop[0] + "more"] if ours.kind == "generate" else [(x, False) for x in logprobs]
    assert theirs.process_results(doc, results) == expected
    assert set(theirs.aggregation()) == set(expected)
    assert set(theirs.higher_is_better().values()) == {ours.higher_is_better}


def test_a_task_without_a_tokenizer_says_so(folder):
    lm_eval = pytest.importorskip("lm_eval.tasks", reason="needs lm-eval")
    manager = lm_eval.TaskManager(
        include_path=str(YAMLS), include_defaults=False, metadata={"data_dir": str(folder), "tokenizer": None}
    )
    with pytest.raises(ValueError, match="no tokenizer is named"):
        manager.load(["legal_ppl"])


def test_the_group_lists_every_task():
    assert yaml.safe_load((YAMLS / "legal.yaml").read_text())["task"] == list(TASKS)
