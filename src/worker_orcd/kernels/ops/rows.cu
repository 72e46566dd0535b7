// Norm, rotation and activation: float32, one row at a time in one shape of reduction, so a row's bits are its own.
#define BLOCK 256

#if __CUDA_ARCH__ >= 900
#define OVERLAP asm volatile("griddepcontrol.launch_dependents; griddepcontrol.wait;" ::: "memory")
#else
#define OVERLAP
#endif

// ---- the cache keeps float32, or 16-bit numbers (-DKV_BITS=16: bf16, 17: fp16)
#ifndef KV_BITS
#define KV_BITS 32
#endif
#if KV_BITS == 32
typedef float Stored;
__device__ __forceinline__ float stored(float v) { return v; }
#elif KV_BITS == 17
typedef unsigned short Stored;
__device__ __forceinline__ Stored stored(float v) {
  Stored h;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(v));
  return h;
}
#else
typedef unsigned short Stored;
__device__ __forceinline__ Stored stored(float v) {
  Stored h;
  asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(h) : "f"(v));
  return h;
}
#endif

// y = x / sqrt(mean(x^2) + eps) weight, over rows of K. grid (rows)
extern "C" __global__ void __launch_bounds__(BLOCK)
rms_norm(const float* __restrict__ x, const float* __restrict__ weight, float* __restrict__ y, int K, int eps_bits) {
  __shared__ float parts[BLOCK / 32];
  OVERLAP;
  const float* row = x + (unsigned long long)blockIdx.x * K;
  float* out = y + (unsigned long long)blockIdx.x * K;
  float sum = 0.f;
  for (int k = threadIdx.x; k < K; k += BLOCK) sum = fmaf(row[k], row[k], sum);
#pragma unroll
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < BLOCK / 32; i++) sum += parts[i];
  const float scale = 1.f / sqrtf(sum / K + __int_as_float(eps_bits));
  for (int k = threadIdx.x; k < K; k += BLOCK) out[k] = row[k] * scale * weight[k];
}

// y = gate / (1 + exp(-gate)) up; rows of F, `stride` apart in gate and up. grid (ceil(F / BLOCK), rows)
extern "C" __global__ void __launch_bounds__(BLOCK)
silu_times(const float* __restrict__ gate, const float* __restrict__ up, float* __restrict__ y, int F, int stride) {
  OVERLAP;
  const int f = blockIdx.x * BLOCK + threadIdx.x;
  if (f >= F) return;
  const unsigned long long at = (unsigned long long)blockIdx.y * stride + f;
  const float g = gate[at];
  y[(unsigned long long)blockIdx.y * F + f] = g / (1.f + expf(-g)) * up[at];
}

// Rotate q [T][Hq][D] and k [T][Hk][D] by the angles of each row's position, keep q, store k and v in the cache.
// Pairs (i, i + half) or, with `interleaved`, (2i, 2i + 1); dimensions from 2 half on pass. grid (T, Hq + 2 Hk)
extern "C" __global__ void __launch_bounds__(BLOCK)
rope_store(const float* __restrict__ q, const float* __restrict__ k, const float* __restrict__ v,
           float* __restrict__ q_out, Stored* __restrict__ k_cache, Stored* __restrict__ v_cache,
           const float* __restrict__ cos, const float* __restrict__ sin, const long long* __restrict__ positions,
           const long long* __restrict__ slots, int Hq, int Hk, int D, int half, int interleaved) {
  OVERLAP;
  const long long t = blockIdx.x;
  int head = blockIdx.y;
  const bool is_q = head < Hq, is_k = !is_q && head < Hq + Hk;
  head -= is_q ? 0 : is_k ? Hq : Hq + Hk;
  const float* from = (is_q ? q : is_k ? k : v) + (t * (is_q ? Hq : Hk) + head) * D;
  for (int d = threadIdx.x; d < D; d += BLOCK) {
    float value = from[d];
    if ((is_q || is_k) && d < 2 * half) {
      const bool second = interleaved ? d & 1 : d >= half;
      const int i = interleaved ? d >> 1 : second ? d - half : d;
      const float other = from[interleaved ? d ^ 1 : second ? d - half : d + half];
      const float c = cos[positions[t] * half + i], s = sin[positions[t] * half + i];
      value = second ? __fadd_rn(__fmul_rn(other, s), __fmul_rn(value, c))
                     : __fsub_rn(__fmul_rn(value, c), __fmul_rn(other, s));
    }
    if (is_q) q_out[(t * Hq + head) * D + d] = value;
    else (is_k ? k_cache : v_cache)[(slots[t] * Hk + head) * D + d] = stored(value);
  }
}
