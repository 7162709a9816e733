"""What is stored beside the vectors of a run of tokens: the indexes and copies that were built on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from alaya_hf.kernels.cpu.blocks import BlockMeans
from alaya_hf.kernels.cpu.lowbit import LowBitKV
from alaya_hf.registry import INDEXES
from alaya_hf.storage.segment import Segment


@dataclass(frozen=True)
class Part:
    """A run of tokens of a file that was one segment in memory.

    Parameters
    ----------
    start, stop : int
        Tokens of the file.
    entries : tuple of mapping
        What is stored: ``{"kind": "low_bit" | "means" | "index", "prefix": str, ...}``; the prefix leads the names of its
        tensors.
    """

    start: int
    stop: int
    entries: tuple[Mapping[str, Any], ...] = field(default=())


def spec_of(index: Any) -> str:
    """An index and its parameters as text; equal for equal parameters."""
    return json.dumps(INDEXES.spec(index), sort_keys=True)


def dump(segment: Segment, name: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Entries and tensors of everything that was built on a segment.

    Parameters
    ----------
    segment : Segment
    name : str
        Leads the names of the tensors.
    """
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}

    def add(prefix: str, state: Mapping[str, Tensor], **entry: Any) -> None:
        prefix = f"{name}.{prefix}"
        entries.append({**entry, "prefix": prefix})
        tensors.update({f"{prefix}.{key}": tensor for key, tensor in state.items()})

    for (key_bits, value_bits), low in segment._lowbits.items():
        if low.num_tokens == segment.used:
            add(f"low_bit{len(entries)}", low.state_dict(), kind="low_bit", key_bits=key_bits, value_bits=value_bits)
    for (block, with_keys, tokens), means in segment._means.items():
        if tokens is None and means.num_tokens == segment.used:
            add(f"means{len(entries)}", means.state_dict(), kind="means", block=block, keys=with_keys)
    for index, searcher in segment._searchers.items():
        state = searcher.state()
        if state is not None and searcher.num_tokens == segment.used:
            add(f"index{len(entries)}", state, kind="index", spec=spec_of(index))
    return entries, tensors


def write_parts(parts: list[Part]) -> str:
    """As text for the header of a file."""
    return json.dumps([{"start": p.start, "stop": p.stop, "entries": list(p.entries)} for p in parts])


def read_parts(text: str, tokens: int) -> list[Part]:
    """From the header of a file.

    Raises
    ------
    ValueError
        For runs that overlap, leave the file or say what is not understood.
    """
    parts, end = [], 0
    for entry in json.loads(text):
        start, stop = entry["start"], entry["stop"]
        if type(start) is not int or type(stop) is not int or not end <= start < stop <= tokens:
            raise ValueError(f"a run of tokens {start} to {stop} does not fit a file of {tokens}")
        parts.append(Part(start, stop, tuple(entry["entries"])))
        end = stop
    return parts


def lowbit_of(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], heads: int, head_dim: int, tokens: int
) -> LowBitKV:
    """The low-bit copy of an entry."""
    key_bits, value_bits = entry["key_bits"], entry["value_bits"]
    return LowBitKV.from_state_dict(dict(tensors), heads, head_dim, key_bits, value_bits, tokens)


def means_of(
    entry: Mapping[str, Any], tensors: Mapping[str, Tensor], heads: int, head_dim: int, tokens: int
) -> BlockMeans:
    """The block means of an entry."""
    return BlockMeans.from_state_dict(dict(tensors), heads, head_dim, int(entry["block"]), bool(entry["keys"]), tokens)
