"""Named components that a configuration can ask for: one registry per kind, one line per component."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from alaya_hf.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a short name to a frozen dataclass of parameters.

    Parameters
    ----------
    kind : str
        What is registered, for messages, for example ``"query"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: makes a frozen dataclass available under ``name``."""

        def add(cls: type[T]) -> type[T]:
            self._classes[name] = cls
            cls.kind = name  # type: ignore[attr-defined]
            return cls

        return add

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._classes)

    def build(self, spec: Any) -> T:
        """Turn a specification into an instance.

        Parameters
        ----------
        spec : str, mapping or instance
            ``"dipr"``, ``{"kind": "dipr", "alpha": 0.01}`` or an instance, which is returned as it is.

        Raises
        ------
        ConfigError
            If the name or a parameter is unknown, or a value is out of range.
        """
        if isinstance(spec, tuple(self._classes.values())):
            return cast(T, spec)
        if isinstance(spec, str):
            spec = {"kind": spec}
        if not isinstance(spec, Mapping) or "kind" not in spec:
            raise ConfigError(
                f"{self.kind} must be a name, a mapping with the key 'kind' or an instance, but got {spec!r}. "
                f"Available: {', '.join(self.names())}."
            )
        parameters = dict(spec)
        name = parameters.pop("kind")
        if name not in self._classes:
            raise ConfigError(f"unknown {self.kind} {name!r}. Available: {', '.join(self.names())}.")
        cls = self._classes[name]
        fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(parameters) - set(fields))
        if unknown:
            raise ConfigError(
                f"{self.kind} {name!r} has no parameter {', '.join(map(repr, unknown))}. "
                f"Its parameters: {', '.join(fields) or 'none'}."
            )
        try:
            return cls(**parameters)
        except TypeError as error:
            raise ConfigError(f"{self.kind} {name!r}: {error}. Its parameters: {', '.join(fields)}.") from error

    def spec(self, instance: T) -> dict[str, Any] | str:
        """The inverse of :meth:`build`: plain data for YAML, only what differs from the defaults."""
        parameters = {
            field.name: getattr(instance, field.name)
            for field in dataclasses.fields(instance)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING or getattr(instance, field.name) != field.default
        }
        name = instance.kind  # type: ignore[attr-defined]
        return {"kind": name, **parameters} if parameters else name


QUERIES: Registry[Any] = Registry("query")
INDEXES: Registry[Any] = Registry("index")
RESIDUALS: Registry[Any] = Registry("residual")
ALLOCATORS: Registry[Any] = Registry("allocator")
PREFILLS: Registry[Any] = Registry("prefill")
