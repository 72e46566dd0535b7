// How qgemm ends with ACTIVATION: act(gate) up leaves as the image that the next matmul reads, bit for bit what
// `activate` of ops/rows.cu makes of the sums.
//
// The matrix is gate above up, F rows each. The first half of a block's warpgroups works on rows of gate, the second
// half on the same rows of up, so the block has both for 32 WARPGROUPS columns of the result, of which F is a multiple.
#pragma once
#include "act.cuh"
#include "async.cuh"

constexpr int CONSUMERS = WARPGROUPS * 128, COLUMNS = WARPGROUPS * 32, GROUP = 256;  // GROUP: u32 of 8 tokens in the image

DEVICE int gated_strip(int warp, int N) {  // of a matrix of N = 2 F rows
  constexpr int HALF = WARPGROUPS * 2;
  return blockIdx.x * HALF + warp % HALF + warp / HALF * (N / 32);
}

DEVICE void store_pairs(u32* to, const u32* pairs) {  // of columns, 32 apart: the block's part of 16 bytes of the image
#pragma unroll
  for (int i = 0; i < WARPGROUPS; i += 2) *(u64*)(to + i) = pairs[i] | (u64)pairs[i + 1] << 32;
}

// sums [TOKENS / 2][CONSUMERS] in shared memory: wgmma's results as each thread had them in registers. image, for rows
// t < T: as store4 in ops/flow.cuh, zeros from F to the next multiple of 256. bias [2 F], or null. All consumers call.
DEVICE void store_activated(const float* sums, u32* image, const float* bias, int F, int T, int T8) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, first = blockIdx.x * COLUMNS;
  const int unit = (warp & 2) * 4 + (lane & 7), t0 = (lane >> 3) * 2 + (warp & 1);  // of 16, of 8
  const int flip = unit >> 2 & 1;  // lanes 4 units apart take the columns of a pair in turns: no two meet in a bank
  const float* gates = sums + (flip * 2 + (t0 & 1)) * CONSUMERS + (unit >> 3) * 32 + (unit & 3) * 8 + (t0 >> 1);
  float gate_bias[WARPGROUPS][2], up_bias[WARPGROUPS][2];
#pragma unroll
  for (int i = 0; i < WARPGROUPS * 2; i++) {
    const int n = first + (i >> 1) * 32 + unit * 2 + (i & 1 ^ flip);
    gate_bias[i >> 1][i & 1] = bias ? bias[n] : 0.f, up_bias[i >> 1][i & 1] = bias ? bias[F + n] : 0.f;
  }
  sync_some(1, CONSUMERS);  // all sums are there
  auto column = [&](int n) {  // where the unit of columns from n on lies, of the block's first token t0 of 8
    const u64 token = ((u64)(n >> 7) * 2 + (unit >> 3)) * T8 * 8 + blockIdx.z * TOKENS + t0;
    return image + (token * 8 + ((unit & 7) ^ t0)) * 4 + (n >> 5 & 3);
  };
  const int groups = min(TOKENS / 8, (T - (int)blockIdx.z * TOKENS - t0 + 7) / 8);
  u32 *to = column(first), pairs[WARPGROUPS];
#pragma unroll 2
  for (int group = warp >> 2; group < groups; group += WARPGROUPS) {
#pragma unroll
    for (int q = 0; q < WARPGROUPS; q++) {
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; e++) {  // added up as by add_up in ops/flow.cuh
        const float* gate = gates + group * 4 * CONSUMERS + q * 64 + (e ^ flip) * 4;
        v[e] = gated(__fadd_rn(__fadd_rn(0.f, gate[0]), gate_bias[q][e]),
                     __fadd_rn(__fadd_rn(0.f, gate[CONSUMERS / 2]), up_bias[q][e]));
      }
      pairs[q] = flip ? bf16x2(v[1], v[0]) : bf16x2(v[0], v[1]);
    }
    store_pairs(to + group * GROUP, pairs);
  }
  if (first + COLUMNS < F) return;
  for (u32& pair : pairs) pair = 0;
  for (int n = F; n < (F + 255) / 256 * 256; n += COLUMNS) {
    to = column(n);
    for (int group = warp >> 2; group < groups; group += WARPGROUPS) store_pairs(to + group * GROUP, pairs);
  }
}
