"""Legal tasks for long contexts: `TASKS` by name, their `Item` and `Output`, and the data `Source`."""

from __future__ import annotations

from eval.legal import (
    contract_nli,
    cross_contract,
    cuad_extract,
    leval_contract_qa,
    longbench_v2,
    multilexsum,
    needle_multikey,
    needle_multivalue,
    needle_single,
    ppl,
)
from eval.legal.chat import with_chat
from eval.legal.items import Item, Output, Task
from eval.legal.sources import DataError, MissingData, Source
from eval.legal.text import load_tokenizer

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK
    for module in (
        cuad_extract,
        needle_single,
        needle_multikey,
        needle_multivalue,
        cross_contract,
        contract_nli,
        leval_contract_qa,
        longbench_v2,
        multilexsum,
        ppl,
    )
}
"""Every task by name. A new one is a file with a ``TASK`` and an entry here."""

__all__ = ["TASKS", "DataError", "Item", "MissingData", "Output", "Source", "Task", "load_tokenizer", "with_chat"]
