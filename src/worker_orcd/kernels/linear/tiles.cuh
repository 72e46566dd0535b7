// How a warp of qmm.cu comes by its tiles: those of one strip after the other, AHEAD of them on their way.
//
// Straight to registers; or with RING by bulk copies to shared memory, which begin later and then keep more on the way,
// since registers hold one tile alone: for large matrices. `take` gives tile after tile, the i-th as take(i % UNROLLED),
// and `refill` with the same number says that it has been used.
#pragma once
#include "async.cuh"
#include "weight.cuh"

struct Path {  // of a warp through the matrix: `count` tiles of a strip, then `skip` bytes to the next
  const char* at;
  u64 skip;
  int count, before_end;  // tiles behind this slice in the strip; with none its last one may be half a tile
  int done;
  DEVICE bool is_half(int tile) const { return HALF_END && before_end == 0 && tile + 1 == count; }
  DEVICE void step(int bytes) {
    at += bytes;
    if (++done == count) done = 0, at += skip;
  }
};

#if RING
template <class Weight, int AHEAD>
struct Tiles {
  static constexpr int UNROLLED = 1, BARRIERS = AHEAD, BYTES = AHEAD * Weight::TILE_BYTES;  // of a warp
  Path path;
  char* places;
  u32 barriers, phase;
  int left, put, got, taken, lane;  // taken of a strip
  Weight r;

  // `total` tiles; `barriers` are made, and `places` have room for BYTES
  DEVICE void begin(const Path& from, int total, char* room, u32 first_barrier) {
    path = from, left = total, places = room, barriers = first_barrier;
    phase = put = got = taken = 0, lane = threadIdx.x & 31;
    for (int i = 0; i < AHEAD; i++) order();
  }
  DEVICE Weight& take(int) {
    barrier_wait(barriers + got * 8, phase);
    load_tile(r, places + got * Weight::TILE_BYTES, lane, path.is_half(taken));
    if (++taken == path.count) taken = 0;
    if (++got == AHEAD) got = 0, phase ^= 1;
    u32* words = (u32*)&r;  // all loads stand before this
#pragma unroll
    for (int i = 0; i < (int)sizeof(r) / 4; i++) asm volatile("" : "+r"(words[i])::"memory");
    __syncwarp();
    fence_async();  // and have come before the next copy to where they read; else it may overtake them
    order();
    return r;
  }
  DEVICE void refill(int) {}

  DEVICE void order() {
    if (left > 0) {
      left--;
      if (lane == 0) {
        const u32 bytes = Weight::TILE_BYTES >> path.is_half(path.done);
        barrier_expect(barriers + put * 8, bytes);
        bulk_copy(shared_address(places) + put * Weight::TILE_BYTES, path.at, bytes, barriers + put * 8);
      }
      if (++put == AHEAD) put = 0;
      path.step(Weight::TILE_BYTES);
    }
    __syncwarp();
  }
};
#else
template <class Weight, int AHEAD>
struct Tiles {
  static constexpr int UNROLLED = AHEAD, BARRIERS = 0, BYTES = 0;
  Path path;
  int left;
  Weight r[AHEAD];

  DEVICE void begin(const Path& from, int total, char*, u32) {
    path = from, left = total;
#pragma unroll
    for (int i = 0; i < AHEAD; i++) refill(i);
  }
  DEVICE Weight& take(int i) { return r[i]; }
  DEVICE void refill(int i) {
    if (left-- <= 0) return;
    load_tile(r[i], path.at, threadIdx.x & 31, path.is_half(path.done));
    path.step(Weight::TILE_BYTES);
  }
};
#endif
