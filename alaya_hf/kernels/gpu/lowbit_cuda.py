"""CUDA C++ of the low-bit pass: what Triton cannot express is that the records already hold the tensor cores' operands.

Compiled at run time with NVRTC (which CUDA builds of torch bring along), once per shape; no headers, no compiler on the
machine. A warp streams whole records into its own ring in shared memory with ``cp.async`` and does everything on them:
scores, running softmax, values. Needs compute capability 8.0.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from alaya_hf.kernels.gpu.layout import Layout
from alaya_hf.kernels.gpu.lowbit_source import PRELUDE, SHARED_PER_SM, macros
from alaya_hf.kernels.gpu.nvrtc import Kernel, compile_kernel

WARPS = 4
ROWS = 8  # of a launch: query heads of a KV head

SOURCE = (
    PRELUDE
    + r"""
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) lowbit_pass(
    const unsigned char* __restrict__ records, const u16* __restrict__ queries, const int* __restrict__ lengths,
    float* best, u16* tile_max, u16* scores, float* acc_out, float* ml_out,
    int kv_heads, int group, int capacity, int slots, int slot0, float factor, float beta) {
  extern __shared__ __align__(16) unsigned char ring[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, gid = lane >> 2, tig = lane & 3;
  const int splits = gridDim.x, split = blockIdx.x, bh = blockIdx.y;
  const int n = lengths[bh / kv_heads];
  const int tiles = (n + 63) >> 6;
  const int first = (int)((i64)tiles * split / splits), last = (int)((i64)tiles * (split + 1) / splits);
  const bool live = gid < group;
  const i64 row = (i64)bh * group + gid;
  const unsigned char* source = records + (i64)bh * capacity * RECORD;
  unsigned char* mine = ring + warp * STAGES * RECORD;

  auto fetch = [&](int tile, int stage) {
    const unsigned char* from = source + (i64)tile * RECORD;
    u32 to = (u32)__cvta_generic_to_shared(mine + stage * RECORD);
#pragma unroll
    for (int i = 0; i < (RECORD + 511) / 512; i++) {
      int at = (i * 32 + lane) * 16;
      if (RECORD % 512 == 0 || at < RECORD)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + at), "l"(from + at) : "memory");
    }
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (first + warp + s * WARPS < last) fetch(first + warp + s * WARPS, s);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  u32 q[J];
#pragma unroll
  for (int j = 0; j < J; j++) {
    int c = 8 * j + 2 * tig;
    u32 x = live && c < D ? *(const u32*)(queries + row * D + c) : 0u;
    if (BF16) x = pack(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
    q[j] = x;
  }
  float acc[MT][4], side[4] = {0, 0, 0, 0};  // out^T: channels x heads; side: zeros' part (rows of groups), weight (row 8)
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int x = 0; x < 4; x++) acc[i][x] = 0;
  float m = NEG;
  int stage = 0;

  for (int tile = first + warp; tile < last; tile += WARPS) {
    int ahead = tile + (STAGES - 1) * WARPS;
    if (ahead < last) fetch(ahead, stage == 0 ? STAGES - 1 : stage - 1);
    asm volatile("cp.async.commit_group;" ::: "memory");
    const float known = live ? *(volatile float*)(best + row) : NEG;
    asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
    __syncwarp();
    const unsigned char* buf = mine + stage * RECORD;

    // Scores: queries times steps, against codes; the zeros' part is the same for every token.
    u32 qs[J];
    float bias[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < J / 4; i++) {
      uint4 s = ((const uint4*)(buf + K_PARAMS))[i * 4 + tig], z = ((const uint4*)(buf + K_PARAMS + DP * 2))[i * 4 + tig];
      qs[4 * i] = mul2(q[4 * i], s.x); qs[4 * i + 1] = mul2(q[4 * i + 1], s.y);
      qs[4 * i + 2] = mul2(q[4 * i + 2], s.z); qs[4 * i + 3] = mul2(q[4 * i + 3], s.w);
      mma16(bias, q[4 * i], 0, q[4 * i + 1], 0, z.x, z.y);
      mma16(bias, q[4 * i + 2], 0, q[4 * i + 3], 0, z.z, z.w);
    }
    u32 h[8];
    float top = NEG;
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      u32 w[WK];
      load_words<WK>(w, (const u32*)buf + (nt * 32 + lane) * WK);
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < J; j += 2)
        mma16(c, qs[j], 0, qs[j + 1], 0, codes<KB>(w[j / (2 * KF)], j / KF % 2, j % KF),
              codes<KB>(w[(j + 1) / (2 * KF)], (j + 1) / KF % 2, (j + 1) % KF));
      float x = fmaf(c[0], 16777216.0f, bias[0]), y = fmaf(c[1], 16777216.0f, bias[0]);
      if (tile * 64 + 64 > n) {
        int token = tile * 64 + nt * 8 + 2 * tig;
        if (token >= n) x = NEG;
        if (token + 1 >= n) y = NEG;
      }
      h[nt] = pack(x, y);
      top = fmaxf(top, fmaxf(x, y));
    }
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 1));
    top = fmaxf(top, __shfl_xor_sync(ALL, top, 2));
    float unused;
    const u32 top16 = pack(top, 0.0f);
    unpack(top16, top, unused);
    if (live && tig == 0) {
      tile_max[row * capacity + tile] = (u16)top16;
      if (top > known) atomic_max(best + row, top);
    }
    // Only tiles that hold a token within beta of the best known are ever read again.
    if (__any_sync(ALL, live && top >= fmaxf(known, top) - beta) && live) {
      u32* to = (u32*)(scores + row * capacity * 64 + tile * 64) + tig;
#pragma unroll
      for (int nt = 0; nt < 8; nt++) to[nt * 4] = h[nt];
    }
    const float higher = fmaxf(m, top);
    if (__any_sync(ALL, higher != m)) {
      float r = exp2_((m - higher) * factor);
      float r0 = __shfl_sync(ALL, r, 8 * tig), r1 = __shfl_sync(ALL, r, 8 * tig + 4);
#pragma unroll
      for (int i = 0; i < MT; i++) { acc[i][0] *= r0; acc[i][1] *= r1; acc[i][2] *= r0; acc[i][3] *= r1; }
      side[0] *= r0; side[1] *= r1; side[2] *= r0; side[3] *= r1;
      m = higher;
    }
    const float shift = OFFSET - m * factor;
#if VB == 0
    float mass[2] = {0, 0};
#endif
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      float x, y;
      unpack(h[nt], x, y);
      x = exp2_(fmaf(x, factor, shift));
      y = exp2_(fmaf(y, factor, shift));
#if VB == 0
      mass[nt / 4] += x + y;
#else
      h[nt] = pack(x, y);
#endif
    }
#if VB == 0
#pragma unroll
    for (int b = 0; b < 2; b++) {
      mass[b] += __shfl_xor_sync(ALL, mass[b], 1);
      mass[b] += __shfl_xor_sync(ALL, mass[b], 2);
    }
    const u32 weights = tig == 0 ? pack(mass[0], mass[1]) : 0u;
    const u32* means = (const u32*)(buf + V_AT) + gid;
    const u32 one = gid == 0 && tig == 0 ? 0x3c003c00u : 0u;
    mma8(side, 0, one, weights);
#pragma unroll
    for (int i = 0; i < MT; i++)
      mma8(acc[i], tig == 0 ? means[i * 16] : 0u, tig == 0 ? means[i * 16 + 8] : 0u, weights);
#else
    const u32 one = gid == 0 ? 0x3c003c00u : 0u;
#pragma unroll
    for (int ks = 0; ks < 4; ks++) {
      u32 w[WV];
      load_words<WV>(w, (const u32*)(buf + V_AT) + (ks * 32 + lane) * WV);
      const uint2* s = (const uint2*)(buf + V_PARAMS) + (ks * 4 + tig) * NG;
      const uint2* z = (const uint2*)(buf + V_PARAMS + 64 * NG * 2) + (ks * 4 + tig) * NG;
      uint2 zero = make_uint2(0, 0);
      if (gid < NG) zero = z[gid];
      mma16(side, zero.x, one, zero.y, one, h[2 * ks], h[2 * ks + 1]);
#pragma unroll
      for (int c = 0; c < NG; c++) {
        uint2 step = s[c];
        u32 p0 = mul2(h[2 * ks], step.x), p1 = mul2(h[2 * ks + 1], step.y);
#pragma unroll
        for (int i = 2 * c; i < 2 * c + 2; i++) {
          const int f0 = 2 * i, f1 = 2 * i + 1;
          mma16(acc[i], codes<VB>(w[f0 / VF], 0, f0 % VF), codes<VB>(w[f1 / VF], 0, f1 % VF),
                codes<VB>(w[f0 / VF], 1, f0 % VF), codes<VB>(w[f1 / VF], 1, f1 % VF), p0, p1);
        }
      }
    }
#endif
    __syncwarp();
    stage = stage + 1 == STAGES ? 0 : stage + 1;
  }

  // The warps' parts become one.
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  const int width = DP + NG + 1;
  float* part = (float*)ring;                      // [warp][head][DP channels, NG zeros, weight]
  float* tops = part + WARPS * 8 * width;          // [warp][head]
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int x = 0; x < 4; x++) {
      int channel = i * 16 + gid + (x >> 1) * 8, head = 2 * tig + (x & 1);
#if VB == 0
      float unit = 1.0f;
#else
      float unit = 16777216.0f / (float)(1 << (VB * ((2 * i + (x >> 1)) % VF)));
#endif
      part[(warp * 8 + head) * width + channel] = acc[i][x] * unit;
    }
#pragma unroll
  for (int x = 0; x < 2; x++) {
    float* to = part + (warp * 8 + 2 * tig + x) * width + DP;
    if (gid < NG) to[gid] = side[x];
    if (gid == 0) to[NG] = side[2 + x];
  }
  if (tig == 0) tops[warp * 8 + gid] = m;
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * (D + 1); i += WARPS * 32) {
    const int head = i / (D + 1), c = i % (D + 1);
    if (head >= group) break;
    float all = NEG;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all = fmaxf(all, tops[w * 8 + head]);
    float sum = 0;
    if (all > NEG)
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float* from = part + (w * 8 + head) * width;
        float x = c == D ? from[DP + NG] : from[c] + (VB == 0 ? 0.0f : from[DP + c / 32]);
        sum += x * exp2_((tops[w * 8 + head] - all) * factor);
      }
    const i64 to = ((i64)bh * group + head) * slots + slot0 + split;
    if (c < D) acc_out[to * D + c] = sum;
    else { ml_out[to * 2] = all > NEG ? all * factor - OFFSET : NEG; ml_out[to * 2 + 1] = sum; }
  }
}
"""
)


def _stages(layout: Layout, capability: int) -> tuple[int, int]:
    """Ring stages per warp and blocks per multiprocessor that its shared memory has room for."""
    room = SHARED_PER_SM.get(capability, 100) * 1024
    limit = min(room - 1024, 227 * 1024)
    for stages, blocks in ((2, 3), (3, 2), (2, 2), (2, 1)):
        if layout.padded > 128 and blocks > 2:
            continue  # registers
        if blocks * (WARPS * stages * layout.record + 1024) <= room and WARPS * stages * layout.record <= limit:
            return stages, blocks
    raise ValueError(
        f"a record of {layout.record} bytes does not fit the shared memory of compute capability {capability}; "
        "use fewer bits for keys or values"
    )


@lru_cache(maxsize=64)
def kernel(layout: Layout, bfloat16: bool, device: int) -> tuple[Kernel, int, int]:
    """The compiled kernel, its bytes of shared memory and its blocks per multiprocessor."""
    major, minor = torch.cuda.get_device_capability(device)
    stages, blocks = _stages(layout, 10 * major + minor)
    epilogue = WARPS * 8 * (layout.padded + layout.groups + 2) * 4
    shared = max(WARPS * stages * layout.record, epilogue)
    settings = {**macros(layout, bfloat16), "WARPS": WARPS, "STAGES": stages, "BLOCKS": blocks}
    return compile_kernel(SOURCE, "lowbit_pass", settings, device, shared), shared, blocks


def blocks_per_device(layout: Layout, device: torch.device) -> int:
    """Thread blocks that run at once."""
    properties = torch.cuda.get_device_properties(device)
    return _stages(layout, 10 * properties.major + properties.minor)[1] * properties.multi_processor_count
