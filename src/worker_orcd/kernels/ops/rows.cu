// What stands between the matmuls: each kernel adds up the sums it is given, in float32 and one order for every number
// of rows, and leaves what the next one reads. AHEAD: slices of the sums fetched at once.
#include "flow.cuh"

#ifdef WIDTH  // ---- residual and norm, for rows of WIDTH numbers, a multiple of 4
// CLUSTER blocks of BLOCK threads share a row, so that one row alone is fetched by several multiprocessors. AFTER: whether
// there is a norm of y; BIAS: whether norms may have one. Code that is not needed would only have to be fetched.
constexpr int WARPS = BLOCK / 32;
constexpr int QUADS = (WIDTH + 4 * BLOCK * CLUSTER - 1) / (4 * BLOCK * CLUSTER);  // of a thread

struct Weights {
  float4 weight[QUADS], bias[QUADS];
};
struct Shared {
  float parts[2][CLUSTER * WARPS];  // sums of all warps of the row; one set is read while the next is written
};

DEVICE int place(int rank, int i) { return ((rank * QUADS + i) * BLOCK + threadIdx.x) * 4; }  // of a thread's quad i

DEVICE void load(Weights& to, const Norm& norm, int rank) {
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = place(rank, i);
    set_zero(to.weight[i]), set_zero(to.bias[i]);
    if (k >= WIDTH) continue;
    if (norm.weight) to.weight[i] = *(const float4*)(norm.weight + k);
    if (BIAS && norm.bias) to.bias[i] = *(const float4*)(norm.bias + k);
  }
}

DEVICE float row_sum(Shared& shared, int& turn, int rank, float v) {
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  const int lane = threadIdx.x & 31;
  float* parts = shared.parts[turn ^= 1];
  if (lane < CLUSTER) of_block(parts, lane)[rank * WARPS + (threadIdx.x >> 5)] = v;
  cluster_sync();
  v = 0.f;
#pragma unroll
  for (int i = 0; i < CLUSTER * WARPS; i++) v += parts[i];
  return v;
}

DEVICE void normalize(Shared& shared, int& turn, int rank, float4* v, const Norm& norm, const Weights& by) {
  float mean = 0.f, sum = 0.f;
  if (BIAS && norm.bias) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) mean += (v[i].x + v[i].y) + (v[i].z + v[i].w);  // beyond WIDTH all are 0
    mean = row_sum(shared, turn, rank, mean) / WIDTH;
  }
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    if (place(rank, i) >= WIDTH) continue;
    v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
    sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w, sum))));
  }
  const float scale = 1.f / sqrtf(row_sum(shared, turn, rank, sum) / WIDTH + norm.eps);
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const float4 w = by.weight[i], b = by.bias[i];
    v[i] = make_float4(fmaf(v[i].x * scale, w.x, b.x), fmaf(v[i].y * scale, w.y, b.y),
                       fmaf(v[i].z * scale, w.z, b.z), fmaf(v[i].w * scale, w.w, b.w));
  }
}

#if CLUSTER > 1
#define TOGETHER __cluster_dims__(CLUSTER, 1, 1)
#else
#define TOGETHER
#endif
// x += after(y) factor, unless y is empty; image = norm(x), unless it is null. grid (rows CLUSTER)
extern "C" __global__ void __launch_bounds__(BLOCK) TOGETHER
add_norm(float* x, const __grid_constant__ Part y, const __grid_constant__ Norm after, float factor,
         const __grid_constant__ Norm norm, u32* __restrict__ image, int T, int T8) {
  extern __shared__ __align__(1024) char shared[];
  Shared& sums = *(Shared*)shared;
  cluster_arrive();
  start_next_kernel();
  const int t = blockIdx.x / CLUSTER, rank = blockIdx.x % CLUSTER;
  int turn = 0;
  Weights by;
  load(by, norm, rank);  // constants of the model, fetched while the kernel ahead is still at work
  float4 old[QUADS], v[QUADS];
  Column<float4> columns[QUADS];
  await_previous_kernel();
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = place(rank, i);
    set_zero(old[i]);
    if (k < WIDTH) old[i] = *(const float4*)(x + (u64)t * WIDTH + k);
    columns[i] = column<float4>(y, T, t, k);
    if (k >= WIDTH) columns[i].count = 0, columns[i].bias = nullptr;
  }
  add_up<AHEAD>(columns, v);
  cluster_wait();  // all blocks have begun: they can be written to
  if (AFTER) {
    Weights by_after;
    load(by_after, after, rank);
    normalize(sums, turn, rank, v, after, by_after);
  }
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = place(rank, i);
    v[i] = make_float4(fmaf(v[i].x, factor, old[i].x), fmaf(v[i].y, factor, old[i].y), fmaf(v[i].z, factor, old[i].z),
                       fmaf(v[i].w, factor, old[i].w));
    if (y.count && k < WIDTH) *(float4*)(x + (u64)t * WIDTH + k) = v[i];
  }
  if (!image) return;
  normalize(sums, turn, rank, v, norm, by);
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = place(rank, i);
    if (k < (WIDTH + 255) / 256 * 256) store4(image, T8, t, k, v[i]);  // zeros beyond WIDTH
  }
}
#endif

#ifdef DIM  // ---- rotation, for heads of DIM numbers, an even number up to 512
#if KV_BITS == 32  // the cache keeps float32, or 16-bit numbers (16: bf16, 17: fp16)
typedef float Stored;
DEVICE Stored stored(float v) { return v; }
#elif KV_BITS == 17
typedef u16 Stored;
DEVICE Stored stored(float v) { return fp16(v); }
#else
typedef u16 Stored;
DEVICE Stored stored(float v) { return (u16)bf16x2(v, 0.f); }
#endif
#define HEADS 4  // of a block; one a warp
constexpr int PAIRS = (DIM / 2 + 31) / 32;  // of a lane

// Cut qkv into Hq heads of q, Hk of k and Hk of v; normalize q and k where a weight is given; rotate both by the angles
// of the row's position; keep q, store k and v in the cache. Pairs (i, i + half) or, with INTERLEAVED, (2i, 2i + 1);
// dimensions from 2 half on pass. A row whose slot is negative is padding: nothing is stored. grid (ceil((Hq + 2 Hk) / HEADS), T)
extern "C" __global__ void __launch_bounds__(HEADS * 32)
rope_store(const __grid_constant__ Sums qkv, const __grid_constant__ Norm q_norm, const __grid_constant__ Norm k_norm,
           float* __restrict__ q, Stored* __restrict__ k_cache, Stored* __restrict__ v_cache,
           const float* __restrict__ cos, const float* __restrict__ sin, const long long* __restrict__ positions,
           const long long* __restrict__ slots, int T, int Hq, int Hk, int half) {
  start_next_kernel();
  const int lane = threadIdx.x & 31, head = blockIdx.x * HEADS + (threadIdx.x >> 5), t = blockIdx.y;
  if (head >= Hq + 2 * Hk) return;
  const bool is_q = head < Hq, is_v = head >= Hq + Hk;
  const long long slot = fresh(slots + t), position = fresh(positions + t);  // copied in before the step's first kernel
  float c[PAIRS], s[PAIRS], a[PAIRS], b[PAIRS], found[2 * PAIRS];
  Column<float> columns[2 * PAIRS];
  auto load_angles = [&] {
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const int pair = i * 32 + lane;
      c[i] = 1.f, s[i] = 0.f;
      if (is_v || pair >= half) continue;
      c[i] = cos[position * half + pair], s[i] = sin[position * half + pair];
    }
  };
  if (AHEAD > 1) load_angles();  // few rows: while the kernel ahead is still at work
  await_previous_kernel();
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int pair = i * 32 + lane;
    const bool apart = !INTERLEAVED && pair < half, is_there = pair < DIM / 2;
    columns[2 * i] = column<float>(qkv, T, t, head * DIM + (is_there ? apart ? pair : 2 * pair : 0));
    columns[2 * i + 1] = column<float>(qkv, T, t, head * DIM + (is_there ? apart ? pair + half : 2 * pair + 1 : 0));
  }
  add_up<AHEAD>(columns, found);
  if (AHEAD == 1) load_angles();  // many rows: beside their columns
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const bool is_there = i * 32 + lane < DIM / 2;
    a[i] = is_there ? found[2 * i] : 0.f, b[i] = is_there ? found[2 * i + 1] : 0.f;
  }
  const Norm& norm = is_q ? q_norm : k_norm;
  if (!is_v && norm.weight) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < PAIRS; i++) sum = fmaf(a[i], a[i], fmaf(b[i], b[i], sum));
#pragma unroll
    for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
    const float scale = 1.f / sqrtf(sum / DIM + norm.eps);
#pragma unroll
    for (int i = 0; i < PAIRS; i++) {
      const int pair = i * 32 + lane;
      if (pair >= DIM / 2) continue;
      const bool apart = !INTERLEAVED && pair < half;
      a[i] = a[i] * scale * norm.weight[apart ? pair : 2 * pair];
      b[i] = b[i] * scale * norm.weight[apart ? pair + half : 2 * pair + 1];
    }
  }
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int pair = i * 32 + lane;
    if (pair >= DIM / 2) continue;
    const bool apart = !INTERLEAVED && pair < half;
    const int first = apart ? pair : 2 * pair, second = apart ? pair + half : 2 * pair + 1;
    float x = a[i], y = b[i];
    if (!is_v && pair < half) {
      x = __fsub_rn(__fmul_rn(a[i], c[i]), __fmul_rn(b[i], s[i]));
      y = __fadd_rn(__fmul_rn(a[i], s[i]), __fmul_rn(b[i], c[i]));
    }
    if (is_q) {
      float* to = q + ((u64)t * Hq + head) * DIM;
      to[first] = x, to[second] = y;
    } else if (slot >= 0) {
      Stored* to = (is_v ? v_cache : k_cache) + (slot * Hk + (head - Hq) % Hk) * DIM;
      to[first] = stored(x), to[second] = stored(y);
    }
  }
}
#endif

#ifdef ACTIVATION  // ---- activation: image = act(gate) up, a part each, of F columns. grid (ceil(F / 4 threads), rows)
#include "act.cuh"

// With `places` only the rows it names are worked on: it was written before the kernel ahead began.
extern "C" __global__ void __launch_bounds__(256)
activate(const __grid_constant__ Sums sums, u32* __restrict__ image, const int* __restrict__ places, int F, int T, int T8) {
  start_next_kernel();
  const int f = (blockIdx.x * blockDim.x + threadIdx.x) * 4, t = places ? fresh(places + blockIdx.y) : blockIdx.y;
  await_previous_kernel();
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (f < F) {
#if GATED
    const Column<float4> columns[2] = {column<float4>(sums.part[0], T, t, f), column<float4>(sums.part[1], T, t, f)};
    float4 found[2];
    add_up<AHEAD>(columns, found);
    const float4 up = found[1];
    v = found[0];
    v = make_float4(gated(v.x, up.x), gated(v.y, up.y), gated(v.z, up.z), gated(v.w, up.w));
#else
    const Column<float4> columns[1] = {column<float4>(sums.part[0], T, t, f)};
    float4 found[1];
    add_up<AHEAD>(columns, found);
    v = make_float4(act(found[0].x), act(found[0].y), act(found[0].z), act(found[0].w));
#endif
  }
  if (f < (F + 255) / 256 * 256) store4(image, T8, t, f, v);
}
#endif

#ifdef PLAIN  // ---- from and to rows
// x [T][K] -> image. grid (ceil(K / 256), T), 64 threads
extern "C" __global__ void __launch_bounds__(64)
to_image(const float* x, u32* __restrict__ image, int K, int T8) {
  start_next_kernel();
  await_previous_kernel();
  const int k = (blockIdx.x * 64 + threadIdx.x) * 4, t = blockIdx.y;
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = k + i < K ? x[(u64)t * K + k + i] : 0.f;
  store4(image, T8, t, k, make_float4(v[0], v[1], v[2], v[3]));
}

// y [T][N] = the sums added up. grid (ceil(N / 256), T), 256 threads
extern "C" __global__ void __launch_bounds__(256)
total(const __grid_constant__ Sums sums, float* __restrict__ y, int T, int N) {
  start_next_kernel();
  await_previous_kernel();
  const int n = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
  if (n >= N) return;
  const Column<float> columns[1] = {column<float>(sums, T, t, n)};
  float found[1];
  add_up<8>(columns, found);
  y[(u64)t * N + n] = found[0];
}
#endif
