// What stands before and after a matmul: x in the order it is read, and the sum of partial results.
#include "async.cuh"

// f32 x [T][K] -> bf16 image [pieces of 64 inputs][T8][8 tokens][8 units of 16 bytes, unit ^ token]. In a 128-wide
// chunk, position 16 j + 8 hh + 2 quad + e holds k = 32 quad + 4 j + 2 hh + e. Zero beyond T and K.
// One thread a unit: 16 threads a chunk, which read 128 bytes at once. grid (ceil(chunks 16 / 128), 8 T8), 128 threads
extern "C" __global__ void __launch_bounds__(128)
x_image(const float* __restrict__ x, uint4* __restrict__ image, int T, int K, int T8, int chunks) {
  start_next_kernel();
  await_previous_kernel();
  const int unit = blockIdx.x * 128 + threadIdx.x, chunk = unit >> 4, u = unit & 15, token = blockIdx.y;
  if (chunk >= chunks) return;
  u32 pairs[4];
#pragma unroll
  for (int quad = 0; quad < 4; quad++) {
    int k = chunk * 128 + quad * 32 + u * 2;
    float low = token < T && k < K ? x[(u64)token * K + k] : 0.f;
    float high = token < T && k + 1 < K ? x[(u64)token * K + k + 1] : 0.f;
    pairs[quad] = bf16x2(low, high);
  }
  u64 group = ((u64)chunk * 2 + (u >> 3)) * T8 + (token >> 3);
  image[(group * 8 + (token & 7)) * 8 + ((u & 7) ^ (token & 7))] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// y[t][n] = 0 + part[0][t][n] + part[1][t][n] + ... (+ bias[n]), in this order. grid (ceil(N / 256), T), 256 threads
extern "C" __global__ void __launch_bounds__(256)
sum_slices(const float* __restrict__ part, const float* __restrict__ bias, float* __restrict__ y, int T, int N, int S) {
  start_next_kernel();
  await_previous_kernel();
  const int n = blockIdx.x * 256 + threadIdx.x, t = blockIdx.y;
  if (n >= N) return;
  float v = 0.f;
  for (int s = 0; s < S; s++) v += part[((u64)s * T + t) * N + n];
  y[(u64)t * N + n] = bias ? v + bias[n] : v;
}
