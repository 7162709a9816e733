"""What each layer retrieved, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor


def save_picture(
    path: Path,
    histogram: Tensor,
    tokens_per_layer: Sequence[float],
    document_tokens: int,
    context_tokens: int,
    answers: Sequence[int] = (),
    title: str = "",
) -> None:
    """Draw a heat map, layers by document position, beside the tokens per layer.

    Parameters
    ----------
    path : Path
        Of the file; its suffix says the format.
    histogram : Tensor
        ``[layers, bins]`` counts of fetched tokens, the bins spread over ``context_tokens`` positions.
    tokens_per_layer : sequence of float
        Tokens retrieved per query head and step, one number per layer.
    document_tokens, context_tokens : int
        Length of the document and of all that the bins cover, in tokens.
    answers : sequence of int
        Token positions to mark, where the answers stand.
    title : str
        Headline.
    """
    # Figures built without pyplot leave the caller's backend and figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    counts = histogram.double().numpy()
    layers, bins = counts.shape
    figure = Figure(figsize=(12, 0.16 * layers + 2.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    heat, bar = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))

    colours = LogNorm(vmin=1, vmax=max(2.0, float(counts.max())))
    image = heat.imshow(
        np.where(counts > 0, counts, np.nan),
        aspect="auto",
        interpolation="nearest",
        origin="lower",
        cmap="viridis",
        norm=colours,
        extent=(0, context_tokens, -0.5, layers - 0.5),
    )
    heat.set_facecolor("#f2f2f2")
    heat.set_xlim(0, document_tokens)
    heat.set_xlabel("position in the document (tokens)")
    heat.set_ylabel("layer")
    if answers:
        marks = heat.get_xaxis_transform()
        heat.plot(answers, [1.015] * len(answers), "v", color="#d62728", transform=marks, clip_on=False, markersize=6)
        heat.text(
            1, 1.035, "▼ an answer stands here", transform=heat.transAxes, color="#d62728", ha="right", fontsize=9
        )
    figure.colorbar(image, ax=heat, label=f"tokens fetched per {context_tokens / bins:.0f} positions", pad=0.01)

    bar.barh(range(layers), tokens_per_layer, color="#440154")
    # The first layers ask for a hundred times what the others do.
    bar.set_xscale("symlog", linthresh=1)
    bar.set_xlim(left=0)
    bar.set_xlabel("tokens retrieved\nper query head and step")
    bar.spines[["top", "right"]].set_visible(False)
    bar.tick_params(labelleft=False)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    canvas.print_figure(path, dpi=120)
