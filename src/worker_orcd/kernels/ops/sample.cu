// The next token of each row of logits: argmax, or one draw by inverse CDF among what top-k, top-p and min-p leave.
//
// Probabilities are integers in units of 2^-40 of the likeliest token's, so sums are exact in every order. Tokens are
// ordered by logit, falling, equal ones by index; each filter keeps a prefix of that order, whose end is found digit by
// digit of the logits' bits (radix selection) instead of by sorting. grid (R), BLOCK threads: one block a row
#include "flow.cuh"
#define BLOCK 1024
#define WARPS (BLOCK / 32)
#define UNITS 0x1p40
typedef long long i64;

struct Params {  // of a row; columns of a table [6][R]
  double temperature, greedy, top_k, top_p, min_p, uniform;
};
struct Row {
  const float* logits;
  const u32* banned;  // bit i: token i may not be drawn
  int V;
  double temperature, best;  // best: the largest logit over the temperature
  u32 last_key;              // the prefix: larger keys, and of equal ones indices up to last_index
  int last_index;
};

DEVICE u32 key_of(float v) {  // orders as the number does; both zeros are one
  const u32 bits = __float_as_uint(v + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE bool is_banned(const u32* banned, int i) { return banned[i >> 5] >> (i & 31) & 1; }
DEVICE bool is_in(const Row& row, u32 key, int i) {
  return key > row.last_key || (key == row.last_key && i <= row.last_index);
}
DEVICE u64 weight_of(const Row& row, float v) {
  const double gap = (double)v / row.temperature - row.best;
  return gap < -30. ? 0 : (u64)rint(exp(gap) * UNITS);
}

__shared__ u64 shared_sums[WARPS];
__shared__ u64 shared_bins[256];
__shared__ int shared_counts[256];
__shared__ u64 shared_value, shared_total;
__shared__ int shared_index;

DEVICE u64 warp_sum(u64 v) {
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
DEVICE u64 block_max(u64 v) {
  for (int step = 16; step; step >>= 1) {
    const u64 other = __shfl_xor_sync(~0u, v, step);
    v = other > v ? other : v;
  }
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared_sums[threadIdx.x >> 5] = v;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) v = shared_sums[i] > v ? shared_sums[i] : v;
  return v;
}
DEVICE u64 block_sum(u64 v) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared_sums[threadIdx.x >> 5] = v;
  __syncthreads();
  v = 0;
  for (int i = 0; i < WARPS; i++) v += shared_sums[i];
  return v;
}

// The first index at which the running sum of measure(i), in the order of indices, exceeds target(sum of all). The sum
// is taken by ranges, of 1 / WARPS of all, then 1 / WARPS of the one it falls in, then token by token.
template <class Measure, class Target>
DEVICE int locate(int V, Measure measure, Target target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int begin = 0, end = V;
  u64 wanted = 0;
  for (int level = 0; level < 2; level++) {
    const int size = ((end - begin + WARPS - 1) / WARPS + 31) / 32 * 32, from = begin + warp * size;
    u64 sum = 0;
    for (int i = from + lane; i < from + size && i < end; i += 32) sum += measure(i);
    sum = warp_sum(sum);
    __syncthreads();
    if (lane == 0) shared_sums[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      if (level == 0) {
        u64 total = 0;
        for (int i = 0; i < WARPS; i++) total += shared_sums[i];
        wanted = target(total);
      }
      int range = 0;
      while (range < WARPS - 1 && shared_sums[range] <= wanted) wanted -= shared_sums[range++];
      shared_index = range, shared_value = wanted;
    }
    __syncthreads();
    wanted = shared_value;
    begin += shared_index * size, end = begin + size < end ? begin + size : end;
    __syncthreads();
  }
  if (warp == 0) {
    int found = end - 1;
    for (int first = begin; first < end; first += 32) {
      u64 sum = first + lane < end ? measure(first + lane) : 0;
      for (int step = 1; step < 32; step <<= 1) {
        const u64 before = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += before;
      }
      const u32 beyond = __ballot_sync(~0u, sum > wanted);
      if (beyond) {
        found = first + __ffs(beyond) - 1;
        break;
      }
      wanted -= __shfl_sync(~0u, sum, 31);
    }
    if (lane == 0) shared_index = found;
  }
  __syncthreads();
  const int found = shared_index;
  __syncthreads();
  return found;
}

// Shorten the row's prefix to the tokens for which is_kept(measure of all before them), and at least to one.
template <class Measure, class Kept>
DEVICE void shorten(Row& row, Measure measure, Kept is_kept) {
  u32 key = 0;
  u64 before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < 256; i += BLOCK) shared_bins[i] = 0, shared_counts[i] = 0;
    __syncthreads();
    for (int first = 0; first < row.V; first += BLOCK) {
      const int i = first + threadIdx.x;
      const bool is_there = i < row.V;
      const float v = is_there ? row.logits[i] : 0.f;
      const u32 own = key_of(v);
      const bool counts = is_there && !is_banned(row.banned, i) && is_in(row, own, i) &&
                          (shift == 24 || own >> (shift + 8) == key >> (shift + 8));
      const u64 m = counts ? measure(v) : 0;
      const int bin = m ? own >> shift & 255 : 256;
      const u32 peers = __match_any_sync(~0u, bin);  // one of those that share a bin counts for all
      if (m) {
        if ((threadIdx.x & 31) == __ffs(peers) - 1) atomicAdd(&shared_counts[bin], __popc(peers));
        atomicAdd(&shared_bins[bin], m);
      }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      int chosen = -1;
      u64 at = before;
      for (int bin = 255; bin >= 0; bin--) {
        if (!shared_counts[bin]) continue;
        if (chosen >= 0 && !is_kept(at)) break;
        chosen = bin, before = at;
        at += shared_bins[bin];
      }
      shared_index = chosen, shared_value = before;
    }
    __syncthreads();
    before = shared_value, key |= (u32)shared_index << shift;
    if (shift) __syncthreads();
  }
  const int equal = shared_counts[shared_index];
  const u64 each = shared_bins[shared_index] / equal;
  int low = 1, high = equal;  // how many of them: the largest n for which the n-th is kept
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (is_kept(before + (u64)(middle - 1) * each)) low = middle;
    else high = middle - 1;
  }
  __syncthreads();
  int last = row.V;
  if (low < equal) {
    auto is_equal = [&](int i) -> u64 {
      return !is_banned(row.banned, i) && key_of(row.logits[i]) == key && is_in(row, key, i);
    };
    last = locate(row.V, is_equal, [&](u64) { return (u64)(low - 1); });
  }
  if (key == row.last_key && row.last_index < last) last = row.last_index;
  row.last_key = key, row.last_index = last;
}

// out [2][R]: tokens, and whether a row's logits are all numbers and one may be drawn; if not, its token means nothing
extern "C" __global__ void __launch_bounds__(BLOCK)
sample(const float* __restrict__ logits, const double* __restrict__ table, const u32* __restrict__ banned,
       i64* __restrict__ out, int R, int V) {
  start_next_kernel();
  await_previous_kernel();
  const int r = blockIdx.x;
  Row row;
  row.logits = logits + (u64)r * V, row.banned = banned, row.V = V, row.last_key = 0, row.last_index = V;
  u64 best = 0;
  bool is_finite = true;
  for (int i = threadIdx.x; i < V; i += BLOCK) {
    const float v = row.logits[i];
    is_finite &= fabsf(v) <= 3.4028234663852886e38f;
    const u64 candidate = (u64)key_of(v) << 32 | (u32)(V - i);
    if (!is_banned(banned, i) && candidate > best) best = candidate;
  }
  const bool is_sound = block_sum(!is_finite) == 0;
  best = block_max(best);
  int token = V - (int)(u32)best;
  if (threadIdx.x == 0) out[R + r] = is_sound && best;
  if (!is_sound || !best || table[R + r] > 0.) {
    if (threadIdx.x == 0) out[r] = is_sound && best ? token : 0;
    return;
  }
  row.temperature = table[r], row.best = (double)row.logits[token] / row.temperature;
  const double top_k = table[2 * R + r], top_p = table[3 * R + r], min_p = table[4 * R + r], uniform = table[5 * R + r];
  auto weight = [&](float v) { return weight_of(row, v); };
  if (top_k < V) shorten(row, [](float) -> u64 { return 1; }, [&](u64 before) { return (double)before < top_k; });
  if (top_p < 1.) {
    u64 sum = 0;
    for (int i = threadIdx.x; i < V; i += BLOCK) {
      const float v = row.logits[i];
      if (!is_banned(banned, i) && is_in(row, key_of(v), i)) sum += weight(v);
    }
    const double mass = top_p * (double)block_sum(sum);
    shorten(row, weight, [&](u64 before) { return (double)before < mass; });
  }
  auto kept = [&](int i) -> u64 {
    const float v = row.logits[i];
    if (is_banned(banned, i) || !is_in(row, key_of(v), i)) return 0;
    const u64 w = weight(v);
    return (double)w >= min_p * UNITS ? w : 0;
  };
  token = locate(V, kept, [&](u64 total) {
    const u64 wanted = (u64)(uniform * (double)total);
    return wanted < total ? wanted : total - 1;
  });
  if (threadIdx.x == 0) out[r] = token;
}
