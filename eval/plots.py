"""Plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def loglog(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time per step against context length, one line per system and one panel per dtype."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(1, len(kinds), figsize=(6.5 * len(kinds), 5), sharey=True, squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        here = [row for row in rows if row["dtype"] == kind]
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        for system in dict.fromkeys(row["system"] for row in here):
            points = sorted((row["context"], row["ms"]) for row in here if row["system"] == system)
            style = "k--" if system == "torch SDPA" else "o-"
            axis.loglog([x for x, _ in points], [y for _, y in points], style, label=system, markersize=4)
        axis.set_title(f"one layer's decode step, {kind}")
        axis.set_xlabel("context (tokens)")
        axis.set_xscale("log", base=2)
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("median time (ms)")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """KL to full attention against tokens retrieved, one line per family."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5.5))
    axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for family in dict.fromkeys(row["family"] for row in rows):
        points = sorted((row["retrieved %"], row["KL"]) for row in rows if row["family"] == family)
        axis.semilogy([x for x, _ in points], [y for _, y in points], "o-", label=family, markersize=4)
    axis.set_xlabel("tokens retrieved per query head (% of the context)")
    axis.set_ylabel("KL to full attention (nats per token)")
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def allocation(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Reserved bytes and the share of them that no token needs, with room for all; fragmentation in the tight pool.

    Points have ``allocator``, ``pool`` (``ample`` or ``tight``), ``event``, ``needed``, ``reserved`` (GiB) and ``fragmentation``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 4.6))
    for name in dict.fromkeys(point["allocator"] for point in points):
        ample, tight = (
            [p for p in points if (p["allocator"], p["pool"]) == (name, pool)] for pool in ("ample", "tight")
        )
        x = [point["event"] for point in ample]
        axes[0].semilogy(x, [point["reserved"] for point in ample], label=name, linewidth=1.2)
        axes[1].plot(x, [100 * (1 - point["needed"] / point["reserved"]) for point in ample], linewidth=1.2)
        axes[2].plot([p["event"] for p in tight], [p["fragmentation"] for p in tight], linewidth=1.2)
    axes[0].semilogy(x, [point["needed"] for point in ample], "k--", label="needed", linewidth=1)
    titles = ("reserved (GiB), room for all", "of it not needed (%)", "tight pool: 1 - largest free run / free bytes")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("event of the trace")
        axis.grid(True, alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def per_token(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time per token of a whole model against context length, one line per system.

    Rows have ``system``, ``tokens`` and ``ms``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5.5))
    for system in dict.fromkeys(row["system"] for row in rows):
        points = sorted((row["tokens"], row["ms"]) for row in rows if row["system"] == system)
        style = "o-" if system.startswith("alaya") else "s--"
        axis.loglog([x for x, _ in points], [y for _, y in points], style, label=system, markersize=4)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("context (tokens)")
    axis.set_ylabel("time per token (ms)")
    axis.grid(True, which="both", alpha=0.25)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def prefill(model: Sequence[dict[str, Any]], layer: Sequence[dict[str, Any]], path: Path) -> None:
    """Time to first token and peak memory of a whole model against the prompt's length; one layer's attention beside cuDNN's.

    Parameters
    ----------
    model : sequence of dict
        ``tokens``, ``system``, ``chunk``, ``s``, ``peak GB``; of equal ones the fastest counts.
    layer : sequence of dict
        ``tokens``, ``system``, ``x SDPA`` (how many times as fast).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(17, 4.8))
    lines: dict[str, dict[int, dict[str, Any]]] = {}
    for row in model:
        whole = row["system"] == "full" or row["chunk"] == row["tokens"]
        name = "DynamicCache" if row["system"] == "full" else f"{row['system']}, {'whole' if whole else row['chunk']}"
        held = lines.setdefault(name, {}).get(row["tokens"])
        if row.get("s") is not None and (held is None or row["s"] < held["s"]):
            lines[name][row["tokens"]] = row
    for name, points in lines.items():
        style = "k--" if name == "DynamicCache" else "o-"
        for axis, column in zip(axes, ("s", "peak GB"), strict=False):
            found = [(tokens, row[column]) for tokens, row in sorted(points.items()) if row.get(column) is not None]
            axis.plot([x for x, _ in found], [y for _, y in found], style, label=name, markersize=5)
    axes[0].set_yscale("log")
    for axis, title in zip(
        axes, ("time to first token (s)", "peak device memory, weights included (GB)"), strict=False
    ):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("prompt (tokens)")
        axis.set_title(title)
        axis.grid(True, alpha=0.3)
    axes[0].legend(fontsize=8)
    sizes = list(dict.fromkeys(row["tokens"] for row in layer))
    systems = [name for name in dict.fromkeys(row["system"] for row in layer) if "offloading" not in name]
    for place, tokens in enumerate(sizes):
        speed = {row["system"]: row["x SDPA"] for row in layer if row["tokens"] == tokens}
        at = [index + 0.4 * (place - (len(sizes) - 1) / 2) for index in range(len(systems))]
        axes[2].barh(at, [speed.get(name) or 0 for name in systems], height=0.38, label=f"{tokens:,} tokens")
    axes[2].set_yticks(range(len(systems)), systems, fontsize=8)
    axes[2].invert_yaxis()
    axes[2].axvline(1, color="k", linewidth=1)
    axes[2].set_title("one layer's attention: times as fast as cuDNN")
    axes[2].grid(True, axis="x", alpha=0.3)
    axes[2].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
