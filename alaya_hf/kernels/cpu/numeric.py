"""What the CPU kernels are made of: loads from 16-bit stores, a vectorisable ``exp2``, dot and update micro-kernels.

Numba has no vector types and no 16-bit floats, so the innermost loops are written as LLVM IR through
:func:`numba.extending.intrinsic`. The IR uses generic 16-lane vectors: LLVM maps them to one AVX-512 register, two AVX2
registers or four NEON registers, so the same code runs everywhere and is fast where the hardware is wide.

Stores are handed over as flat NumPy arrays without a copy (:func:`flat_store`): float32 as ``float32``, bfloat16 as
``int16`` and float16 as ``uint16``. The integer type is what tells the intrinsics which conversion to emit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = ["FASTMATH", "LN2", "LOG2E", "flat_store", "check_store", "check_queries", "splits", "as_numpy"]

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
VL = 16

# No "nnan"/"ninf": masked tokens carry a logit of -inf.
FASTMATH = {"reassoc", "contract", "arcp", "nsz", "afn"}
_FM = ("reassoc", "contract", "nsz")

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VF32 = ir.VectorType(_F32, VL)


# ---------------------------------------------------------------------------------------------------------- tensors
def check_store(kv: torch.Tensor) -> None:
    """Raise ``ValueError`` unless `kv` is a ``[kv_heads, tokens, 2, head_dim]`` store readable in place."""
    if kv.ndim != 4 or kv.shape[2] != 2:
        raise ValueError(f"expected a store of shape [kv_heads, tokens, 2, head_dim], got {tuple(kv.shape)}")
    if kv.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected a float32, float16 or bfloat16 store, got {kv.dtype}; convert it first")
    if kv.device.type != "cpu":
        raise ValueError(f"expected a store in host memory, got one on {kv.device}; use the kernels of that device")
    d = kv.shape[3]
    if kv.numel() and (kv.stride(3), kv.stride(2), kv.stride(1)) != (1, d, 2 * d):
        raise ValueError(
            f"expected keys and values of a token side by side (strides 2*d, d, 1 with d={d}), got {kv.stride()}; "
            "only the stride between heads may be larger"
        )


def check_queries(q: torch.Tensor, kv_heads: int, head_dim: int) -> None:
    """Raise ``ValueError`` unless `q` is float32 ``[kv_heads, group, head_dim]`` in host memory."""
    if q.ndim != 3 or q.shape[0] != kv_heads or q.shape[2] != head_dim or q.dtype != torch.float32:
        raise ValueError(
            f"expected float32 queries of shape [{kv_heads}, group, {head_dim}], got {q.dtype} {tuple(q.shape)}; "
            "fold query positions into the group and convert to float32"
        )
    if q.device.type != "cpu":
        raise ValueError(f"expected queries in host memory, got them on {q.device}; move them with .cpu()")


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor as NumPy without a copy; bfloat16 becomes ``int16`` and float16 ``uint16``."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy()
    if tensor.dtype == torch.float16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def flat_store(kv: torch.Tensor) -> tuple[np.ndarray, int]:
    """Flat view of a store and its stride between heads, in elements; no copy.

    Parameters
    ----------
    kv : Tensor ``[kv_heads, tokens, 2, head_dim]``
        Possibly a view of the first tokens of a larger buffer.

    Returns
    -------
    flat : ndarray ``[(kv_heads - 1) * stride + tokens * 2 * head_dim]``
        float32, int16 (bfloat16 bits) or uint16 (float16 bits).
    stride : int
        Elements from one head to the next.
    """
    heads, tokens, _, d = kv.shape
    if kv.numel() == 0:
        return as_numpy(torch.empty(0, dtype=kv.dtype)), 0
    stride = kv.stride(0) if heads > 1 else tokens * 2 * d
    return as_numpy(torch.as_strided(kv.detach(), ((heads - 1) * stride + tokens * 2 * d,), (1,))), stride


def splits(kv_heads: int, tokens: int, smallest: int = 512) -> int:
    """Number of token ranges per KV head: enough to occupy every thread, none shorter than `smallest` tokens."""
    threads = numba.get_num_threads()
    if kv_heads <= 0 or tokens <= smallest:
        return 1
    wanted = -(-threads // kv_heads)
    if (kv_heads * wanted) % threads:  # uneven: more and shorter pieces balance better
        wanted = -(-4 * threads // kv_heads)
    return max(1, min(wanted, tokens // smallest))


# ------------------------------------------------------------------------------------------------------- IR helpers
def _data(context: Any, builder: ir.IRBuilder, ty: types.Array, value: ir.Value) -> ir.Value:
    """Data pointer of a numba array."""
    return context.make_array(ty)(context, builder, value).data


def _at(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, as_type: ir.Type | None = None) -> ir.Value:
    """Pointer to an element, without bounds or sign checks, optionally reinterpreted."""
    where = builder.gep(pointer, [index])
    return where if as_type is None else builder.bitcast(where, as_type.as_pointer())


def _mul_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """``a * b + c``; contracted to one instruction where the target has it."""
    return builder.fadd(builder.fmul(a, b, flags=_FM), c, flags=_FM)


def _widen(builder: ir.IRBuilder, bits: ir.Value, dtype: types.Type) -> ir.Value:
    """Convert loaded elements (scalar or vector) of a store to float32."""
    if dtype == types.float32:
        return bits
    lanes = bits.type.count if isinstance(bits.type, ir.VectorType) else 0

    def shaped(scalar: ir.Type) -> ir.Type:
        return ir.VectorType(scalar, lanes) if lanes else scalar

    if dtype == types.int16:  # bfloat16 is the upper half of a float32
        wide = builder.zext(bits, shaped(_I32))
        by = ir.Constant(shaped(_I32), [16] * lanes if lanes else 16)
        return builder.bitcast(builder.shl(wide, by), shaped(_F32))
    if dtype == types.uint16:
        return builder.fpext(builder.bitcast(bits, shaped(ir.HalfType())), shaped(_F32))
    raise TypeError(f"no conversion from {dtype} to float32")


def _load_vector(builder: ir.IRBuilder, pointer: ir.Value, index: ir.Value, dtype: types.Type) -> ir.Value:
    """Load 16 elements of a store as float32."""
    element = _F32 if dtype == types.float32 else ir.IntType(16)
    align = 4 if dtype == types.float32 else 2
    raw = builder.load(_at(builder, pointer, index, ir.VectorType(element, VL)), align=align)
    return _widen(builder, raw, dtype)


def _splat(builder: ir.IRBuilder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Copy a scalar into every lane."""
    lane0 = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, vector.count), [0] * vector.count)
    return builder.shuffle_vector(lane0, ir.Constant(vector, ir.Undefined), mask)


def _reduce_add(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Sum of the lanes of a 16-lane vector, as a tree of halvings."""
    width = vector.type.count
    while width > 1:
        width //= 2
        kind = ir.VectorType(_I32, width)
        undef = ir.Constant(vector.type, ir.Undefined)
        low = builder.shuffle_vector(vector, undef, ir.Constant(kind, list(range(width))))
        high = builder.shuffle_vector(vector, undef, ir.Constant(kind, list(range(width, 2 * width))))
        vector = builder.fadd(low, high, flags=_FM)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


# -------------------------------------------------------------------------------------------------- scalar intrinsics
@intrinsic
def load_f32(typingctx, array, index):  # type: ignore[no-untyped-def]
    """``float32(array[index])`` of a flat store, no bounds or wraparound check."""
    sig = types.float32(array, types.intp)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _data(context, builder, array, args[0])
        return _widen(builder, builder.load(_at(builder, pointer, args[1])), array.dtype)

    return sig, codegen


@intrinsic
def half_to_f32(typingctx, bits):  # type: ignore[no-untyped-def]
    """Float32 value of the float16 with these bits (uint16)."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), _F32)

    return types.float32(types.uint16), codegen


@intrinsic
def f32_to_half(typingctx, value):  # type: ignore[no-untyped-def]
    """Bits (uint16) of the float16 nearest to a float32."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


@intrinsic
def fmax(typingctx, a, b):  # type: ignore[no-untyped-def]
    """Larger of two float32; NaN is not allowed for, which is what lets a maximum loop vectorise."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered(">", args[0], args[1], flags=flags), args[0], args[1], flags=flags)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def fmin(typingctx, a, b):  # type: ignore[no-untyped-def]
    """Smaller of two float32; NaN is not allowed for."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        flags = ("nnan", "nsz")
        return builder.select(builder.fcmp_ordered("<", args[0], args[1], flags=flags), args[0], args[1], flags=flags)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def exp2_f32(typingctx, value):  # type: ignore[no-untyped-def]
    """``2 ** x`` for x <= 127, to about 2e-7 relative; 0 below -126 (so also for -inf).

    Plain arithmetic (split into integer and fraction, a degree-6 polynomial, the exponent set by bits), because a call
    to libm would keep the loop around it scalar.
    """
    sig = types.float32(types.float32)
    coefficients = [LN2**k / f for k, f in zip(range(7), (1, 1, 2, 6, 24, 120, 720), strict=True)]

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        (x,) = args
        floor = ir.Constant(_F32, -126.0)
        small = builder.fcmp_ordered("<", x, floor)
        clamped = builder.select(small, floor, x)
        rint = builder.module.declare_intrinsic("llvm.rint", [_F32])
        whole = builder.call(rint, [clamped])
        r = builder.fsub(clamped, whole)
        y = ir.Constant(_F32, np.float32(coefficients[6]).item())
        for c in coefficients[5::-1]:
            y = _mul_add(builder, y, r, ir.Constant(_F32, np.float32(c).item()))
        exponent = builder.add(builder.fptosi(whole, _I32), ir.Constant(_I32, 127))
        power = builder.bitcast(builder.shl(exponent, ir.Constant(_I32, 23)), _F32)
        return builder.select(small, ir.Constant(_F32, 0.0), builder.fmul(y, power))

    return sig, codegen


@intrinsic
def prefetch(typingctx, array, index):  # type: ignore[no-untyped-def]
    """Ask for the cache line holding ``array[index]``."""
    sig = types.void(array, types.intp)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        pointer = _at(builder, _data(context, builder, array, args[0]), args[1], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(fn, [pointer, ir.Constant(_I32, 0), ir.Constant(_I32, 2), ir.Constant(_I32, 1)])
        return context.get_dummy_value()

    return sig, codegen


# ----------------------------------------------------------------------------------------------------- micro-kernels
def _make_dot(tokens: int, heads: int) -> Any:
    """Inner products of `heads` query rows with `tokens` gathered rows of a store, each row read once."""

    @intrinsic
    def dot(typingctx, out, out_at, out_stride, q, q_at, dim, store, base, first):  # type: ignore[no-untyped-def]
        n = types.intp
        sig = types.void(out, n, n, q, n, n, store, base, n)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            o_at, o_stride, q_first, d, t0 = args[1], args[2], args[4], args[5], args[8]
            o_ptr = _data(context, builder, out, args[0])
            q_ptr = _data(context, builder, q, args[3])
            k_ptr = _data(context, builder, store, args[6])
            b_ptr = _data(context, builder, base, args[7])
            rows = [builder.load(_at(builder, b_ptr, builder.add(t0, ir.Constant(_I64, t)))) for t in range(tokens)]
            queries = [builder.add(q_first, builder.mul(d, ir.Constant(_I64, h))) for h in range(heads)]
            zero = ir.Constant(_VF32, [0.0] * VL)
            acc = [[cgutils.alloca_once_value(builder, zero) for _ in range(heads)] for _ in range(tokens)]
            blocks = builder.udiv(d, ir.Constant(_I64, VL))
            with cgutils.for_range(builder, blocks) as loop:
                c = builder.mul(loop.index, ir.Constant(_I64, VL))
                keys = [_load_vector(builder, k_ptr, builder.add(r, c), store.dtype) for r in rows]
                for h in range(heads):
                    qv = _load_vector(builder, q_ptr, builder.add(queries[h], c), types.float32)
                    for t in range(tokens):
                        builder.store(_mul_add(builder, keys[t], qv, builder.load(acc[t][h])), acc[t][h])
            sums = [
                [
                    cgutils.alloca_once_value(builder, _reduce_add(builder, builder.load(acc[t][h])))
                    for h in range(heads)
                ]
                for t in range(tokens)
            ]
            with cgutils.for_range_slice(
                builder, builder.mul(blocks, ir.Constant(_I64, VL)), d, ir.Constant(_I64, 1)
            ) as (c, _):
                for t in range(tokens):
                    k = _widen(builder, builder.load(_at(builder, k_ptr, builder.add(rows[t], c))), store.dtype)
                    for h in range(heads):
                        x = builder.load(_at(builder, q_ptr, builder.add(queries[h], c)))
                        builder.store(_mul_add(builder, k, x, builder.load(sums[t][h])), sums[t][h])
            for h in range(heads):
                row = builder.add(builder.add(o_at, t0), builder.mul(o_stride, ir.Constant(_I64, h)))
                for t in range(tokens):
                    where = _at(builder, o_ptr, builder.add(row, ir.Constant(_I64, t)))
                    builder.store(builder.load(sums[t][h]), where)
            return context.get_dummy_value()

        return sig, codegen

    return dot


def _make_update(tokens: int, heads: int) -> Any:
    """Add `tokens` weighted gathered rows of a store to `heads` accumulator rows, each row read once."""

    @intrinsic
    def update(typingctx, acc, acc_at, dim, p, p_at, p_stride, store, base, first, shift):  # type: ignore[no-untyped-def]
        n = types.intp
        sig = types.void(acc, n, n, p, n, n, store, base, n, n)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            a_first, d, w_first, w_stride, t0, offset = args[1], args[2], args[4], args[5], args[8], args[9]
            a_ptr = _data(context, builder, acc, args[0])
            w_ptr = _data(context, builder, p, args[3])
            v_ptr = _data(context, builder, store, args[6])
            b_ptr = _data(context, builder, base, args[7])
            rows, weights = [], []
            for t in range(tokens):
                row = builder.load(_at(builder, b_ptr, builder.add(t0, ir.Constant(_I64, t))))
                rows.append(builder.add(row, offset))
            for h in range(heads):
                row = builder.add(builder.add(w_first, t0), builder.mul(w_stride, ir.Constant(_I64, h)))
                weights.append(
                    [builder.load(_at(builder, w_ptr, builder.add(row, ir.Constant(_I64, t)))) for t in range(tokens)]
                )
            outs = [builder.add(a_first, builder.mul(d, ir.Constant(_I64, h))) for h in range(heads)]
            splats = [[_splat(builder, w, _VF32) for w in row] for row in weights]
            blocks = builder.udiv(d, ir.Constant(_I64, VL))
            with cgutils.for_range(builder, blocks) as loop:
                c = builder.mul(loop.index, ir.Constant(_I64, VL))
                values = [_load_vector(builder, v_ptr, builder.add(r, c), store.dtype) for r in rows]
                for h in range(heads):
                    where = _at(builder, a_ptr, builder.add(outs[h], c), _VF32)
                    y = builder.load(where, align=4)
                    for t in range(tokens):
                        y = _mul_add(builder, values[t], splats[h][t], y)
                    builder.store(y, where, align=4)
            with cgutils.for_range_slice(
                builder, builder.mul(blocks, ir.Constant(_I64, VL)), d, ir.Constant(_I64, 1)
            ) as (c, _):
                for t in range(tokens):
                    v = _widen(builder, builder.load(_at(builder, v_ptr, builder.add(rows[t], c))), store.dtype)
                    for h in range(heads):
                        where = _at(builder, a_ptr, builder.add(outs[h], c))
                        builder.store(_mul_add(builder, v, weights[h][t], builder.load(where)), where)
            return context.get_dummy_value()

        return sig, codegen

    return update


dot_2x4 = _make_dot(2, 4)
dot_4x1 = _make_dot(4, 1)
update_4x4 = _make_update(4, 4)
update_4x1 = _make_update(4, 1)
