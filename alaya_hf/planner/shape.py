"""What the planner has to know of a model and of the device it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from alaya_hf.errors import UnsupportedModelError


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder.

    Attributes
    ----------
    layers : int
        Layers that offload.
    heads, kv_heads, head_dim : int
    dtype : torch.dtype
        Of keys and values.
    device : str
        Type of the device that the keys are on: ``"cuda"``, ``"cpu"``, ...
    parameters : int
        Numbers that a decode step reads, about: the weights without the embedding table. 0: not known.
    name : str
        Where a profile of the model is looked for.
    numbers : tuple of int
        Of the layers that offload; empty: all.
    capped : bool
        Whether logits are capped or heads have sinks, which only the host engine serves.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    device: str = "cpu"
    parameters: int = 0
    name: str = ""
    numbers: tuple[int, ...] = ()
    capped: bool = False

    def number(self, place: int) -> int:
        """Of the layer at a place among those that offload."""
        return self.numbers[place] if self.numbers else place

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values in one layer, in the model's precision."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    @classmethod
    def from_config(cls, config: Any, dtype: torch.dtype | None = None, device: str = "cpu") -> ModelShape:
        """From a Transformers configuration; no weights are needed.

        Parameters
        ----------
        config : PreTrainedConfig
        dtype : torch.dtype, optional
            Default: the configuration's, else bfloat16.
        device : str

        Raises
        ------
        UnsupportedModelError
            If the configuration does not say how many heads and layers there are.
        """
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
        heads, layers = getattr(text, "num_attention_heads", None), getattr(text, "num_hidden_layers", None)
        hidden = getattr(text, "hidden_size", None)
        if not heads or not layers or not hidden:
            raise UnsupportedModelError(
                f"expected a decoder's configuration with num_hidden_layers, num_attention_heads and hidden_size, but got "
                f"{type(text).__name__} with {layers}, {heads} and {hidden}. Give the numbers: --layers, --heads, --kv-heads, "
                "--head-dim."
            )
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        kinds = getattr(text, "layer_types", None)
        full = tuple(i for i, kind in enumerate(kinds) if kind == "full_attention") if kinds else ()
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        per_layer = hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner
        found = getattr(text, "dtype", None)
        return cls(
            layers=len(full) or layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype or (found if isinstance(found, torch.dtype) else torch.bfloat16),
            device=device,
            parameters=layers * per_layer + hidden * (getattr(text, "vocab_size", None) or 0),
            name=str(getattr(config, "_name_or_path", "") or ""),
            numbers=() if len(full) in (0, layers) else full,
            capped=getattr(text, "attn_logit_softcapping", None) is not None
            or "gpt_oss" in str(getattr(text, "model_type", "")),
        )
