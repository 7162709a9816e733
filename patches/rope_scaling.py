"""Lets a model that was trained on short texts take longer ones: another scaling of its rotary embedding.

Transformers scales a model's rotary embedding where its configuration says so, which has to be before the model is made. Here the
same functions (``ROPE_INIT_FUNCTIONS``) fill the embedding of a model that is there already.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alaya_hf.errors import ConfigError, UnsupportedModelError
from alaya_hf.patches.base import Patch

KINDS = ("linear", "dynamic", "yarn", "llama3")
#: Llama 3.1's own.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_STATE = ("rope_type", "attention_scaling", "max_seq_len_cached", "original_max_seq_len")
_BUFFERS = ("inv_freq", "original_inv_freq")


def extend_rope(model_or_config: Any, factor: float, kind: str = "yarn", **parameters: Any) -> RopeScaling:
    """A patch under which a model takes texts `factor` times as long as it was trained on.

    Parameters
    ----------
    model_or_config : PreTrainedModel or PreTrainedConfig
        A configuration alone is for models made from it while the patch is on.
    factor : float
        More than 1. 16 makes 131,072 tokens of 8,192.
    kind : {"yarn", "linear", "llama3", "dynamic"}
        How frequencies are scaled: YaRN (arXiv 2309.00071), which keeps high ones and needs no training up to moderate factors;
        all alike (position interpolation, arXiv 2306.15595), which needs fine-tuning; Llama 3.1's rule; or by the length of each
        pass (NTK), see the notes.
    **parameters
        Of the kind, as in ``rope_parameters``: ``beta_fast``, ``low_freq_factor``, ...

    Returns
    -------
    RopeScaling
        Not on yet: ``with extend_rope(...)`` or ``extend_rope(...).enable()``.

    Raises
    ------
    ConfigError
        For an unknown kind, or a factor that does not extend.
    UnsupportedModelError
        If the embedding is scaled already, or differs between layers.

    Notes
    -----
    ``"dynamic"`` changes frequencies as a text grows, and keys keep those that they were made with: use it where a prompt is
    prefilled in one pass. It looks at positions on the host, so decode steps are not captured in CUDA graphs, and
    ``max_position_embeddings``, which its rule reads, stays as it is. With the other kinds it is multiplied by `factor`.
    A cache and a stored context belong to the embedding that they were made with.
    """
    return RopeScaling(model_or_config, factor, kind, parameters)


class RopeScaling(Patch):
    """What :func:`extend_rope` returns: takes back exactly what it replaced, of this one model."""

    def __init__(self, model_or_config: Any, factor: float, kind: str, parameters: dict[str, Any]) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, but got {kind!r}.")
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not factor > 1:
            raise ConfigError(f"factor must be a number greater than 1, but got {factor!r}.")
        config = getattr(model_or_config, "config", model_or_config)
        if not isinstance(config, PreTrainedConfig):
            raise UnsupportedModelError(
                f"expected a Transformers model or its configuration, but got {type(model_or_config).__name__}."
            )
        self.config = config.get_text_config(decoder=True)
        self.modules = self._embeddings(model_or_config) if isinstance(model_or_config, nn.Module) else []
        self.factor, self.kind, self.parameters = float(factor), kind, parameters
        self._check()

    def _embeddings(self, model: nn.Module) -> list[nn.Module]:
        found = [part for part in model.modules() if hasattr(part, "rope_type") and "inv_freq" in part._buffers]
        if not found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no rotary embedding of Transformers' kind (modules with rope_type and inv_freq)."
            )
        return found

    def _check(self) -> None:
        held = getattr(self.config, "rope_parameters", None)
        name = type(self.config).__name__
        if not isinstance(held, dict) or "rope_theta" not in held or any(isinstance(x, dict) for x in held.values()):
            raise UnsupportedModelError(
                f"{name} has rope_parameters {held!r}, and only those of one rotary embedding for all layers can be scaled."
            )
        if held.get("rope_type", "default") != "default":
            raise UnsupportedModelError(
                f"the rotary embedding of {name} is scaled already ({held['rope_type']!r}). Use the model as it is, up to "
                f"{self.config.max_position_embeddings:,} tokens, or load it with rope_parameters of your own."
            )

    def _apply(self) -> None:
        self._check()
        config = self.config
        original = config.max_position_embeddings
        self._held = (config.rope_parameters, original)
        scaled = {**config.rope_parameters, "rope_type": self.kind, "factor": self.factor}
        if self.kind in ("yarn", "llama3"):
            scaled["original_max_position_embeddings"] = original
        if self.kind == "llama3":
            scaled |= _LLAMA3
        self._before: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        try:
            config.rope_parameters = {**scaled, **self.parameters}
            if self.kind != "dynamic":
                config.max_position_embeddings = round(original * self.factor)
            for module in self.modules:
                self._scale(module)
        except BaseException:
            self._restore()
            raise

    def _scale(self, module: Any) -> None:
        state = {name: getattr(module, name) for name in _STATE if hasattr(module, name)}
        buffers = {name: module._buffers[name] for name in _BUFFERS if name in module._buffers}
        # 'original_inv_freq' is a buffer in some releases and an attribute in others.
        state |= {name: module.__dict__[name] for name in _BUFFERS if name in module.__dict__}
        self._before.append((module, state, buffers))
        device = module._buffers["inv_freq"].device
        frequencies, scaling = ROPE_INIT_FUNCTIONS[self.kind](self.config, device)
        module.rope_type, module.attention_scaling = self.kind, scaling
        module.max_seq_len_cached = module.original_max_seq_len = self.config.max_position_embeddings
        for name in _BUFFERS:
            if name in buffers:
                module._buffers[name] = frequencies.clone()
            elif name in state:
                setattr(module, name, frequencies.clone())

    def _restore(self) -> None:
        self.config.rope_parameters, self.config.max_position_embeddings = self._held
        for module, state, buffers in self._before:
            for name, value in state.items():
                setattr(module, name, value)
            module._buffers.update(buffers)
        self._before = []
