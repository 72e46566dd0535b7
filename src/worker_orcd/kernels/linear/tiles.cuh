// How a warp comes by its tiles: those of one strip after the other, AHEAD of them on their way.
//
// With TILES_IN_SHARED they are copied to places in shared memory, from where registers take one at a time. Copies are
// waited for by their number, the oldest while the others are still coming. Of loads to registers that a loop uses in a
// later turn the compiler lets all raise one and the same signal: to wait for the oldest is to wait for the latest, so for
// a part of every turn nothing is on its way. Registers are left for slices of few tiles, and where shared memory is full.
// `take` gives tile after tile, the i-th as take(i % UNROLLED), and `refill` with the same number says that it was used.
// With FIXED numbers, known when this is compiled, are those of places, too, and nothing is left to work out of them.
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

#if TILES_IN_SHARED
template <class Weight, int AHEAD, bool FIXED>
struct Tiles {
  static constexpr int UNROLLED = FIXED ? AHEAD : 1, BYTES = AHEAD * Weight::TILE_BYTES;  // of a warp
  Path path;
  char* places;
  int left, put, got, taken, lane;  // taken of a strip
  Weight r;

  // `total` tiles; `room` for BYTES
  DEVICE void begin(const Path& from, int total, char* room) {
    path = from, left = total, places = room;
    put = got = taken = 0, lane = threadIdx.x & 31;
    for (int i = 0; i < AHEAD; i++) order(i);
  }
  DEVICE Weight& take(int i) {
    await_copies<AHEAD - 1>();
    __syncwarp();  // what the other lanes have copied is there, too
    load_tile(r, places + (FIXED ? i * Weight::TILE_BYTES : got), lane, path.is_half(taken));
    if (++taken == path.count) taken = 0;
    got = next(got);
    u32* words = (u32*)&r;  // all loads stand before this
#pragma unroll
    for (int j = 0; j < (int)sizeof(r) / 4; j++) asm volatile("" : "+r"(words[j])::"memory");
    __syncwarp();  // and those of all lanes before the copy to where they read
    order(i);
    return r;
  }
  DEVICE void refill(int) {}

  static DEVICE int next(int place) { return place + Weight::TILE_BYTES == BYTES ? 0 : place + Weight::TILE_BYTES; }
  DEVICE void order(int i) {  // a group of copies for each tile, an empty one where there is none: they are counted
    if (left > 0) {
      left--;
      const int bytes = Weight::TILE_BYTES >> path.is_half(path.done);
      const u32 to = shared_address(places) + (FIXED ? i * Weight::TILE_BYTES : put) + lane * 16;
#pragma unroll
      for (int j = 0; j < Weight::TILE_BYTES; j += 512)
        if ((!HALF_END && j + 512 <= Weight::TILE_BYTES) || j + lane * 16 < bytes) copy16(to + j, path.at + j + lane * 16);
      put = next(put);
      path.step(Weight::TILE_BYTES);
    }
    close_copies();
  }
};
#else
template <class Weight, int AHEAD, bool>
struct Tiles {
  static constexpr int UNROLLED = AHEAD, BYTES = 0;
  Path path;
  int left;
  Weight r[AHEAD];

  DEVICE void begin(const Path& from, int total, char*) {
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
