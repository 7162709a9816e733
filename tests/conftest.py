"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numba
import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from alaya_hf.patches import prompt_guard, routing
from tests.interpreted import INTERPRET_EVERY, INTERPRETED
from tests.sampling import leave_out

settings.register_profile(
    "alaya",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "alaya"))
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
# Test processes share the cores: a parallel region that waits for a thread of its own costs more than the work of a test.
numba.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests in Triton's interpreter first, which take minutes each, and a sample of their cases; no GPU tests without a GPU."""
    if INTERPRETED:
        leave_out(config, items, INTERPRET_EVERY, lambda item: item.name.startswith("test_case"))
    items.sort(key=lambda item: not item.name.startswith("test_in_interpreter"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _patches_as_found() -> Iterator[None]:
    """Routing and prompt guard are on, as after the first AlayaCache of a process, and stay so for the next test."""
    routing.enable()
    prompt_guard.enable()
    yield
    routing.enable()
    prompt_guard.enable()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a two-layer model and a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=alphabet[0], eos_token=alphabet[0]).save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
