// y[t][n] = sum over k of x[t][k] W[n][k] for few tokens, by mma.sync with weights as the first operand.
//
// Every warp is on its own: it streams strips of 16 rows from device memory straight into registers, DEPTH tiles
// ahead, and multiplies them by this CTA's slice of x, which lies in shared memory. The first tiles are fetched, and
// with EARLY also expanded, before the previous kernel has ended: weights do not depend on it.
// grid (CTAs that share the strips, K slices, groups of 8 GROUPS tokens); compile-time FORMAT, GROUPS, WARPS, DEPTH,
// CTAS (per multiprocessor), EARLY. Sums are taken in the same order at every value of these but the slices.
// With GROUPED the matrix is that of many experts, one under the other, and `owners` names for each 8 GROUPS `share` rows
// of x the expert they belong to, or -1 where there are none; N, nk and T8 are those of one expert and of all rows.
// HALF_END: see weight.cuh. With SECOND, another format, and its SECOND_DEPTH there is `qmm_pair` instead: two matrices
// times the same x.
#include "async.cuh"
#include "weight.cuh"

// x image -> shared memory: pieces of 64 inputs, in each this CTA's token groups
DEVICE void load_x(u32 to, const char* from, int pieces, int T8, u32 barrier) {
  const int piece_bytes = GROUPS * GROUP_BYTES;
#if HOPPER
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0) {
      barrier_expect(barrier, pieces * piece_bytes);
      if (T8 == GROUPS) bulk_copy(to, from, pieces * piece_bytes, barrier);
    }
    __syncwarp();
    if (T8 != GROUPS)
      for (int c = threadIdx.x; c < pieces; c += 32)
        bulk_copy(to + c * piece_bytes, from + (u64)c * T8 * GROUP_BYTES, piece_bytes, barrier);
  }
  barrier_wait(barrier, 0);
#else
  for (int i = threadIdx.x * 16; i < pieces * piece_bytes; i += WARPS * 512)
    copy16(to + i, from + (u64)(i / piece_bytes) * T8 * GROUP_BYTES + i % piece_bytes);
  copies_done();
  __syncthreads();
#endif
}

struct Share {  // what a CTA takes of a matrix: strips block, block + blocks ..., each WARPS at a time, of one K slice
  int block, blocks, slice, slices;
};

// w: tiles [strips][nk]; x: image [nk STAGES_X][T8][8 tokens][8 units of 16 bytes, unit ^ token]; y: [slices][T][N]
template <class Weight, int AHEAD>
DEVICE void multiply(const char* w, const char* x, float* y, int N, int nk, int T, int T8, Share share) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int CHUNKS = Weight::TILE_K / 128, STAGES_X = Weight::TILE_K / 64;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be warp-uniform
  const int S = share.slices, slice = share.slice, z = blockIdx.z;
  const int k0 = nk * slice / S, nt = nk * (slice + 1) / S - k0, pieces = nt * STAGES_X;
  const int strips = (N + 15) / 16, step = share.blocks * WARPS;
  int strip = share.block * WARPS + warp;
  const int total = strip < strips ? (strips - strip + step - 1) / step * nt : 0;  // tiles of this warp

  const u64 each = strip_bytes<Weight>(nk);
  const char* src = w + strip * each + (u64)k0 * Weight::TILE_BYTES;
  int fetched = 0;
  auto fetch = [&](Weight& r) {
    load_tile(r, src, lane, k0 + ++fetched == nk);
    src += Weight::TILE_BYTES;
    if (fetched == nt) fetched = 0, src += step * each - (u64)nt * Weight::TILE_BYTES;
  };
  Weight r[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; i++)
    if (i < total) fetch(r[i]);
  start_next_kernel();
#if EARLY
  u32 first_even[CHUNKS * 4][4], first_odd[CHUNKS * 4][4];
  if (total) {
#pragma unroll
    for (int h = 0; h < CHUNKS; h++) {
      r[0].prepare(h);
#pragma unroll
      for (int p = 0; p < 4; p++) r[0].expand(h, p, first_even[h * 4 + p], first_odd[h * 4 + p]);
    }
    if (AHEAD < total) fetch(r[0]);
  }
#endif
  const u32 barrier = shared_address(shared), xs = barrier + 1024;
#if HOPPER
  if (threadIdx.x == 0) {
    barrier_init(barrier, 1);
    barrier_init_done();
  }
  __syncthreads();
#endif
  await_previous_kernel();
  load_x(xs, x + ((u64)k0 * STAGES_X * T8 + z * GROUPS) * GROUP_BYTES, pieces, T8, barrier);

  float acc[GROUPS][4];
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
  u32 xa = xs + (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
  asm volatile("" : "+r"(xa)::"memory");  // ldmatrix is no volatile asm: it must not move above the wait
  const int g = lane >> 2, quad = lane & 3;
  int done = 0;

  auto store = [&] {  // this slice of these 16 rows is complete
#pragma unroll
    for (int n = 0; n < GROUPS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int row = (z * GROUPS + n) * 8 + quad * 2 + (i & 1), col = strip * 16 + g + (i >> 1) * 8;
        if (row < T && col < N) y[((u64)slice * T + row) * N + col] = acc[n][i] * Weight::SCALE;
        acc[n][i] = 0.f;
      }
  };
  auto compute = [&](Weight& r, bool first) {
#pragma unroll
    for (int h = 0; h < CHUNKS; h++) {
      if (!(EARLY && first)) r.prepare(h);
#pragma unroll
      for (int p = 0; p < 4; p++) {
        u32 b[GROUPS][4], even[4], odd[4];
#pragma unroll
        for (int n = 0; n < GROUPS; n++)
          load_matrix4(b[n], (xa ^ ((p & 1) * 64)) + ((h * 2 + (p >> 1)) * GROUPS + n) * GROUP_BYTES);
#if EARLY
        if (first) {
#pragma unroll
          for (int i = 0; i < 4; i++) even[i] = first_even[h * 4 + p][i], odd[i] = first_odd[h * 4 + p][i];
        } else
#endif
          r.expand(h, p, even, odd);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) mma(acc[n], even, b[n]);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) mma(acc[n], odd, b[n] + 2);
      }
    }
    xa += STAGES_X * GROUPS * GROUP_BYTES;
    if (++done == nt) {
      store();
      done = 0, xa -= pieces * GROUPS * GROUP_BYTES, strip += step;
    }
  };

#if EARLY
  if (total) compute(r[0], true);
#endif
  for (int i = EARLY; i < total; i += AHEAD) {  // tile i lies in r[i % AHEAD]
#pragma unroll
    for (int d = 0; d < AHEAD; d++) {
      if (i + d >= total) break;
      Weight& tile = r[(EARLY + d) % AHEAD];
      compute(tile, false);
      if (i + d + AHEAD < total) fetch(tile);
    }
  }
}

#ifdef SECOND
// the blocks of all slices of one matrix, then those of the other
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
qmm_pair(const char* __restrict__ w, float* __restrict__ y, int N, int nk, int slices, int blocks,
         const char* __restrict__ w2, float* __restrict__ y2, int N2, int nk2, int slices2, int blocks2,
         const char* __restrict__ x, int T, int T8) {
  const int i = blockIdx.x, j = i - blocks * slices;
  if (j < 0)
    multiply<FORMAT, DEPTH>(w, x, y, N, nk, T, T8, {i % blocks, blocks, i / blocks, slices});
  else
    multiply<SECOND, SECOND_DEPTH>(w2, x, y2, N2, nk2, T, T8, {j % blocks2, blocks2, j / blocks2, slices2});
}
#else
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
qmm(const char* __restrict__ w, const char* __restrict__ x, float* __restrict__ y, int N, int nk, int T, int T8
#if GROUPED
    , const int* __restrict__ owners, int share
#endif
) {
#if GROUPED
  const int owner = fresh(owners + blockIdx.z / share);  // known before the kernel ahead: see `spread` in ops/experts.cu
  if (owner < 0) return;
  w += (u64)owner * ((N + 15) / 16) * strip_bytes<Weight>(nk);
#endif
  const Share mine = {(int)blockIdx.x, (int)gridDim.x, (int)blockIdx.y, (int)gridDim.y};
  multiply<Weight, DEPTH>(w, x, y, N, nk, T, T8, mine);
}
#endif
