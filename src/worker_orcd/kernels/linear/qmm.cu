// y[t][n] = sum over k of x[t][k] W[n][k] for few tokens, by mma.sync with weights as the first operand.
//
// Every warp is on its own: it streams strips of 16 rows from device memory (see tiles.cuh) and multiplies them by this
// CTA's slice of x, which lies in shared memory. The first tiles are fetched, and with EARLY one is expanded, before the
// previous kernel has ended: weights do not depend on it.
// grid (CTAs that share the strips, one for each at least, K slices, groups of 8 GROUPS tokens); compile-time FORMAT, GROUPS,
// WARPS, DEPTH, CTAS (per multiprocessor), EARLY, LONG, TILES_IN_SHARED, MADE. Sums are taken in the same order at every value
// of these but the slices. With LONG x is waited for tile by tile, not all of it, and places of tiles are known when this is
// compiled: more code, which is worth it for long slices only.
// With GROUPED the matrix is that of many experts, one under the other, and `owners` names for each 8 GROUPS `share` rows
// of x the expert they belong to, or -1 where there are none; N, nk and T8 are those of one expert and of all rows. With
// `share` 0 there is but one row, and each owner takes it.
// MADE: see operand.cuh; HALF_END: see weight.cuh. With SECOND, another format, there is `qmm_pair` instead: two matrices
// times the same x.
#include "operand.cuh"
#include "tiles.cuh"

template <class Weight>
struct Expanded {  // a tile's operands
  u32 even[Weight::TILE_K / 32][4], odd[Weight::TILE_K / 32][4];
  DEVICE void set(Weight& r) {
#pragma unroll
    for (int i = 0; i < Weight::TILE_K / 32; i++) {
      if (i % 4 == 0) r.prepare(i / 4);
      r.expand(i / 4, i % 4, even[i], odd[i]);
    }
  }
};

// y [T][N] = the sums of a warp's 16 rows from `strip` on, and these begin anew
DEVICE void store_sums(float (&acc)[GROUPS][4], float scale, float* y, int strip, int T, int N) {
  const int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int row = (blockIdx.z * GROUPS + n) * 8 + quad * 2 + (i & 1), col = strip * 16 + g + (i >> 1) * 8;
      if (row < T && col < N) y[(u64)row * N + col] = acc[n][i] * scale;
      acc[n][i] = 0.f;
    }
}

struct Share {  // what a CTA takes of a matrix: strips block, block + blocks ..., each WARPS at a time, of one K slice
  int block, blocks, slice, slices;
};

// w: tiles [strips][nk]; y: [slices][T][N]
template <class Weight>
DEVICE void multiply(const char* w, const Operand& operand, float* y, int N, int nk, int T, Share share) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int CHUNKS = Weight::TILE_K / 128, STAGES_X = Weight::TILE_K / 64;
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0);  // known to be warp-uniform
  const int S = share.slices, slice = share.slice;
  const int k0 = nk * slice / S, nt = nk * (slice + 1) / S - k0, pieces = nt * STAGES_X;
  const int strips = (N + 15) / 16, step = share.blocks * WARPS;
  int strip = share.block * WARPS + warp;
  const int total = strip < strips ? (strips - strip + step - 1) / step * nt : 0;  // tiles of this warp

  using Source = Tiles<Weight, DEPTH, LONG>;
  const u64 each = strip_bytes<Weight>(nk);
  const Path path = {w + strip * each + (u64)k0 * Weight::TILE_BYTES, step * each - (u64)nt * Weight::TILE_BYTES, nt,
                     nk - k0 - nt};
  OperandSlice<Weight> x = {operand, shared, k0, nt};
  Source tiles;
  tiles.begin(path, total, shared + x.bytes() + warp * Source::BYTES);
  start_next_kernel();
  x.begin();
#if EARLY
  Expanded<Weight> ready;
  if (total) {
    ready.set(tiles.take(0));
    tiles.refill(0);
  }
#endif
  x.await();

  float acc[GROUPS][4];
#pragma unroll
  for (int n = 0; n < GROUPS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) acc[n][i] = 0.f;
  u32 xa = own_part(shared_address(shared) + BEFORE_X);
  int done = 0;

  auto compute = [&](Weight& r, bool first) {
    x.await_tile(done);
    asm volatile("" : "+r"(xa)::"memory");  // ldmatrix is no volatile asm: it must not move above the wait
#pragma unroll
    for (int h = 0; h < CHUNKS; h++) {
      if (!(EARLY && first)) r.prepare(h);
#pragma unroll
      for (int p = 0; p < 4; p++) {
        u32 b[GROUPS][4], even[4], odd[4];
#pragma unroll
        for (int n = 0; n < GROUPS; n++)
          load_matrix4(b[n], (xa ^ ((p & 1) * 64)) + (h * 2 + (p >> 1)) * PIECE_BYTES + n * GROUP_BYTES);
#if EARLY
        if (first) {
#pragma unroll
          for (int i = 0; i < 4; i++) even[i] = ready.even[h * 4 + p][i], odd[i] = ready.odd[h * 4 + p][i];
        } else
#endif
          r.expand(h, p, even, odd);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) mma(acc[n], even, b[n]);
#pragma unroll
        for (int n = 0; n < GROUPS; n++) mma(acc[n], odd, b[n] + 2);
      }
    }
    xa += STAGES_X * PIECE_BYTES;
    if (++done == nt) {
      store_sums(acc, Weight::SCALE, y + (u64)slice * T * N, strip, T, N);  // this slice of these 16 rows is complete
      done = 0, xa -= pieces * PIECE_BYTES, strip += step;
    }
  };

#if EARLY
  Weight none;
  if (total) compute(none, true);
#endif
  constexpr int UNROLLED = Source::UNROLLED;
  for (int i = EARLY; i < total; i += UNROLLED) {
#pragma unroll
    for (int d = 0; d < UNROLLED; d++) {
      if (i + d >= total) break;
      const int number = (EARLY + d) % UNROLLED;
      compute(tiles.take(number), false);
      tiles.refill(number);
    }
  }
}

#ifdef SECOND
// the blocks of all slices of one matrix, then those of the other
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
qmm_pair(const char* __restrict__ w, float* __restrict__ y, int N, int nk, int slices, int blocks,
         const char* __restrict__ w2, float* __restrict__ y2, int N2, int nk2, int slices2, int blocks2,
         const char* __restrict__ x, int T, int T8) {
  const Operand operand = {x, T8, (int)blockIdx.z * GROUPS};
  const int i = blockIdx.x, j = i - blocks * slices;
  if (j < 0)
    multiply<FORMAT>(w, operand, y, N, nk, T, {i % blocks, blocks, i / blocks, slices});
  else
    multiply<SECOND>(w2, operand, y2, N2, nk2, T, {j % blocks2, blocks2, j / blocks2, slices2});
}
#else
extern "C" __global__ void __launch_bounds__(WARPS * 32, CTAS)
#if MADE
qmm(const char* __restrict__ w, const __grid_constant__ Sums x, float* __restrict__ y, int N, int nk, int T, int F
#else
qmm(const char* __restrict__ w, const char* __restrict__ x, float* __restrict__ y, int N, int nk, int T, int T8
#endif
#if GROUPED
    , const int* __restrict__ owners, int share
#endif
) {
  int group = blockIdx.z * GROUPS;
#if GROUPED
  // Known before the kernel ahead, see `spread` in ops/experts.cu; one row is not spread.
  if (!share) await_previous_kernel(), group = 0;
  const int owner = fresh(owners + (share ? blockIdx.z / share : blockIdx.z));
  if (owner < 0) return;
  w += (u64)owner * ((N + 15) / 16) * strip_bytes<Weight>(nk);
#endif
#if MADE
  const Operand operand = {x, F, T, (int)blockIdx.z * 8};
#else
  const Operand operand = {x, T8, group};
#endif
  const Share mine = {(int)blockIdx.x, (int)gridDim.x, (int)blockIdx.y, (int)gridDim.y};
  multiply<Weight>(w, operand, y, N, nk, T, mine);
}
#endif
