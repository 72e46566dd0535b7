// What stands between the matmuls: each kernel adds up the sums it is given, in float32 and one order for every number
// of rows, and leaves what the next one reads. AHEAD: slices of the sums fetched at once.
#include "flow.cuh"

#ifdef WIDTH  // ---- residual and norm, for rows of WIDTH numbers, a multiple of 4
// CLUSTER blocks of BLOCK threads share a row, so that one row alone is fetched by several multiprocessors.
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
    if (norm.bias) to.bias[i] = *(const float4*)(norm.bias + k);
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
  if (norm.bias) {
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
add_norm(float* __restrict__ x, const __grid_constant__ Part y, const __grid_constant__ Norm after, float factor,
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
  if (after.weight) {
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

#ifdef ACTIVATION  // ---- activation: image = act(gate) up for columns f and F + f. grid (ceil(F / 4 threads), rows)
#include "act.cuh"

// With `places` only the rows it names are worked on: it was written before the kernel ahead began.
extern "C" __global__ void __launch_bounds__(256)
activate(const __grid_constant__ Sums sums, u32* __restrict__ image, const int* __restrict__ places, int F, int T, int T8) {
  start_next_kernel();
  const int f = (blockIdx.x * blockDim.x + threadIdx.x) * 4, t = places ? fresh(places + blockIdx.y) : blockIdx.y;
  const Part& whole = sums.part[0];
  await_previous_kernel();
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
  if (f < F) {
#if GATED
    const Column<float4> columns[2] = {column<float4>(whole, T, t, f), column<float4>(sums, T, t, F + f)};
    float4 found[2];
    add_up<AHEAD>(columns, found);
    const float4 up = found[1];
    v = found[0];
    v = make_float4(gated(v.x, up.x), gated(v.y, up.y), gated(v.z, up.z), gated(v.w, up.w));
#else
    const Column<float4> columns[1] = {column<float4>(whole, T, t, f)};
    float4 found[1];
    add_up<AHEAD>(columns, found);
    v = make_float4(act(found[0].x), act(found[0].y), act(found[0].z), act(found[0].w));
#endif
  }
  if (f < (F + 255) / 256 * 256) store4(image, T8, t, f, v);
}
#endif

#ifdef EXPERTS  // ---- mixture of EXPERTS experts, of which a row takes USED
// A row's best experts by score, equal ones by index, and their weights: softmax over the chosen or over all. One warp.
DEVICE void route_row(const Sums& scores, int* chosen, float* weights, int t, int T, int over_chosen) {
  constexpr int OWN = (EXPERTS + 31) / 32;
  const int lane = threadIdx.x & 31;
  const float lowest = __int_as_float(0xff800000);
  float own[OWN], best[USED];
  bool taken[OWN];
  for (int i = 0; i < OWN; i++) {
    own[i] = lowest, taken[i] = i * 32 + lane >= EXPERTS;
    if (taken[i]) continue;
    const Column<float> columns[1] = {column<float>(scores, T, t, i * 32 + lane)};
    float found[1];
    add_up<24>(columns, found);
    own[i] = found[0];
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

// Places for the pairs (row, slot), a unit's all for one expert: first those of `smalls` units of `small` rows, then of
// `larges` units of `large`. An expert takes large units while it fills them; what is left goes to a small one if it
// fits there, else to one more large one. owners: for each unit its expert, or -1, all of these behind the others of
// the size; experts: the same for each place, -1 where nobody is. One block.
#define ARRANGERS 1024
struct Units {
  int smalls, larges, small, large;
};
DEVICE void arrange_pairs(const int* chosen, int* places, int* experts, int* owners, int pairs, const Units& units) {
  const int large_from = units.smalls * units.small;  // a place
  __shared__ int count[EXPERTS], in_large[EXPERTS], to_large[EXPERTS], to_small[EXPERTS];  // to_: added to a row's number
  for (int e = threadIdx.x; e < EXPERTS; e += ARRANGERS) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += ARRANGERS) atomicAdd(&count[chosen[i]], 1);
  for (int i = threadIdx.x; i < large_from + units.larges * units.large; i += ARRANGERS) experts[i] = -1;
  for (int i = threadIdx.x; i < units.smalls + units.larges; i += ARRANGERS) owners[i] = -1;
  __syncthreads();
  if (threadIdx.x < 32) {  // the units of the experts before each, 32 experts at a time
    for (int base = 0, smalls = 0, larges = 0; base < EXPERTS; base += 32) {
      const int e = base + threadIdx.x, n = e < EXPERTS ? count[e] : 0;
      const int own = (n + units.large - units.small - 1) / units.large, rows = own * units.large;
      const u32 has_small = __ballot_sync(~0u, n > rows);
      int sum = own;
      for (int step = 1; step < 32; step <<= 1) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (threadIdx.x >= step) sum += other;
      }
      const int at = larges + sum - own, small_at = smalls + __popc(has_small & ((1u << threadIdx.x) - 1));
      if (e < EXPERTS) {
        count[e] = 0, in_large[e] = rows;
        to_large[e] = large_from + at * units.large, to_small[e] = small_at * units.small - rows;
      }
      for (int i = 0; i < own; i++) owners[units.smalls + at + i] = e;
      if (n > rows) owners[small_at] = e;
      larges += __shfl_sync(~0u, sum, 31), smalls += __popc(has_small);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += ARRANGERS) {
    const int e = chosen[i], row = atomicAdd(&count[e], 1);
    const int place = row + (row < in_large[e] ? to_large[e] : to_small[e]);
    places[i] = place, experts[place] = e;
  }
}

// grid (T), 32 threads
extern "C" __global__ void __launch_bounds__(32)
route(const __grid_constant__ Sums scores, int* chosen, float* weights, int T, int over_chosen) {
  start_next_kernel();
  await_previous_kernel();
  route_row(scores, chosen, weights, blockIdx.x, T, over_chosen);
}

// grid (1), ARRANGERS threads
extern "C" __global__ void __launch_bounds__(ARRANGERS)
arrange(const int* chosen, int* places, int* experts, int* owners, int pairs, const __grid_constant__ Units units) {
  start_next_kernel();
  await_previous_kernel();
  arrange_pairs(chosen, places, experts, owners, pairs, units);
}

// Both, for at most a row a warp. grid (1), ARRANGERS threads
extern "C" __global__ void __launch_bounds__(ARRANGERS)
route_and_arrange(const __grid_constant__ Sums scores, int* chosen, float* weights, int* places, int* experts,
                  int* owners, int T, int over_chosen, const __grid_constant__ Units units) {
  start_next_kernel();
  await_previous_kernel();
  if ((threadIdx.x >> 5) < T) route_row(scores, chosen, weights, threadIdx.x >> 5, T, over_chosen);
  __syncthreads();
  arrange_pairs(chosen, places, experts, owners, T * USED, units);
}

// Copy each row's image to the places of its pairs, EACH times 16 bytes a thread. grid (ceil(units of a row / 64 EACH),
// pairs). The next kernel starts when this one has waited, so whatever comes after it finds the owners of the units and
// all else about places complete.
template <int EACH>
DEVICE void copy_to_places(const uint4* from, uint4* to, const int* places, int units, int T8, int P8) {
  await_previous_kernel();
  start_next_kernel();
  const int first = blockIdx.x * 64 * EACH + threadIdx.x, t = blockIdx.y / USED, p = places[blockIdx.y];
  uint4 v[EACH];
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int i = first + n * 64, u = i & 7;
    if (i < units) v[n] = from[(((u64)(i >> 3) * T8 + (t >> 3)) * 8 + (t & 7)) * 8 + (u ^ (t & 7))];
  }
#pragma unroll
  for (int n = 0; n < EACH; n++) {
    const int i = first + n * 64, u = i & 7;
    if (i < units) to[(((u64)(i >> 3) * P8 + (p >> 3)) * 8 + (p & 7)) * 8 + (u ^ (p & 7))] = v[n];
  }
}
extern "C" __global__ void __launch_bounds__(64)
spread(const uint4* __restrict__ from, uint4* __restrict__ to, const int* __restrict__ places, int units, int T8, int P8) {
  copy_to_places<1>(from, to, places, units, T8, P8);
}
extern "C" __global__ void __launch_bounds__(64)
spread_many(const uint4* __restrict__ from, uint4* __restrict__ to, const int* __restrict__ places, int units, int T8,
            int P8) {
  copy_to_places<4>(from, to, places, units, T8, P8);
}

// y[t][n] = sum over slots, in order, of weight times what the expert gave. Where, how much and the biases are known since
// `spread`; each is fetched for all slots at once. WHOLE: of one slice, which leaves room for more blocks.
// grid (ceil(N / 256), T), 64 threads
template <bool WHOLE>
DEVICE void combine_slots(const Part& given, const int* places, const float* weights, float* y, int P) {
  start_next_kernel();
  const int n = (blockIdx.x * 64 + threadIdx.x) * 4, t = blockIdx.y;
  if (n >= given.width) return;
  const u64 stride = (u64)P * given.width / 4;
  Column<float4> columns[USED];
  float4 found[USED], bias[USED], sum = make_float4(0.f, 0.f, 0.f, 0.f);
  int place[USED], expert[USED];
  float by[USED];
#pragma unroll
  for (int slot = 0; slot < USED; slot++) {
    place[slot] = fresh(places + t * USED + slot);
    by[slot] = __int_as_float(fresh((const int*)weights + t * USED + slot));
  }
#pragma unroll
  for (int slot = 0; slot < USED; slot++) expert[slot] = given.experts ? fresh(given.experts + place[slot]) : 0;
#pragma unroll
  for (int slot = 0; slot < USED; slot++) {
    set_zero(bias[slot]);
    if (given.bias) bias[slot] = *(const float4*)(given.bias + (u64)expert[slot] * given.width + n);
    const float4* slices = (const float4*)(given.slices + (u64)place[slot] * given.width + n);
    columns[slot] = {slices, nullptr, stride, WHOLE ? 1 : given.count};
  }
  await_previous_kernel();
  add_up<!WHOLE && USED <= 4 ? 3 : 1>(columns, found);
#pragma unroll
  for (int slot = 0; slot < USED; slot++) {
    const float4 v = plus(found[slot], bias[slot]);
    const float w = by[slot];
    sum = make_float4(__fadd_rn(sum.x, __fmul_rn(w, v.x)), __fadd_rn(sum.y, __fmul_rn(w, v.y)),
                      __fadd_rn(sum.z, __fmul_rn(w, v.z)), __fadd_rn(sum.w, __fmul_rn(w, v.w)));
  }
  *(float4*)(y + (u64)t * given.width + n) = sum;
}
extern "C" __global__ void __launch_bounds__(64)
combine(const __grid_constant__ Part given, const int* __restrict__ places, const float* __restrict__ weights,
        float* __restrict__ y, int P) {
  combine_slots<false>(given, places, weights, y, P);
}
extern "C" __global__ void __launch_bounds__(64)
combine_whole(const __grid_constant__ Part given, const int* __restrict__ places, const float* __restrict__ weights,
              float* __restrict__ y, int P) {
  combine_slots<true>(given, places, weights, y, P);
}
#endif

#ifdef PLAIN  // ---- from and to rows
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
  if (n >= N) return;
  const Column<float> columns[1] = {column<float>(sums, T, t, n)};
  float found[1];
  add_up<8>(columns, found);
  y[(u64)t * N + n] = found[0];
}
#endif
