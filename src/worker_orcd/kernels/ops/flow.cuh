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

DEVICE const float* bias_of(const Part& p, int t) {
  return p.experts ? p.bias + (u64)p.experts[t] * p.width : p.bias;
}
DEVICE float sum_at(const Part& p, int T, int t, int n) {
  const float* from = p.slices + (u64)t * p.width + n;
  const u64 stride = (u64)T * p.width;
  float v = 0.f;
#pragma unroll 4
  for (int s = 0; s < p.count; s++) v = __fadd_rn(v, from[s * stride]);
  return p.bias ? __fadd_rn(v, bias_of(p, t)[n]) : v;
}
DEVICE float sum_at(const Sums& sums, int T, int t, int n) {  // column n of all parts
  if (n < sums.part[0].width) return sum_at(sums.part[0], T, t, n);
  n -= sums.part[0].width;
  if (n < sums.part[1].width) return sum_at(sums.part[1], T, t, n);
  return sum_at(sums.part[2], T, t, n - sums.part[1].width);
}
DEVICE float4 sum4_at(const Part& p, int T, int t, int n) {  // columns n to n + 3; width and n multiples of 4
  const float4* from = (const float4*)(p.slices + (u64)t * p.width + n);
  const u64 stride = (u64)T * p.width / 4;
  float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
  for (int s = 0; s < p.count; s++) {
    const float4 a = from[s * stride];
    v = make_float4(__fadd_rn(v.x, a.x), __fadd_rn(v.y, a.y), __fadd_rn(v.z, a.z), __fadd_rn(v.w, a.w));
  }
  if (!p.bias) return v;
  const float4 b = *(const float4*)(bias_of(p, t) + n);
  return make_float4(__fadd_rn(v.x, b.x), __fadd_rn(v.y, b.y), __fadd_rn(v.z, b.z), __fadd_rn(v.w, b.w));
}

// bf16 image [pieces of 64 inputs][T8][8 tokens][8 units of 16 bytes, unit ^ token]. In a 128-wide chunk, position
// 16 j + 8 hh + 2 quad + e holds k = 32 quad + 4 j + 2 hh + e. Stores inputs k to k + 3 of token t; k a multiple of 4
DEVICE void store4(u32* image, int T8, int t, int k, float4 v) {
  const int chunk = k >> 7, quad = (k >> 5) & 3, unit = (k & 31) >> 1;
  const u64 token = (((u64)chunk * 2 + (unit >> 3)) * T8 + (t >> 3)) * 8 + (t & 7);
  image[(token * 8 + ((unit & 7) ^ (t & 7))) * 4 + quad] = bf16x2(v.x, v.y);
  image[(token * 8 + (((unit + 1) & 7) ^ (t & 7))) * 4 + quad] = bf16x2(v.z, v.w);
}
