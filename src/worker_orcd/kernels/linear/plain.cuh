// Decoders of plain numbers. What a decoder is: see weight.cuh.
#pragma once
#include "ptx.cuh"

struct BF16 {  // 4096 bytes: 16 per lane and MMA, its four registers as they are
  static constexpr int TILE_K = 128, TILE_BYTES = 4096;
  static constexpr float SCALE = 1.f;
  u32 words[32];
  DEVICE void load(const char* tile, int lane, int half) {
#pragma unroll
    for (int j = 0; j < 8; j++) load4(words + 4 * j, tile + j * (512 >> half) + lane * 16);
  }
  DEVICE void prepare(int) {}
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int i = 0; i < 4; i++) even[i] = copy(words[8 * pair + i]), odd[i] = copy(words[8 * pair + 4 + i]);
  }
  // Times one: a copy that the compiler keeps. wgmma still reads its operands when the next tile is loaded into `words`.
  static DEVICE u32 copy(u32 w) { return mul_bf16x2(w, power_x2(0)); }
};

struct F16 : BF16 {
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      even[i] = rounded(words[8 * pair + i]);
      odd[i] = rounded(words[8 * pair + 4 + i]);
    }
  }
  static DEVICE u32 rounded(u32 w) { return bf16x2(low_half(w), high_half(w)); }
};

struct F32 {  // 8192 bytes: 16 per lane and half MMA, (row g, row g + 8) x 2 numbers
  static constexpr int TILE_K = 128, TILE_BYTES = 8192;
  static constexpr float SCALE = 1.f;
  u32 words[64];
  DEVICE void load(const char* tile, int lane, int half) {
#pragma unroll
    for (int i = 0; i < 16; i++) load4(words + 4 * i, tile + i * (512 >> half) + lane * 16);
  }
  DEVICE void prepare(int) {}
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 *w = words + 16 * pair + 2 * i, *v = w + 8;
      even[i] = bf16x2(__uint_as_float(w[0]), __uint_as_float(w[1]));
      odd[i] = bf16x2(__uint_as_float(v[0]), __uint_as_float(v[1]));
    }
  }
};
