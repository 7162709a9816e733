"""Low-bit keys and values of any tokens, element by element, in Triton: see `layout` for where things are."""

from __future__ import annotations

import triton
import triton.language as tl

from alaya_hf.kernels.gpu.layout import Layout


def constants(layout: Layout) -> dict[str, int]:
    """The compile-time arguments that the functions here take."""
    return {
        "PADDED": layout.padded,
        "KEY_BITS": layout.key_bits,
        "VALUE_BITS": layout.value_bits,
        "KEY_WORDS": layout.key_words,
        "VALUE_WORDS": layout.value_words,
        "KEY_PARAMS": layout.key_params,
        "VALUES": layout.values,
        "VALUE_PARAMS": layout.value_params if layout.value_bits else 0,
        "RECORD": layout.record,
    }


@triton.jit
def load_keys(words, halves, at, t, c, mask, PADDED, KEY_BITS: tl.constexpr, KEY_WORDS: tl.constexpr, KEY_PARAMS):  # type: ignore[no-untyped-def]
    """Keys of token `t` of the record that starts at byte `at`, channel `c`; all broadcast against each other."""
    FIELDS: tl.constexpr = 8 // KEY_BITS
    j = c // 8
    tig = c % 8 // 2
    e = c % 2
    word = (t // 8 * 32 + t % 8 * 4 + tig) * KEY_WORDS + j // (2 * FIELDS)
    shift = 16 * e + 8 * (j // FIELDS % 2) + KEY_BITS * (j % FIELDS)
    code = (tl.load(words + at // 4 + word, mask=mask, other=0) >> shift) & ((1 << KEY_BITS) - 1)
    half = (at + KEY_PARAMS) // 2 + ((j // 4 * 4 + tig) * 4 + j % 4) * 2 + e
    step = tl.load(halves + half, mask=mask, other=0.0).to(tl.float32) * (1 << (KEY_BITS * (j % FIELDS))).to(tl.float32)
    return code.to(tl.float32) * step + tl.load(halves + half + PADDED, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_values(  # type: ignore[no-untyped-def]
    words, halves, at, t, c, mask, PADDED: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_WORDS, VALUES, VALUE_PARAMS
):  # type: ignore[no-untyped-def]
    """Values, or their means, likewise."""
    if VALUE_BITS == 0:
        value = tl.load(halves + (at + VALUES) // 2 + c * 2 + t // 32, mask=mask, other=0.0).to(tl.float32)
    else:
        FIELDS: tl.constexpr = 8 // VALUE_BITS
        GROUPS: tl.constexpr = PADDED // 32
        ks = t // 16
        byte = t % 16 // 8
        tig = t % 8 // 2
        e = t % 2
        word = (at + VALUES) // 4 + (ks * 32 + c % 8 * 4 + tig) * VALUE_WORDS + c // 8 // FIELDS
        shift = 16 * e + 8 * byte + VALUE_BITS * (c // 8 % FIELDS)
        code = (tl.load(words + word, mask=mask, other=0) >> shift) & ((1 << VALUE_BITS) - 1)
        half = (at + VALUE_PARAMS) // 2 + (((ks * 4 + tig) * GROUPS + c // 32) * 2 + byte) * 2 + e
        value = code.to(tl.float32) * tl.load(halves + half, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(halves + half + 64 * GROUPS, mask=mask, other=0.0).to(tl.float32)
    return value
