// The next token of each row of logits: argmax, or one draw by inverse CDF among what top-k, top-p and min-p leave.
//
// Probabilities are integers in units of 2^-40 of the likeliest token's, so sums are exact in every order. Tokens are
// ordered by logit, falling, equal ones by index; each filter keeps a prefix of that order, whose end is found bin by
// bin: first among bins of equal width in the logit, then among those of the chosen bin's keys, until it is one key.
// Tokens that weigh nothing are out of the prefix from the start: whether they are kept changes no sum.
//
// grid (R * C), BLOCK threads: the C blocks of a cluster share a row. Each holds a part of it, in shared memory if
// there is room. Between them go one u64 a block, by remote stores, and the bins, by remote loads. No block may end
// while others read from it: every path ends with a barrier of the cluster after the last remote load.
#include "flow.cuh"
#define BLOCK 1024
#define WARPS (BLOCK / 32)
#define BINS 512
#define MAX_CLUSTER 8
#define IN_FLIGHT 5  // vectors that a thread loads at once
#define UNITS 0x1p40
#define PARAMS 6  // of a row, columns of a table [6][R]: temperature, greedy, top-k, top-p, min-p, uniform draw
typedef long long i64;


struct Shared {  // buffers in pairs: one is read while the next is written
  u64 bins[2][BINS];
  u64 of_warp[2][WARPS], of_block[2][MAX_CLUSTER];
  double params[PARAMS];
  u64 before, sum;  // the chosen bin's
  u32 bounds[2];
  int bin, found;
};
static_assert(sizeof(Shared) % 16 == 0 && sizeof(Shared) <= 9216, "as sample.py allots; vectors come after it");
struct Row {
  Shared* shared;
  const float* logits;  // the block's part of them; with a copy in shared memory, that, and the banned at -inf
  const u32* banned;    // bit i: token i of the part may not be drawn; null with a copy
  int begin, count, V;  // the part
  int rank, C;          // of the block in its cluster
  int warp_turn, block_turn, bin_turn;  // which of two buffers is next
  double temperature, best;             // best: the largest logit over the temperature
  u32 best_key, last_key;               // the prefix: larger keys than the last, and of equal ones indices up to
  int last_index;                       // last_index
};

DEVICE u32 key_of(float v) {  // orders as the number does; both zeros are one
  const u32 bits = __float_as_uint(v + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float number_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }
DEVICE float logit_at(const Row& row, int i) {
  const float v = row.logits[i];
  return row.banned && row.banned[i >> 5] >> (i & 31) & 1 ? -__uint_as_float(0x7f800000u) : v;
}
DEVICE bool is_in(const Row& row, u32 key, int i) {
  return key > row.last_key || (key == row.last_key && row.begin + i <= row.last_index);
}
DEVICE u64 weight_of(const Row& row, float v) {  // adding 2^52 rounds to a whole number, which its bits end with
  const double gap = (double)v / row.temperature - row.best;
  return (u64)__double_as_longlong(exp(gap) * UNITS + 0x1p52) & 0xfffffffffffffull;
}

DEVICE u64 warp_sum(u64 v) {
  for (int step = 16; step; step >>= 1) v += __shfl_xor_sync(~0u, v, step);
  return v;
}
DEVICE u64 warp_max(u64 v) {
  for (int step = 16; step; step >>= 1) {
    const u64 other = __shfl_xor_sync(~0u, v, step);
    v = other > v ? other : v;
  }
  return v;
}
DEVICE u64 running(u64 v) {  // the sum of this lane's and all before it
  for (int step = 1; step < 32; step <<= 1) {
    const u64 before = __shfl_up_sync(~0u, v, step);
    if ((threadIdx.x & 31) >= step) v += before;
  }
  return v;
}
DEVICE u64 from_warps(Row& row, u64 v) {  // lane w gets what warp w brought
  u64* slots = row.shared->of_warp[row.warp_turn ^= 1];
  if ((threadIdx.x & 31) == 0) slots[threadIdx.x >> 5] = v;
  __syncthreads();
  return slots[threadIdx.x & 31];
}
DEVICE u64 from_blocks(Row& row, u64 v) {  // lane c gets what block c brought, others 0
  u64* slots = row.shared->of_block[row.block_turn ^= 1];
  if (threadIdx.x < row.C) *of_block(slots + row.rank, threadIdx.x) = v;
  cluster_sync();
  const int lane = threadIdx.x & 31;
  return lane < row.C ? slots[lane] : 0;
}

// The first index at which the running sum of measure(i), in the order of indices, exceeds target(sum of all): the
// block it falls in, the warp's range of that block's part, the token.
template <class Measure, class Target>
DEVICE int locate(Row& row, Measure measure, Target target) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int size = (row.count + BLOCK - 1) / BLOCK * 32, from = warp * size;
  u64 sum = 0;
#pragma unroll 1
  for (int i = from + lane; i < from + size && i < row.count; i += 32) sum += measure(i);
  const u64 of_range = from_warps(row, warp_sum(sum)), mine = warp_sum(of_range);
  const u64 of_block_ = from_blocks(row, mine), through_block = running(of_block_);
  u64 wanted = target(__shfl_sync(~0u, through_block, 31)) - __shfl_sync(~0u, through_block - of_block_, row.rank);
  if (wanted < mine) {  // not below 0, which is a very large number
    const u64 through_range = running(of_range);
    const int range = __ffs(__ballot_sync(~0u, through_range > wanted)) - 1;
    wanted -= __shfl_sync(~0u, through_range - of_range, range);
    const int last = (range + 1) * size, end = last < row.count ? last : row.count;
#pragma unroll 1
    for (int first = range * size; first < end; first += BLOCK) {
      const int i = first + threadIdx.x;
      const u64 own = i < end ? measure(i) : 0, through = running(own);
      const u64 of_warp = from_warps(row, __shfl_sync(~0u, through, 31)), through_warp = running(of_warp);
      const u64 before = __shfl_sync(~0u, through_warp - of_warp, warp) + through - own;
      if (before <= wanted && wanted < before + own)
#pragma unroll 1
        for (int c = 0; c < row.C; c++) *of_block(&row.shared->found, c) = row.begin + i;
      const u64 all = __shfl_sync(~0u, through_warp, 31);
      if (wanted < all) break;
      wanted -= all;
    }
  }
  cluster_sync();
  return row.shared->found;
}

DEVICE void add(u64* bin, u64 v) {  // as two numbers: there is no atomic addition of 64 bits in shared memory
  u32* halves = (u32*)bin;
  const u32 low = (u32)v, before = atomicAdd(halves, low), carry = before + low < before;
  const u32 high = (u32)(v >> 32) + carry;
  if (high) atomicAdd(halves + 1, high);
}

// Of the bins that the blocks filled, the last that is_kept(measure before it), and at least the first that is not
// empty: its number, its sum and what is before it come to row.shared. `whole`, if 0, becomes the sum of all bins.
template <class Kept>
DEVICE void choose(Row& row, u64 before, u64& whole, Kept is_kept) {
  const int t = threadIdx.x, warp = t >> 5;
  Shared& s = *row.shared;
  cluster_sync();
  u64 own = 0;
  if (t < BINS) {
    u64* bin = &s.bins[row.bin_turn][t];
#pragma unroll
    for (int c = 0; c < MAX_CLUSTER; c++)
      if (c < row.C) own += *of_block(bin, c);
    s.bins[row.bin_turn ^ 1][t] = 0;  // nobody reads it any more: they have come to this level's barrier
  }
  row.bin_turn ^= 1;
  const u64 through_lane = running(own);
  const u64 of_warp = from_warps(row, __shfl_sync(~0u, through_lane, 31)), through_warp = running(of_warp);
  const u64 all = __shfl_sync(~0u, through_warp, 31);
  if (!whole) whole = all;
  const u64 through = __shfl_sync(~0u, through_warp - of_warp, warp) + through_lane, ahead = through - own;
  const bool is_reached = own && (ahead == 0 || is_kept(before + ahead, whole));
  if (is_reached && (through == all || !is_kept(before + through, whole)))
    s.bin = t, s.before = before + ahead, s.sum = own;
  __syncthreads();
}

// Shorten the row's prefix to the tokens for which is_kept(measure of all before them, of the whole prefix), and at
// least to one.
template <class Measure, class Kept>
DEVICE void shorten(Row& row, Measure measure, Kept is_kept) {
  Shared& s = *row.shared;
  u32 low = row.last_key, high = row.best_key;  // keys of the chosen bin
  const float most = number_of(high), scale = BINS / fmaxf(most - number_of(low), 1e-30f);
  auto bin_of_value = [&](float v) -> int { return (int)fminf((most - v) * scale, (float)(BINS - 1)); };
  u64 before = 0, whole = 0;
  int shift = -1;  // of keys; at first bins are of values
  do {
#pragma unroll 1  // weights are long code, and the warps are many
    for (int i = threadIdx.x; i < row.count; i += BLOCK) {
      const float v = logit_at(row, i);
      const u32 key = key_of(v);
      if (key < low || key > high || !is_in(row, key, i)) continue;
      const u64 m = measure(v);
      if (m) add(&s.bins[row.bin_turn][shift < 0 ? bin_of_value(v) : (high - key) >> shift], m);
    }
    choose(row, before, whole, is_kept);
    before = s.before;
    if (shift < 0) {
      if (threadIdx.x < 2) {  // look for the smallest key of this bin, and for that of the bin before, of larger ones
        const int bin = s.bin - (int)threadIdx.x;
        u32 from = low, to = high;
        while (bin >= 0 && from < to) {
          const u32 middle = from + (to - from) / 2;
          if (bin_of_value(number_of(middle)) <= bin) to = middle;
          else from = middle + 1;
        }
        s.bounds[threadIdx.x] = bin >= 0 ? to - threadIdx.x : high;
      }
      __syncthreads();
      low = s.bounds[0], high = s.bounds[1];
    } else {
      high -= (u32)s.bin << shift;
      if (high - low >> shift) low = high - (1u << shift) + 1;
    }
    const int digits = high > low ? 32 - __clz(high - low) : 0;
    shift = digits > 9 ? digits - 9 : 0;  // 2^9 bins
  } while (low < high);
  const u64 each = measure(number_of(low));
  const int equal = (int)(s.sum / each);
  int least = 1, most_kept = equal;  // how many of them: the largest n for which the n-th is kept
  while (least < most_kept) {
    const int middle = least + (most_kept - least + 1) / 2;
    if (is_kept(before + (u64)(middle - 1) * each, whole)) least = middle;
    else most_kept = middle - 1;
  }
  int last = row.V;
  if (least < equal) {
    auto is_equal = [&](int i) -> u64 {
      const u32 key = key_of(logit_at(row, i));
      return key == low && is_in(row, key, i);
    };
    last = locate(row, is_equal, [&](u64) { return (u64)(least - 1); });
  }
  if (low == row.last_key && row.last_index < last) last = row.last_index;
  row.last_key = low, row.last_index = last;
}

// Read the part by vectors of WIDTH, 4 if V is a multiple of 4, else 1, and copy it if there is room. The largest
// key << 32 | V - index of those allowed, 0 if there are none, ~0 if a logit is no finite number.
template <int WIDTH>
DEVICE u64 read_part(const Row& row, float* copy) {
  u32 best_key = 0, largest = 0;
  int best = 0;
#pragma unroll 1
  for (int first = threadIdx.x * WIDTH; first < row.count; first += BLOCK * WIDTH * IN_FLIGHT) {
    __align__(16) float v[IN_FLIGHT][WIDTH];
    u32 bans[IN_FLIGHT];
#pragma unroll
    for (int n = 0; n < IN_FLIGHT; n++) {  // nothing here waits for a load
      const int i = first + n * BLOCK * WIDTH;
      if (i >= row.count) break;
      bans[n] = row.banned[i >> 5];
      if (WIDTH == 4) *(float4*)v[n] = *(const float4*)(row.logits + i);
      else v[n][0] = row.logits[i];
    }
#pragma unroll
    for (int n = 0; n < IN_FLIGHT; n++) {
      const int i = first + n * BLOCK * WIDTH;
      if (i >= row.count) break;
#pragma unroll
      for (int e = 0; e < WIDTH; e++) {
        const u32 size = __float_as_uint(v[n][e]) & 0x7fffffffu, key = key_of(v[n][e]);
        largest = size > largest ? size : largest;
        if (bans[n] >> (i + e & 31) & 1) v[n][e] = -__uint_as_float(0x7f800000u);
        else if (key > best_key) best_key = key, best = i + e;
      }
      if (copy && WIDTH == 4) *(float4*)(copy + i) = *(float4*)v[n];
      else if (copy) copy[i] = v[n][0];
    }
  }
  if (largest >= 0x7f800000u) return ~0ull;
  return best_key ? (u64)best_key << 32 | (u32)(row.V - row.begin - best) : 0;
}

// out [2][R]: tokens, and whether a row's logits are all numbers and one may be drawn; else its token means nothing
//
// Not inlined: most of compiling it is done once for all sizes of clusters
static __device__ __noinline__ void sample(const float* logits, const double* table, const u32* banned, i64* out,
                                           int R, int V, int has_room) {
  extern __shared__ __align__(1024) char shared[];
  Row row;
  row.C = gridDim.x / R, row.rank = blockIdx.x % row.C, row.V = V;
  const int r = blockIdx.x / row.C, size = ((V + row.C - 1) / row.C + 31) / 32 * 32;
  row.begin = min(row.rank * size, V), row.count = min(size, V - row.begin);
  row.shared = (Shared*)shared, row.logits = logits + (u64)r * V + row.begin, row.banned = banned + row.begin / 32;
  row.warp_turn = row.block_turn = row.bin_turn = 0;
  Shared& s = *row.shared;
  for (int i = threadIdx.x; i < 2 * BINS; i += BLOCK) s.bins[0][i] = 0;
  if (threadIdx.x == 0) s.found = 0;
  cluster_arrive();
  start_next_kernel();
  await_previous_kernel();
  float* copy = has_room ? (float*)(shared + sizeof(Shared)) : nullptr;
  const double param = threadIdx.x < PARAMS ? table[threadIdx.x * R + r] : 0.;
  u64 best = V % 4 ? read_part<1>(row, copy) : read_part<4>(row, copy);
  if (threadIdx.x < PARAMS) s.params[threadIdx.x] = param;
  best = warp_max(from_warps(row, warp_max(best)));
  if (copy) row.logits = copy, row.banned = nullptr;
  cluster_wait();  // all blocks have begun: they can be written to
  best = warp_max(from_blocks(row, best));
  const bool is_sound = best && best != ~0ull, is_first = row.rank == 0 && threadIdx.x == 0;
  int token = is_sound ? V - (int)(u32)best : 0;
  if (is_first) out[R + r] = is_sound;
  if (!is_sound || s.params[1] > 0.) {
    if (is_first) out[r] = token;
    return;
  }
  row.best_key = (u32)(best >> 32), row.temperature = s.params[0];
  row.best = (double)number_of(row.best_key) / row.temperature;
  // exp(-28.5) is less than half a unit. A float below this, rounded to a float, is below it: its gap is below -28.5
  row.last_key = key_of((float)((row.best - 29.) * row.temperature)), row.last_index = V;
  const double top_k = s.params[2], top_p = s.params[3], min_p = s.params[4], uniform = s.params[5];
  auto weight = [&](float v) { return weight_of(row, v); };
  auto one = [](float) -> u64 { return 1; };
  if (top_k < V) shorten(row, one, [&](u64 before, u64) { return (double)before < top_k; });
  if (top_p < 1.) shorten(row, weight, [&](u64 before, u64 whole) { return (double)before < top_p * (double)whole; });
  const u64 least = (u64)ceil(min_p * UNITS);
  auto kept = [&](int i) -> u64 {
    const float v = logit_at(row, i);
    if (!is_in(row, key_of(v), i)) return 0;
    const u64 w = weight(v);
    return w >= least ? w : 0;
  };
  token = locate(row, kept, [&](u64 total) {
    const u64 wanted = (u64)(uniform * (double)total);
    return wanted < total ? wanted : total - 1;
  });
  if (is_first) out[r] = token;
}

#define ARGUMENTS                                                                                  \
  const float *__restrict__ logits, const double *__restrict__ table, const u32 *__restrict__ banned, \
      i64 *__restrict__ out, int R, int V, int has_room
#define BODY { sample(logits, table, banned, out, R, V, has_room); }
extern "C" __global__ void __launch_bounds__(BLOCK) sample_1(ARGUMENTS) BODY
#if CLUSTERS
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(BLOCK) sample_2(ARGUMENTS) BODY
extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(BLOCK) sample_4(ARGUMENTS) BODY
extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(BLOCK) sample_8(ARGUMENTS) BODY
#endif
