"""``python -m eval calibrate-bsfa``: thresholds below which a tile of a prefill's logits is skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alaya_hf.engine.prefill.thresholds import Thresholds, model_shape
from alaya_hf.kernels.sparse_prefill import Q_TILE, tile_maxima
from eval.data import long_contracts
from eval.models import load


def thresholds_of(maxima: Tensor, k: int) -> Tensor:
    """Midpoint of the k-th and the (k+1)-th largest tile maximum.

    Parameters
    ----------
    maxima : Tensor
        ``[..., k_tiles]``, ``-inf`` where there is no off-diagonal tile.

    Returns
    -------
    Tensor
        ``[...]``, ``-inf`` where there are k tiles or fewer.
    """
    if k + 1 > maxima.shape[-1]:
        return torch.full(maxima.shape[:-1], float("-inf"), device=maxima.device)
    best = maxima.topk(k + 1, dim=-1).values
    return (best[..., k - 1] + best[..., k]) / 2


@contextmanager
def _watched(model: Any, see: Callable[[int, Tensor, Tensor, float], None]) -> Iterator[None]:
    """Let `see` look at layer, queries, keys and scaling of every attention of the model."""

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        see(module.layer_idx, query, key, kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, value, None, **{**kwargs, "is_causal": True})

    before = model.config._attn_implementation
    AttentionInterface.register("alaya_calibration", attend)
    model.set_attn_implementation("alaya_calibration")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def calibrate(model: Any, texts: Sequence[Sequence[int]], ks: Sequence[int], name: str) -> dict[int, Thresholds]:
    """Thresholds of a model from its own dense prefills.

    Parameters
    ----------
    model
        With full attention in all layers.
    texts : sequence of sequence of int
        Token ids, all equally many.
    ks : sequence of int
        Tiles to keep per block of queries and head.
    name : str
        For people.

    Returns
    -------
    dict of int to Thresholds
        One table per k, the mean over the texts.

    Raises
    ------
    ValueError
        Without texts, or if they differ in length.

    Notes
    -----
    BSFA (arXiv 2512.07011): 16 texts, k in {16, 32, 64, 96, 128} for the paper. Deterministic. Cost: a prefill and the
    products of queries and keys once more, each text in one pass; float32 scores of 128 queries of all heads at a time.
    """
    lengths = {len(text) for text in texts}
    if len(lengths) != 1:
        raise ValueError(
            f"expected texts of one length, got lengths {sorted(lengths) or 'of no text'}. Cut them alike."
        )
    shape = model_shape(model.config.get_text_config(decoder=True))
    blocks = -(-lengths.pop() // Q_TILE)
    sums = {k: torch.zeros(shape["layers"], shape["heads"], blocks) for k in ks}

    def see(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        maxima = tile_maxima(query, key)[0] * scaling
        for k in ks:
            sums[k][layer] += thresholds_of(maxima, k).cpu()

    device = next(model.parameters()).device
    with _watched(model, see):
        for text in track(texts, description="calibrating", transient=True):
            model.model(input_ids=torch.tensor([list(text)], device=device), use_cache=False)
    about = {"model": name, "texts": len(texts), "tokens": len(texts[0])}
    return {k: Thresholds(total / len(texts), shape, {**about, "k": k}) for k, total in sums.items()}


def calibrate_bsfa(
    model: Annotated[str, typer.Option(help="'smollm2' or a model name or path.")] = "smollm2",
    data_dir: Annotated[Path, typer.Option(help="Folder with cuad.jsonl.gz.")] = Path("../shared/legal"),
    tokens: Annotated[
        int, typer.Option(help="The longest context in use: shorter ones are served, longer ones not.")
    ] = 4096,
    texts: Annotated[int, typer.Option(help="Contracts, the first of CUAD that are long enough.")] = 16,
    k: Annotated[
        str, typer.Option(help="Tiles of 64 keys to keep per 128 queries and head, one file each.")
    ] = "16,32,64,96,128",
    device: Annotated[str, typer.Option(help="'cpu' or a CUDA device.")] = "cpu",
    output: Annotated[Path, typer.Option(help="Folder for the files.")] = Path("results/bsfa"),
) -> None:
    """Write a file of BSFA thresholds per k, for AlayaConfig(prefill={"kind": "bsfa", "thresholds": FILE})."""
    ks = [int(part) for part in k.split(",")]
    if min(ks) < 1:
        raise typer.BadParameter(f"expected k of at least 1, got {k}")
    network, tokenizer = load(model, device)
    chosen = [ids for _, ids in long_contracts(data_dir, tokenizer, tokens, texts)]
    output.mkdir(parents=True, exist_ok=True)
    for each, found in calibrate(network, chosen, ks, model).items():
        path = output / f"{Path(model).name}-{tokens}-k{each}.safetensors"
        found.save(path)
        typer.echo(path)
