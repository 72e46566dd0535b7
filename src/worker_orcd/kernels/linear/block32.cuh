// Decoders of formats with blocks of 32. What a decoder is, half a tile, and the arithmetic on bits: see weight.cuh.
#pragma once
#include "ptx.cuh"

struct Words {  // 128 inputs: two 512-byte planes, a word for four numbers of each half
  u32 words[8];
  DEVICE void load_words(const char* tile, int lane, int half) {
    load4(words, tile + lane * 16);
    load4(words + 4, tile + (512 >> half) + lane * 16);
  }
};

// the two 4-bit pairs in the low byte of each half, one with the scale 16 times smaller instead of a shift
DEVICE void two_pairs(u32 w, u32 scale, u32 scale_16th, u32 add, u32& first, u32& second) {
  first = fma_bf16x2(w & 0x000f000fu, scale, add);
  second = fma_bf16x2(w & 0x00f000f0u, scale_16th, add);
}
// four pairs of 5 bits: three and the top bit of the fourth in each half of `w`, the others of the fourth in `v`, one
// place up, below where `third` has the top bit: with half the scale no bit of it is shifted
DEVICE void four_pairs_5(u32 w, u32 v, u32 scale, u32 scale_half, u32 add, u32* even, u32* odd) {
  u32 third = w >> 10;
  even[0] = fma_bf16x2(w & 0x001f001fu, scale, add);
  even[2] = fma_bf16x2(w >> 5 & 0x001f001fu, scale, add);
  odd[0] = fma_bf16x2(third & 0x001f001fu, scale, add);
  odd[2] = fma_bf16x2((v & 0x001e001eu) | (third & 0x00200020u), scale_half, add);
}
DEVICE u32 fourths_of(u32 rest, int pair) { return __funnelshift_l(rest, rest, 32 - 4 * pair); }

struct NibbleScales : Words {  // what Q4_0 and Q4_1 share
  u32 scale[2], scale_16th[2], add[2];
  DEVICE void set(int row, float d) {
    u32 s = twice_bf16(d);
    scale[row] = mul_bf16x2(s, power_x2(117));
    scale_16th[row] = mul_bf16x2(s, power_x2(113));
  }
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[pair * 2 + row];
      two_pairs(w, scale[row], scale_16th[row], add[row], even[row], even[2 + row]);
      two_pairs(w >> 8, scale[row], scale_16th[row], add[row], odd[row], odd[2 + row]);
    }
  }
};

struct Q4_0 : NibbleScales {  // d (q - 8)
  static constexpr int TILE_K = 128, TILE_BYTES = 1152;
  static constexpr float SCALE = 65536.f;
  u32 d;
  DEVICE void load(const char* tile, int lane, int half) {
    load_words(tile, lane, half);
    d = load1(tile + (1024 >> half) + lane * 4);
  }
  DEVICE void prepare(int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float s = row ? high_half(d) : low_half(d);
      set(row, s);
      add[row] = twice_bf16(s * -0x1p-13f);
    }
  }
};

struct Q4_1 : NibbleScales {  // d q + m
  static constexpr int TILE_K = 128, TILE_BYTES = 1280;
  static constexpr float SCALE = 65536.f;
  u32 dm[2];
  DEVICE void load(const char* tile, int lane, int half) {
    load_words(tile, lane, half);
    load2(dm, tile + (1024 >> half) + lane * 8);
  }
  DEVICE void prepare(int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      set(row, row ? high_half(dm[0]) : low_half(dm[0]));
      add[row] = twice_bf16((row ? high_half(dm[1]) : low_half(dm[1])) * 0x1p-16f);
    }
  }
};

struct FiveBits : Words {  // what Q5_0 and Q5_1 share
  u32 rest[2], scale[2], scale_half[2], add[2];
  DEVICE void load_five(const char* tile, int lane, int half) {
    load_words(tile, lane, half);
    load2(rest, tile + (1024 >> half) + lane * 8);
  }
  DEVICE void set(int row, u32 s) {
    scale[row] = mul_bf16x2(s, power_x2(117));
    scale_half[row] = mul_bf16x2(s, power_x2(116));
  }
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[pair * 2 + row], v = fourths_of(rest[row], pair);
      four_pairs_5(w, v, scale[row], scale_half[row], add[row], even + row, odd + row);
    }
  }
};

struct Q5_0 : FiveBits {  // d (q - 16)
  static constexpr int TILE_K = 128, TILE_BYTES = 1408;
  static constexpr float SCALE = 65536.f;
  u32 d;
  DEVICE void load(const char* tile, int lane, int half) {
    load_five(tile, lane, half);
    d = load1(tile + (1280 >> half) + lane * 4);
  }
  DEVICE void prepare(int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 s = twice_bf16(row ? high_half(d) : low_half(d));
      set(row, s);
      add[row] = mul_bf16x2(s, power_x2(-12) ^ MINUS_X2);
    }
  }
};

struct Q5_1 : FiveBits {  // d q + m
  static constexpr int TILE_K = 128, TILE_BYTES = 1536;
  static constexpr float SCALE = 65536.f;
  u32 dm[2];
  DEVICE void load(const char* tile, int lane, int half) {
    load_five(tile, lane, half);
    load2(dm, tile + (1280 >> half) + lane * 8);
  }
  DEVICE void prepare(int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      set(row, twice_bf16(row ? high_half(dm[0]) : low_half(dm[0])));
      add[row] = twice_bf16((row ? high_half(dm[1]) : low_half(dm[1])) * 0x1p-16f);
    }
  }
};

struct Q8_0 {  // d (v - 128), v the stored byte with its sign bit flipped
  static constexpr int TILE_K = 128, TILE_BYTES = 2176;
  static constexpr float SCALE = 65536.f;
  u32 words[16], d, scale[2], add[2];
  DEVICE void load(const char* tile, int lane, int half) {
#pragma unroll
    for (int i = 0; i < 4; i++) load4(words + 4 * i, tile + i * (512 >> half) + lane * 16);
    d = load1(tile + (2048 >> half) + lane * 4);
  }
  DEVICE void prepare(int) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 s = twice_bf16(row ? high_half(d) : low_half(d));
      scale[row] = mul_bf16x2(s, power_x2(117));
      add[row] = mul_bf16x2(s, power_x2(-9) ^ MINUS_X2);
    }
  }
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[pair * 4 + row], v = words[pair * 4 + 2 + row];
      even[row] = fma_bf16x2(__byte_perm(w, 0, 0x4140), scale[row], add[row]);
      even[2 + row] = fma_bf16x2(__byte_perm(w, 0, 0x4342), scale[row], add[row]);
      odd[row] = fma_bf16x2(__byte_perm(v, 0, 0x4140), scale[row], add[row]);
      odd[2 + row] = fma_bf16x2(__byte_perm(v, 0, 0x4342), scale[row], add[row]);
    }
  }
};

struct MXFP4 : Words {  // 2^(E - 127) e2m1: sign, exponent and mantissa are moved under those of bf16, exact
  static constexpr int TILE_K = 128, TILE_BYTES = 1088;
  static constexpr float SCALE = 65536.f;
  u32 e, scale[2];
  DEVICE void load(const char* tile, int lane, int half) {
    load_words(tile, lane, half);
    e = load_u16(tile + (1024 >> half) + lane * 2);
  }
  DEVICE void prepare(int) {  // 2^(E - 17) in bf16: the moved bits mean 2^-126 of the code, the operand has 2^-16
    scale[0] = ((e & 255) + 110) * 0x00800080u;
    scale[1] = ((e >> 8) + 110) * 0x00800080u;
  }
  DEVICE void expand(int, int pair, u32* even, u32* odd) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 w = words[pair * 2 + row], turned = __funnelshift_l(w, w, 6);  // not << and >>: nvcc would shift twice
      even[row] = mul_bf16x2(w & 0x81C081C0u, scale[row]);
      even[2 + row] = mul_bf16x2(w << 3 & 0x81C081C0u, scale[row]);
      odd[row] = mul_bf16x2(turned & 0x81C081C0u, scale[row]);
      // what is left lies apart: << 3, << 8 and << 14 at once, whose bits do not meet
      odd[2 + row] = mul_bf16x2((turned & 0x001B001Bu) * 0x4108u & 0x81C081C0u, scale[row]);
    }
  }
};
