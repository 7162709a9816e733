"""Full attention over resident keys, without Python in the step: what a cache that offloads has to be compared with."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import AttentionInterface

from alaya_hf.cache_argument import cache_argument

NAME = "resident_speed"


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Without a mask and without repeating the KV heads, either of which costs several times the attention itself."""
    gqa = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous(), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _no_mask)


class Resident(DynamicCache):
    """Keys and values of a fixed number of tokens in buffers of a fixed place; every new token takes the last one's place.

    For timing alone: a step attends to as many tokens as it would, and never to the token before it.

    Parameters
    ----------
    config
        Of the model.
    keys, values : Tensor
        ``[batch, kv_heads, tokens, head_dim]`` of one layer; each layer gets copies, with room for one token more.
    """

    def __init__(self, config: Any, keys: Tensor, values: Tensor) -> None:
        super().__init__(config=config)
        batch, kv_heads, tokens, head_dim = keys.shape
        self.tokens = tokens
        self.held = []
        for _ in range(config.num_hidden_layers):
            pair = keys.new_empty(2, batch, kv_heads, tokens + 1, head_dim)
            pair[0, :, :, :tokens], pair[1, :, :, :tokens] = keys, values
            self.held.append(pair)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Put the new token in the last place; all keys and values of the layer."""
        pair = self.held[layer_idx]
        pair[0, :, :, -1:].copy_(key_states)
        pair[1, :, :, -1:].copy_(value_states)
        return pair[0], pair[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that the caller has seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        """Those of the buffers."""
        return self.held[layer_idx].shape[3], 0


@contextmanager
def stepping(model: Any, cache: Resident, batch: int) -> Iterator[None]:
    """Let the model's call be one step over the cache: on a GPU a captured CUDA graph, elsewhere the step itself."""
    device = model.device
    ids = torch.ones(batch, 1, dtype=torch.int64, device=device)
    positions = torch.full_like(ids, cache.tokens)
    own = model.forward

    def step() -> Tensor:
        return own(
            input_ids=ids, position_ids=positions, **cache_argument(cache), use_cache=True, logits_to_keep=1
        ).logits

    graph, logits = None, None
    if device.type == "cuda":
        with torch.no_grad():
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step()
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = step()

    @functools.wraps(own)
    def call(input_ids: Tensor | None = None, **kwargs: Any) -> CausalLMOutputWithPast:
        assert input_ids is not None
        ids.copy_(input_ids[:, -1:])
        if graph is None:
            out = step()
        else:
            graph.replay()
            out = logits.clone()
        cache.tokens += 1
        return CausalLMOutputWithPast(logits=out, **cache_argument(cache))

    model.forward = call
    try:
        yield
    finally:
        del model.forward
