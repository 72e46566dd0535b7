// What stands between the matmuls: each kernel adds up the sums it is given, in float32 and one order for every number
// of rows, and leaves what the next one reads.
#include "flow.cuh"

#ifdef WIDTH  // ---- residual and norm, for rows of WIDTH numbers, a multiple of 4
#define BLOCK 512
constexpr int QUADS = (WIDTH + 4 * BLOCK - 1) / (4 * BLOCK);  // of a thread

DEVICE float block_sum(float v) {
  __shared__ float parts[BLOCK / 32];
#pragma unroll
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  __syncthreads();  // the call before has been read
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int i = 0; i < BLOCK / 32; i++) v += parts[i];
  return v;
}

DEVICE void normalize(float4* v, const Norm& norm) {
  float mean = 0.f, sum = 0.f;
  if (norm.bias) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) mean += (v[i].x + v[i].y) + (v[i].z + v[i].w);  // beyond WIDTH all are 0
    mean = block_sum(mean) / WIDTH;
  }
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    if ((i * BLOCK + threadIdx.x) * 4 >= WIDTH) continue;
    v[i] = make_float4(v[i].x - mean, v[i].y - mean, v[i].z - mean, v[i].w - mean);
    sum = fmaf(v[i].x, v[i].x, fmaf(v[i].y, v[i].y, fmaf(v[i].z, v[i].z, fmaf(v[i].w, v[i].w, sum))));
  }
  const float scale = 1.f / sqrtf(block_sum(sum) / WIDTH + norm.eps);
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = (i * BLOCK + threadIdx.x) * 4;
    if (k >= WIDTH) continue;
    const float4 w = *(const float4*)(norm.weight + k);
    float4 b = make_float4(0.f, 0.f, 0.f, 0.f);
    if (norm.bias) b = *(const float4*)(norm.bias + k);
    v[i] = make_float4(fmaf(v[i].x * scale, w.x, b.x), fmaf(v[i].y * scale, w.y, b.y),
                       fmaf(v[i].z * scale, w.z, b.z), fmaf(v[i].w * scale, w.w, b.w));
  }
}

// x += after(y) factor, unless y is empty; image = norm(x), unless it is null. grid (rows)
extern "C" __global__ void __launch_bounds__(BLOCK)
add_norm(float* __restrict__ x, const __grid_constant__ Part y, const __grid_constant__ Norm after, float factor,
         const __grid_constant__ Norm norm, u32* __restrict__ image, int T, int T8) {
  start_next_kernel();
  await_previous_kernel();
  const int t = blockIdx.x;
  float4 v[QUADS];
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = (i * BLOCK + threadIdx.x) * 4;
    v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    if (k < WIDTH && y.count) v[i] = sum4_at(y, T, t, k);
  }
  if (after.weight) normalize(v, after);
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = (i * BLOCK + threadIdx.x) * 4;
    if (k >= WIDTH) continue;
    float4* at = (float4*)(x + (u64)t * WIDTH + k);
    const float4 a = *at;
    v[i] = make_float4(fmaf(v[i].x, factor, a.x), fmaf(v[i].y, factor, a.y), fmaf(v[i].z, factor, a.z),
                       fmaf(v[i].w, factor, a.w));
    if (y.count) *at = v[i];
  }
  if (!image) return;
  normalize(v, norm);
#pragma unroll
  for (int i = 0; i < QUADS; i++) {
    const int k = (i * BLOCK + threadIdx.x) * 4;
    if (k < (WIDTH + 255) / 256 * 256) store4(image, T8, t, k, k < WIDTH ? v[i] : make_float4(0.f, 0.f, 0.f, 0.f));
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
  await_previous_kernel();
  const int lane = threadIdx.x & 31, head = blockIdx.x * HEADS + (threadIdx.x >> 5), t = blockIdx.y;
  if (head >= Hq + 2 * Hk) return;
  const bool is_q = head < Hq, is_v = head >= Hq + Hk;
  float a[PAIRS], b[PAIRS];
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int pair = i * 32 + lane;
    a[i] = b[i] = 0.f;
    if (pair >= DIM / 2) continue;
    const bool apart = !INTERLEAVED && pair < half;
    a[i] = sum_at(qkv, T, t, head * DIM + (apart ? pair : 2 * pair));
    b[i] = sum_at(qkv, T, t, head * DIM + (apart ? pair + half : 2 * pair + 1));
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
  const long long slot = slots[t], position = positions[t];
#pragma unroll
  for (int i = 0; i < PAIRS; i++) {
    const int pair = i * 32 + lane;
    if (pair >= DIM / 2) continue;
    const bool apart = !INTERLEAVED && pair < half;
    const int first = apart ? pair : 2 * pair, second = apart ? pair + half : 2 * pair + 1;
    float x = a[i], y = b[i];
    if (!is_v && pair < half) {
      const float c = cos[position * half + pair], s = sin[position * half + pair];
      x = __fsub_rn(__fmul_rn(a[i], c), __fmul_rn(b[i], s));
      y = __fadd_rn(__fmul_rn(a[i], s), __fmul_rn(b[i], c));
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

#ifdef ACTIVATION  // ---- activation: image = act(gate) up for columns f and F + f. grid (ceil(F / 256), T), 64 threads
#define SILU 0
#define GELU 1
#define GELU_TANH 2
#define CLAMPED 3  // of GPT-OSS, arXiv:2508.10925
DEVICE float act(float x) {
#if ACTIVATION == SILU
  return x / (1.f + expf(-x));
#elif ACTIVATION == GELU
  return 0.5f * x * (1.f + erff(x * 0.70710678118654752f));
#else
  return x / (1.f + expf(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
#endif
}
DEVICE float gated(float gate, float up) {
#if ACTIVATION == CLAMPED
  gate = gate > 7.f ? 7.f : gate;  // a NaN stays one
  up = up > 7.f ? 7.f : up < -7.f ? -7.f : up;
  return gate / (1.f + expf(-1.702f * gate)) * (up + 1.f);
#else
  return act(gate) * up;
#endif
}

// Rows whose `experts` entry is negative are padding, and left as they are.
extern "C" __global__ void __launch_bounds__(64)
activate(const __grid_constant__ Sums sums, u32* __restrict__ image, int F, int T, int T8) {
  start_next_kernel();
  await_previous_kernel();
  const int f = (blockIdx.x * 64 + threadIdx.x) * 4, t = blockIdx.y;
  const Part& whole = sums.part[0];
  if (whole.experts && whole.experts[t] < 0) return;
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (f < F) {
    v = sum4_at(whole, T, t, f);
#if GATED
    const float4 up = whole.width > F ? sum4_at(whole, T, t, F + f) : sum4_at(sums.part[1], T, t, f);
    v = make_float4(gated(v.x, up.x), gated(v.y, up.y), gated(v.z, up.z), gated(v.w, up.w));
#else
    v = make_float4(act(v.x), act(v.y), act(v.z), act(v.w));
#endif
  }
  store4(image, T8, t, f, v);
}
#endif

#ifdef EXPERTS  // ---- mixture of EXPERTS experts, of which a row takes USED
// Each row's best experts by score, equal ones by index, and their weights: softmax over the chosen or over all.
// grid (T), 32 threads
extern "C" __global__ void __launch_bounds__(32)
route(const __grid_constant__ Sums scores, int* __restrict__ chosen, float* __restrict__ weights, int T, int over_chosen) {
  start_next_kernel();
  await_previous_kernel();
  constexpr int OWN = (EXPERTS + 31) / 32;
  const int lane = threadIdx.x, t = blockIdx.x;
  const float lowest = __int_as_float(0xff800000);
  float own[OWN], best[USED];
  bool taken[OWN];
  for (int i = 0; i < OWN; i++) {
    own[i] = i * 32 + lane < EXPERTS ? sum_at(scores, T, t, i * 32 + lane) : lowest;
    taken[i] = i * 32 + lane >= EXPERTS;
  }
  for (int slot = 0; slot < USED; slot++) {
    float top = lowest;
    int at = EXPERTS;  // nothing found: all that is left is NaN
    for (int i = OWN - 1; i >= 0; i--)
      if (!taken[i] && (at == EXPERTS || !(own[i] < top))) top = own[i], at = i * 32 + lane;
    for (int step = 16; step; step >>= 1) {
      const float other = __shfl_xor_sync(~0u, top, step);
      const int other_at = __shfl_xor_sync(~0u, at, step);
      const bool better = at == EXPERTS || other > top || (!(other < top) && other_at < at);
      if (other_at < EXPERTS && better) top = other, at = other_at;
    }
    at = __shfl_sync(~0u, at, 0), top = __shfl_sync(~0u, top, 0);
    best[slot] = top;
    if (lane == (at & 31)) taken[at >> 5] = true;
    if (lane == 0) chosen[t * USED + slot] = at;
  }
  float total = 0.f;
  if (over_chosen) {
    for (int slot = 0; slot < USED; slot++) total += expf(best[slot] - best[0]);
  } else {
    for (int i = 0; i < OWN; i++) total += i * 32 + lane < EXPERTS ? expf(own[i] - best[0]) : 0.f;
    for (int step = 16; step; step >>= 1) total += __shfl_xor_sync(~0u, total, step);
  }
  if (lane == 0)
    for (int slot = 0; slot < USED; slot++) weights[t * USED + slot] = expf(best[slot] - best[0]) / total;
}

// Places for the pairs (row, slot), expert by expert, each expert's from a multiple of `unit`. owners: for each unit
// its expert or -1; experts: the same for each place, -1 where nobody is. grid (1), 1024 threads
extern "C" __global__ void __launch_bounds__(1024)
arrange(const int* __restrict__ chosen, int* __restrict__ places, int* __restrict__ experts, int* __restrict__ owners,
        int pairs, int units, int unit) {
  start_next_kernel();
  await_previous_kernel();
  __shared__ int count[EXPERTS], first[EXPERTS];
  for (int e = threadIdx.x; e < EXPERTS; e += 1024) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += 1024) atomicAdd(&count[chosen[i]], 1);
  for (int i = threadIdx.x; i < units * unit; i += 1024) experts[i] = -1;
  for (int i = threadIdx.x; i < units; i += 1024) owners[i] = -1;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int e = 0, at = 0; e < EXPERTS; e++) {
      first[e] = at * unit;
      for (int left = count[e]; left > 0; left -= unit) owners[at++] = e;
      count[e] = 0;
    }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += 1024) {
    const int e = chosen[i], place = first[e] + atomicAdd(&count[e], 1);
    places[i] = place, experts[place] = e;
  }
}

// Copy each row's image to the places of its pairs, 16 bytes a thread. grid (ceil(units of a row / 64), pairs)
extern "C" __global__ void __launch_bounds__(64)
spread(const uint4* __restrict__ from, uint4* __restrict__ to, const int* __restrict__ places, int units, int T8, int P8) {
  start_next_kernel();
  await_previous_kernel();
  const int i = blockIdx.x * 64 + threadIdx.x, t = blockIdx.y / USED, p = places[blockIdx.y];
  if (i >= units) return;
  const u64 piece = i >> 3, u = i & 7;
  to[((piece * P8 + (p >> 3)) * 8 + (p & 7)) * 8 + (u ^ (p & 7))] =
      from[((piece * T8 + (t >> 3)) * 8 + (t & 7)) * 8 + (u ^ (t & 7))];
}

// y[t][n] = sum over slots, in order, of weight times what the expert gave. grid (ceil(N / 256), T), 64 threads
extern "C" __global__ void __launch_bounds__(64)
combine(const __grid_constant__ Part given, const int* __restrict__ places, const float* __restrict__ weights,
        float* __restrict__ y, int P) {
  start_next_kernel();
  await_previous_kernel();
  const int n = (blockIdx.x * 64 + threadIdx.x) * 4, t = blockIdx.y;
  if (n >= given.width) return;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int slot = 0; slot < USED; slot++) {
    const float4 v = sum4_at(given, P, places[t * USED + slot], n);
    const float w = weights[t * USED + slot];
    sum = make_float4(__fadd_rn(sum.x, __fmul_rn(w, v.x)), __fadd_rn(sum.y, __fmul_rn(w, v.y)),
                      __fadd_rn(sum.z, __fmul_rn(w, v.z)), __fadd_rn(sum.w, __fmul_rn(w, v.w)));
  }
  *(float4*)(y + (u64)t * given.width + n) = sum;
}
#endif

#ifdef PLAIN  // ---- from and to rows
// The stored bytes of some rows of a matrix in tiles [strips][depth][tile_bytes]: bit i of a row's bytes in a tile is bit
// places[row % 16][i] of it. One byte a thread. grid (ceil(depth row_bytes / 64), T)
extern "C" __global__ void __launch_bounds__(64)
gather_rows(const u8* __restrict__ tiles, const int* __restrict__ places, const long long* __restrict__ rows,
            u8* __restrict__ out, int depth, int tile_bytes, int row_bytes) {
  start_next_kernel();
  await_previous_kernel();
  const int i = blockIdx.x * 64 + threadIdx.x, at = i % row_bytes;
  if (i >= depth * row_bytes) return;
  const long long row = rows[blockIdx.y];
  const u8* tile = tiles + ((row >> 4) * depth + i / row_bytes) * tile_bytes;
  const int* place = places + ((row & 15) * row_bytes + at) * 8;
  int byte = 0;
#pragma unroll
  for (int bit = 0; bit < 8; bit++) byte |= (tile[place[bit] >> 3] >> (place[bit] & 7) & 1) << bit;
  out[(u64)blockIdx.y * depth * row_bytes + i] = (u8)byte;
}

// x [T][K] -> image. grid (ceil(K / 256), T), 64 threads
extern "C" __global__ void __launch_bounds__(64)
to_image(const float* __restrict__ x, u32* __restrict__ image, int K, int T8) {
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
  if (n < N) y[(u64)t * N + n] = sum_at(sums, T, t, n);
}
#endif
