"""What all figures share: their type, their style, labels that do not collide."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from eval.reporting.systems import look

INK, SOFT, RULE = "#22272e", "#626b76", "#e3e6ea"
#: Light to dark in one hue, readable in grey and by colour-blind readers.
SEQUENTIAL = LinearSegmentedColormap.from_list("blues", ["#f1f5f9", "#b7d1e8", "#5b9bd0", "#1f639f", "#0a3157"])
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#b6bdc6",
    "axes.labelcolor": SOFT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "svg.hashsalt": "alaya",
    "svg.fonttype": "path",
}


@dataclass(frozen=True)
class Panel:
    """One drawing: a file's name without its ending, what it shows, the figure."""

    name: str
    title: str
    figure: Figure

    @cached_property
    def image(self) -> bytes:
        """The drawing as SVG, text as outlines; equal input gives equal bytes."""
        with matplotlib.rc_context(STYLE):
            buffer = io.BytesIO()
            metadata = {"Date": None, "Creator": None}
            self.figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.06, metadata=metadata)
            return buffer.getvalue()


@dataclass(frozen=True)
class Plot:
    """One figure of the report, of one or more panels.

    Parameters
    ----------
    key : str
        For anchors.
    title : str
    reading : str
        One plain sentence that says how to read it.
    panels : list of Panel
    notes : list of str
        What is not shown, and why.
    width : int
        Least width of a panel in pixels; as many stand in a row as fit.
    """

    key: str
    title: str
    reading: str
    panels: list[Panel]
    notes: list[str] = field(default_factory=list)
    width: int = 500


def canvas(width: float = 5.6, height: float = 3.9) -> tuple[Figure, Axes]:
    """A figure of one pair of axes, in inches, in the report's style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        return figure, figure.add_subplot()


def log_axis(axis: Any, text: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 where it spans little."""
    decades = np.log10(max(values) / min(values)) if values and min(values) > 0 else 1
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=12))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def label_margin(axes: Axes, points: Sequence[tuple[float, float, str, str]], step: float = 0.062) -> None:
    """Name points in the right margin, in the order of their heights, each joined to its point by a hairline.

    Parameters
    ----------
    axes : Axes
        With its final limits.
    points : sequence of (x, y, system, text)
        In data coordinates.
    step : float
        Smallest distance of two labels, as a share of the height.
    """
    # Asking for the limits makes matplotlib settle them.
    axes.get_xlim(), axes.get_ylim()
    heights = [float(axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1]) for x, y, _, _ in points]
    ranked = sorted(range(len(points)), key=lambda place: heights[place])
    for place, height in zip(ranked, spread([heights[place] for place in ranked], step), strict=True):
        x, y, system, text = points[place]
        colour = look(system).colour
        axes.annotate(
            "",
            xy=(x, y),
            xytext=(1.025, height),
            xycoords="data",
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.7, "alpha": 0.45, "shrinkA": 0, "shrinkB": 3},
            annotation_clip=False,
        )
        axes.plot(
            [1.04],
            [height],
            look(system).marker,
            color=colour,
            markersize=5.5 * (1.4 if look(system).marker == "*" else 1),
            transform=axes.transAxes,
            clip_on=False,
        )
        bold = "bold" if system == "alaya" else "normal"
        axes.text(1.065, height, text, transform=axes.transAxes, va="center", fontsize=8.6, color=INK, fontweight=bold)


def spread(heights: Sequence[float], step: float) -> list[float]:
    """Ascending heights moved as little as keeps neighbours ``step`` apart, around the middle of [0, 1].

    Neighbours that collide are merged into blocks centred on their mean (pool adjacent violators).
    """
    blocks: list[tuple[float, int]] = []

    def centre(total: float, size: int) -> float:
        # More labels than fit run over below and above alike.
        half = step * (size - 1) / 2
        return min(max(total / size, half), 1 - half) if half <= 0.5 else 0.5

    for height in heights:
        total, size = height, 1
        while blocks and centre(total, size) - centre(*blocks[-1]) < step * (size + blocks[-1][1]) / 2:
            other, many = blocks.pop()
            total, size = total + other, size + many
        blocks.append((total, size))
    return [centre(*block) + step * (place - (block[1] - 1) / 2) for block in blocks for place in range(block[1])]


def cells(
    axes: Axes,
    grid: np.ndarray[Any, Any],
    across: Sequence[str],
    down: Sequence[str],
    limits: tuple[float, float],
    texts: Sequence[Sequence[str]],
) -> None:
    """A heat map ``[down, across]`` with texts written in; NaN stays empty."""
    low, high = limits
    axes.grid(False)
    axes.imshow(grid, cmap=SEQUENTIAL, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(range(len(across)), across)
    axes.set_yticks(range(len(down)), down)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for place in np.arange(0.5, len(across) - 1):
        axes.axvline(place, color="white", lw=2)
    for place in np.arange(0.5, len(down) - 1):
        axes.axhline(place, color="white", lw=2)
    for row, column in np.ndindex(*grid.shape):
        value = grid[row, column]
        if np.isnan(value):
            axes.text(column, row, "–", ha="center", va="center", color=SOFT, fontsize=8)
            continue
        dark = (value - low) > 0.55 * (high - low)
        axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=8, color="white" if dark else INK)
