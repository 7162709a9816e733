"""``alaya-hf explain``: what the planner would do, before anything runs."""

from __future__ import annotations

from typing import Any

import torch

from alaya_hf.config import AlayaConfig
from alaya_hf.errors import ConfigError
from alaya_hf.planner.calibration import load_calibration
from alaya_hf.planner.explain import Explanation, explain_plan
from alaya_hf.planner.plan_model import Planner
from alaya_hf.planner.profile import load_profile
from alaya_hf.planner.shape import ModelShape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def shape_of(
    model: str | None, numbers: dict[str, int | None], dtype: str | None, device: str
) -> ModelShape:  # fmt: skip
    """A model's shape, from its configuration alone or from numbers.

    Parameters
    ----------
    model : str or None
        A name or a folder; only its configuration is read.
    numbers : dict
        ``layers``, ``heads``, ``kv_heads``, ``head_dim`` and ``parameters``; those given take the place of the configuration's.
    dtype : str or None
    device : {"auto", "cuda", "cpu"}
        Where it is to run; need not be here.

    Raises
    ------
    ConfigError
        If neither a model nor all of its numbers are given.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: value for name, value in numbers.items() if value is not None}
    kind = None if dtype is None else DTYPES[dtype]
    if model is not None:
        from transformers import AutoConfig

        if model == "smollm2":
            from alaya_hf.cli.smollm2 import load_smollm2

            config: Any = load_smollm2()[0].config
        else:
            try:
                config = AutoConfig.from_pretrained(model)
            except (OSError, ValueError) as error:
                raise ConfigError(f"--model {model!r} has no configuration that can be read: {error}") from error
        found = ModelShape.from_config(config, kind, where)
        return ModelShape(**{**vars(found), **given}) if given else found
    missing = [name for name in ("layers", "heads", "kv_heads", "head_dim") if name not in given]
    if missing:
        raise ConfigError(
            f"expected --model, or all of --layers, --heads, --kv-heads and --head-dim, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing."
        )
    return ModelShape(**{"dtype": kind or torch.bfloat16, "device": where, **given})  # type: ignore[arg-type]


def explain(
    shape: ModelShape, settings: AlayaConfig, context: int, batch: int, calibration: str | None = None, profile: str | None = None
) -> Explanation:  # fmt: skip
    """The plan for a context, as an explanation.

    Raises
    ------
    ConfigError
        Of the planner: see :meth:`Planner.plan`.
    """
    costs = load_calibration(shape, calibration)
    planner = Planner(settings, shape, costs, load_profile(shape.name if profile is None else profile))
    return explain_plan(planner.plan(context, batch))
