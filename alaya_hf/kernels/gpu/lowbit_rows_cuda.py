"""CUDA C++ of the low-bit pass for many query rows per KV head: the positions of a short pass, all heads of each.

The kernel of `lowbit_cuda` gives a warp records of its own and eight rows. Here a block's warps share every record and have
sixteen rows each, so that a record is read once for up to 64 rows, and a code is masked once for sixteen: both halves of an
``mma.m16n8k16`` are queries when it scores, and two of them share the values' operand when it attends. Needs compute
capability 8.0.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from alaya_hf.kernels.gpu.layout import Layout
from alaya_hf.kernels.gpu.lowbit_source import PRELUDE, SHARED_PER_SM, macros
from alaya_hf.kernels.gpu.nvrtc import Kernel, compile_kernel

ROWS = 16  # of a warp
_MOST_WARPS = 4  # of a block

SOURCE = (
    PRELUDE
    + r"""
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) lowbit_rows(
    const unsigned char* __restrict__ records, const u16* __restrict__ queries, const int* __restrict__ lengths,
    float* best, u16* tile_max, u16* scores, float* acc_out, float* ml_out,
    int kv_heads, int rows, int row_blocks, int capacity, int slots, int slot0, float factor, float beta) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, gid = lane >> 2, tig = lane & 3;
  // Blocks that read the same records start side by side, so that the L2 cache serves all but one of them.
  const int splits = gridDim.x / row_blocks, split = blockIdx.x / row_blocks, bh = blockIdx.y;
  const int row0 = (blockIdx.x % row_blocks * WARPS + warp) * 16;
  const int n = lengths[bh / kv_heads];
  const int tiles = (n + 63) >> 6;
  const int first = (int)((i64)tiles * split / splits), last = (int)((i64)tiles * (split + 1) / splits);
  const bool live[2] = {row0 + gid < rows, row0 + gid + 8 < rows};
  const i64 row[2] = {(i64)bh * rows + row0 + gid, (i64)bh * rows + row0 + gid + 8};
  const unsigned char* source = records + (i64)bh * capacity * RECORD;
  unsigned char* ring = shared + WARPS * 2 * J * 32 * 4;

  auto fetch = [&](int tile, int stage) {
    for (int at = threadIdx.x * 16; at < RECORD; at += WARPS * 32 * 16)
      copy16(ring + stage * RECORD + at, source + (i64)tile * RECORD + at);
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; s++) {
    if (first + s < last) fetch(first + s, s);
    copies_commit();
  }

  // Queries wait in shared memory, as operands: registers are for the sums.
  uint4* q = (uint4*)shared + warp * 2 * (J / 4) * 32 + lane;
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < J / 4; i++) {
      u32 x[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        int c = 8 * (4 * i + j) + 2 * tig;
        x[j] = live[half] && c < D ? *(const u32*)(queries + row[half] * D + c) : 0u;
        if (BF16) x[j] = pack(__uint_as_float(x[j] << 16), __uint_as_float(x[j] & 0xffff0000u));
      }
      q[(half * (J / 4) + i) * 32] = make_uint4(x[0], x[1], x[2], x[3]);
    }

  float acc[2][MT][4], side[2][4];  // of each half, out^T: channels x rows; side: zeros' part (rows of groups), weight (row 8)
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int x = 0; x < 4; x++) {
      side[half][x] = 0;
#pragma unroll
      for (int i = 0; i < MT; i++) acc[half][i][x] = 0;
    }
  float m[2] = {NEG, NEG};
  int stage = 0;

  for (int tile = first; tile < last; tile++) {
    float known[2];
#pragma unroll
    for (int half = 0; half < 2; half++) known[half] = live[half] ? *(volatile float*)(best + row[half]) : NEG;
    copies_wait<STAGES - 2>();
    __syncthreads();  // the record is there for all warps, and all are done with the one before it
    if (tile + STAGES - 1 < last) fetch(tile + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1);
    copies_commit();
    const unsigned char* buf = ring + stage * RECORD;
    stage = stage + 1 == STAGES ? 0 : stage + 1;

    // Scores: queries times steps, against codes; the zeros' part is the same for every token.
    u32 qs[2][J];
    float bias[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < J / 4; i++) {
      uint4 s = ((const uint4*)(buf + K_PARAMS))[i * 4 + tig], z = ((const uint4*)(buf + K_PARAMS + DP * 2))[i * 4 + tig];
      uint4 a = q[i * 32], b = q[(J / 4 + i) * 32];
      qs[0][4 * i] = mul2(a.x, s.x); qs[0][4 * i + 1] = mul2(a.y, s.y);
      qs[0][4 * i + 2] = mul2(a.z, s.z); qs[0][4 * i + 3] = mul2(a.w, s.w);
      qs[1][4 * i] = mul2(b.x, s.x); qs[1][4 * i + 1] = mul2(b.y, s.y);
      qs[1][4 * i + 2] = mul2(b.z, s.z); qs[1][4 * i + 3] = mul2(b.w, s.w);
      mma16(bias, a.x, b.x, a.y, b.y, z.x, z.y);
      mma16(bias, a.z, b.z, a.w, b.w, z.z, z.w);
    }
    u32 h[2][8];
    float top[2] = {NEG, NEG};
#pragma unroll
    for (int nt = 0; nt < 8; nt++) {
      u32 w[WK];
      load_words<WK>(w, (const u32*)buf + (nt * 32 + lane) * WK);
      float c[4] = {0, 0, 0, 0};
#pragma unroll
      for (int j = 0; j < J; j += 2)
        mma16(c, qs[0][j], qs[1][j], qs[0][j + 1], qs[1][j + 1], codes<KB>(w[j / (2 * KF)], j / KF % 2, j % KF),
              codes<KB>(w[(j + 1) / (2 * KF)], (j + 1) / KF % 2, (j + 1) % KF));
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float x = fmaf(c[2 * half], 16777216.0f, bias[2 * half]), y = fmaf(c[2 * half + 1], 16777216.0f, bias[2 * half]);
        if (tile * 64 + 64 > n) {
          int token = tile * 64 + nt * 8 + 2 * tig;
          if (token >= n) x = NEG;
          if (token + 1 >= n) y = NEG;
        }
        h[half][nt] = pack(x, y);
        top[half] = fmaxf(top[half], fmaxf(x, y));
      }
    }
    bool wanted = false;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(ALL, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(ALL, top[half], 2));
      float unused;
      const u32 top16 = pack(top[half], 0.0f);
      unpack(top16, top[half], unused);
      if (live[half] && tig == 0) {
        tile_max[row[half] * capacity + tile] = (u16)top16;
        if (top[half] > known[half]) atomic_max(best + row[half], top[half]);
      }
      wanted |= live[half] && top[half] >= fmaxf(known[half], top[half]) - beta;
    }
    // Only tiles that hold a token within beta of the best known are ever read again, by any row of the warp.
    if (__any_sync(ALL, wanted)) {
#pragma unroll
      for (int half = 0; half < 2; half++)
        if (live[half]) {
          u32* to = (u32*)(scores + row[half] * capacity * 64 + tile * 64) + tig;
#pragma unroll
          for (int nt = 0; nt < 8; nt++) to[nt * 4] = h[half][nt];
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float higher = fmaxf(m[half], top[half]);
      if (__any_sync(ALL, higher != m[half])) {
        float r = exp2_((m[half] - higher) * factor);
        float r0 = __shfl_sync(ALL, r, 8 * tig), r1 = __shfl_sync(ALL, r, 8 * tig + 4);
#pragma unroll
        for (int i = 0; i < MT; i++) {
          acc[half][i][0] *= r0; acc[half][i][1] *= r1; acc[half][i][2] *= r0; acc[half][i][3] *= r1;
        }
        side[half][0] *= r0; side[half][1] *= r1; side[half][2] *= r0; side[half][3] *= r1;
        m[half] = higher;
      }
    }
#if VB == 0
    u32 weights[2];
#endif
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float shift = OFFSET - m[half] * factor;
      float mass[2] = {0, 0};
#pragma unroll
      for (int nt = 0; nt < 8; nt++) {
        float x, y;
        unpack(h[half][nt], x, y);
        x = exp2_(fmaf(x, factor, shift));
        y = exp2_(fmaf(y, factor, shift));
        mass[nt / 4] += x + y;
        h[half][nt] = pack(x, y);
      }
#if VB == 0
#pragma unroll
      for (int b = 0; b < 2; b++) {
        mass[b] += __shfl_xor_sync(ALL, mass[b], 1);
        mass[b] += __shfl_xor_sync(ALL, mass[b], 2);
      }
      weights[half] = tig == 0 ? pack(mass[0], mass[1]) : 0u;
#endif
    }
#if VB == 0
    const u32* means = (const u32*)(buf + V_AT) + gid;
    const u32 one = gid == 0 && tig == 0 ? 0x3c003c00u : 0u;
    mma8(side[0], 0, one, weights[0]);
    mma8(side[1], 0, one, weights[1]);
#pragma unroll
    for (int i = 0; i < MT; i++) {
      const u32 a0 = tig == 0 ? means[i * 16] : 0u, a1 = tig == 0 ? means[i * 16 + 8] : 0u;
      mma8(acc[0][i], a0, a1, weights[0]);
      mma8(acc[1][i], a0, a1, weights[1]);
    }
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
      mma16(side[0], zero.x, one, zero.y, one, h[0][2 * ks], h[0][2 * ks + 1]);
      mma16(side[1], zero.x, one, zero.y, one, h[1][2 * ks], h[1][2 * ks + 1]);
#pragma unroll
      for (int c = 0; c < NG; c++) {
        uint2 step = s[c];
        u32 p0 = mul2(h[0][2 * ks], step.x), p1 = mul2(h[0][2 * ks + 1], step.y);
        u32 r0 = mul2(h[1][2 * ks], step.x), r1 = mul2(h[1][2 * ks + 1], step.y);
#pragma unroll
        for (int i = 2 * c; i < 2 * c + 2; i++) {
          const int f0 = 2 * i, f1 = 2 * i + 1;
          const u32 a0 = codes<VB>(w[f0 / VF], 0, f0 % VF), a1 = codes<VB>(w[f1 / VF], 0, f1 % VF);
          const u32 a2 = codes<VB>(w[f0 / VF], 1, f0 % VF), a3 = codes<VB>(w[f1 / VF], 1, f1 % VF);
          mma16(acc[0][i], a0, a1, a2, a3, p0, p1);
          mma16(acc[1][i], a0, a1, a2, a3, r0, r1);
        }
      }
    }
#endif
  }
  copies_wait<0>();

  // A warp has its rows' sums over the split alone: no other warp has a part in them.
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int base = row0 + half * 8;
    const i64 place = ((i64)bh * rows + base) * slots + slot0 + split;
#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int x = 0; x < 4; x++) {
        const int channel = i * 16 + gid + (x >> 1) * 8, mine = 2 * tig + (x & 1);
#if VB == 0
        const float value = acc[half][i][x];
#else
        const float zeros = __shfl_sync(ALL, side[half][x & 1], 4 * (i / 2) + tig);
        const float value = fmaf(acc[half][i][x], 16777216.0f / (float)(1 << (VB * ((2 * i + (x >> 1)) % VF))), zeros);
#endif
        if (base + mine < rows && channel < D) acc_out[(place + (i64)mine * slots) * D + channel] = value;
      }
    if (tig == 0 && live[half])
      ml_out[(place + (i64)gid * slots) * 2] = m[half] > NEG ? m[half] * factor - OFFSET : NEG;
    if (gid == 0)
#pragma unroll
      for (int x = 0; x < 2; x++)
        if (base + 2 * tig + x < rows) ml_out[(place + (i64)(2 * tig + x) * slots) * 2 + 1] = side[half][2 + x];
  }
}
"""
)


def grouping(rows: int) -> tuple[int, int]:
    """Warps of a block, and blocks over the rows: as even as it gets."""
    warps = -(-rows // ROWS)
    blocks = -(-warps // _MOST_WARPS)
    return -(-warps // blocks), blocks


def _shared(layout: Layout, warps: int, stages: int) -> int:
    return warps * 2 * layout.padded // 8 * 32 * 4 + stages * layout.record


def _stages(layout: Layout, warps: int, capability: int) -> tuple[int, int]:
    """Ring stages per block and blocks per multiprocessor that its registers and shared memory have room for."""
    room = SHARED_PER_SM.get(capability, 100) * 1024
    limit = min(room - 1024, 227 * 1024)
    for blocks in range((12 if layout.padded <= 128 else 8) // warps, 0, -1):
        for stages in (4, 3, 2):
            size = _shared(layout, warps, stages)
            if size <= limit and blocks * (size + 1024) <= room:
                return stages, blocks
    raise ValueError(
        f"a record of {layout.record} bytes does not fit the shared memory of compute capability {capability}; "
        "use fewer bits for keys or values"
    )


@lru_cache(maxsize=64)
def kernel(layout: Layout, bfloat16: bool, warps: int, device: int) -> tuple[Kernel, int]:
    """The compiled kernel for blocks of so many warps, and its bytes of shared memory."""
    major, minor = torch.cuda.get_device_capability(device)
    stages, blocks = _stages(layout, warps, 10 * major + minor)
    shared = _shared(layout, warps, stages)
    settings = {**macros(layout, bfloat16), "WARPS": warps, "STAGES": stages, "BLOCKS": blocks}
    return compile_kernel(SOURCE, "lowbit_rows", settings, device, shared), shared


def blocks_per_device(layout: Layout, warps: int, device: torch.device) -> int:
    """Thread blocks that run at once."""
    properties = torch.cuda.get_device_properties(device)
    return _stages(layout, warps, 10 * properties.major + properties.minor)[1] * properties.multi_processor_count
