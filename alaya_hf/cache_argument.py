"""The name under which models take a cache.

Transformers 5.24 renamed ``past_key_values`` to ``cache``, in calls and in outputs, and warns of the old name. Either works
for the caches of this package, in every supported version.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Final

from transformers.generation import GenerationMixin

#: Both names, the newer one first.
CACHE_ARGUMENTS: Final = ("cache", "past_key_values")

#: What the installed Transformers calls it.
CACHE_ARGUMENT: Final[str] = next(
    name
    for name in CACHE_ARGUMENTS
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return ``cache`` as a keyword argument of a model's call or of ``generate``.

    Parameters
    ----------
    cache
        Any ``Cache`` of Transformers, or None.

    Returns
    -------
    dict
        One item, under the installed Transformers' name: ``model(ids, **cache_argument(cache))``.
    """
    return {CACHE_ARGUMENT: cache}


def renamed(kwargs: Mapping[str, Any], mark: str) -> dict[str, Any]:
    """Return a call's keyword arguments with a cache that has the attribute ``mark`` under the installed name.

    Other caches stay under the name they came by: what Transformers says of that is for whoever wrote the call.
    """
    found = dict(kwargs)
    given = [name for name in CACHE_ARGUMENTS if name in found]
    if len(given) == 1 and hasattr(found[given[0]], mark):
        found[CACHE_ARGUMENT] = found.pop(given[0])
    return found
