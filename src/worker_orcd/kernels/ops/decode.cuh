// What decode.cu is made of before the first product: shared memory, keys and values on their way to it, queries and
// the newest key made from sums.
#pragma once
#include "flow.cuh"

#if KV_BITS == 17  // as in rows.cu
DEVICE void mma_kv(float* c, const u32* a, const u32* b) { mma_fp16(c, a, b); }
DEVICE u32 pair(float low, float high) { return fp16x2(low, high); }
constexpr u32 ONES = 0x3C003C00u;
#else
DEVICE void mma_kv(float* c, const u32* a, const u32* b) { mma(c, a, b); }
DEVICE u32 pair(float low, float high) { return bf16x2(low, high); }
constexpr u32 ONES = 0x3F803F80u;
#endif

constexpr int SPLIT = 256, TILE = DIM <= 128 ? 64 : 32, ROWS = 8, THREADS = WARPS * 32;
constexpr int CHUNKS = DIM / 8, STRIDE = DIM * 2 + 16;  // of a row: 16-byte pieces, and bytes; 8 rows share no bank
constexpr int SLOT_BYTES = TILE * STRIDE, STEPS = TILE / 16, OWN_STEPS = STEPS / WARPS;  // of 16 keys
constexpr int TILES = IS_WHOLE ? SPLIT / TILE : 1;  // whose peaks and weights are kept
constexpr int LANES = CHUNKS & -CHUNKS, FETCHED = THREADS / LANES;  // threads that copy a row, rows copied at once
constexpr int BANDS = DIM / 16, OWN_BANDS = (BANDS + WARPS - 1) / WARPS;                 // of 16 columns
constexpr float LOWEST = -1e30f, LOG2_E = 1.4426950408889634f;
#define NOTHING __int_as_float(0xff800000)

struct Form {
  int heads, kv_heads, window, table_width, half, interleaved;
  int groups, pad;  // of the image that is written: groups of 8 rows, columns behind the last head; 0: rows, float32
  float factor, soft_cap;  // of scores: to the base 2 without a cap (0), else divided by it
};
struct Cache {
  u16 *k, *v;  // [blocks][BLOCK][Hk][DIM]
  const long long* table;  // of this sequence
  int token_elems, head;   // elements from a token to the next, and to this head
};
struct Shared {
  u32 slots, queries;  // addresses; queries [ROWS][STRIDE]
  char* rows;          // where the queries are
  u16* newest;         // [2][DIM], key and value
  float *made, *angles, *peaks;  // [ROWS + 2][DIM]; cos, sin [2][half]; [WARPS][ROWS]
  uint2* weights;                // [STEPS][32]
};

DEVICE Shared lay_out(char* memory, const Form& form) {  // `shared_bytes` in attention.py says how much it takes
  Shared s;
  s.slots = shared_address(memory), s.queries = s.slots + SLOTS * SLOT_BYTES;
  s.rows = memory + SLOTS * SLOT_BYTES, s.newest = (u16*)(s.rows + ROWS * STRIDE);
  s.weights = (uint2*)(s.newest + 2 * DIM), s.peaks = (float*)(s.weights + (WARPS > 1 ? TILES * STEPS * 32 : 0));
  s.angles = s.peaks + (WARPS > 1 ? TILES * WARPS * ROWS : 0), s.made = s.angles + (2 * form.half + 3) / 4 * 4;
  return s;
}

DEVICE void sync_block() {
  if (WARPS == 1) __syncwarp();
  else __syncthreads();
}

// The blocks of WINDOW_BLOCKS from that of position `start` on, two of them in a lane.
constexpr int WINDOW_BLOCKS = 64, WINDOW = WINDOW_BLOCKS * BLOCK;  // at least a tile
DEVICE void find_blocks(const Cache& cache, int start, int high, int* blocks) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int at = start / BLOCK + i * 32 + (threadIdx.x & 31);
    blocks[i] = at * BLOCK < high ? (int)fresh(cache.table + at) : 0;
  }
}
DEVICE int block_of(const int* blocks, int number) {  // of the window; all lanes ask
  const int low = __shfl_sync(~0u, blocks[0], number & 31), high = __shfl_sync(~0u, blocks[1], number & 31);
  return number < 32 ? low : high;
}
// Begin to copy a tile of keys or values, whose first block is `number` of the window; what lies at `old` or beyond
// becomes zeros.
DEVICE void fetch(const Cache& cache, const u16* from, const int* blocks, int number, int start, int old, u32 slot) {
  const int first = threadIdx.x / LANES, chunk = threadIdx.x % LANES, step = FETCHED * cache.token_elems;
  slot += first * STRIDE + chunk * 16;
  const u16* at = from;
#pragma unroll
  for (int row = 0; row < TILE; row += FETCHED) {
    if (FETCHED > BLOCK || row % BLOCK == 0) {  // another block begins
      const int inside = FETCHED > BLOCK ? first % BLOCK : first;
      const int block = block_of(blocks, number + (FETCHED > BLOCK ? row + first : row) / BLOCK);
      at = from + ((u64)block * BLOCK + start % BLOCK + inside) * cache.token_elems + cache.head + chunk * 8;
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c += LANES)
      copy16_or_zeros(slot + row * STRIDE + c * 16, at + c * 8, start + row + first < old);
    at += step;
  }
}

// A block's tiles of keys and values on their way through SLOTS places, each as an item: of a tile the keys, then the
// values, or, with IS_WHOLE, all keys first.
struct Stream {
  Cache cache;
  char* shared;
  const u16* newest;      // key and value, once they are made
  int low, high, last;    // positions of the block's part, in whole tiles from `low`; the row's own
  int window, blocks[2];  // a window's first position, and its blocks

  DEVICE bool has_newest() const { return low <= last && last < high; }
  DEVICE int tiles() const { return low < high ? (high - low + TILE - 1) / TILE : 0; }
  DEVICE int start_of(int item) const { return low + (IS_WHOLE ? item % TILES : item >> 1) * TILE; }
  DEVICE bool is_value(int item) const { return IS_WHOLE ? item / TILES : item & 1; }
  DEVICE u32 place(int item) const { return shared_address(shared) + item % SLOTS * SLOT_BYTES; }

  DEVICE void begin() {
    window = low, find_blocks(cache, low, low < high ? high : 0, blocks);
#pragma unroll 1
    for (int item = 0; item < SLOTS; item++) begin(item);
  }
  DEVICE void begin(int item) {
    const int start = start_of(item);
    if (start < high) {
      if (start < window || start + TILE > window / BLOCK * BLOCK + WINDOW)
        window = start, find_blocks(cache, window, high, blocks);
      const int number = start / BLOCK - window / BLOCK;
      fetch(cache, is_value(item) ? cache.v : cache.k, blocks, number, start, last, place(item));
    }
    close_copies();
  }
  // The newest key or value among the others of its tile, whose copies are there.
  DEVICE void put_newest(int item) {
    const int row = last - start_of(item);
    if (!has_newest() || row >= TILE) return;
    char* to = shared + item % SLOTS * SLOT_BYTES + row * STRIDE;
    for (int i = threadIdx.x; i < CHUNKS; i += THREADS)
      *(uint4*)(to + i * 16) = ((const uint4*)newest)[is_value(item) * CHUNKS + i];
    sync_block();
  }
};

DEVICE void load_angles(const Shared& to, const Form& form, const float* cos, const float* sin, int position) {
  for (int i = threadIdx.x; i < form.half; i += THREADS) {
    to.angles[i] = cos[(u64)position * form.half + i];
    to.angles[form.half + i] = sin[(u64)position * form.half + i];
  }
}
DEVICE void load_queries(const Shared& to, const float* q, int own) {
  for (int i = threadIdx.x; i < own * (DIM / 2); i += THREADS) {
    const int row = i / (DIM / 2), d = i % (DIM / 2) * 2;
    *(u32*)(to.rows + row * STRIDE + d * 2) = pair(q[row * DIM + d], q[row * DIM + d + 1]);
  }
}

// The columns of a row of `made`: own queries first, then the new key and the new value.
DEVICE int column_of(const Form& form, int row, int own, int first, int kv_head) {
  const int head = row < own ? first + row : form.heads + kv_head + (row > own ? form.kv_heads : 0);
  return head * DIM;
}
// Sums of all rows added up.
#if ROTATED
DEVICE void add_rows(const Form& form, const Sums& qkv, float* made, int rows, int own, int first, int kv_head, int t,
                     int T) {
  constexpr int QUADS = DIM / 4, AT_ONCE = 2;  // columns of four, of a thread
#pragma unroll 1
  for (int start = threadIdx.x; start < rows * QUADS; start += THREADS * AT_ONCE) {
    Column<float4> columns[AT_ONCE];
    float4 found[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      const int at = start + i * THREADS, row = at < rows * QUADS ? at / QUADS : 0;
      columns[i] = column<float4>(qkv, T, t, column_of(form, row, own, first, kv_head) + at % QUADS * 4);
      if (at >= rows * QUADS) columns[i].count = 0, columns[i].bias = nullptr;
    }
    add_up<AHEAD>(columns, found);
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (start + i * THREADS < rows * QUADS) ((float4*)made)[start + i * THREADS] = found[i];
  }
}
// Two numbers of a row of sums that turn together, by angle i.
DEVICE void turn(const Form& form, const float* angles, int i, float& a, float& b) {
  const float c = angles[i], s = angles[form.half + i], x = a;
  a = __fsub_rn(__fmul_rn(x, c), __fmul_rn(b, s)), b = __fadd_rn(__fmul_rn(x, s), __fmul_rn(b, c));
}
// A row of sums, rotated if it `turns`, as it is kept: a lane's pairs of numbers, to `store(d, both)`.
template <class F>
DEVICE void rotate(const Form& form, const float* row, const float* angles, bool turns, F&& store) {
  const int apart = turns && !form.interleaved ? form.half : 0;  // between the numbers that turn together
  for (int i = (threadIdx.x & 31) * 2; i < DIM / 2; i += 64) {  // 4 numbers: d, d + 1, e, e + 1; `half` is even
    const int d = i < apart ? i : 2 * i, e = i < apart ? i + apart : d + 2;
    float2 v = *(const float2*)(row + d), w = *(const float2*)(row + e);
    if (i < apart) turn(form, angles, i, v.x, w.x), turn(form, angles, i + 1, v.y, w.y);
    if (turns && form.interleaved && d / 2 < form.half) turn(form, angles, d / 2, v.x, v.y);
    if (turns && form.interleaved && e / 2 < form.half) turn(form, angles, e / 2, w.x, w.y);
    store(d, pair(v.x, v.y)), store(e, pair(w.x, w.y));
  }
}
#endif
