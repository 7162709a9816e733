"""Errors raised for bad input.

All derive from :class:`ValueError`, so ``except ValueError`` catches every misuse; the subclasses let callers tell them
apart. Each message names what was given, what was expected and what to do.
"""


class AlayaError(ValueError):
    """Base class of everything this package raises about its input."""


class ConfigError(AlayaError):
    """An unknown preset, an unknown configuration key or a parameter out of range."""


class ConflictError(ConfigError):
    """Settings that contradict each other."""


class BudgetError(ConfigError):
    """The memory that the planner may use holds no plan, or no longer holds the one that runs."""


class CalibrationError(ConfigError):
    """A file of measured costs or of a model's profile is not what the planner reads."""


class UnsupportedModelError(AlayaError):
    """The model has no rotary multi-head or grouped-query attention that this cache can serve."""


class UnsupportedMaskError(AlayaError):
    """An attention mask that is not causal + padding."""


class IgnoredCacheError(AlayaError):
    """An attention implementation read the cache's keys without asking the cache to attend."""


class PromptMismatchError(AlayaError):
    """The prompt does not continue the tokens that the cache holds."""


class BatchSizeError(AlayaError):
    """The batch size differs from the one the cache was filled with."""


class NonFiniteError(AlayaError):
    """Keys or values that are infinite or not a number."""


class HostMemoryError(AlayaError, MemoryError):
    """The host has too little free memory for the requested context."""


class StoreError(AlayaError):
    """A store of contexts cannot do what was asked; nothing visible has changed."""


class CorruptStoreError(StoreError):
    """A stored file is damaged, incomplete or not what the catalog says; names the context and the layer."""


class FingerprintError(StoreError):
    """A stored context was made by another model; the message names what differs."""


class UnknownContextError(StoreError, KeyError):
    """There is no such context in the namespace."""

    def __str__(self) -> str:
        # KeyError shows its argument quoted.
        return ValueError.__str__(self)


class ContextExistsError(StoreError):
    """Another context has the name already."""


class ReadOnlyStoreError(StoreError):
    """The store, or its folder, may not be written to."""


class DiskFullError(StoreError, OSError):
    """The disk has too little room for what would be stored."""

    def __str__(self) -> str:
        # OSError shows an error number.
        return ValueError.__str__(self)


class RemoteError(StoreError):
    """A remote store failed or took too long; local contexts go on being served."""


class PoolFullError(AlayaError, MemoryError):
    """A KV pool has too little free memory, or no place for a sequence that long; the pool is as it was."""


class UnknownSequenceError(AlayaError):
    """A KV pool holds no sequence under this number: it was freed, or belongs to another pool."""


class UnavailableError(AlayaError, RuntimeError):
    """This system lacks what was asked for: a package, a device or a feature of the operating system."""
