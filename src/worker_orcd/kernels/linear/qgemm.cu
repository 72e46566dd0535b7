// y[t][n] = sum over k of x[t][k] W[n][k] for many tokens, by wgmma (Hopper), in the same order of sums as qmm.cu.
//
// A CTA is WARPGROUPS consumers of 64 rows each (a warp owns the strip of 16 rows) and a producer, which streams x
// through STAGES buffers, each of PIECES (1, 2 or 4) pieces of TOKENS x 64. Weights come DEPTH tiles ahead, see tiles.cuh.
// grid (groups of 64 WARPGROUPS rows, S slices or 1, groups of TOKENS tokens). With SEQUENTIAL the slices are worked
// off one after the other and added in order, else each writes its own partial sums. wgmma() is generated for TOKENS.
// With SHARED_SUMS the sums of slices wait in shared memory: registers hold one set of TOKENS / 2, not two.
// With GROUPED as in qmm.cu, an owner for each TOKENS rows of x, of which the first `filled` are anybody's; of the others x
// is not read nor y written. With ACTIVATION as in activated.cuh. HALF_END: see weight.cuh.
// `turn` 1 and 2 are two launches over units of two sizes, each with its own part of x and y; 0 is one alone. A block of
// the first lets the second begin only when it has waited itself, so the second finds complete whatever the first waited
// for, and begins without a wait. Its blocks wait for the first before they leave: who waits for the second has waited
// for both. This holds for blocks without an owner, too.
#include "tiles.cuh"
#include "wgmma.cuh"
#ifdef ACTIVATION  // SEQUENTIAL and SHARED_SUMS are too
#include "activated.cuh"
#endif

constexpr int SPAN = PIECES > 2 ? PIECES / 2 : 1;  // chunks of 128 inputs that share a barrier; 1 with PIECES 1, too
constexpr u32 SUMS = SHARED_SUMS * 256 * WARPGROUPS * TOKENS;
constexpr u32 PIECE_BYTES = TOKENS * 128, STAGE_BYTES = PIECES * PIECE_BYTES;

// Of x for wgmma: 128-byte swizzle, groups of 8 tokens 1024 bytes apart. The lower half counts on with the address, the
// upper one is the same for all.
DEVICE u32 lower_of(u32 address) { return address / 16 | 1 << 16; }
DEVICE u64 descriptor(u32 lower) { return (64ull | 1ull << 30) << 32 | lower; }

// The barriers of a buffer: x is there, and x was read. `full` is the first of STAGES, those for `empty` lie behind them.
DEVICE void make_barriers(u32 full) {
  for (int i = 0; i < STAGES; i++) {
    barrier_init(full + i * 8, 1);
    barrier_init(full + (STAGES + i) * 8, WARPGROUPS * 4);
  }
  barrier_init_done();
}

// Zeros where no x is copied to, by a warp: of them a multiplication in vain takes less power than of what lies there.
DEVICE void clear_rest(u32 xs, u32 bytes, int lane) {
  for (int i = 0; i < STAGES * PIECES; i++)
    for (u32 at = bytes + lane * 16; at < PIECE_BYTES; at += 512) set_zero16(xs + i * PIECE_BYTES + at);
  fence_async();
  __syncwarp();
}

// What the producer does: so many pieces of x, `stride` apart, of each the first `bytes`, into the buffers as they are free.
DEVICE void fetch_x(const char* x, u64 stride, int pieces, u32 bytes, u32 full, u32 xs) {
  for (int c = 0; c * PIECES < pieces; c++) {
    const int stage = c % STAGES, count = min(PIECES, pieces - c * PIECES);
    if (c >= STAGES) barrier_wait(full + (STAGES + stage) * 8, ((c / STAGES) + 1) & 1);
    barrier_expect(full + stage * 8, count * bytes);
    for (int i = 0; i < count; i++)
      bulk_copy(xs + stage * STAGE_BYTES + i * PIECE_BYTES, x + (c * PIECES + i) * stride, bytes, full + stage * 8);
  }
}

// y [..][N], rows up to `end`, from value(i), i < TOKENS / 2, the sums as wgmma leaves them in a strip's warp.
template <class Value>
DEVICE void store_sums(const Value& value, float* y, int strip, int N, int end) {
  const int lane = threadIdx.x & 31, g = lane >> 2, quad = lane & 3;
#pragma unroll
  for (int i = 0; i < TOKENS / 2; i++) {
    const float v = value(i);
    const int row = blockIdx.z * TOKENS + (i >> 2) * 8 + quad * 2 + (i & 1), col = strip * 16 + g + ((i >> 1) & 1) * 8;
    if (row < end && col < N) y[(u64)row * N + col] = v;
  }
}

// w, x: as in qmm.cu; y: [slices][T][N], or [T][N] with SEQUENTIAL
extern "C" __global__ void __launch_bounds__(WARPGROUPS * 128 + 128, CTAS)
qgemm(const char* __restrict__ w, const char* __restrict__ x, float* __restrict__ y, int N, int nk, int T, int T8,
      int S, int turn
#if GROUPED
      , const int* __restrict__ owners, const int* __restrict__ filled
#endif
#ifdef ACTIVATION  // y is the image instead
      , const float* __restrict__ bias
#endif
) {
  extern __shared__ __align__(1024) char shared[];
  const int lane = threadIdx.x & 31, warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), z = blockIdx.z;
  const int slice = blockIdx.y, k0 = nk * slice / gridDim.y, nt = nk * (slice + 1) / gridDim.y - k0;
  const u32 full = shared_address(shared), xs = (full + 1024 + 1023) & ~1023u;
#if GROUPED
  const int owner = fresh(owners + z);
  if (owner < 0) {
    if (turn) await_previous_kernel();
    return;
  }
  w += (u64)owner * ((N + 15) / 16) * strip_bytes<Weight>(nk);
  const int rows = fresh(filled + z);
  const u32 bytes = (rows + 7) / 8 * GROUP_BYTES;  // of a piece; x of nobody is not fetched
  const int end = min(T, z * TOKENS + rows);
#else
  const u32 bytes = PIECE_BYTES;
  const int end = T;  // of the rows that are stored
#endif
  if (threadIdx.x == 0) make_barriers(full);
  __syncthreads();
  if (turn != 1) start_next_kernel();
  if (warp >= WARPGROUPS * 4) {  // the producer: one lane works, the others' registers go to the consumers
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
    if (warp == WARPGROUPS * 4) {
      if (bytes < PIECE_BYTES) clear_rest(xs, bytes, lane);
      if (turn != 2) await_previous_kernel();
      if (turn == 1) start_next_kernel();
      x += ((u64)k0 * STAGES_X * T8 + z * (TOKENS / 8)) * GROUP_BYTES;
      if (lane == 0) fetch_x(x, (u64)T8 * GROUP_BYTES, nt * STAGES_X, bytes, full, xs);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
#ifdef ACTIVATION
    const int strip = gated_strip(warp, N);
#else
    const int strip = blockIdx.x * WARPGROUPS * 4 + warp;
#endif
    const int strips = (N + 15) / 16;
    const int readable = strip < strips ? strip : strips - 1;  // warps past the end repeat the last and store nothing
    using Source = Tiles<Weight, DEPTH, false>;
    const Path path = {w + readable * strip_bytes<Weight>(nk) + (u64)k0 * Weight::TILE_BYTES, 0, nt, nk - k0 - nt};
    Source tiles;
    tiles.begin(path, nt, shared + (xs - full) + STAGES * STAGE_BYTES + SUMS + warp * Source::BYTES);
    if (turn != 2) await_previous_kernel();
    float acc[TOKENS / 2];
    u32 is_begun = 0;  // whether acc holds a part of this slice
#if SEQUENTIAL
#if SHARED_SUMS
    float* sums = (float*)(shared + (xs - full) + STAGES * STAGE_BYTES) + threadIdx.x;
#define SUM(i) sums[(i) * WARPGROUPS * 128]
#else
    float sums[TOKENS / 2];
#define SUM(i) sums[i]
#endif
    int slices_done = 0, slice_end = S > 1 ? nk / S : nk + 1;  // of all but the last
    auto added = [&](int i) {  // the sum with what is in acc; the product is exact: as sum_slices adds it
      return fmaf(acc[i], Weight::SCALE, slices_done ? SUM(i) : 0.f);
    };
#endif
    u32 a[2][4][4], phase = 0, now = full, free = 0;  // the barriers of this stage, and of the one before once it is read
    u32 now_x = lower_of(xs), stage = 0;
    auto compute = [&](int d) {  // the next tile, d of those that are unrolled
      Weight& r = tiles.take(d);
#pragma unroll
      for (int h = 0; h < CHUNKS; h++) {
        r.prepare(h);
#pragma unroll
        for (int half = 0; half < 2; half++) {  // 64 inputs
          const bool starts = PIECES == 1 || (half == 0 && (d * CHUNKS + h) % SPAN == 0);
          const bool ends = PIECES == 1 || (half == 1 && (d * CHUNKS + h + 1) % SPAN == 0);
          r.expand(h, half * 2, a[half][0], a[half][1]);
          r.expand(h, half * 2 + 1, a[half][2], a[half][3]);
          if (h == CHUNKS - 1 && half == 1) tiles.refill(d);  // before anything is waited for
          if (starts) barrier_wait(now, phase);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int j = 0; j < 4; j++) wgmma(acc, a[half][j], descriptor(now_x + j * 2), h + half + j ? 1 : is_begun);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
          asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // the piece before: its x and `a` are free
          if (starts) {
            if (free && lane == 0) barrier_arrive(free);
            free = now + 8 * STAGES;
          }
          now_x += PIECE_BYTES / 16;
          if (ends) {
            now += 8;
            if (++stage == STAGES) now_x -= STAGES * STAGE_BYTES / 16, now -= 8 * STAGES, stage = 0, phase ^= 1;
          }
        }
      }
    };
    constexpr int UNROLLED = Source::UNROLLED * CHUNKS > SPAN ? Source::UNROLLED : SPAN / CHUNKS;
    for (int i = 0; i < nt; i += UNROLLED) {
#pragma unroll
      for (int d = 0; d < UNROLLED; d++) {
        if (i + d >= nt) break;
        compute(d);
        is_begun = 1;
#if SEQUENTIAL
        if (i + d + 1 == slice_end) {
          asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
          for (int k = 0; k < TOKENS / 2; k++) {
            asm volatile("" : "+f"(acc[k]));
            SUM(k) = added(k);
          }
          is_begun = 0, slices_done++, slice_end = slices_done + 1 < S ? nk * (slices_done + 1) / S : nk + 1;
        }
#endif
      }
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) asm volatile("" : "+f"(acc[i]));
#ifdef ACTIVATION
#pragma unroll
    for (int i = 0; i < TOKENS / 2; i++) SUM(i) = added(i);
#if GROUPED
    bias = bias ? bias + (u64)owner * N : bias;
#endif
    store_activated(sums - threadIdx.x, (u32*)y, bias, N / 2, end, T8);
#else
#if !SEQUENTIAL
    auto added = [&](int i) { return acc[i] * Weight::SCALE; };
#endif
    store_sums(added, y + (u64)slice * T * N, strip, N, end);
#endif
  }
  if (turn == 2) await_previous_kernel();
}
