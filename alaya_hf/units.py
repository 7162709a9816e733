"""Times per token and amounts of memory as people write them."""

from __future__ import annotations

import math
import re
from typing import Any

from alaya_hf.errors import ConfigError

_NUMBER = r"([0-9]+(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?)"
_TIME = re.compile(rf"^\s*{_NUMBER}\s*(us|µs|ms|s)(?:\s*/\s*(?:token|tok))?\s*$", re.IGNORECASE)
_RATE = re.compile(rf"^\s*{_NUMBER}\s*(?:tokens|token|tok)\s*/\s*s\s*$", re.IGNORECASE)
_BYTES = re.compile(rf"^\s*{_NUMBER}\s*([kmgt]i?)?b\s*$", re.IGNORECASE)
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_SIZES = {"": 1, **{p: 1000 ** (i + 1) for i, p in enumerate("kmgt")}}
_SIZES |= {p + "i": 1024 ** (i + 1) for i, p in enumerate("kmgt")}


def seconds_per_token(name: str, value: Any) -> float:
    """Seconds per token.

    Parameters
    ----------
    name : str
        Of the setting, for messages.
    value : str or float
        ``"50ms/token"``, ``"0.24s"``, ``"20 tokens/s"``, or a number of seconds.

    Raises
    ------
    ConfigError
        For anything else, and for times that are not positive and finite.
    """
    seconds = math.nan
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and (found := _TIME.match(value)):
        seconds = float(found[1]) * _SECONDS[found[2].lower()]
    elif isinstance(value, str) and (found := _RATE.match(value)):
        seconds = 1 / float(found[1]) if float(found[1]) else math.nan
    if not 0 < seconds < math.inf:
        raise ConfigError(
            f"{name} must be a positive time per token such as '50ms/token', '0.24s/token' or '20 tokens/s', or a number of "
            f"seconds, but got {value!r}."
        )
    return seconds


def number_of_bytes(name: str, value: Any) -> int:
    """Bytes.

    Parameters
    ----------
    name : str
        Of the setting, for messages.
    value : str or int
        ``"2GiB"`` (1024-based), ``"2GB"`` (1000-based), or a number of bytes.

    Raises
    ------
    ConfigError
        For anything else, and for amounts below one byte.
    """
    size = 0.0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (found := _BYTES.match(value)):
        size = float(found[1]) * _SIZES[(found[2] or "").lower()]
    if not 1 <= size < math.inf:
        raise ConfigError(
            f"{name} must be an amount of memory such as '2GiB', '500MB' or a whole number of bytes, but got {value!r}."
        )
    return int(size)


def bytes_text(size: float) -> str:
    """``1.5 GiB``."""
    for exponent, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**exponent:
            return (
                f"{size / 1024**exponent:.3g} {unit}"
                if size < 1000 * 1024**exponent
                else f"{size / 1024**exponent:.0f} {unit}"
            )
    return f"{size:.0f} B"


def time_text(seconds: float) -> str:
    """``12.1 ms``."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"
