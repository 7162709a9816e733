"""Model arguments of the harness to a cache's settings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alaya_hf import AlayaConfig
from alaya_hf.errors import ConfigError

PREFIX = "alaya."


def settings_from(preset: str | None, config: str | Path | None, overrides: Mapping[str, Any]) -> AlayaConfig:
    """The settings that a run asked for.

    Parameters
    ----------
    preset : str, optional
        Name of a preset; ``"alaya"`` if neither this nor ``config`` is given.
    config : path, optional
        YAML file of an :class:`~alaya_hf.AlayaConfig`.
    overrides : mapping
        Dotted fields as for :meth:`~alaya_hf.AlayaConfig.override`, each with the prefix ``alaya.``:
        ``{"alaya.window.local": 256}``.

    Raises
    ------
    ConfigError
        For both a preset and a file, an unknown preset or field, a missing file, a value out of range.
    """
    if preset is not None and config is not None:
        raise ConfigError(
            f"got both preset={preset} and config={config}. Give one, and change it with {PREFIX}FIELD=VALUE."
        )
    if config is None:
        settings = AlayaConfig.preset(preset or "alaya")
    else:
        if not Path(config).is_file():
            raise ConfigError(f"config={config} is no file. Give the path of a YAML file, or preset=NAME.")
        settings = AlayaConfig.from_yaml(config)
    changes = {key[len(PREFIX) :]: value for key, value in overrides.items()}
    try:
        return settings.override(changes) if changes else settings
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in overrides.items())
        raise ConfigError(f"cannot set {given}: {error}. Give a value of the field's type.") from error
