"""Scores of the legal tasks against hand-worked cases and other implementations."""

from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.legal import TASKS, Item, Output
from eval.legal.metrics import (
    accuracy,
    char_precision_recall,
    contained,
    exact_match,
    normalise,
    quoted_spans,
    rouge_l,
    token_f1,
)

ITEM = Item(id="a", document="a", context="", question="", answers=(" B",), choices=(" A", " B", " C"))
WORDS = st.lists(st.sampled_from("party law the term of a notice state york an day days".split()), max_size=12)
CONTEXT = (
    "1. Law. This Agreement shall be governed by\nthe laws of the State of New York.  2. Term. It runs for five years. "
    "3. Law. This Agreement shall be governed by the laws of the State of Texas."
)


@pytest.mark.parametrize(
    "answer, gold, f1, exact",
    [
        ("The State of New York.", "state of new york", 1, 1),
        ("New York", "the State of New York", 2 * 2 / (2 + 4), 0),
        ("york york", "york", 2 * 1 / (2 + 1), 0),
        ("Texas", "New York", 0, 0),
        ("", "New York", 0, 0),
        ("the", "", 1, 1),
    ],
)
def test_squad_scores_by_hand(answer, gold, f1, exact):
    assert token_f1(answer, [gold]) == pytest.approx(f1)
    assert exact_match(answer, [gold]) == exact


def test_the_best_gold_answer_counts():
    golds = ["an entirely different clause", "New York"]
    assert token_f1("new york", golds) == exact_match("new york", golds) == 1
    assert token_f1("new york", []) == exact_match("new york", []) == 0


@given(WORDS, WORDS)
def test_token_f1_is_rouge_1_of_normalised_text(answer, gold):
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"])
    answer, gold = normalise(" ".join(answer)), normalise(" ".join(gold))
    expected = scorer.score(gold, answer)["rouge1"].fmeasure if answer or gold else 1.0
    assert token_f1(answer, [gold]) == pytest.approx(expected)


def test_rouge_l_by_hand():
    pytest.importorskip("rouge_score")
    # Longest common subsequence "court dismiss case" (stems) of 4 and 5 words.
    assert rouge_l("court dismissed that case", ["the court dismisses the case"]) == pytest.approx(2 * 3 / (4 + 5))
    assert rouge_l("", ["the court"]) == 0


def test_share_of_values_contained():
    assert contained("1234567, 7654321.", ["1234567", "7654321", "1111111", "2222222"]) == 0.5


def test_accuracy_takes_the_likeliest_choice():
    assert accuracy(ITEM, Output(logprobs=(-3.0, -1.0, -2.0))) == 1
    assert accuracy(ITEM, Output(logprobs=(-1.0, -1.0, -2.0))) == 0
    with pytest.raises(ValueError, match="3 choices, the output 1"):
        accuracy(ITEM, Output(logprobs=(-1.0,)))


def test_perplexity_task_scores_nats_per_token():
    score = TASKS["legal_ppl"].score
    assert score(ITEM, Output(logprobs=(-64.0,), tokens=32)) == {"nll": 2.0}
    with pytest.raises(ValueError, match="at least one token"):
        score(ITEM, Output(logprobs=(-64.0,)))


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 12)).map(lambda s: (s[0], s[0] + s[1])), max_size=4)


@given(SPANS, SPANS)
def test_char_precision_and_recall_are_those_of_character_labels(found, gold):
    metrics = pytest.importorskip("sklearn.metrics")
    masks = [[int(any(s <= i < e for s, e in spans)) for i in range(60)] for spans in (gold, found)]
    precision, recall, _, _ = metrics.precision_recall_fscore_support(*masks, average="binary", zero_division=0)
    assert char_precision_recall(found, gold) == pytest.approx((precision, recall))


def test_quotes_are_found_whatever_their_case_and_white_space():
    gold = "governed by\nthe laws of the State of New York"
    (span,) = quoted_spans(CONTEXT, 'It says: "GOVERNED BY  the laws of the state of New York", I think.')
    assert CONTEXT[slice(*span)] == gold


def test_a_quote_that_stands_twice_counts_where_the_evidence_is():
    quote = "This Agreement shall be governed by the laws of the State of"
    second = CONTEXT.rindex("This Agreement")
    (first,) = quoted_spans(CONTEXT, quote)
    assert first[0] == CONTEXT.index("This Agreement")
    (preferred,) = quoted_spans(CONTEXT, quote, prefer=[(second, len(CONTEXT))])
    assert preferred[0] == second


def test_what_is_short_or_not_in_the_context_is_no_quote():
    assert quoted_spans(CONTEXT, "the laws of") == []
    assert quoted_spans(CONTEXT, "I do not know, as nothing of that kind is written there.") == []
    assert quoted_spans(CONTEXT, "") == []


@given(st.text("ab", max_size=60), st.text("ab", max_size=30))
def test_there_are_quotes_where_difflib_finds_a_common_block(context, answer):
    block = SequenceMatcher(None, context, answer, autojunk=False).find_longest_match()
    sizes = [end - start for start, end in quoted_spans(context, answer, minimum=4)]
    assert bool(sizes) == (block.size >= 4)
    assert max(sizes, default=0) <= block.size
    assert all(context[start:end] in answer for start, end in quoted_spans(context, answer, minimum=4))


def test_cross_contract_scores_the_quoted_passage():
    start = CONTEXT.index("It runs for five years.")
    item = Item("a", "a", CONTEXT, "?", ("It runs for five years.",), spans=((start, start + 23),))
    score = TASKS["legal_cross_contract"].score
    perfect = score(item, Output(text="It runs for five years."))
    assert perfect == {"char_f1": 1, "char_precision": 1, "char_recall": 1, "token_f1": 1}
    wrong = score(item, Output(text="This Agreement shall be governed by the laws of the State of Texas."))
    assert wrong["char_f1"] == wrong["char_precision"] == wrong["char_recall"] == 0
    longer = score(item, Output(text="2. Term. It runs for five years."))
    assert longer["char_recall"] == 1
    assert longer["char_precision"] == pytest.approx(23 / len("2. Term. It runs for five years."))
