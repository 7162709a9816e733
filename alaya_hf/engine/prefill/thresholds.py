"""Files of BSFA's thresholds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from alaya_hf.errors import ConfigError

FORMAT = "alaya_hf bsfa 1"


def model_shape(config: Any) -> dict[str, Any]:
    """What tells models apart in a file: type, sizes and rotary embedding of a text configuration."""
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "rope_theta": rope.get("rope_theta", getattr(config, "rope_theta", None)),
    }


@dataclass(frozen=True)
class Thresholds:
    """Thresholds of one model.

    Attributes
    ----------
    table : Tensor
        ``[layers, heads, q_blocks]`` float32 on the host, in logits; block ``i`` is tokens ``128 i`` and following.
    shape : dict
        Of the model, see :func:`model_shape`.
    about : dict
        How they were made, for people: ``k``, ``texts``, ``tokens``, ``model``.
    """

    table: Tensor
    shape: dict[str, Any]
    about: dict[str, Any]

    def check_model(self, config: Any) -> None:
        """Raise if a model (its text configuration) is another one.

        Raises
        ------
        ConfigError
        """
        given = model_shape(config)
        different = [key for key in given if given[key] != self.shape.get(key)]
        if different:
            raise ConfigError(
                f"thresholds were calibrated for {self.about.get('model')} with "
                f"{', '.join(f'{key}={self.shape.get(key)}' for key in different)}, but the model has "
                f"{', '.join(f'{key}={given[key]}' for key in different)}. Calibrate for this model with "
                "`python -m eval calibrate-bsfa`."
            )

    def of_layer(self, layer_idx: int, heads: int, kv_heads: int, head_dim: int) -> Tensor:
        """``[heads, q_blocks]`` of one layer.

        Raises
        ------
        ConfigError
            If the file has no such layer or its heads are others.
        """
        given = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        if layer_idx >= len(self.table) or any(self.shape.get(key) != value for key, value in given.items()):
            raise ConfigError(
                f"thresholds were calibrated for {self.about.get('model')}, {len(self.table)} layers with "
                f"{', '.join(f'{key}={self.shape.get(key)}' for key in given)}, but layer {layer_idx} of this model has "
                f"{', '.join(f'{key}={value}' for key, value in given.items())}. Calibrate for this model with "
                "`python -m eval calibrate-bsfa`."
            )
        return self.table[layer_idx]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: the table, and everything else as JSON in its metadata."""
        metadata = {"format": FORMAT, "shape": json.dumps(self.shape), "about": json.dumps(self.about)}
        save_file({"thresholds": self.table.contiguous()}, str(path), metadata=metadata)


def load_thresholds(path: str) -> Thresholds:
    """Read a file of thresholds; kept until the file changes.

    Raises
    ------
    ConfigError
        If it is missing or not such a file.
    """
    try:
        found = Path(path).stat()
    except OSError as error:
        raise ConfigError(
            f"the thresholds {path} cannot be read ({error}). Make the file with `python -m eval calibrate-bsfa`."
        ) from error
    return _load(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=8)
def _load(path: str, modified: int, size: int) -> Thresholds:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            table = file.get_tensor("thresholds")
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}")
        shape, about = json.loads(metadata["shape"]), json.loads(metadata["about"])
        if (
            table.dtype != torch.float32
            or table.shape[:2] != (shape["layers"], shape["heads"])
            or bool(table.isnan().any())
        ):
            raise ValueError(f"its table is {list(table.shape)} {table.dtype}")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no file of BSFA thresholds ({error}): expected a safetensors file that `python -m eval calibrate-bsfa` "
            "wrote."
        ) from error
    return Thresholds(table, shape, about)
