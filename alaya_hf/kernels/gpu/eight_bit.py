"""8-bit codes in kernels: the arithmetic of `store_format`, element by element.

float8_e4m3fn is done by hand, because devices before compute capability 8.9 (and Triton's interpreter) have no conversion:
its bits, shifted under a half's five bits of exponent, are the half that is 2 ** -8 times the number, subnormals included.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(codes, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What is in a store as float32, scales left out. `FORMAT`: :attr:`~alaya_hf.kernels.gpu.store_format.StoreFormat.code`."""
    if FORMAT == 2:
        bits = codes.to(tl.int32)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        numbers = half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        numbers = codes.to(tl.float32)
    return numbers


@triton.jit
def nearest(x):
    """The nearest integer, half to even, of numbers below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode(x, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of at most the largest code as codes, in the bits of an int8."""
    if FORMAT == 2:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        # Below 2 ** -6 numbers are subnormal: the distance of two codes shrinks no further.
        exponent = tl.maximum((size >> 23) - 127, -6)
        per_step = ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # 2 ** (3 - exponent)
        steps = nearest(size.to(tl.float32, bitcast=True) * per_step).to(tl.int32)
        # A mantissa that is rounded up to the next power of two carries into the exponent.
        codes = (tl.minimum((exponent + 6) * 8 + steps, 0x7E) | ((bits >> 24) & 0x80)).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(nearest(x), -127.0), 127.0).to(tl.int8)
    return codes


@triton.jit
def quantise(x, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes and scale of one vector, float32; NaN as the scale where a value is not finite."""
    PER_CODE: tl.constexpr = 1 / 448 if FORMAT == 2 else 1 / 127
    finite = tl.min((tl.abs(x) <= 3.4028234663852886e38).to(tl.int32), 0) > 0
    scale = tl.max(tl.abs(x), 0) * PER_CODE
    some = finite & (scale > 0)
    codes = encode(tl.where(some, tl.div_rn(x, tl.where(some, scale, 1.0)), 0.0), FORMAT)
    return codes, tl.where(finite, scale, float("nan"))
