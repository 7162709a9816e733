"""What a patch is: a change to upstream that can be taken back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType


class Patch(ABC):
    """Replaces attributes of upstream while it is on, and restores exactly what it replaced.

    Use it as a context manager, or through :meth:`enable` and :meth:`disable`. Entering it while it is on changes nothing.
    """

    def __init__(self) -> None:
        self._depth = 0

    @property
    def enabled(self) -> bool:
        """Whether the patch is on."""
        return self._depth > 0

    @abstractmethod
    def _apply(self) -> None: ...

    @abstractmethod
    def _restore(self) -> None: ...

    def enable(self) -> None:
        """Switch on; returns at once if it is on already."""
        if not self._depth:
            self._apply()
            self._depth = 1

    def disable(self) -> None:
        """Switch off and restore upstream."""
        if self._depth:
            self._depth = 0
            self._restore()

    def __enter__(self) -> Patch:
        if self._depth:
            self._depth += 1
        else:
            self.enable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._depth > 1:
            self._depth -= 1
        else:
            self.disable()
