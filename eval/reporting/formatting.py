"""Numbers as text, the same everywhere."""

from __future__ import annotations

from typing import Any

MINUS = "−"


def signed(value: float, digits: int = 1) -> str:
    """With its sign and a proper minus; zero has none."""
    text = f"{value:+.{digits}f}"
    if float(text) == 0:
        return f"{0:.{digits}f}"
    return text.replace("-", MINUS)


def nats(value: float) -> str:
    """Two significant digits, scientific below 0.0001."""
    if value == 0:
        return "0"
    text = f"{value:.2g}" if abs(value) >= 1e-4 else f"{value:.1e}"
    return text.replace("e-0", "e-").replace("-", MINUS, 1) if value < 0 else text.replace("e-0", "e-")


def seconds(value: float) -> str:
    """Milliseconds below one second."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def tokens(value: float, _: Any = None) -> str:
    """Thousands separated, no decimals."""
    return f"{value:,.0f}"


def value(kind: str, number: float) -> str:
    """A shown value of a measure's kind."""
    if kind == "points":
        return f"{number:.1f}"
    if kind == "perplexity":
        return f"{number:.2f}"
    if kind == "change":
        return signed(number, 2) + " %"
    return {"nats": nats, "tokens": tokens, "seconds": seconds}[kind](number)


def gap(kind: str, number: float) -> str:
    """A shown difference of a measure's kind."""
    if kind in ("points",):
        return signed(number)
    if kind in ("perplexity", "change"):
        return signed(number, 2) + " %"
    if kind == "tokens":
        return signed(number, 0)
    text = seconds(abs(number)) if kind == "seconds" else nats(abs(number))
    return f"{'+' if number > 0 else MINUS}{text}" if number else text


def interval(kind: str, middle: float, low: float | None, high: float | None) -> str:
    """``"[low, high]"`` of a value; empty without an interval, and where its ends read like the value."""
    return _interval(value, kind, middle, low, high)


def gap_interval(kind: str, middle: float, low: float | None, high: float | None) -> str:
    """The same of a difference."""
    return _interval(gap, kind, middle, low, high)


def _interval(text: Any, kind: str, middle: float, low: float | None, high: float | None) -> str:
    if low is None or high is None or text(kind, low) == text(kind, middle) == text(kind, high):
        return ""
    return f"[{_end(text, kind, low)}, {_end(text, kind, high)}]"


def _end(text: Any, kind: str, number: float) -> str:
    """An interval's end, in whole points from 10 on and without its unit."""
    if kind == "points" and abs(number) >= 10:
        return signed(number, 0) if text is gap else f"{number:.0f}"
    return text(kind, number).removesuffix(" %")


def length(number: int) -> str:
    """A context length: 4096 as 4K, 6000 as 6,000."""
    return f"{number // 1024}K" if number % 1024 == 0 else f"{number:,}"
