"""A real model on a real contract: retrieval answers as full attention does."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from alaya_hf import AlayaCache, AlayaConfig, AlayaError
from alaya_hf.cache_argument import cache_argument

TOKENS = 2600
NEW = 6
CONTRACTS = Path(__file__).parents[2] / "shared" / "legal" / "cuad.jsonl.gz"


def contract() -> str:
    """The first contract of CUAD, or licence agreements where CUAD is not at hand."""
    if CONTRACTS.exists():
        with gzip.open(CONTRACTS, "rt", encoding="utf-8") as lines:
            return json.loads(next(lines))["text"]
    folder = Path(pytest.importorskip("spdx", reason="needs CUAD or the package spdx for a contract").__file__).parent
    texts = [path for path in sorted(folder.rglob("*QPL-1.0*")) + sorted(folder.rglob("*CNRI*")) if path.is_file()]
    if not texts:
        pytest.skip("the package spdx holds no licence texts here")
    return "\n\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts)


@pytest.mark.slow
def test_answers_of_full_attention() -> None:
    """One prefill, shared by three questions, whose answers stand in the offloaded part of the contract."""
    smollm2 = pytest.importorskip("alaya_hf.cli.smollm2", reason="needs the demo's packages")
    try:
        model, tokenizer = smollm2.load_smollm2()
    except AlayaError as error:
        pytest.skip(str(error))
    model.set_attn_implementation("alaya")
    ids = tokenizer(contract(), return_tensors="pt").input_ids[:, :TOKENS]
    settings = AlayaConfig.preset("alaya").replace(window=(64, 256), min_context=0)
    cache, dense = AlayaCache(settings), DynamicCache(config=model.config)
    with torch.no_grad():
        for held in (cache, dense):
            model(ids, **cache_argument(held), logits_to_keep=1)
    stats = cache.stats()
    assert stats["offloaded_bytes"] / stats["total_bytes"] == pytest.approx(1 - 320 / ids.shape[1])
    # Passages far outside the window; copying on is what a small model does well.
    for place in (0.5, 0.7, 0.75):
        start = int(place * ids.shape[1])
        stop = start + 24
        question = torch.cat([ids, tokenizer("\n\n", return_tensors="pt").input_ids, ids[:, start:stop]], dim=1)
        actual, expected = (
            model.generate(
                question,
                attention_mask=torch.ones_like(question),
                **cache_argument(copy.deepcopy(held)),
                max_new_tokens=NEW,
                do_sample=False,
            )[0, question.shape[1] :].tolist()
            for held in (cache, dense)
        )
        # Full attention answers from what is offloaded here: otherwise the test would say little.
        assert expected == ids[0, stop : stop + NEW].tolist()
        assert actual == expected
    assert cache.stats()["offloaded_bytes"] == stats["offloaded_bytes"]
