"""How the kernel is cut for a head dimension: a short table, and what a measurement on the device in use chose from it."""

from __future__ import annotations

from dataclasses import dataclass

from alaya_hf.kernels.sparse_prefill.tiles import K_TILE


@dataclass(frozen=True)
class Cut:
    """Parameters of a compilation.

    Attributes
    ----------
    keys : int
        Keys of a tile; rules that skip tiles have theirs (:data:`~alaya_hf.kernels.sparse_prefill.K_TILE`).
    warps : int
        Of a program, which has 128 queries. Four are one of Hopper's warp groups.
    stages : int
        Tiles of keys and of values in shared memory.
    """

    keys: int
    warps: int
    stages: int


#: By the largest head dimension and whether tiles are skipped, the one to use first. Two programs of four warps share an SM (a
#: program's softmax runs beside the other's products) where their tiles fit its 227 KiB; the wait for the verdict on a tile is
#: then one warp group's. Dense attention takes wider tiles in two warp groups. What does not fit a device gives way to the next.
_TABLE: dict[tuple[int, bool], tuple[Cut, ...]] = {
    (64, True): (Cut(K_TILE, 4, 3), Cut(K_TILE, 4, 2), Cut(K_TILE, 4, 4), Cut(K_TILE, 8, 3)),
    (128, True): (Cut(K_TILE, 4, 2), Cut(K_TILE, 8, 2), Cut(K_TILE, 8, 3), Cut(K_TILE, 4, 3), Cut(K_TILE, 4, 1)),
    (256, True): (Cut(K_TILE, 8, 2), Cut(K_TILE, 8, 1)),
    (64, False): (Cut(128, 8, 3), Cut(64, 4, 3), Cut(128, 8, 2)),
    (128, False): (Cut(128, 8, 3), Cut(64, 4, 2), Cut(128, 8, 2), Cut(64, 4, 1)),
    (256, False): (Cut(64, 8, 2), Cut(64, 8, 1)),
}
_preferred: dict[tuple[int, bool], Cut] = {}


def _key(head_dim: int, skips: bool) -> tuple[int, bool]:
    return (64 if head_dim <= 64 else 128 if head_dim <= 128 else 256), skips


def cuts(head_dim: int, skips: bool) -> tuple[Cut, ...]:
    """Candidates for a head dimension up to 256, the preferred one first."""
    key = _key(head_dim, skips)
    first = _preferred.get(key, _TABLE[key][0])
    return (first, *(cut for cut in _TABLE[key] if cut != first))


def prefer(head_dim: int, skips: bool, cut: Cut) -> None:
    """Use a candidate first from now on, in this process.

    Raises
    ------
    ValueError
        If it is none of :func:`cuts`.
    """
    key = _key(head_dim, skips)
    if cut not in _TABLE[key]:
        raise ValueError(
            f"expected one of {_TABLE[key]} for head dimension {head_dim}, got {cut}. Ask cuts() for the candidates."
        )
    _preferred[key] = cut
