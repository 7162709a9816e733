"""Models, built once per process; a sample of the battery where the whole of it is run elsewhere."""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable
from typing import Any

import pytest

from tests.contract import models

#: Of each test's cases about one in so many is run, always the same ones, and always one.
EVERY = int(os.environ.get("CONTRACT_EVERY", "1"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but the sample."""
    if EVERY == 1:
        return
    seen: set[str] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        first = test not in seen
        seen.add(test)
        here = "tests/contract/" not in item.nodeid or first or zlib.crc32(item.nodeid.encode()) % EVERY == 0
        (kept if here else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


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
