// What flows from kernel to kernel: operands in the order the matmuls read them, and sums not yet added up.
#pragma once
#include "async.cuh"

// Outputs of one matrix for rows t < T: the sum over `count` slices [count][T][width] in their order, plus the bias.
struct Part {
  const float* slices;
  const float* bias;   // or null
  const int* experts;  // null, or for each row the expert whose bias it takes: bias [experts][width]
  int width, count;
};
struct Sums {
  Part part[3];  // side by side; width 0 where there are fewer
};
struct Norm {
  const float* weight;
  const float* bias;  // null: divide by the root mean square; else subtract the mean and divide by the deviation
  float eps;
};

DEVICE const float* bias_of(const Part& p, int t) {  // who owns a row is known long before its sums
  return p.experts ? p.bias + (u64)fresh(p.experts + t) * p.width : p.bias;
}

// Where the sums of one column, or of four side by side (V: float4, with widths and columns multiples of 4), lie.
template <class V>
struct Column {
  const V* slices;
  const V* bias;  // or null
  u64 stride;     // from a slice to the next
  int count;      // 0: the sum is 0
};
template <class V>
DEVICE Column<V> column(const Part& p, int T, int t, int n) {
  return {(const V*)(p.slices + (u64)t * p.width + n), p.bias ? (const V*)(bias_of(p, t) + n) : nullptr,
          (u64)T * p.width * 4 / sizeof(V), p.count};
}
template <class V>
DEVICE Column<V> column(const Sums& sums, int T, int t, int n) {  // column n of all parts
  if (n < sums.part[0].width) return column<V>(sums.part[0], T, t, n);
  n -= sums.part[0].width;
  if (n < sums.part[1].width) return column<V>(sums.part[1], T, t, n);
  return column<V>(sums.part[2], T, t, n - sums.part[1].width);
}

DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float4 plus(float4 a, float4 b) {
  return make_float4(__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y), __fadd_rn(a.z, b.z), __fadd_rn(a.w, b.w));
}
DEVICE void set_zero(float& v) { v = 0.f; }
DEVICE void set_zero(float4& v) { v = make_float4(0.f, 0.f, 0.f, 0.f); }

// N columns added up, each slice by slice in their order and the bias last. AT_ONCE slices of all of them are on their way
// at once, since one by one each would cost the time to memory and back. What is not there counts as +0, which changes
// no sum that began with +0.
template <int AT_ONCE, class V, int N>
DEVICE void add_up(const Column<V> (&from)[N], V (&v)[N]) {
  V bias[N], found[AT_ONCE][N];
  int most = 0;
#pragma unroll
  for (int j = 0; j < N; j++) {
    set_zero(v[j]), set_zero(bias[j]);
    if (from[j].bias) bias[j] = *from[j].bias;
    most = from[j].count > most ? from[j].count : most;
  }
  for (int s = 0; s < most; s += AT_ONCE) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
#pragma unroll
      for (int j = 0; j < N; j++) {
        set_zero(found[i][j]);
        if (s + i < from[j].count) found[i][j] = from[j].slices[(s + i) * from[j].stride];
      }
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) {
      if (s + i >= most) break;
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = plus(v[j], found[i][j]);
    }
  }
#pragma unroll
  for (int j = 0; j < N; j++) v[j] = plus(v[j], bias[j]);
}

// bf16 image [pieces of 64 inputs][T8][8 tokens][8 units of 16 bytes, unit ^ token]. In a 128-wide chunk, position
// 16 j + 8 hh + 2 quad + e holds k = 32 quad + 4 j + 2 hh + e. Stores inputs k to k + 3 of token t; k a multiple of 4
DEVICE void store4(u32* image, int T8, int t, int k, float4 v) {
  const int chunk = k >> 7, quad = (k >> 5) & 3, unit = (k & 31) >> 1;
  const u64 token = (((u64)chunk * 2 + (unit >> 3)) * T8 + (t >> 3)) * 8 + (t & 7);
  image[(token * 8 + ((unit & 7) ^ (t & 7))) * 4 + quad] = bf16x2(v.x, v.y);
  image[(token * 8 + (((unit + 1) & 7) ^ (t & 7))) * 4 + quad] = bf16x2(v.z, v.w);
}
