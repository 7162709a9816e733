"""``python -m eval speed prefill``: time to first token of a whole model, offloading as it goes, against DynamicCache."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import DynamicCache

from alaya_hf import AlayaCache
from eval.environment import describe
from eval.random_model import SHAPES, random_model
from eval.report import markdown, write_csv
from eval.speed_model import DEVICE


def prefill_once(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Seconds until the next token's logits are there; of a cache that knows how many tokens will come, as in ``generate``."""
    cuda = ids.is_cuda
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            model(
                input_ids=ids[:, start : start + chunk], past_key_values=cache, logits_to_keep=1
            ).logits.argmax().item()
    return time.perf_counter() - began


def prefill(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-3-8b",
    contexts: Annotated[str, typer.Option(help="Context lengths, comma-separated.")] = "32768,131072",
    chunks: Annotated[str, typer.Option(help="Chunk sizes for the offloading cache; 0: all in one pass.")] = "0,16384",
    layers: Annotated[int, typer.Option(help="Only so many of the model's layers; 0: all.")] = 0,
    repeats: Annotated[
        int, typer.Option(help="Passes per system, the fastest counts; the first one makes host memory.")
    ] = 2,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    output: Annotated[Path, typer.Option(help="Folder for table and CSV.")] = Path("results/speed-prefill"),
) -> None:
    """Time to first token: DynamicCache in one pass against the offloading cache, in one pass and in chunks."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise typer.BadParameter("expected a CUDA device, found none")
    rows: list[dict[str, Any]] = []
    text = ""
    with torch.cuda.device(device) if cuda else nullcontext():
        model = random_model(shape, device, torch.bfloat16 if cuda else torch.float32, layers)
        settings = DEVICE if cuda else DEVICE.replace(engine="host")
        warm = torch.randint(1, model.config.vocab_size, (1, 4096), device=device)
        for cache in (DynamicCache(config=model.config), AlayaCache(settings, config=model.config)):
            prefill_once(model, cache, warm, 2048)
        for tokens in (int(n) for n in contexts.split(",")):
            ids = torch.randint(1, model.config.vocab_size, (1, tokens), device=device)
            systems = [("full", 0)] + [("alaya", int(chunk)) for chunk in chunks.split(",")]
            for name, chunk in systems:
                times = []
                for _ in range(repeats):
                    gc.collect()
                    if cuda:
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    cache = (
                        DynamicCache(config=model.config)
                        if name == "full"
                        else AlayaCache(settings, config=model.config)
                    )
                    if name == "alaya":
                        cache.reserve(tokens)
                    times.append(prefill_once(model, cache, ids, chunk or tokens))
                    del cache
                row = {"tokens": tokens, "system": name, "chunk": chunk or tokens, "s": min(times), "first s": times[0]}
                base = next((r["s"] for r in rows if r["tokens"] == tokens and r["system"] == "full"), row["s"])
                row |= {"x full": row["s"] / base, "tokens/s": tokens / row["s"]}
                row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
                rows.append(row)
                output.mkdir(parents=True, exist_ok=True)
                write_csv(output / "prefill.csv", rows)
                text = f"{describe()}; {shape}{f', {layers} layers' if layers else ''}\n\n{markdown(rows)}\n"
                (output / "prefill.md").write_text(text, encoding="utf-8")
                typer.echo(text.splitlines()[-1])
    typer.echo(text)
