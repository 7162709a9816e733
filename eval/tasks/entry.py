"""What the task files of lm-evaluation-harness call: data sets and scores of the tasks in `eval.legal`.

Every task of `eval.legal.TASKS` is a function of this module, e.g. ``entry.legal_ppl``, that builds its data set.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

# The harness's console script does not have the repository root on its path.
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

from eval.legal import TASKS, Item, Output, Source, load_tokenizer  # noqa: E402


def build(
    name: str,
    *,
    data_dir: str | None = None,
    length: int = 4096,
    items: int = 60,
    seed: int = 0,
    **others: Any,
) -> dict[str, Any]:
    """The items of a task as a ``test`` split.

    Parameters
    ----------
    name : str
    data_dir : str or None
        Folder with the data, see `Source`; None for the hub.
    length, items, seed : int
        See `Task.build`.
    **others
        The tokenizer's name: the first of ``tokenizer``, ``pretrained`` and ``model`` that is a text. The harness passes
        all model arguments and metadata; the rest is ignored.

    Raises
    ------
    ValueError
        If no tokenizer is named.
    DataError
        If the data are missing or malformed.
    """
    from datasets import Dataset

    named = (others.get(key) for key in ("tokenizer", "pretrained", "model"))
    chosen = next((value for value in named if isinstance(value, str) and value), None)
    if chosen is None:
        raise ValueError(
            f"{name}: no tokenizer is named, and contexts are measured in its tokens. Add "
            f'--metadata \'{{"tokenizer": "NAME"}}\' or --model_args pretrained=NAME.'
        )
    tokenizer, task = load_tokenizer(chosen), TASKS[name]
    found = task.build(Source(data_dir), tokenizer, int(length), items=int(items), seed=int(seed))
    return {"test": Dataset.from_list([_row(name, item, tokenizer) for item in found])}


def _row(name: str, item: Item, tokenizer: Any) -> dict[str, Any]:
    return {
        "task": name,
        "id": item.id,
        "document": item.document,
        "context": item.context,
        "question": item.question,
        "answers": list(item.answers),
        "choices": list(item.choices),
        "gold": item.choices.index(item.answers[0]) if item.choices else -1,
        # As text: rows of one column have one type, and labels and spans differ from item to item.
        "spans": json.dumps(item.spans),
        "labels": json.dumps(item.labels),
        "tokens": len(tokenizer(item.answers[0], add_special_tokens=False).input_ids),
    }


def first_answer(doc: dict[str, Any]) -> str:
    """The text a continuation task scores, or one gold answer of a generation task."""
    return doc["answers"][0]


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """The task's own score of what the harness hands back: texts, or pairs of log-likelihood and "is greedy"."""
    task = TASKS[doc["task"]]
    item = Item(
        id=doc["id"],
        document=doc["document"],
        context=doc["context"],
        question=doc["question"],
        answers=tuple(doc["answers"]),
        choices=tuple(doc["choices"]),
        spans=tuple((start, end) for start, end in json.loads(doc["spans"])),
        labels=json.loads(doc["labels"]),
    )
    if task.kind == "generate":
        return task.score(item, Output(text=_cut(results[0], task.stop)))
    logprobs = tuple(float(result[0]) for result in results)
    return task.score(item, Output(logprobs=logprobs, tokens=doc["tokens"]))


def _cut(text: str, stop: tuple[str, ...]) -> str:
    """The text up to the first stop string; back ends differ in whether they have cut it already."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


globals().update({name: partial(build, name) for name in TASKS})
