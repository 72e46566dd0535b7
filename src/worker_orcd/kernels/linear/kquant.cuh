// Decoders of the K formats: tiles of 256 inputs, two chunks of 128. See weight.cuh.
#pragma once
#include "block32.cuh"

struct KWords {  // two chunks of two 512-byte planes
  u32 words[16];
  DEVICE void load_words(const char* tile, int lane) {
#pragma unroll
    for (int i = 0; i < 4; i++) load4(words + 4 * i, tile + i * 512 + lane * 16);
  }
};

struct KScales : KWords {  // what Q4_K and Q5_K share: d sc q - dmin m
  u32 packed, low_mins, dm[2];
  u32 add[2];
  DEVICE void load_scales(const char* planes, int lane) {
    packed = load1(planes + lane * 4);
    low_mins = load_u16(planes + 128 + lane * 2);
    dm[0] = load1(planes + 192 + (lane >> 2) * 4);
    dm[1] = load1(planes + 224 + (lane >> 2) * 4);
  }
  DEVICE u32 prepare_row(int chunk, int row) {  // sets `add`; d sc in bf16: the product is exact, then rounded once
    int i = chunk * 2 + row;
    float d = low_half(dm[row]), m = high_half(dm[row]) * -0x1p-18f;
    u32 both = __byte_perm(packed, 0x4B000000u, 0x7440 | i);  // the float 2^23 + sc + 64 (mn >> 4)
    u32 sc = both & 0x4B00003Fu, mn = (both & 0x4B0000C0u) | (low_mins << 2 >> (4 * i) & 0x3C);  // 2^23 + sc, + 4 mn
    add[row] = twice_bf16(fmaf(__uint_as_float(mn), m, m * -8388608.f));
    return twice_bf16(fmaf(__uint_as_float(sc), d, d * -8388608.f));
  }
};

struct Q4_K : KScales {
  static constexpr int TILE_K = 256, TILE_BYTES = 2304;
  static constexpr float SCALE = 65536.f;
  u32 scale[2], scale_16th[2];
  DEVICE void load(const char* tile, int lane, int) {
    load_words(tile, lane);
    load_scales(tile + 2048, lane);
  }
  DEVICE void prepare(int chunk) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 s = prepare_row(chunk, row);
      scale[row] = mul_bf16x2(s, power_x2(117));
      scale_16th[row] = mul_bf16x2(s, power_x2(113));
    }
  }
  DEVICE void expand(int chunk, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[chunk * 8 + pair * 2 + row];
      two_pairs(w, scale[row], scale_16th[row], add[row], even[row], even[2 + row]);
      two_pairs(w >> 8, scale[row], scale_16th[row], add[row], odd[row], odd[2 + row]);
    }
  }
};

struct Q5_K : KScales {
  static constexpr int TILE_K = 256, TILE_BYTES = 2816;
  static constexpr float SCALE = 65536.f;
  u32 rest[4], scale[2], scale_half[2];  // rest of (chunk, row)
  DEVICE void load(const char* tile, int lane, int) {
    load_words(tile, lane);
    load4(rest, tile + 2048 + lane * 16);
    load_scales(tile + 2560, lane);
  }
  DEVICE void prepare(int chunk) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 s = prepare_row(chunk, row);
      scale[row] = mul_bf16x2(s, power_x2(117));
      scale_half[row] = mul_bf16x2(s, power_x2(116));
    }
  }
  DEVICE void expand(int chunk, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[chunk * 8 + pair * 2 + row], v = fourths_of(rest[chunk * 2 + row], pair);
      four_pairs_5(w, v, scale[row], scale_half[row], add[row], even + row, odd + row);
    }
  }
};

struct Q6_K : KWords {  // d sc (q - 32); one scale for 16 inputs, so two in a lane's block of 32
  static constexpr int TILE_K = 256, TILE_BYTES = 3360;
  static constexpr float SCALE = 65536.f;
  u32 rest[8], packed[2], d[2], scale[2], scale_4th[2], add[2];
  DEVICE void load(const char* tile, int lane, int) {
    load_words(tile, lane);
    load4(rest, tile + 2048 + lane * 16);
    load4(rest + 4, tile + 2560 + lane * 16);
    packed[0] = load1(tile + 3072 + lane * 4);  // int8 scale of (row, half block) at byte 2 row + half
    packed[1] = load1(tile + 3200 + lane * 4);
    d[0] = load_u16(tile + 3328 + (lane >> 2) * 2);
    d[1] = load_u16(tile + 3344 + (lane >> 2) * 2);
  }
  DEVICE void prepare(int) {}
  DEVICE void prepare_half(int chunk, int half) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 sc = ((packed[chunk] >> (8 * (half + 2 * row))) & 255) ^ 128;
      u32 s = twice_bf16((plus_2_23(sc) - 8388736.f) * low_half(d[row]));  // exact, then rounded once
      scale[row] = mul_bf16x2(s, power_x2(117));
      scale_4th[row] = mul_bf16x2(s, power_x2(115));
      add[row] = mul_bf16x2(s, power_x2(-11) ^ MINUS_X2);
    }
  }
  DEVICE void expand(int chunk, int pair, u32* even, u32* odd) {
    if ((pair & 1) == 0) prepare_half(chunk, pair >> 1);
#pragma unroll
    for (int row = 0; row < 2; row++) {  // two pairs in `w`, the upper bits of the last between them; a byte of rest
      u32 w = words[chunk * 8 + pair * 2 + row], v = rest[chunk * 4 + (pair >> 1) * 2 + row];
      v = (pair & 1) ? v >> 8 : v;
      even[row] = fma_bf16x2(w & 0x003f003fu, scale[row], add[row]);
      even[2 + row] = fma_bf16x2(w >> 10 & 0x003f003fu, scale[row], add[row]);
      odd[row] = fma_bf16x2(v & 0x00fc00fcu, scale_4th[row], add[row]);
      odd[2 + row] = fma_bf16x2((w >> 4 & 0x003c003cu) | (v & 0x00030003u), scale[row], add[row]);
    }
  }
};
