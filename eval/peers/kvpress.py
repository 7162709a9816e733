"""SnapKV and expected attention, run by kvpress (github.com/NVIDIA/kvpress) in an environment of its own.

kvpress pins a Transformers that this package does not support, so the two meet in files: items go out as token ids, answers
come back as JSON lines, and the task scores them here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.environment import hardware
from eval.models import load
from eval.peers.rows import PeerUnavailable, as_task, compared, context_ids, continuation_ids, cut, result_row
from eval.running.store import Results

if TYPE_CHECKING:
    from eval.legal.items import Item, Task

VERSION = "0.5.5"
TRANSFORMERS = "5.2.0"
TORCH = "torch==2.13.0"
REQUIREMENTS = Path(__file__).with_name("kvpress_requirements.txt")
SCRIPT = Path(__file__).with_name("kvpress_run.py")
#: Names that kvpress_run.py knows.
PRESSES = ("snapkv", "expected_attention")
#: SnapKV's observation window, which it always keeps and which a context has to exceed.
LEAST_CONTEXT = 65


def default_cache_dir() -> Path:
    """Where environments and exported models go: ``$XDG_CACHE_HOME/alaya_hf/peers``, or below ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alaya_hf" / "peers"


@dataclass(frozen=True)
class KVPressSettings:
    """How to run kvpress.

    Parameters
    ----------
    attended : int, optional
        Tokens that an answering step attends to, question included: each KV head keeps as many of the context's as make that
        number. Default: the mean of ``match`` in the results.
    match : str
        The system to follow, by the rows of the same model, task and length.
    device : str
    dtype : str
        Name of a torch dtype.
    cache_dir : Path
        Environments and exported models.
    timeout : float, optional
        Seconds for one run; None waits.

    Raises
    ------
    ValueError
        If ``attended`` is no positive integer.
    """

    attended: int | None = None
    match: str = "alaya"
    device: str = "cpu"
    dtype: str = "float32"
    cache_dir: Path = field(default_factory=default_cache_dir)
    timeout: float | None = None

    def __post_init__(self) -> None:
        given = self.attended
        if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
            raise ValueError(f"attended must be an integer of at least 1, or None, but got {given!r}.")

    def budget(self, results: Results, model: str, task: str, length: int) -> int:
        """Tokens to attend to.

        Raises
        ------
        PeerUnavailable
            If they follow a system of which there is no result.
        """
        if self.attended is not None:
            return self.attended
        wanted = (model, task, length, self.match)
        keys = ("model", "task", "length", "system")
        rows = [row for row in results.rows() if tuple(row.get(key) for key in keys) == wanted]
        attended = [row["retrieval"]["attended"] for row in rows if "retrieval" in row]
        if not attended:
            raise PeerUnavailable(
                f"no result of {self.match} says how many tokens to keep. Run {self.match} on {task} at {length} tokens first."
            )
        return max(1, round(sum(attended) / len(attended)))


def _run(command: list[str], what: str, timeout: float | None = None) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerUnavailable(f"{what}: {error}") from error
    if done.returncode:
        last = [line for line in (done.stderr or done.stdout).strip().splitlines() if line.strip()][-3:]
        raise PeerUnavailable(f"{what}: {' | '.join(last) or f'exit status {done.returncode}'}")


def ensure_environment(cache_dir: Path) -> Path:
    """The interpreter of kvpress's environment, which is built on the first call.

    Parameters
    ----------
    cache_dir : Path
        The environment goes to ``<cache_dir>/kvpress-<version>``; 1.4 GB with a CPU build of torch.

    Raises
    ------
    PeerUnavailable
        If it cannot be built: no network, no suitable package.

    Notes
    -----
    Packages come from wherever pip is configured to look. PyPI's torch for Linux brings CUDA; for a CPU build, set
    ``PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu`` or ``PIP_FIND_LINKS``.
    """
    home = Path(cache_dir) / f"kvpress-{VERSION}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ready = home / ".ready"
    pins = f"{TORCH}\n{REQUIREMENTS.read_text(encoding='utf-8')}"
    if ready.exists() and ready.read_text(encoding="utf-8") == pins:
        return python
    what = "cannot build the environment of kvpress"
    home.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(home)], what)
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    # By itself and first: what comes after then has no reason to look for another build of it.
    _run([*pip, TORCH], what)
    _run([*pip, TORCH, "--requirement", str(REQUIREMENTS)], what)
    ready.write_text(pins, encoding="utf-8")
    return python


def _exported(model: str, cache_dir: Path) -> str:
    """A name or path that ``from_pretrained`` takes in the other environment."""
    if model != "smollm2":
        return model
    folder = Path(cache_dir) / "smollm2"
    if not (folder / "tokenizer.json").exists():
        loaded, tokenizer = load(model)
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def export_items(items: Sequence[Item], task: Task, tokenizer: Any, attended: int, path: Path) -> None:
    """Write items as ``kvpress_run.py`` reads them: one document a line, all texts as token ids.

    Parameters
    ----------
    attended : int
        Tokens to attend to, question included. A document is compressed once for all its questions, so what is left for it
        goes by their mean length.

    Raises
    ------
    PeerUnavailable
        If a context is too short for SnapKV's observation window.
    """
    documents: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        documents[item.document].append(item)
    with path.open("w", encoding="utf-8") as file:
        for document, asked in documents.items():
            ids = context_ids(tokenizer, asked[0])
            if len(ids) < LEAST_CONTEXT:
                raise PeerUnavailable(
                    f"the context of {document!r} has {len(ids)} tokens, but SnapKV's observation window alone has "
                    f"{LEAST_CONTEXT - 1}. Ask for longer items."
                )
            lines: list[dict[str, Any]] = [
                {
                    "id": item.id,
                    "question_ids": continuation_ids(tokenizer, item.question),
                    "continuations": [continuation_ids(tokenizer, text) for text in compared(task, item)],
                }
                for item in asked
            ]
            question = sum(len(line["question_ids"]) for line in lines) / len(lines)
            kept = max(1, round(attended - question))
            line = {"document": document, "context_ids": ids, "kept": kept, "items": lines}
            file.write(json.dumps(line) + "\n")


def run_kvpress(
    items: Sequence[Item],
    task: Task | str,
    model: str,
    length: int,
    press_names: Sequence[str],
    results: Results,
    settings: KVPressSettings | None = None,
) -> list[dict[str, Any]]:
    """Answer items with kvpress and add the rows to the results.

    Parameters
    ----------
    items : sequence of Item
        Built with the model's tokenizer. Those that the results hold already, for every press, are left out.
    task : Task or str
        What the items belong to; a name of ``eval.legal.TASKS``.
    model : str
        ``"smollm2"``, or what ``from_pretrained`` takes.
    length : int
        The length that the items were built for; goes into the rows.
    press_names : sequence of str
        Of :data:`PRESSES`; each is a system of that name.
    results : Results
    settings : KVPressSettings, optional

    Returns
    -------
    list of dict
        The new rows, in the order in which they were answered. ``retrieval`` holds ``attended`` (tokens of the context that
        each KV head kept, and the question) and ``context`` (all tokens of both); which were kept is not observed.

    Raises
    ------
    ValueError
        For an unknown press or task.
    PeerUnavailable
        If there is no budget to follow, the environment cannot be built, the model cannot be loaded, a context is too short
        for SnapKV, or the run fails. No row is written then.
    """
    unknown = sorted(set(press_names) - set(PRESSES))
    if unknown:
        raise ValueError(f"unknown press {', '.join(unknown)}. Known: {', '.join(PRESSES)}.")
    task, settings = as_task(task), settings or KVPressSettings()
    done = results.done()
    items = [
        item for item in items if any((model, task.name, length, press, item.id) not in done for press in press_names)
    ]
    if not items:
        return []
    attended = settings.budget(results, model, task.name, length)
    python = ensure_environment(settings.cache_dir)
    try:
        from transformers import AutoTokenizer

        exported = _exported(model, settings.cache_dir)
        tokenizer = AutoTokenizer.from_pretrained(exported)
    except (OSError, ValueError) as error:
        raise PeerUnavailable(f"cannot load the model {model}: {error}") from error
    given = {
        "model": exported,
        "device": settings.device,
        "dtype": settings.dtype,
        "max_new_tokens": task.max_new_tokens,
        "stop": list(task.stop),
        "presses": list(press_names),
    }
    with tempfile.TemporaryDirectory() as folder:
        config, documents, found = (Path(folder) / name for name in ("settings.json", "documents.jsonl", "rows.jsonl"))
        config.write_text(json.dumps(given), encoding="utf-8")
        export_items(items, task, tokenizer, attended, documents)
        # -I: the script's folder stays off the path, where this file would be found in place of the package kvpress.
        command = [str(python), "-I", str(SCRIPT), str(config), str(documents), str(found)]
        _run(command, f"kvpress {VERSION} failed", settings.timeout)
        lines = [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]
    rows = _scored(lines, items, task, model, length)
    rows = [row for row in rows if (model, task.name, length, row["system"], row["item"]) not in done]
    for row in rows:
        results.add(row)
    return rows


def _scored(
    lines: list[dict[str, Any]], items: Sequence[Item], task: Task, model: str, length: int
) -> list[dict[str, Any]]:
    from eval.legal.items import Output

    by_id = {item.id: item for item in items}
    where = f"{hardware()}; kvpress {VERSION}, Transformers {TRANSFORMERS}, {TORCH}"
    rows = []
    for line in lines:
        text = cut(line["answer"], task.stop)
        output = Output(text=text, logprobs=tuple(line["logprobs"]), tokens=line["tokens"])
        row = result_row(
            model, task, length, line["press"], by_id[line["item"]], output, where,
            retrieval={"attended": float(line["attended"]), "context": float(line["context"])},
            seconds_per_token=line["seconds_per_token"],
            device_bytes=line["device_bytes"],
            full_bytes=line["full_bytes"],
        )  # fmt: skip
        rows.append(row)
    return rows
