// What stands around the grouped matmuls of a mixture of EXPERTS experts, of which a row takes USED: who takes whom, where
// their rows lie together, and the weighted sum of what comes back.
#include "flow.cuh"

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
// the size; filled: how many of its rows are anybody's, the first; experts: the expert for each place, -1 where nobody is.
// One block.
#define ARRANGERS 1024
struct Units {
  int smalls, larges, small, large;
};
DEVICE void arrange_pairs(const int* chosen, int* places, int* experts, int* owners, int* filled, int pairs,
                          const Units& units) {
  const int large_from = units.smalls * units.small;  // a place
  __shared__ int count[EXPERTS], in_large[EXPERTS], to_large[EXPERTS], to_small[EXPERTS];  // to_: added to a row's number
  for (int e = threadIdx.x; e < EXPERTS; e += ARRANGERS) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += ARRANGERS) atomicAdd(&count[chosen[i]], 1);
  for (int i = threadIdx.x; i < large_from + units.larges * units.large; i += ARRANGERS) experts[i] = -1;
  for (int i = threadIdx.x; i < units.smalls + units.larges; i += ARRANGERS) owners[i] = -1, filled[i] = 0;
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
      for (int i = 0; i < own; i++) {
        owners[units.smalls + at + i] = e;
        filled[units.smalls + at + i] = min(units.large, n - i * units.large);
      }
      if (n > rows) owners[small_at] = e, filled[small_at] = n - rows;
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
arrange(const int* chosen, int* places, int* experts, int* owners, int* filled, int pairs,
        const __grid_constant__ Units units) {
  start_next_kernel();
  await_previous_kernel();
  arrange_pairs(chosen, places, experts, owners, filled, pairs, units);
}

// Both, for at most a row a warp. grid (1), ARRANGERS threads
extern "C" __global__ void __launch_bounds__(ARRANGERS)
route_and_arrange(const __grid_constant__ Sums scores, int* chosen, float* weights, int* places, int* experts,
                  int* owners, int* filled, int T, int over_chosen, const __grid_constant__ Units units) {
  start_next_kernel();
  await_previous_kernel();
  if ((threadIdx.x >> 5) < T) route_row(scores, chosen, weights, threadIdx.x >> 5, T, over_chosen);
  __syncthreads();
  arrange_pairs(chosen, places, experts, owners, filled, T * USED, units);
}

// A single row: slot i has unit i, of 8 rows, to itself. As many units as slots. grid (1), 32 threads
extern "C" __global__ void __launch_bounds__(32)
route_alone(const __grid_constant__ Sums scores, int* chosen, float* weights, int* places, int* experts, int* owners,
            int* filled, int over_chosen) {
  start_next_kernel();
  await_previous_kernel();
  route_row(scores, chosen, weights, 0, 1, over_chosen);
  __syncwarp();
  for (int i = threadIdx.x; i < USED * 8; i += 32) {
    const int slot = i >> 3, is_first = i % 8 == 0, owner = chosen[slot];
    experts[i] = is_first ? owner : -1;
    if (is_first) places[slot] = i, owners[slot] = owner, filled[slot] = 1;
  }
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
spread(const uint4* from, uint4* __restrict__ to, const int* places, int units, int T8, int P8) {
  copy_to_places<1>(from, to, places, units, T8, P8);
}
extern "C" __global__ void __launch_bounds__(64)
spread_many(const uint4* from, uint4* __restrict__ to, const int* places, int units, int T8,
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
