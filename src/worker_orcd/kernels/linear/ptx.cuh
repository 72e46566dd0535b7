// Types, and the machine instructions the kernels are made of. No system headers: NVRTC needs none.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define HOPPER (__CUDA_ARCH__ >= 900)

// ---- arithmetic; "x2" is a pair of 16-bit numbers, the first in the lower half
DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
DEVICE u32 mul_bf16x2(u32 a, u32 b) {
#if HOPPER
  u32 d;
  asm("mul.rn.bf16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return fma_bf16x2(a, b, 0x80008000u);  // adding -0 changes nothing, not even the sign of a zero
#endif
}
DEVICE u32 bf16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u16 fp16(float a) {
  u16 h;
  asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(a));
  return h;
}
DEVICE u32 fp16x2(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
DEVICE u32 twice_bf16(float a) { return bf16x2(a, a); }
DEVICE float low_half(u32 h) {  // fp16 in the lower 16 bits
  float f;
  asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l;}" : "=f"(f) : "r"(h));
  return f;
}
DEVICE float high_half(u32 h) { return low_half(h >> 16); }
DEVICE float plus_2_23(u32 v) { return __uint_as_float(v | 0x4B000000u); }  // 2^23 + v, for v < 2^23
DEVICE constexpr u32 power_x2(int e) { return ((u32)(127 + e) << 7) * 0x00010001u; }  // (2^e, 2^e) in bf16
DEVICE float power_of_2(float a) {  // these two as Triton has them, to within 2 units in the last place
  float d;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(d) : "f"(a));
  return d;
}
DEVICE float quotient(float a, float b) {
  float d;
  asm("div.full.f32 %0,%1,%2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}
constexpr u32 MINUS_X2 = 0x80008000u;                                          // xor with it negates both

// ---- loads of weights
#if TILES_IN_SHARED  // where whole tiles have been copied to
DEVICE void load4(u32* d, const char* p) {
  const uint4 v = *(const uint4*)p;
  d[0] = v.x, d[1] = v.y, d[2] = v.z, d[3] = v.w;
}
DEVICE void load2(u32* d, const char* p) {
  const uint2 v = *(const uint2*)p;
  d[0] = v.x, d[1] = v.y;
}
DEVICE u32 load1(const char* p) { return *(const u32*)p; }
DEVICE u32 load_u16(const char* p) { return *(const u16*)p; }
#else  // of global memory: each byte is read once, so it is not kept in L1
DEVICE void load4(u32* d, const char* p) {
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "l"(p));
}
DEVICE void load2(u32* d, const char* p) {
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(p));
}
DEVICE u32 load1(const char* p) {
  u32 d;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0,[%1];" : "=r"(d) : "l"(p));
  return d;
}
DEVICE u32 load_u16(const char* p) {
  u16 d;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0,[%1];" : "=h"(d) : "l"(p));
  return d;
}
#endif

// ---- matrix unit
DEVICE void mma(float* c, const u32* a, const u32* b) {  // c[16 x 8] += a[16 x 16] b[16 x 8]
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_fp16(float* c, const u32* a, const u32* b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void load_matrix4(u32* d, u32 shared) {
  asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared));
}
DEVICE void load_matrix4_ordered(u32* d, u32 shared) {  // not moved past a barrier: for what is written again
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared) : "memory");
}
DEVICE void load_matrix4_turned(u32* d, u32 shared) {  // likewise, and columns become rows
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3]) : "r"(shared) : "memory");
}
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
