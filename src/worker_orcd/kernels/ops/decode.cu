// Attention of rows that are alone in their sequence: softmax(q k^T scale) v over a paged cache, in the order that
// attention.py states, so a row has the bits that prompt_kernel gives it: every product, sum and rounding is the same.
//
// A block of WARPS takes up to 8 query heads that share a key/value head through its part of the keys, TILE at a time.
// Queries are rows of the first product, columns of the second, whose rows are the values' columns: so what leaves the
// first is what the second takes, and neither has more than 8 rows of nobody. Warps share the keys of a tile for the
// scores, and the columns for the weighted sum. Tiles of keys and of values take turns in SLOTS buffers, or, with IS_WHOLE,
// have one each, and a block has one split; all but the newest key are from earlier steps and are on their way before the kernel ahead has ended. With ROTATED queries, newest
// key and value are made here from the projection's sums, as rope_store in rows.cu makes them; else they lie in q and
// in the cache.
#include "decode.cuh"

// Attention's state of a block: for columns g and g + 8 of its warp's bands, queries 2 quad and 2 quad + 1.
struct State {
  float acc[OWN_BANDS][4], total[2], peak;  // the peak is that of query g
};
DEVICE void clear(State& s) {
#pragma unroll
  for (int i = 0; i < OWN_BANDS * 4; i++) s.acc[i >> 2][i & 3] = 0.f;
  s.peak = LOWEST, s.total[0] = s.total[1] = 0.f;
}
// What lanes of a query have, for lanes that have two of them in their columns.
DEVICE void by_column(float v, float (&columns)[2]) {
  const int quad = threadIdx.x & 3;
  columns[0] = __shfl_sync(~0u, v, quad * 8), columns[1] = __shfl_sync(~0u, v, quad * 8 + 4);
}
// Add a partial to `run`; one that saw nothing changes no bit.
DEVICE void fold(State& run, const State& part) {
  const float peak = fmaxf(run.peak, part.peak);
  float weight[2], part_weight[2];
  by_column(power_of_2(__fsub_rn(run.peak, peak)), weight);
  by_column(power_of_2(__fsub_rn(part.peak, peak)), part_weight);
  run.peak = peak;
#pragma unroll
  for (int e = 0; e < 2; e++) run.total[e] = fmaf(part.total[e], part_weight[e], __fmul_rn(run.total[e], weight[e]));
#pragma unroll
  for (int i = 0; i < OWN_BANDS * 4; i++) {
    float& own = run.acc[i >> 2][i & 3];
    own = fmaf(part.acc[i >> 2][i & 3], part_weight[i & 1], __fmul_rn(own, weight[i & 1]));
  }
}

// scores [own keys] of the queries and N tiles of keys; of each four only the first two are of queries
template <int N>
DEVICE void score(float (&s)[N][OWN_STEPS][2][4], u32 queries, u32 keys) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 a_at = queries + (lane & 7) * STRIDE + (lane >> 3) * 16;
  const u32 b_at = keys + (warp * OWN_STEPS * 16 + (lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 16;
#pragma unroll
  for (int tile = 0; tile < N; tile++)
#pragma unroll
    for (int i = 0; i < OWN_STEPS * 8; i++) s[tile][i >> 3][i >> 2 & 1][i & 3] = 0.f;
  u32 rows[4];
#pragma unroll
  for (int band = 0; band < BANDS; band++) {
    if (band % 2 == 0) load_matrix4_ordered(rows, a_at + band * 32);  // of two bands; behind the last lies something
    const u32 a[4] = {rows[band % 2 * 2], 0, rows[band % 2 * 2 + 1], 0};
    u32 b[4];
#pragma unroll
    for (int i = 0; i < N * OWN_STEPS; i++) {
      const int tile = i / OWN_STEPS, step = i % OWN_STEPS;
      load_matrix4_ordered(b, b_at + tile * SLOT_BYTES + step * 16 * STRIDE + band * 32);
      mma_kv(s[tile][step][0], a, b), mma_kv(s[tile][step][1], a, b + 2);
    }
  }
}
// Scores as they take part in the softmax: capped, and none of keys that are not seen. → the warp's own peak of query g.
// `limit`: the row's position
DEVICE float own_peak(float (&s)[OWN_STEPS][2][4], const Form& form, int start, int limit) {
  const int warp = threadIdx.x >> 5, quad = threadIdx.x & 3;
  float peak = NOTHING;
  if (form.soft_cap > 0.f) {
#pragma unroll
    for (int i = 0; i < OWN_STEPS * 4; i++) {
      float& v = s[i >> 2][i >> 1 & 1][i & 1];
      const float e = power_of_2(__fmul_rn(__fmul_rn(v, form.factor), (float)(2 * 1.4426950408889634)));
      v = __fmul_rn(form.soft_cap, __fsub_rn(1.f, quotient(2.f, __fadd_rn(1.f, e))));
    }
  }
  if (start + TILE - 1 > limit || (form.window && start <= limit - form.window)) {
    const int lowest = form.window ? limit - form.window : -1;
#pragma unroll
    for (int i = 0; i < OWN_STEPS * 4; i++) {
      const int position = start + warp * OWN_STEPS * 16 + (i >> 1) * 8 + quad * 2 + (i & 1);
      if (position > limit || position <= lowest) s[i >> 2][i >> 1 & 1][i & 1] = NOTHING;
    }
  }
#pragma unroll
  for (int i = 0; i < OWN_STEPS * 4; i++) peak = fmaxf(peak, s[i >> 2][i >> 1 & 1][i & 1]);
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes <<= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, lanes));
  return peak;
}
DEVICE float to_base_2(const Form& form) { return form.soft_cap > 0.f ? LOG2_E : form.factor; }
// The state's peak follows; what this takes from all that was added before.
DEVICE void raise(State& state, float peak, float factor, float (&rescale)[2]) {
  const float now = fmaxf(state.peak, __fmul_rn(peak, factor));
  by_column(power_of_2(__fsub_rn(state.peak, now)), rescale);
  state.peak = now;
}
DEVICE void scale(State& state, const float (&rescale)[2]) {
#pragma unroll
  for (int e = 0; e < 2; e++) state.total[e] = __fmul_rn(state.total[e], rescale[e]);
#pragma unroll
  for (int i = 0; i < OWN_BANDS * 4; i++) {
    float& own = state.acc[i >> 2][i & 3];
    own = __fmul_rn(own, rescale[i & 1]);
  }
}
// Scores → weights, packed as the next product takes them.
DEVICE uint2 weights_of(const float (&s)[2][4], float factor, float peak) {
  float w[4];
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = power_of_2(fmaf(s[i >> 1][i & 1], factor, -peak));
  return make_uint2(pair(w[0], w[1]), pair(w[2], w[3]));
}
DEVICE void weigh(float (&s)[OWN_STEPS][2][4], uint2 (&weights)[STEPS], State& state, const Form& form,
                  const Shared& shared, int start, int limit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
  float peak = own_peak(s, form, start, limit), rescale[2];
  if (WARPS > 1) {
    if (lane % 4 == 0) shared.peaks[warp * ROWS + g] = peak;
    __syncthreads();
#pragma unroll
    for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, shared.peaks[w * ROWS + g]);
  }
  raise(state, peak, to_base_2(form), rescale);
  scale(state, rescale);
#pragma unroll
  for (int step = 0; step < OWN_STEPS; step++) {
    weights[step] = weights_of(s[step], to_base_2(form), state.peak);
    if (WARPS > 1) shared.weights[(warp * OWN_STEPS + step) * 32 + lane] = weights[step];
  }
}
// state += weights · values, and the sum of the weights, weight(step), as a product with ones
template <class Weight>
DEVICE void add_values(State& state, u32 values, const Weight& weight) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const u32 a_at = values + ((lane & 7) + (lane >> 4) * 8) * STRIDE + (lane >> 3 & 1) * 16;
  const u32 ones[4] = {ONES, ONES, ONES, ONES};
  float totals[4] = {state.total[0], state.total[1], 0.f, 0.f};
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    const uint2 w = weight(step);
    const u32 b[2] = {w.x, w.y};
    mma_kv(totals, ones, b);
#pragma unroll
    for (int i = 0; i < OWN_BANDS; i++) {
      u32 a[4];
      const int band = warp + i * WARPS;
      if (BANDS % WARPS && band >= BANDS) break;
      load_matrix4_turned(a, a_at + step * 16 * STRIDE + band * 32);
      mma_kv(state.acc[i], a, b);
    }
  }
  state.total[0] = totals[0], state.total[1] = totals[1];
}

#if IS_WHOLE
// The block's part is a split, whose keys and values all have a place: the scores of its tiles first, which do not depend on
// each other, then their weights, then their values. Three barriers, not three for each tile.
template <class F>
DEVICE void attend(State& state, Stream& stream, const Form& form, const Shared& shared, F&& leave) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
  const int tiles = stream.tiles(), newest = (stream.last - stream.low) / TILE;
  const float factor = to_base_2(form);
  float s[TILES][OWN_STEPS][2][4], rescale[TILES][2];
  if (!tiles) return;
  await_copies<TILES>();  // keys
  sync_block();
  stream.put_newest(newest);
  score(s, shared.queries, shared.slots);  // of tiles that are not there, too: nobody asks for these
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (tile == tiles) break;
    const float peak = own_peak(s[tile], form, stream.low + tile * TILE, stream.last);
    if (lane % 4 == 0) shared.peaks[(tile * WARPS + warp) * ROWS + g] = peak;
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (tile == tiles) break;
    float peak = NOTHING;
#pragma unroll
    for (int w = 0; w < WARPS; w++) peak = fmaxf(peak, shared.peaks[(tile * WARPS + w) * ROWS + g]);
    raise(state, peak, factor, rescale[tile]);
#pragma unroll
    for (int step = 0; step < OWN_STEPS; step++)
      shared.weights[(tile * STEPS + warp * OWN_STEPS + step) * 32 + lane] = weights_of(s[tile][step], factor, state.peak);
  }
  await_copies<0>();  // values
  sync_block();
  stream.put_newest(TILES + newest);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    if (tile == tiles) break;
    scale(state, rescale[tile]);
    add_values(state, stream.place(TILES + tile),
               [&](int step) { return shared.weights[(tile * STEPS + step) * 32 + lane]; });
  }
  leave(stream.high);
}
#else
// Tile after tile; `leave(end)` is called when a split is done.
template <class F>
DEVICE void attend(State& state, Stream& stream, const Form& form, const Shared& shared, F&& leave) {
  const int items = stream.tiles() * 2, lane = threadIdx.x & 31;
  float s[1][OWN_STEPS][2][4];
  uint2 weights[STEPS];
  auto await_item = [&](int item) {  // the place of the item before it has been read, and takes the next
    if (item && item + SLOTS - 1 < items) sync_block();
    if (item) stream.begin(item + SLOTS - 1);
    await_copies<SLOTS - 1>();
    sync_block();
    stream.put_newest(item);
    return stream.place(item);
  };
#pragma unroll 1
  for (int item = 0; item < items; item += 2) {
    const int start = stream.start_of(item), end = start + TILE;
    score(s, shared.queries, await_item(item));
    weigh(s[0], weights, state, form, shared, start, stream.last);
    add_values(state, await_item(item + 1),
               [&](int step) { return WARPS > 1 ? shared.weights[step * 32 + lane] : weights[step]; });
    if (end % SPLIT == 0 || end >= stream.high) leave(end);
  }
}
#endif

// Each pair of columns of the rows this block has: a lane gives one of its two queries away for another column.
template <class F>
DEVICE void for_own(const State& state, int own, F&& store) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, is_odd = g & 1;
  const int row = (lane & 3) * 2 + is_odd;
#pragma unroll
  for (int i = 0; i < OWN_BANDS; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float* v = state.acc[i] + half * 2;
      const float kept = is_odd ? v[1] : v[0], other = __shfl_xor_sync(~0u, is_odd ? v[0] : v[1], 4);
      const int band = warp + i * WARPS, d = band * 16 + half * 8 + (g & ~1);
      if (row < own && band < BANDS) store(row, is_odd, d, is_odd ? other : kept, is_odd ? kept : other);
    }
}
// As store4 in flow.cuh: columns k and k + 1, k even, of token t. No image has 2^32 bytes.
DEVICE void store_pair(void* image, int groups, int t, int k, float low, float high) {
  const u32 unit = (u32)(k & 31) >> 1, token = (((u32)k >> 7) * 2 + (unit >> 3)) * (groups * 8) + t;
  ((u32*)image)[(token * 8 + ((unit ^ t) & 7)) * 4 + (k >> 5 & 3)] = bf16x2(low, high);
}

// The positions of this block's part: whole splits, as evenly as they go.
DEVICE void take_part(int& low, int& high) {
  const int begin = low / SPLIT, each = ((high + SPLIT - 1) / SPLIT - begin + gridDim.z - 1) / gridDim.z;
  const int from = (begin + blockIdx.z * each) * SPLIT;
  low = max(low, from), high = min(high, from + each * SPLIT);
}
// The partial of rows `row` … of all heads of all sequences, for one of `num_splits` splits.
DEVICE void store_partial(const State& state, float* partials, u64 row, u64 num_rows, u64 num_splits, int split,
                          int own) {
  const u64 part = row * num_splits + split;
  float* stats = partials + num_rows * num_splits * DIM;
  for_own(state, own, [&](int r, int e, int d, float a, float b) {
    float* to = partials + (part + r * num_splits) * DIM + d;
    to[0] = a, to[1] = b;
    if (d == 0) stats[(part + r * num_splits) * 2 + 1] = e ? state.total[1] : state.total[0];
  });
  const int g = (threadIdx.x & 31) >> 2;
  if (threadIdx.x < 32 && threadIdx.x % 4 == 0 && g < own) stats[(part + g * num_splits) * 2] = state.peak;
}
// What was seen, divided by the sum of weights, for heads `first` …; zeros behind the last head.
DEVICE void store_result(const State& run, void* out, const Form& form, int t, int first, int own) {
  for_own(run, own, [&](int row, int e, int d, float a, float b) {
    const float sum = e ? run.total[1] : run.total[0], total = sum == 0.f ? 1.f : sum;
    const int column = (first + row) * DIM + d;
    a = quotient(a, total), b = quotient(b, total);
    if (form.groups) store_pair(out, form.groups, t, column, a, b);
    else *(u64*)((float*)out + (u64)t * form.heads * DIM + column) = __float_as_uint(a) | (u64)__float_as_uint(b) << 32;
  });
  if (first + own < form.heads) return;
  for (int i = threadIdx.x * 2; i < form.pad; i += THREADS * 2)
    store_pair(out, form.groups, t, form.heads * DIM + i, 0.f, 0.f);
}

// partials: acc [S][Hq][splits][DIM], then (peak, total) [S][Hq][splits][2]; or null: this block folds its own.
// grid (S, Hk ceil(group / 8), parts)
extern "C" __global__ void __launch_bounds__(THREADS, WARPS == 4 ? 4 : 1)
decode(void* __restrict__ out,
#if ROTATED
       const __grid_constant__ Sums qkv, const float* __restrict__ cos, const float* __restrict__ sin,
#else
       const float* q,
#endif
       u16* k_cache, u16* v_cache, const float* __restrict__ sinks, const long long* __restrict__ query_starts,
       const long long* __restrict__ context_lens, const long long* __restrict__ block_table,
       float* __restrict__ partials, const __grid_constant__ Form form) {
  extern __shared__ __align__(1024) char shared[];
  start_next_kernel();
  const int lane = threadIdx.x & 31, g = lane >> 2, seq = blockIdx.x, num_seqs = gridDim.x;
  const int group = form.heads / form.kv_heads, row_tiles = (group + ROWS - 1) / ROWS;
  const int kv_head = blockIdx.y / row_tiles, tile_row = blockIdx.y % row_tiles * ROWS;
  const int own = min(ROWS, group - tile_row), first = kv_head * group + tile_row;
  const int context_len = (int)fresh(context_lens + seq), last = context_len - 1;
  const int t = ROTATED ? seq : (int)fresh(query_starts + seq);
  const bool is_alone = ROTATED || (int)fresh(query_starts + seq + 1) - t == 1;

  const Shared here = lay_out(shared, form);
  Cache cache = {k_cache, v_cache, block_table + (u64)seq * form.table_width};
  cache.token_elems = form.kv_heads * DIM, cache.head = kv_head * DIM;

  int low = form.window ? max(0, context_len - form.window) / TILE * TILE : 0, high = is_alone ? context_len : low;
  if (partials) take_part(low, high);
  Stream stream = {cache, shared, here.newest, low, high, last};
  stream.begin();
  const bool has_newest = stream.has_newest();
  const u64 newest_block = has_newest ? fresh(cache.table + last / BLOCK) : 0;
  const u64 newest_at = (newest_block * BLOCK + last % BLOCK) * cache.token_elems + cache.head;
#if ROTATED
  load_angles(here, form, cos, sin, max(last, 0));
  await_previous_kernel();
  const int rows = own + (has_newest ? 2 : 0);
  add_rows(form, qkv, here.made, rows, own, first, kv_head, seq, num_seqs);
  sync_block();
  for (int row = threadIdx.x >> 5; row < rows; row += WARPS) {
    const bool is_query = row < own, is_value = row == own + 1;
    u16* const to = is_query ? (u16*)(here.rows + row * STRIDE) : here.newest + (row - own) * DIM;
    u16* const kept = (is_value ? v_cache : k_cache) + newest_at;
    rotate(form, here.made + row * DIM, here.angles, !is_value, [&](int d, u32 both) {
      *(u32*)(to + d) = both;
      if (!is_query && tile_row == 0) *(u32*)(kept + d) = both;
    });
  }
#else
  await_previous_kernel();
  if (!is_alone) return;
  load_queries(here, q + ((u64)t * form.heads + first) * DIM, own);
  if (has_newest)
    for (int i = threadIdx.x; i < 2 * CHUNKS; i += THREADS)
      ((uint4*)here.newest)[i] = fresh((const uint4*)((i < CHUNKS ? k_cache : v_cache) + newest_at) + i % CHUNKS);
#endif
  sync_block();

  State state, run;
  clear(state), clear(run);
  attend(state, stream, form, here, [&](int end) {
    const u64 num_splits = ((u64)form.table_width * BLOCK + SPLIT - 1) / SPLIT;
    const u64 row = (u64)seq * form.heads + first, num_rows = (u64)num_seqs * form.heads;
    if (partials) store_partial(state, partials, row, num_rows, num_splits, (end - 1) / SPLIT, own);
    else fold(run, state);
    clear(state);
  });
  if (partials) return;

  if (sinks) {
    state.peak = g < own ? __fmul_rn(sinks[first + g], LOG2_E) : 0.f, state.total[0] = state.total[1] = 1.f;
    fold(run, state);
  }
  store_result(run, out, form, t, first, own);
}
