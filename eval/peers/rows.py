"""What every peer shares: how items become token ids, and answers become result rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eval.legal.items import Item, Output, Task


class PeerUnavailable(RuntimeError):
    """A peer cannot run here; the message says why, for the report's "not run"."""


def as_task(task: Task | str) -> Task:
    """A task, from itself or its name.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    if not isinstance(task, str):
        return task
    from eval.legal import TASKS

    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}. Known: {', '.join(TASKS)}.")
    return TASKS[task]


def context_ids(tokenizer: Any, item: Item) -> list[int]:
    """Token ids of an item's context, with the special tokens that the model's texts start with."""
    return list(tokenizer(item.context, verbose=False).input_ids)


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a question, a choice or an answer, which continue a text."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def compared(task: Task, item: Item) -> tuple[str, ...]:
    """The continuations whose likelihood a task asks for; none for generation."""
    if task.kind == "generate":
        return ()
    return item.choices if task.kind == "choices" else item.answers[:1]


def cut(text: str, stop: Sequence[str]) -> str:
    """An answer up to the first stop string that follows its first visible character, without surrounding white space."""
    begins = len(text) - len(text.lstrip())
    ends = [place for place in (text.find(one, begins) for one in stop) if place >= 0]
    return text[: min(ends, default=len(text))].strip()


def result_row(
    model: str, task: Task, length: int, system: str, item: Item, output: Output, hardware: str, **measured: Any
) -> dict[str, Any]:
    """One line of ``rows.jsonl``.

    Parameters
    ----------
    measured
        ``seconds_per_token``, ``device_bytes``, ``full_bytes``, ``retrieval``; those that are None are left out.
    """
    return {
        "model": model,
        "task": task.name,
        "length": length,
        "system": system,
        "item": item.id,
        "document": item.document,
        "labels": dict(item.labels),
        "answer": output.text,
        "metrics": task.score(item, output),
        **({"logprobs": list(output.logprobs)} if output.logprobs else {}),
        **{name: value for name, value in measured.items() if value is not None},
        "hardware": hardware,
    }
