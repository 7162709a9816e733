"""Tasks over systems: one prefill per document, every question, every system."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from eval.legal import Item, Task
from eval.legal.text import token_spans
from eval.running.answer import Answer, Decoder, Reader, draft, verify
from eval.running.row import fidelity, footprint, retrieval
from eval.running.store import Results
from eval.systems import Context, System


@dataclass
class Runner:
    """Runs items and keeps the rows.

    Parameters
    ----------
    model, tokenizer
    name : str
        The model's name in the rows.
    systems : sequence of System
        ``full``, the reference, is run whether or not it is among them.
    results : Results
    window : (int, int)
        Of the shared context.
    budget_of : str, optional
        The system whose number of attended tokens the matched systems follow; has to be among the systems.
    hardware : str
        Goes into every row.
    timing : bool
        Measure the time of one-token passes, on the first item of every document.
    prefill_model : optional
        The same model on a faster device, for prefills alone.
    answers : collection of str, optional
        Systems whose own answers are completed where they part from full attention's, token by token, which is most of the
        time of a run; the others have fidelity and retrieval, and no answer where one is generated. Default: all.
    on_row : callable, optional
        Called after every (item, system), for progress.
    """

    model: Any
    tokenizer: Any
    name: str
    systems: Sequence[System]
    results: Results
    window: tuple[int, int]
    budget_of: str | None = None
    hardware: str = ""
    timing: bool = True
    prefill_model: Any = None
    answers: Collection[str] | None = None
    on_row: Callable[[], None] | None = None

    def run(self, task: Task, length: int, items: Sequence[Item]) -> None:
        """Run what the results do not hold yet.

        Parameters
        ----------
        task : Task
        length : int
            Tokens of the prompts, as recorded in the rows.
        items : sequence of Item
        """
        done = self.results.done()
        for _, group in groupby(items, key=lambda item: item.document):
            group = list(group)
            work = [
                (item, [s for s in self.systems if (self.name, task.name, length, s.name, item.id) not in done])
                for item in group
            ]
            for item, missing in work:
                for _ in range(len(self.systems) - len(missing)):
                    self._advance(item)
            work = [(item, missing) for item, missing in work if missing]
            if work:
                self._document(task, length, work, group[0])

    def _advance(self, item: Item) -> None:
        if self.on_row is not None:
            self.on_row()

    def _document(self, task: Task, length: int, work: list[tuple[Item, list[System]]], first: Item) -> None:
        # Times and recovery ratios, which cost a dense pass a layer, are taken on a document's first item.
        text = work[0][0].context
        encoded = self.tokenizer(text, return_offsets_mapping=True, verbose=False)
        ids = encoded.input_ids
        # The last token is fed with the question: a prompt without one needs a token to ask with.
        filled = torch.tensor([ids[:-1]], device=self.model.device)
        context = Context.for_systems(self.model, filled, self.window, self.systems, prefill_model=self.prefill_model)
        full = Reader(self.model, System("full").cache(context))
        budgets = self._budgets(task, length) if any(s.matched for s in self.systems) else {}
        for item, systems in work:
            question = ids[-1:] + self.tokenizer(item.question, add_special_tokens=False).input_ids
            watch = torch.tensor(token_spans(encoded.offset_mapping, item.spans), dtype=torch.int64)
            watch = watch[watch < len(ids) - 1]
            self._item(task, length, item, systems, context, full, question, watch, item is first, budgets.get(item.id))

    def _item(
        self,
        task: Task,
        length: int,
        item: Item,
        systems: list[System],
        context: Context,
        full: Reader,
        question: list[int],
        watch: torch.Tensor,
        measured: bool,
        budget: tuple[float, float] | None,
    ) -> None:
        decoder = Decoder(self.tokenizer, task)
        *head, last = question
        full.read(head)
        reference = draft(full, decoder, item, last)
        tokens = context.ids.shape[1] + len(question)
        # The system that sets the budget goes first.
        for system in sorted(systems, key=lambda one: (one.matched, one.name != self.budget_of)):
            if system.matched:
                if budget is None:
                    raise ValueError(
                        f"no result of {self.budget_of} on {item.id}, whose budget the other systems follow"
                    )
                system = system.at_budget(*budget)
            if system.name == "full":
                reader, answer = full, reference
                observed = retrieval(full.cache, bool(watch.numel()), tokens)
            else:
                reader = Reader(self.model, system.cache(context))
                reader.read(head)
                reader.observe(watch, recovery=measured)
                complete = self.answers is None or system.name in self.answers
                answer, observed = self._verified(reader, decoder, item, last, reference, watch, tokens, complete)
                agreement = fidelity(answer, reference)
                if not complete and task.kind == "generate":
                    answer.output = None  # not even where it is known: those that agree would be a biased choice
            row = {
                "model": self.name,
                "task": task.name,
                "length": length,
                "system": system.name,
                "item": item.id,
                "document": item.document,
                "labels": item.labels,
                "answer": None if answer.output is None else answer.output.text,
                "metrics": {} if answer.output is None else task.score(item, answer.output),
                **observed,
                **({} if system.name == "full" else {"fidelity": agreement}),
                **footprint(reader.cache),
                **system.labels,
                "hardware": self.hardware,
            }
            if answer.output is not None and answer.output.logprobs:
                row["logprobs"] = list(answer.output.logprobs)
            if self.timing and measured:
                row["seconds_per_token"] = reader.seconds_per_token(last)
            self.results.add(row)
            if system.name == self.budget_of:
                budget = self._spent(row)
            self._advance(item)
        full.forget(len(head))

    @staticmethod
    def _verified(
        reader: Reader,
        decoder: Decoder,
        item: Item,
        last: int,
        reference: Answer,
        watch: torch.Tensor,
        tokens: int,
        complete: bool,
    ) -> tuple[Answer, dict[str, Any]]:
        observed: dict[str, Any] = {}

        def on_scored() -> None:
            observed.update(retrieval(reader.cache, bool(watch.numel()), tokens))
            reader.stop_observing()

        return verify(reader, decoder, item, last, reference, on_scored, complete), observed

    @staticmethod
    def _spent(row: dict[str, Any]) -> tuple[float, float]:
        """Offloaded tokens that a head attended to, and asked for."""
        retrieval = row["retrieval"]
        return max(0.0, retrieval["attended"] - retrieval["window"]), retrieval["retrieved"]

    def _budgets(self, task: Task, length: int) -> dict[str, tuple[float, float]]:
        """The budgets that earlier runs found, by item."""
        wanted = (self.name, task.name, length, self.budget_of)
        keys = ("model", "task", "length", "system")
        return {
            row["item"]: self._spent(row) for row in self.results.rows() if tuple(row[key] for key in keys) == wanted
        }
