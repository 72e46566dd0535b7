// Rows of a matrix in tiles as float32: what the format's `dequantize` in quant/ gives, to the last bit.
//
// Compiled for one format (-DFORMAT=Q4_K ...) and its tiles of 16 rows by TILE_K inputs, TILE_BYTES bytes; with HALF_END a
// strip ends with half a tile, as linear/weight.cuh has it: `half` is 1 there, and planes are half as large. A thread
// takes four inputs side by side, whose bits lie in one word of each plane; the layout, and its letters, are those of
// quant/repack_bits. Products and sums are rounded one by one.
#include "async.cuh"

struct At {  // inputs 128 c + 32 q + 16 v + 8 l + 4 j + 2 h + e of row 8 r + g, for h, e = 0 and 1; lane = 4 g + q
  int row, r, c, v, l, j, lane, half;
};
DEVICE int lanes(const At& a) { return 32 >> a.half; }
struct Four {  // integers; number 2 h + e
  int n[4];
};

DEVICE Four four(u32 first, u32 second, u32 mask, int zero) {  // the lowest bits of each half, minus `zero`
  return {(int)(first & mask) - zero, (int)(first >> 16 & mask) - zero,
          (int)(second & mask) - zero, (int)(second >> 16 & mask) - zero};
}
DEVICE float half_at(const char* p) { return low_half(load_u16(p)); }

DEVICE float4 floats(const Four& q) {
  return make_float4((float)q.n[0], (float)q.n[1], (float)q.n[2], (float)q.n[3]);
}
DEVICE float4 times(float4 a, float d) {
  return make_float4(__fmul_rn(a.x, d), __fmul_rn(a.y, d), __fmul_rn(a.z, d), __fmul_rn(a.w, d));
}
DEVICE float4 plus(float4 a, float m) {
  return make_float4(__fadd_rn(a.x, m), __fadd_rn(a.y, m), __fadd_rn(a.z, m), __fadd_rn(a.w, m));
}

// ---- blocks of 32
DEVICE u32 word_at(const char* tile, const At& a) {
  return load1(tile + (((a.c * 2 + a.v) * lanes(a) + a.lane) * 4 + a.l * 2 + a.r) * 4);
}
DEVICE Four nibbles(const char* tile, const At& a, int zero) {
  const u32 word = word_at(tile, a) >> 8 * a.j;
  return four(word, word >> 4, 15, zero);
}
DEVICE Four five_bits(const char* tile, const char* plane, const At& a, int zero) {
  const u32 word = word_at(tile, a), rest = load1(plane + ((a.lane * (TILE_K / 128) + a.c) * 2 + a.r) * 4);
  if (a.j == 0) return four(word, word >> 5, 31, zero);
  const u32 lower = __funnelshift_l(rest, rest, 31 - 4 * (2 * a.v + a.l));
  return four(word >> 10, (lower & 0x000f000fu) | (word >> 11 & 0x00100010u), 31, zero);
}
DEVICE float scale_at(const char* plane, const At& a) { return half_at(plane + a.lane * 4 + a.r * 2); }
DEVICE float4 scale_and_min(const Four& q, const char* plane, const At& a) {
  const char* d = plane + a.lane * 8 + a.r * 2;
  return plus(times(floats(q), half_at(d)), half_at(d + 4));
}

DEVICE float4 Q4_0(const char* tile, const At& a) {
  return times(floats(nibbles(tile, a, 8)), scale_at(tile + (1024 >> a.half), a));
}
DEVICE float4 Q4_1(const char* tile, const At& a) { return scale_and_min(nibbles(tile, a, 0), tile + (1024 >> a.half), a); }
DEVICE float4 Q5_0(const char* tile, const At& a) {
  return times(floats(five_bits(tile, tile + (1024 >> a.half), a, 16)), scale_at(tile + (1280 >> a.half), a));
}
DEVICE float4 Q5_1(const char* tile, const At& a) {
  return scale_and_min(five_bits(tile, tile + (1024 >> a.half), a, 0), tile + (1280 >> a.half), a);
}
DEVICE float4 Q8_0(const char* tile, const At& a) {  // the sign bit is kept flipped: the number plus 128
  const u32 word = load1(tile + ((a.v * 2 + a.l) * lanes(a) + a.lane) * 16 + a.j * 8 + a.r * 4);
  Four q;
#pragma unroll
  for (int i = 0; i < 4; i++) q.n[i] = (int)(word >> 8 * i & 255) - 128;
  return times(floats(q), scale_at(tile + (2048 >> a.half), a));
}
DEVICE float4 MXFP4(const char* tile, const At& a) {  // twice the number times half the scale, as in quant/mxfp4
  const u32 word = word_at(tile, a), e = load_u16(tile + (1024 >> a.half) + a.lane * 2) >> 8 * a.r & 255;
  const u32 turned = __funnelshift_l(word, word, 6);
  const u32 pairs[2] = {a.j ? turned : word, a.j ? (turned & 0x001B001Bu) * 0x4108u : word << 3};
  Four q;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 code = pairs[i >> 1] >> 16 * (i & 1), magnitude = code >> 6 & 7;  // where bf16 has these bits
    const int n = (int)(magnitude < 2 ? magnitude : ((magnitude & 1) + 2) << ((magnitude >> 1) - 1));
    q.n[i] = code & 0x8000 ? -n : n;
  }
  return times(floats(q), __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23));
}

// ---- blocks of 256
DEVICE float4 scale_and_shift(const Four& q, const char* planes, const At& a) {
  const u32 upper = load1(planes + a.lane * 4) >> 8 * (2 * a.c + a.r);
  const u32 lower = load_u16(planes + 128 + a.lane * 2) >> 4 * (2 * a.c + a.r);
  const u32 both = load1(planes + 192 + a.row * 4);
  const float d = __fmul_rn((float)(upper & 63), low_half(both));
  const float m = __fmul_rn((float)((lower & 15) | (upper >> 2 & 0x30)), high_half(both));
  return plus(times(floats(q), d), -m);
}
DEVICE float4 Q4_K(const char* tile, const At& a) { return scale_and_shift(nibbles(tile, a, 0), tile + 2048, a); }
DEVICE float4 Q5_K(const char* tile, const At& a) {
  return scale_and_shift(five_bits(tile, tile + 2048, a, 0), tile + 2560, a);
}
DEVICE float4 Q6_K(const char* tile, const At& a) {
  const u32 word = word_at(tile, a);
  const u32 rest = load1(tile + 2048 + ((a.c * 32 + a.lane) * 4 + a.v * 2 + a.r) * 4) >> 8 * a.l;
  const u32 scales = load1(tile + 3072 + (a.c * 32 + a.lane) * 4);
  const u32 last = (word >> 4 & 0x003c003cu) | (rest & 0x00030003u);
  const Four q = a.j ? four(rest >> 2, last, 63, 32) : four(word, word >> 10, 63, 32);
  const float scale = (float)(signed char)(scales >> 8 * (2 * a.r + a.v));
  return times(floats(q), __fmul_rn(scale, half_at(tile + 3328 + a.row * 2)));
}

// ---- plain numbers
DEVICE int mma_of(const At& a) { return 4 * a.v + 2 * a.l + a.j; }
DEVICE const char* pairs_of_16(const char* tile, const At& a) {
  return tile + (mma_of(a) * lanes(a) + a.lane) * 16 + a.r * 4;
}
DEVICE float4 F16(const char* tile, const At& a) {
  const u32 first = load1(pairs_of_16(tile, a)), second = load1(pairs_of_16(tile, a) + 8);
  return make_float4(low_half(first), high_half(first), low_half(second), high_half(second));
}
DEVICE float4 BF16(const char* tile, const At& a) {
  const u32 first = load1(pairs_of_16(tile, a)), second = load1(pairs_of_16(tile, a) + 8);
  return make_float4(__uint_as_float(first << 16), __uint_as_float(first & 0xffff0000u),
                     __uint_as_float(second << 16), __uint_as_float(second & 0xffff0000u));
}
DEVICE float4 F32(const char* tile, const At& a) {
  const char* pair = tile + (mma_of(a) * 2 * lanes(a) + a.lane) * 16 + a.r * 8;
  u32 first[2], second[2];
  load2(first, pair), load2(second, pair + 16 * lanes(a));
  return make_float4(__uint_as_float(first[0]), __uint_as_float(first[1]),
                     __uint_as_float(second[0]), __uint_as_float(second[1]));
}

// y [T][K] = rows `tokens` of the matrix [N, K]; K a multiple of 4. Token -1 - r is sampled[r] of so many. One that has
// no row is given NaN.
// grid (ceil(K / 256), T), 64 threads
extern "C" __global__ void __launch_bounds__(64)
embed(const char* __restrict__ tiles, const long long* tokens, const long long* sampled,
      float* __restrict__ y, int num_sampled, int N, int K) {
  start_next_kernel();
  const int k = (blockIdx.x * 64 + threadIdx.x) * 4, t = blockIdx.y, depth = (K + TILE_K - 1) / TILE_K;
  if (k >= K) return;
  await_previous_kernel();
  long long token = tokens[t];
  if (token < 0 && token >= -(long long)num_sampled) token = sampled[-1 - token];
  const float nan = __int_as_float(0x7fc00000);
  float4 v = make_float4(nan, nan, nan, nan);
  if (token >= 0 && token < N) {
    const int row = token & 15, half = HALF_END && k / TILE_K == depth - 1, lane = (row & 7) * (4 >> half) + (k >> 5 & 3);
    const At at = {row, row >> 3, k % TILE_K >> 7, k >> 4 & 1, k >> 3 & 1, k >> 2 & 1, lane, half};
    const u64 strip_bytes = (u64)depth * TILE_BYTES - (HALF_END ? TILE_BYTES / 2 : 0);
    v = FORMAT(tiles + (token >> 4) * strip_bytes + k / TILE_K * TILE_BYTES, at);
  }
  *(float4*)(y + (u64)t * K + k) = v;
}
