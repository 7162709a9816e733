"""What the low-bit pass's CUDA C++ kernels have in common: tensor-core operations, codes, and the macros of a layout."""

from __future__ import annotations

from alaya_hf.kernels.gpu.layout import Layout

#: KiB of shared memory per multiprocessor, by compute capability.
SHARED_PER_SM = {80: 164, 86: 100, 87: 164, 89: 100, 90: 228, 100: 228, 103: 228, 120: 100, 121: 100}

PRELUDE = r"""
typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;

#define J (DP / 8)
#define KF (8 / KB)
#define NG (DP / 32)
#define K_PARAMS (8 * 32 * WK * 4)
#define V_AT (K_PARAMS + 2 * DP * 2)
#define V_PARAMS (V_AT + 4 * 32 * WV * 4)
#define MT (DP / 16)
#define NEG __int_as_float(0xff800000)
#define ALL 0xffffffffu
#define OFFSET 6.0f  // weights are 2^OFFSET times larger: small ones stay clear of half's subnormals

__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d;
}
__device__ __forceinline__ u32 pack(float lo, float hi) {
  u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d;
}
__device__ __forceinline__ void unpack(u32 h, float& lo, float& hi) {
  asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(lo), "=f"(hi) : "r"(h));
}
__device__ __forceinline__ float exp2_(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ void mma16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma8(float (&c)[4], u32 a0, u32 a1, u32 b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}
template <int N> __device__ __forceinline__ void load_words(u32 (&w)[N], const u32* at) {
  if (N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
      uint4 x = ((const uint4*)at)[i];
      w[4 * i] = x.x; w[4 * i + 1 < N ? 4 * i + 1 : 0] = x.y; w[4 * i + 2 < N ? 4 * i + 2 : 0] = x.z;
      w[4 * i + 3 < N ? 4 * i + 3 : 0] = x.w;
    }
  } else if (N % 2 == 0) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      uint2 x = ((const uint2*)at)[i];
      w[2 * i] = x.x; w[2 * i + 1 < N ? 2 * i + 1 : 0] = x.y;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) w[i] = at[i];
  }
}
// Two codes of a field, each the subnormal half code * 2^-24 * 2^(bits * field).
template <int BITS> __device__ __forceinline__ u32 codes(u32 word, int byte, int field) {
  return (byte ? word >> 8 : word) & ((u32)((1 << BITS) - 1) * 0x00010001u << (BITS * field));
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void atomic_max(float* at, float x) {
  if (x >= 0) atomicMax((int*)at, __float_as_int(x)); else atomicMin((u32*)at, __float_as_uint(x));
}
"""


def macros(layout: Layout, bfloat16: bool) -> dict[str, int]:
    """Compile-time constants of a layout, and of queries in bfloat16 or float16."""
    return {
        "D": layout.head_dim,
        "DP": layout.padded,
        "KB": layout.key_bits,
        "VB": layout.value_bits,
        "VF": 8 // layout.value_bits if layout.value_bits else 1,
        "WK": layout.key_words,
        "WV": layout.value_words,
        "RECORD": layout.record,
        "BF16": int(bfloat16),
    }
