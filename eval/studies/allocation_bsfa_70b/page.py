"""The study's page: docs/results/allocation-bsfa-70b.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from eval.report import markdown

_CAN = """\
## What random weights show, and what they do not

The weights are random and the keys that are decoded over are synthetic: **no number here says anything about the
quality of an answer**.

* They do show times of dense arithmetic, of copies and of memory management, bytes on every side, and which settings
  fit: these depend on shapes, not on values.
* They do **not** show how many tiles BSFA and BLASST skip on text, nor so what they save: attention of random weights
  is nearly even. BSFA's thresholds are calibrated on random tokens to keep a number of tiles, those past the
  calibrated length repeat the last block's; BLASST skips what its rule lets it. Their times here are those of these
  shares of tiles.
* Nor what `retrieval` in prefill loses. On a real model: docs/results/sparse-prefill.md.
* Decoding reads keys that are distributed as a real model's are (eval/synthetic.py), so the number of tokens fetched
  is plausible.
* Times are those of a few of the shape's identical layers, multiplied: embedding and output head are counted once too
  often per measured share, and what is the same whatever the number of layers is multiplied too. Over several GPUs,
  their hand-over is not in them.
* Allocators have no part in the times: they are replayed with the shape's sizes on a trace of documents and
  questions, without memory. The engine's own store does not allocate from them.
"""


def _cell(rows: Iterable[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    for row in rows:
        if all(row["settings"].get(name) == value for name, value in settings.items()):
            return row
    return {}


def _values(rows: Sequence[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(row["settings"][name] for row in rows if name in row["settings"]))


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per allocation, prefill, context and batch, from the cells that it is made of."""
    found = []
    contexts, batches = sorted(_values(rows, "context")), sorted(_values(rows, "batch"))
    for context in contexts:
        best = _largest(rows, context, batches)
        for batch in batches:
            place = {"context": context, "batch": batch}
            plan, decode = (_cell(rows, part=part, **place) for part in ("plan", "decode"))
            for prefill in _values(rows, "prefill"):
                first = _cell(rows, part="prefill", prefill=prefill, **place)
                for allocation in _values(rows, "allocation"):
                    held = _cell(rows, part="allocation", allocation=allocation, **place)
                    found.append({
                        "context": context, "batch": batch, "prefill": prefill, "allocation": allocation,
                        "first token s": first.get("time to first token s"), "ms/token": decode.get("ms per token"),
                        "tokens/s, largest batch": best.get("tokens/s"), "largest batch": best.get("batch"),
                        "device GB": plan.get("peak device GB"), "host GB": plan.get("host GB"),
                        "fragmentation": held.get("fragmentation"), "reserved GB": held.get("peak reserved GB"),
                        "transfers": held.get("transfers"), "calls per transfer": held.get("calls per transfer"),
                    })  # fmt: skip
    return found


def _largest(rows: Sequence[dict[str, Any]], context: int, batches: Sequence[int]) -> dict[str, Any]:
    """The largest of the batches that fits as planned and was measured, and its throughput."""
    for batch in sorted(batches, reverse=True):
        plan, decode = (_cell(rows, part=part, context=context, batch=batch) for part in ("plan", "decode"))
        if "not run" not in plan and plan and "ms per token" in decode:
            return {"batch": batch, "tokens/s": 1000 * batch / decode["ms per token"]}
    return {}


def page(rows: Sequence[dict[str, Any]], about: str) -> str:
    """The page in Markdown.

    Parameters
    ----------
    rows : sequence of dict
        Cells, see :class:`~eval.studies.cells.Cells`.
    about : str
        Hardware and versions, one line.
    """
    shapes, timed = _values(rows, "shape"), _values(rows, "layers")
    parts = [
        "# Allocation and sparse prefill at the shape of Llama-3-70B",
        f"Shape {', '.join(shapes)}, timed on {', '.join(map(str, timed))} layers (0: all) and scaled. {about}.",
        "`python -m eval study allocation-bsfa-70b`",
        _CAN.rstrip(),
        "## Cells",
        markdown(table(rows)),
        "**First token** is a prompt in chunks until its last logits, offloading as it goes; **device GB** the fullest "
        "device as planned for the whole shape, weights included (`alaya_hf.sharding`); **host GB** the offloaded "
        "context; **fragmentation** 1 - largest free run / free bytes, mean over the trace; **calls per "
        "transfer** copies of a document from pool to pool.",
    ]
    missing = [
        {
            **{k: row["settings"].get(k) for k in ("part", "context", "batch", "prefill", "allocation")},
            "why": row["not run"],
        }
        for row in rows
        if "not run" in row
    ]
    if missing:
        parts += ["## Not run", markdown(missing)]
    return "\n\n".join(parts) + "\n"
