"""Approximate scores of every token from the low-bit keys, in 8-bit integer arithmetic."""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from alaya_hf.kernels.cpu.dense import score_buffer
from alaya_hf.kernels.cpu.lowbit import GROUP, LowBitKV
from alaya_hf.kernels.cpu.numeric import (
    FASTMATH,
    VL,
    _at,
    _data,
    _splat,
    as_numpy,
    check_queries,
    fmax,
    half_to_f32,
    splits,
)

__all__ = ["lowbit_scores", "lowbit_scores_reference"]


def _instructions() -> str:
    """Which 8-bit multiply-add the compiler may emit: NUMBA_CPU_FEATURES where set, else what this processor has."""
    chosen = numba.config.CPU_FEATURES
    if chosen is None:
        features = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}
    else:
        features = {name[1:] for name in chosen.split(",") if name.startswith("+")}
    return "vnni" if "avx512vnni" in features else "avx2" if "avx2" in features else "generic"


_INSTRUCTIONS = _instructions()

_I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
_VI32 = ir.VectorType(_I32, VL)


def _constant(vector: ir.VectorType, value: int) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _add_products(builder: ir.IRBuilder, acc: ir.Value, codes: ir.Value, q: ir.Value, how: str) -> ir.Value:
    """``acc[lane] += sum of the four unsigned bytes of codes times the four signed bytes of q``, 16 lanes."""
    if how == "vnni":
        kind = ir.FunctionType(_VI32, [_VI32, ir.VectorType(_I8, 64), ir.VectorType(_I8, 64)])
        fn = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(fn, [acc, *(builder.bitcast(x, ir.VectorType(_I8, 64)) for x in (codes, q))])
    if how == "avx2":
        bytes_, shorts, half = ir.VectorType(_I8, 32), ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
        pairs_type = ir.FunctionType(shorts, [bytes_, bytes_])
        pairs = cgutils.get_or_insert_function(builder.module, pairs_type, "llvm.x86.avx2.pmadd.ub.sw")
        fours = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(half, [shorts, shorts]), "llvm.x86.avx2.pmadd.wd"
        )
        parts = []
        for first in (0, 8):
            lanes = ir.Constant(ir.VectorType(_I32, 8), list(range(first, first + 8)))
            a, b = (builder.bitcast(builder.shuffle_vector(x, x, lanes), bytes_) for x in (codes, q))
            parts.append(builder.call(fours, [builder.call(pairs, [a, b]), _constant(shorts, 1)]))
        whole = ir.Constant(ir.VectorType(_I32, 16), list(range(16)))
        return builder.add(acc, builder.shuffle_vector(parts[0], parts[1], whole))
    for byte in range(4):
        shift = _constant(_VI32, 8 * byte)
        code = builder.and_(builder.lshr(codes, shift), _constant(_VI32, 255))
        weight = builder.ashr(builder.shl(q, _constant(_VI32, 24 - 8 * byte)), _constant(_VI32, 24))
        acc = builder.add(acc, builder.mul(code, weight))
    return acc


def _make_code_dot(bits: int, heads: int, how: str) -> Any:
    """Integer inner products of `heads` query rows with 32 tokens of a packed group."""
    chunks = 2

    @intrinsic
    def code_dot(typingctx, out, out_at, words, words_at, count, q, q_at, q_stride):  # type: ignore[no-untyped-def]
        n = types.intp
        sig = types.void(out, n, words, n, n, q, n, n)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            o_ptr = _data(context, builder, out, args[0])
            w_ptr = _data(context, builder, words, args[2])
            q_ptr = _data(context, builder, q, args[5])
            acc = [
                [cgutils.alloca_once_value(builder, _constant(_VI32, 0)) for _ in range(chunks)] for _ in range(heads)
            ]
            planes = 8 // bits
            with cgutils.for_range(builder, args[4]) as loop:
                at = builder.add(args[3], builder.mul(loop.index, ir.Constant(_I64, GROUP)))
                packed = []
                for chunk in range(chunks):
                    where = _at(builder, w_ptr, builder.add(at, ir.Constant(_I64, VL * chunk)), _VI32)
                    packed.append(builder.load(where, align=4))
                for p in range(planes):
                    mask = sum(((1 << bits) - 1) << (8 * b) for b in range(4))
                    codes = packed
                    if planes > 1:
                        codes = [
                            builder.and_(builder.lshr(x, _constant(_VI32, bits * p)), _constant(_VI32, mask))
                            for x in packed
                        ]
                    here = builder.add(
                        args[6], builder.add(builder.mul(loop.index, ir.Constant(_I64, planes)), ir.Constant(_I64, p))
                    )
                    for h in range(heads):
                        row = builder.add(here, builder.mul(args[7], ir.Constant(_I64, h)))
                        weights = _splat(builder, builder.load(_at(builder, q_ptr, row)), _VI32)
                        for chunk in range(chunks):
                            slot = acc[h][chunk]
                            builder.store(_add_products(builder, builder.load(slot), codes[chunk], weights, how), slot)
            for h in range(heads):
                for chunk in range(chunks):
                    at = builder.add(args[1], ir.Constant(_I64, h * GROUP + chunk * VL))
                    builder.store(builder.load(acc[h][chunk]), _at(builder, o_ptr, at, _VI32), align=4)
            return context.get_dummy_value()

        return sig, codegen

    return code_dot


# The AVX2 instruction saturates at 16 bits, which 8-bit codes would reach.
_HOW8 = "generic" if _INSTRUCTIONS == "avx2" else _INSTRUCTIONS
_dot4_2, _dot1_2 = (_make_code_dot(2, h, _INSTRUCTIONS) for h in (4, 1))
_dot4_4, _dot1_4 = (_make_code_dot(4, h, _INSTRUCTIONS) for h in (4, 1))
_dot4_8, _dot1_8 = (_make_code_dot(8, h, _HOW8) for h in (4, 1))


@njit(cache=True, nogil=True, error_model="numpy")
def _code_scores(acc, words, words_at, count, quads, q_stride, rows, bits):
    """Integer scores of a group of 64 tokens for all query rows."""
    for half in range(2):
        first = words_at + half * 32
        g = 0
        while g < rows:
            at = g * GROUP + half * 32
            if rows - g >= 4:
                if bits == 4:
                    _dot4_4(acc, at, words, first, count, quads, g * q_stride, q_stride)
                elif bits == 2:
                    _dot4_2(acc, at, words, first, count, quads, g * q_stride, q_stride)
                else:
                    _dot4_8(acc, at, words, first, count, quads, g * q_stride, q_stride)
                g += 4
            else:
                if bits == 4:
                    _dot1_4(acc, at, words, first, count, quads, g * q_stride, q_stride)
                elif bits == 2:
                    _dot1_2(acc, at, words, first, count, quads, g * q_stride, q_stride)
                else:
                    _dot1_8(acc, at, words, first, count, quads, g * q_stride, q_stride)
                g += 1


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _fold_query(q, q_at, d, bits, scale, bias, folded, codes, group, g):
    """Fold the steps of a group into one query head and round it to integers.

    ``q . k = sum q (step code + offset)``. With integers ``r`` and a step ``delta``, ``q step = delta r + e``.
    Replacing each code by its middle in the term of ``e`` leaves ``e (code - middle)``, a fraction of the keys' error.

    Returns ``(delta, constant)`` with ``score = delta * (r . code) + constant``.
    """
    top = np.float32(0.0)
    offset = np.float32(0.0)
    whole = np.float32(0.0)
    for c in range(d):
        x = q[q_at + c] * scale[c]
        folded[c] = x
        whole += x
        offset += q[q_at + c] * bias[c]
        top = fmax(abs(x), top)
    steps = np.float32(16256.0) if bits == 8 else np.float32(127.0)
    inverse = steps / top if top > np.float32(1e-30) else np.float32(0.0)
    delta = top / steps
    total = np.int32(0)
    if bits == 8:  # 15 bits of query in two bytes, or the query would be coarser than the keys
        for c in range(d):
            r = np.int32(folded[c] * inverse + np.float32(16384.5)) - np.int32(16384)
            total += r
            high = ((r + np.int32(16448)) >> np.int32(7)) - np.int32(128)
            codes[g, c] = np.int8(high)
            codes[group + g, c] = np.int8(r - high * np.int32(128))
    else:
        for c in range(d):
            r = np.int32(folded[c] * inverse + np.float32(128.5)) - np.int32(128)
            total += r
            codes[g, c] = np.int8(r)
    middle = np.float32((1 << bits) - 1) * np.float32(0.5)
    return delta, offset + middle * (whole - delta * np.float32(total))


@njit(fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _scan_groups(q, q_at, group, d, bits, words, scale, bias, slot, first, last, out, out_at, n):
    rows = 2 * group if bits == 8 else group
    count = d * bits // 32
    codes = np.zeros((rows, d), np.int8)
    quads = codes.view(np.int32).reshape(-1)
    acc = np.empty(rows * GROUP, np.int32)
    folded = np.empty(d, np.float32)
    steps = np.empty(d, np.float32)
    offsets = np.empty(d, np.float32)
    delta = np.empty(group, np.float32)
    constant = np.empty(group, np.float32)
    for i in range(first, last):
        params = scale[(slot + i) * d : (slot + i + 1) * d]
        mins = bias[(slot + i) * d : (slot + i + 1) * d]
        for c in range(d):
            steps[c] = half_to_f32(params[c])
            offsets[c] = half_to_f32(mins[c])
        for g in range(group):
            delta[g], constant[g] = _fold_query(q, q_at + g * d, d, bits, steps, offsets, folded, codes, group, g)
        _code_scores(acc, words, (slot + i) * count * GROUP, count, quads, d // 4, rows, bits)
        for g in range(group):
            at = out_at + g * n + i * GROUP
            target = out[at : at + GROUP]
            source = acc[g * GROUP : (g + 1) * GROUP]
            if bits == 8:
                low = acc[(group + g) * GROUP : (group + g + 1) * GROUP]
                for t in range(GROUP):
                    target[t] = (
                        delta[g] * (np.float32(source[t]) * np.float32(128.0) + np.float32(low[t])) + constant[g]
                    )
            else:
                for t in range(GROUP):
                    target[t] = delta[g] * np.float32(source[t]) + constant[g]


@njit(parallel=True, fastmath=FASTMATH, cache=True, nogil=True, error_model="numpy")
def _scan(q, heads, group, d, bits, words, scale, bias, capacity, groups, parts, out, n):
    for task in prange(heads * parts):
        h = task // parts
        part = task % parts
        _scan_groups(
            q, h * group * d, group, d, bits, words, scale, bias, h * capacity,
            groups * part // parts, groups * (part + 1) // parts, out, h * group * n, n,
        )  # fmt: skip


def lowbit_scores(q: torch.Tensor, low: LowBitKV, out: torch.Tensor | None = None) -> torch.Tensor:
    """Approximate raw scores of every token.

    Parameters
    ----------
    q : Tensor ``[kv_heads, group, head_dim]`` float32
    low : LowBitKV
    out : Tensor ``[kv_heads, group, num_tokens]`` float32, optional
        Contiguous; written to instead of a fresh tensor.

    Returns
    -------
    Tensor ``[kv_heads, group, num_tokens]`` float32
        Unscaled. Tokens in the unquantised tail (at most 63) are exact.

    Raises
    ------
    ValueError
        Wrong shape or dtype of `q` or `out`.

    Notes
    -----
    The step of each channel is folded into the query, which is rounded to 8 bits per group of 64 tokens (15 bits for
    8-bit keys); products are exact integers (AVX-512 VNNI where present). Rounding the query adds at most 8 % to the
    root mean square error that the 4-bit keys have anyway, typically 1 %. Cost: one read of the packed keys.
    """
    check_queries(q, low.kv_heads, low.head_dim)
    heads, group, d = q.shape
    n = low.num_tokens
    out = score_buffer(out, (heads, group, n))
    if not out.numel():
        return out
    q = q.detach().contiguous()
    if low.full_groups:
        _scan(
            q.view(-1).numpy(), heads, group, d, low.key_bits, low.key_words.view(-1).numpy(),
            as_numpy(low.key_scale.view(-1)), as_numpy(low.key_bias.view(-1)), low.key_words.shape[1], low.full_groups,
            splits(heads, n), out.view(-1).numpy(), n,
        )  # fmt: skip
    if low.tail_tokens:
        tail = low.tail[:, : low.tail_tokens]
        out[:, :, low.full_groups * GROUP :] = q @ tail.transpose(-1, -2)
    return out


def lowbit_scores_reference(q: torch.Tensor, low: LowBitKV, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`lowbit_scores` in plain torch, without rounding the query."""
    scores = q @ low.dequantize()[0].to(q.dtype).transpose(-1, -2)
    return scores if out is None else out.copy_(scores)
