"""Models, built once per process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract import models


@functools.cache
def _model(name: str, attn_implementation: str | None = None, seed: int = 0) -> Any:
    return models.build(name, attn_implementation, seed)


@pytest.fixture(scope="session")
def get_model() -> Callable[..., Any]:
    """``get_model(name, attn_implementation=None, seed=0)``, cached."""
    return _model


@pytest.fixture(scope="session")
def dense_model() -> Callable[[str], Any]:
    """``dense_model(name)``: the same weights under a stock attention implementation, for reference outputs."""
    return lambda name: _model(name, models.DENSE.get(name, "sdpa"))
