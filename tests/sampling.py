"""Some of a test's cases instead of all, where all of them take long and are run elsewhere as well."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest


def leave_out(config: pytest.Config, items: list[pytest.Item], every: int, of: Callable[[pytest.Item], bool]) -> None:
    """Keep about one case in so many of each test, always the same ones, and always one.

    Parameters
    ----------
    items : list of Item
        Changed in place.
    every : int
        1: all.
    of : callable
        Whether a test is sampled at all.
    """
    seen: set[str] = set()
    kept: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        test = item.nodeid.partition("[")[0]
        first = test not in seen
        seen.add(test)
        here = not of(item) or first or zlib.crc32(item.nodeid.encode()) % every == 0
        (kept if here else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept
