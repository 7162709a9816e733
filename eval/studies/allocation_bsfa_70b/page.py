"""The study's page: docs/results/allocation-bsfa-70b.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.report import markdown, read_csv
from eval.studies.allocation_bsfa_70b.answer import (
    answers,
    in_short,
    measured,
    of_allocation,
    of_bsfa,
    of_memory,
    of_scaling,
    plausible,
    strategies,
    values,
    wholest,
)

_TITLE = """\
# Allocation and BSFA at the shape of Llama-3-70B

**What do dynamic memory allocation strategies (FlowKV, PagedAttention) do to the inference efficiency of BSFA-enhanced
Llama-3-70B beyond 128K tokens in legal benchmarks?** FlowKV's segments are `segment`, PagedAttention's blocks `paged`; beside
them `contiguous` (room for the longest context, reserved), `dynamic` (reallocated as it grows) and `virtual` (vAttention's pages
on demand)."""

_CANNOT = """\
## What random weights cannot show

Weights are random; keys that are decoded over are distributed as a real model's are (`eval/synthetic.py`). Times of dense
arithmetic, copies and memory management, bytes on every side, and what fits depend on shapes and are shown here. **No number of
these tables says anything about the quality of an answer**, and these neither:

* How many tiles BSFA skips on text, and so what it gains there. Attention of random weights is nearly even; thresholds are
  made from random tokens to keep k tiles per 128 queries, and past 131,072 tokens repeat the last block's. A gain here is the
  gain at the share of skipped tiles that stands beside it.
* What is lost at that share: on a real model, [prefill.md](prefill.md) has the loss of BSFA's k and of `blasst`.
* Times of fewer layers than the shape's are brought to all of them: of a decode step, and of what it keeps on the device, from
  two numbers of layers, in a straight line; of a prefill in proportion. Of cells that differ in the layers run, the one with the
  most is shown. Over several GPUs the hand-over between them is in no time; `python -m eval legal --config
  configs/llama3_70b.yaml --random-weights` runs the shape over all GPUs of a machine, `make test-gpu` what is tested there.
* Where **weights** says shared, all layers have one layer's weights, so that one device runs every layer of a model that it
  could not hold. A layer's weights are many times what the device's cache holds and come from its memory in every layer, as they
  would."""


_TABLE = """\
Times with one document on the GPU's engine, brought to all layers where **layers run** below says so; memory, copies and refusals
with as many documents at a time as fit, in a pool of 1.2 times what they need. Empty: not measured, see **Not run**."""


def _legal(quality: Path | None) -> list[str]:
    """What legal tasks say of the cache with trained weights."""
    table = quality / "headline.csv" if quality else None
    if table is None or not table.exists():
        return ["No results of legal tasks are at hand: `python -m eval legal` makes them."]
    rows = [row for row in read_csv(table) if row["system"] in ("full", "alaya")]
    full = {(row["model"], row["length"], row["task"]): row["mean"] for row in rows if row["system"] == "full"}
    lines = []
    for row in rows:
        key = (row["model"], row["length"], row["task"])
        if row["system"] == "alaya" and key in full:
            lines.append({
                "tokens": f"{row['length']:,}", "task": row["task"].removeprefix("legal_").replace("_", " "),
                "metric": row["metric"],
                "items": row["items"], "full attention": full[key], "alaya": row["mean"],
                "difference": row["difference"],
                "95 % interval": f"{row['difference_low']:.2f} to {row['difference_high']:.2f}",
            })  # fmt: skip
    models = ", ".join(dict.fromkeys(str(row["model"]) for row in rows))
    # Of differences, points of a score and per cent of a perplexity.
    return [
        f"{models}, dense prefill, contexts of {', '.join(dict.fromkeys(line['tokens'] for line in lines))} tokens "
        "([legal-smollm2](legal-smollm2/README.md)); differences in points, of the perplexity in per cent. An allocator moves "
        "bytes and changes no answer.",
        markdown(lines),
    ]


def _timed(rows: Sequence[dict[str, Any]], part: str, columns: Iterable[str]) -> list[dict[str, Any]]:
    """Lines of measured cells, the same columns in all."""
    names = {"decode": ("system", "allocation"), "prefill": ("prefill", "allocation")}[part]
    found = []
    for row in measured(rows, part=part):
        place = row["settings"]
        own = {name: place[name] or "the engine's own" for name in names}
        if place.get("system") not in (None, "alaya"):
            own["allocation"] = ""
        found.append({
            "shape": place["shape"], "tokens": f"{place['context']:,}", "batch": place["batch"], **own,
            "layers run": place["layers"], "weights": place.get("weights", "own"),
            **{name: row.get(name) for name in columns},
        })  # fmt: skip
    return sorted(found, key=lambda line: (line["shape"], int(line["tokens"].replace(",", "")), line["batch"]))


def _planned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for row in measured(rows, part="plan"):
        place = row["settings"]
        limit = next(iter(measured(rows, part="limits", **{k: place[k] for k in ("shape", "context", "devices")})), {})
        found.append({
            "shape": place["shape"], "tokens": f"{place['context']:,}", "batch": place["batch"],
            "machine": f"{place['devices']} x {place['memory']}, host {place['host']}",
            **{name: row[name] for name in row if name not in ("settings", "seconds")},
            "most rows": limit.get("alaya rows"), "resident, most rows": limit.get("resident rows"),
        })  # fmt: skip
    return found


def _traced(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "shape": row["settings"]["shape"], "tokens": f"{row['settings']['context']:,}",
            "documents at a time": row["settings"]["batch"], "allocation": row["settings"]["allocation"],
            **{name: value for name, value in row.items() if name not in ("settings", "seconds")},
        }
        for row in measured(rows, part="allocation")
    ]  # fmt: skip


def page(rows: Sequence[dict[str, Any]], quality: Path | None = None) -> str:
    """The page in Markdown, of what has been measured so far.

    Parameters
    ----------
    rows : sequence of dict
        Cells, see :class:`~eval.studies.cells.Cells`.
    quality : Path, optional
        Tables of ``python -m eval report`` over the legal tasks.
    """
    everything = plausible(rows)
    rows = wholest(everything)
    claims, machines = answers(rows), values(rows, "device")
    sentences = [*of_bsfa(rows), *of_scaling(everything)]
    details = [*of_allocation(rows), *of_memory(rows)]
    table = strategies(rows)
    held = [claim["holds"] for claim in claims]
    count = {kind: held.count(kind) for kind in ("yes", "no", "not measured")}
    summary = f"{count['yes']} of {len(held)} bounds hold, {count['no']} do not, {count['not measured']} not measured."
    parts = [
        _TITLE,
        f"Timed on {', '.join(machines) or 'no GPU so far'}; `python -m eval study allocation-bsfa-70b --help`; every cell in "
        "`cells.csv` of the results folder.",
        "## Answer",
        *filter(None, [in_short(rows)]),
        *([markdown(table), _TABLE] if table else []),
        *(["\n".join(f"* {sentence}" for sentence in sentences)] if sentences else []),
        *([] if table or sentences or details else ["Nothing has been measured yet."]),
        "## Against full attention on the same machine",
        f"{summary} Resident: the fastest of the baselines that keep all keys on the device, of which `resident` is full "
        "attention in a CUDA graph over buffers that never grow, without any cache of Transformers. Bytes of the cache are those "
        "on the device, as a share of the full keys and values.",
        markdown(claims),
        "## Quality",
        *_legal(quality),
        _CANNOT,
        "## Decoding",
        markdown(_timed(rows, "decode", (
            "ms per token", "tokens/s", "measured ms", "p95 ms", "store", "device share", "MB over the bus per token", "peak GB",
        ))),
        "## Prefill",
        markdown(_timed(rows, "prefill", (
            "first token s", "measured s", "skipped tiles", "store", "host GB", "planned GB", "peak GB", "planned / measured",
        ))),
        "**Planned**: `alaya_hf.sharding.memory_plan` for the layers that ran, and the weights of those that did not.",
        *(["## Strategy by strategy", "\n".join(f"* {each}" for each in details)] if details else []),
        "## Memory of the whole shape, planned",
        markdown(_planned(rows)),
        "**Most rows**: with the store in 8 bits where the host's memory asks for it; resident ones have weights, keys "
        "and values on the devices and nothing else.",
        "## Allocators over a trace of documents and questions",
        markdown(_traced(rows)),
        "Bytes and copies follow from the trace and the shape, and hold on every machine. **Held**: most at a time with room "
        "for all; **fragmentation** (1 - largest free run / free bytes), **refused** and transfers in a pool of 1.2 times what "
        "is needed.",
    ]  # fmt: skip
    missing = [
        {
            **{
                k: row["settings"].get(k)
                for k in ("part", "shape", "context", "batch", "system", "prefill", "allocation")
            },
            "why": row["not run"],
        }
        for row in rows
        if "not run" in row
    ]
    if missing:
        parts += ["## Not run", markdown(missing)]
    return "\n\n".join(parts) + "\n"
