"""What one process of the test of tensor parallelism does: ``python -m tests.tensor_parallel MODEL [RANKS]``."""

from __future__ import annotations

import json
import os
import sys
import warnings

import torch
from transformers import AutoModelForCausalLM

from alaya_hf import AlayaCache, AlayaConfig
from alaya_hf.cache_argument import cache_argument


def main(folder: str, ranks: int) -> None:
    """Generate and print, on rank 0, what came out and how many KV heads each layer has here."""
    torch.set_num_threads(1)
    plan = {}
    if ranks > 1:
        warnings.filterwarnings("ignore", category=FutureWarning)
        plan = {"tp_plan": "auto"}
    cuda = torch.cuda.is_available()
    if cuda and ranks > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    elif cuda:
        plan = {"device_map": "cuda:0"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16 if cuda else torch.float32, **plan)
    ids = (torch.arange(1, 200)[None] % 90 + 1).to(model.device)
    # The collectives of a step are no part of a graph.
    engine = {"engine": "device", "cuda_graphs": "none"} if cuda else {}
    cache = AlayaCache(AlayaConfig(window=(4, 20), min_context=0, **engine))
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=8, do_sample=False
    )
    if int(os.environ.get("RANK", 0)) == 0:
        print(
            json.dumps(
                {"tokens": out[0, 199:].tolist(), "heads": [layer.contents()[0].shape[1] for layer in cache.layers]}
            )
        )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 1)
