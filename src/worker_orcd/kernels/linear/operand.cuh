// x of a block of qmm.cu: pieces of 64 inputs in shared memory, in each the block's token groups.
//
// It is copied from an image, or, with MADE, made here of the sums that a matmul of gate and up left for a single row:
// act(gate) up, as `activate` of ops/rows.cu has it. Then a piece has that row alone, and all lanes read it. `begin` comes
// before a first tile is expanded, `await` behind it, and `await_tile` before each tile is multiplied.
#pragma once
#include "async.cuh"
#include "weight.cuh"
#if MADE
#include "act.cuh"
#include "flow.cuh"
#endif

constexpr int BEFORE_X = 1024;  // bytes of shared memory, for barriers
constexpr int PIECE_BYTES = MADE ? 128 : GROUPS * GROUP_BYTES;

// Where a lane's part of the first piece lies, of x at `xs`.
DEVICE u32 own_part(u32 xs) {
  const int lane = threadIdx.x & 31;
  return MADE ? xs + (lane >> 3 << 4) : xs + (lane & 7) * 128 + (((lane >> 3) ^ (lane & 7)) << 4);
}

#if MADE
constexpr int NUMBERS = GATE_NUMBERS + UP_NUMBERS;  // of a column: its slices, and a bias where there is one; less than 32
struct Operand {
  const Sums& sums;  // of gate and of up
  int F, T, row;     // columns of each; rows of the sums, and the one of them that is meant
};
template <class Weight>
struct OperandSlice {  // the inputs of `count` tiles from `first` on; their sums lie behind x
  Operand from;
  char* shared;
  int first, count;

  DEVICE int inputs() const { return count * Weight::TILE_K; }
  DEVICE int there() const { return min(inputs(), from.F - first * Weight::TILE_K); }
  DEVICE u32 behind_x() const { return BEFORE_X + inputs() * 2; }
  DEVICE int bytes() const { return behind_x() + NUMBERS * inputs() * 4; }
  DEVICE const float* numbers(int i) const {  // the i-th of each column
    const int half = i >= GATE_NUMBERS;
    const Column<float> own = column<float>(from.sums.part[half], from.T, from.row, first * Weight::TILE_K);
    i -= half * GATE_NUMBERS;
    return i < own.count ? own.slices + i * own.stride : own.bias;
  }
  DEVICE void begin() {
#if HOPPER
    const u32 barrier = shared_address(shared), size = there() * 4, i = threadIdx.x;
    if (i == 0) barrier_init(barrier, 1), barrier_init_done();
    __syncthreads();
    if (i >= 32) return;
    if (i == 0) barrier_expect(barrier, size * NUMBERS);
    const float* own = i < NUMBERS ? numbers(i) : nullptr;
    __syncwarp();
    await_previous_kernel();
    if (i < NUMBERS) bulk_copy(barrier + behind_x() + i * inputs() * 4, own, size, barrier);
#endif
  }
  DEVICE void await() {
#if HOPPER
    barrier_wait(shared_address(shared), 0);
#else
    for (int i = 0; i < NUMBERS; i++)
      for (int k = threadIdx.x * 4; k < there(); k += WARPS * 128)
        copy16(shared_address(shared) + behind_x() + (i * inputs() + k) * 4, numbers(i) + k);
    copies_done();
    __syncthreads();
#endif
#pragma unroll 1
    for (int k = threadIdx.x * 4; k < inputs(); k += WARPS * 128) {
      const char* at = shared + behind_x() + k * 4;
      float4 v[NUMBERS], gate, up;
#pragma unroll
      for (int i = 0; i < NUMBERS; i++) v[i] = *(const float4*)(at + i * inputs() * 4);
      set_zero(gate), set_zero(up);
#pragma unroll
      for (int i = 0; i < GATE_NUMBERS; i++) gate = plus(gate, v[i]);  // as add_up in flow.cuh adds, the bias last
#pragma unroll
      for (int i = GATE_NUMBERS; i < NUMBERS; i++) up = plus(up, v[i]);
#if GATED
      gate = make_float4(gated(gate.x, up.x), gated(gate.y, up.y), gated(gate.z, up.z), gated(gate.w, up.w));
#else
      gate = make_float4(act(gate.x), act(gate.y), act(gate.z), act(gate.w));
#endif
      const int unit = (k & 31) >> 1, piece = (k >> 7) * 2 + (unit >> 3);  // as store4 in flow.cuh
      u32* to = (u32*)(shared + BEFORE_X) + (piece * 8 + (unit & 7)) * 4 + (k >> 5 & 3);
      const bool is_there = k < there();
      to[0] = is_there ? bf16x2(gate.x, gate.y) : 0, to[4] = is_there ? bf16x2(gate.z, gate.w) : 0;
    }
    __syncthreads();
  }
  DEVICE void await_tile(int) {}
};
#else
struct Operand {
  const char* image;  // [pieces][T8][8 tokens][8 units of 16 bytes, unit ^ token]
  int T8, group;      // and the first of this block's groups of 8 tokens
};
template <class Weight>
struct OperandSlice {
  static constexpr int PIECES = Weight::TILE_K / 64;
  Operand from;
  char* shared;
  int first, count;
  DEVICE int bytes() const { return BEFORE_X + count * PIECES * PIECE_BYTES; }
  DEVICE const char* piece(int i) const {
    return from.image + ((u64)(first * PIECES + i) * from.T8 + from.group) * GROUP_BYTES;
  }
#if HOPPER
  bool is_there = false;  // the next tile; asked for early, as the answer takes its time

  DEVICE void begin() {  // by all; x is asked for as soon as it is there, no matter how far the weights are
    if (threadIdx.x == 0) make_barriers(LONG ? count : 1);
    __syncthreads();
    if (__shfl_sync(~0u, threadIdx.x >> 5, 0) == 0) {
      await_previous_kernel();
      copy();
    }
  }
  DEVICE void await() {
    if (!LONG) barrier_wait(barriers(), 0);
  }
  DEVICE void await_tile(int tile) {  // with LONG; a slice's come one after the other and then stay
    if (!LONG) return;
    if (!is_there) barrier_wait(barriers() + tile * 8, 0);
    is_there = barrier_is_past(barriers() + (tile + 1 < count ? tile + 1 : 0) * 8, 0);
  }

  DEVICE u32 barriers() const { return shared_address(shared); }
  // By one thread: of barriers that lanes make at once the compiled kernel says that there is one, and racecheck, which
  // goes by that, takes a tile of x for a race.
  DEVICE void make_barriers(int count) {
#pragma unroll 1
    for (int i = 0; i < count; i++) barrier_init(barriers() + i * 8, 1);
    barrier_init_done();
  }
  // By the first warp. Its loops are not unrolled: a step of a model is faster with less code.
  DEVICE void copy() {
    const u32 to = barriers() + BEFORE_X;
    const bool is_whole = from.T8 == GROUPS;
#if LONG
#pragma unroll 1
    for (int c = threadIdx.x * PIECES; c < count * PIECES; c += 32 * PIECES) {  // x of a tile, which has its own barrier
      const u32 barrier = barriers() + c / PIECES * 8;
      barrier_expect(barrier, PIECES * PIECE_BYTES);
      if (is_whole)
        bulk_copy(to + c * PIECE_BYTES, piece(c), PIECES * PIECE_BYTES, barrier);
      else
#pragma unroll 1
        for (int i = c; i < c + PIECES; i++) bulk_copy(to + i * PIECE_BYTES, piece(i), PIECE_BYTES, barrier);
    }
#else
    if (threadIdx.x == 0) {
      barrier_expect(barriers(), count * PIECES * PIECE_BYTES);
      if (is_whole) bulk_copy(to, piece(0), count * PIECES * PIECE_BYTES, barriers());
    }
    __syncwarp();
    if (!is_whole)
#pragma unroll 1
      for (int c = threadIdx.x; c < count * PIECES; c += 32)
        bulk_copy(to + c * PIECE_BYTES, piece(c), PIECE_BYTES, barriers());
#endif
  }
#else
  DEVICE void begin() {}
  DEVICE void await() {  // by all
    for (int i = threadIdx.x * 16; i < count * PIECES * PIECE_BYTES; i += WARPS * 512)
      copy16(shared_address(shared) + BEFORE_X + i, piece(i / PIECE_BYTES) + i % PIECE_BYTES);
    copies_done();
    __syncthreads();
  }
  DEVICE void await_tile(int) {}
#endif
};
#endif
