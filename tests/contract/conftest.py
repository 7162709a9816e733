"""Models, built once per process; a sample of the battery where the whole of it is run elsewhere."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract import models
from tests.sampling import leave_out

#: One case in so many is run.
EVERY = int(os.environ.get("CONTRACT_EVERY", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but the sample."""
    leave_out(config, items, EVERY, lambda item: "tests/contract/" in item.nodeid)


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
