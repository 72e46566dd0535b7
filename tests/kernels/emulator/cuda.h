// CUDA C++ on an ordinary x86-64 processor, as far as our kernels use it: a block's threads are coroutines that
// change places at barriers and warp-wide operations. Blocks run one after the other, those of a cluster together
// (their shared memory has to be dynamic, all of it). Slow, exact, free of races by design; running threads in another
// order (`order`) shows a missing barrier. Stands in for ptx.cuh, async.cuh and wgmma.cuh.
#pragma once
#include <math.h>  // the C headers, as gpu.py has it
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define __CUDA_ARCH__ 800
#define HOPPER 0
#define DEVICE inline
#define __global__
#define __device__
#define __restrict__
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __noinline__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { u32 x, y; };
static inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

namespace emu {
struct Index { int x, y, z; };
struct Warp {
  u32 slots[2][32][8];
  u64 generation = 0;
  int arrived = 0;
};
struct Barrier {  // threads that have left do not take part
  u64 generation;
  int arrived, alive;
  u64 arrive() {
    const u64 mine = generation;
    if (++arrived == alive) arrived = 0, generation++;
    return mine;
  }
  void leave() {
    if (--alive && arrived == alive) arrived = 0, generation++;
  }
};
struct Block {
  Index index;
  Barrier barrier;
  Warp* warps;
  char* shared;
  Barrier named[2];  // of sync_some
};
struct Thread {
  void* stack_pointer;
  Index index;
  Block* block;
  const u64* awaited;  // no turn before this is no longer `before`; null: any turn will do
  u64 before, cluster_arrival;
  bool is_done;
};

static Index grid_, threads_;
static Thread* all;
static Block* blocks;  // of the cluster that runs
static Barrier cluster_barrier;
static char *stacks, *shared_base;  // of the block that runs
static Thread* self;
static void* scheduler;
static void (*body)(void**);
static void** arguments;

extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
static void yield() { emu_switch(&self->stack_pointer, scheduler); }
static void entry() {
  body(arguments);
  self->is_done = true;
  yield();
  abort();
}
static void wait(const u64& generation, u64 before) {
  if (generation != before) return;
  self->awaited = &generation, self->before = before;
  yield();
}
static void wait(const Barrier& barrier, u64 arrival) { wait(barrier.generation, arrival); }
static int lane() { return self->index.x & 31; }
static Warp& warp() { return self->block->warps[self->index.x >> 5]; }
template <class T>
static u32 (*exchange(const T* mine, int count))[8] {  // what each lane of the warp brought: slots[lane][i]
  Warp& w = warp();
  const u64 generation = w.generation;
  memcpy(w.slots[generation & 1][lane()], mine, count * 4);
  if (++w.arrived == 32) w.arrived = 0, w.generation++;
  wait(w.generation, generation);
  return w.slots[generation & 1];
}
constexpr size_t STACK = 65 * 1024;  // no power of two, or the tops of all would share a few lines of the cache
static void run_cluster(int cluster, int order) {
  const int per_block = threads_.x, n = cluster * per_block;
  cluster_barrier = {0, 0, n};
  for (int i = 0; i < n; i++) {
    void** top = (void**)(((uintptr_t)(stacks + (i + 1) * STACK) & ~(uintptr_t)63) - 8);
    *top-- = nullptr;
    *top = (void*)entry;
    for (int r = 0; r < 6; r++) *--top = nullptr;
    all[i] = {top, {i % per_block, 0, 0}, &blocks[i / per_block], nullptr, 0, 0, false};
  }
  long idle = 0;
  for (int left = n; left;) {
    const int before = left;
    for (int i = 0; i < n; i++) {
      self = &all[order == 0 ? i : order == 1 ? n - 1 - i : (i * 7 + 3) % n];  // 7 divides no number in use
      if (self->is_done || (self->awaited && *self->awaited == self->before)) continue;
      self->awaited = nullptr;
      shared_base = self->block->shared;
      emu_switch(&scheduler, self->stack_pointer);
      if (self->is_done) left--, self->block->barrier.leave(), cluster_barrier.leave();
    }
    idle = left == before ? idle + 1 : 0;
    if (idle > 1000000) fprintf(stderr, "emulated block hangs\n"), abort();
  }
}
template <size_t... I>
struct Sequence {};
template <class... A>
struct Kernel {  // what a launch needs to know: the types of the arguments
  template <void (*function)(A...), size_t... I>
  static void call(void** args, Sequence<I...>) { function(*(A*)args[I]...); }
  template <void (*function)(A...)>
  static void entry(void** args) { call<function>(args, Sequence<__integer_pack(sizeof...(A))...>()); }
};
template <class... A>
Kernel<A...> of(void (*)(A...));
static void run(void (*kernel)(void**), void** args, const int* shape, int order) {
  body = kernel, arguments = args;
  grid_ = {shape[0], shape[1], shape[2]}, threads_ = {shape[3], 1, 1};
  const int cluster = shape[5], num_warps = shape[3] / 32;
  const size_t shared_bytes = (shape[4] + 1023) / 1024 * 1024;
  all = (Thread*)malloc(cluster * shape[3] * sizeof(Thread)), blocks = (Block*)malloc(cluster * sizeof(Block));
  Warp* warps = (Warp*)malloc(cluster * num_warps * sizeof(Warp));
  stacks = (char*)malloc(cluster * shape[3] * STACK + 64);
  char* dynamic_shared = (char*)malloc(cluster * shared_bytes + 2048);
  char* aligned = (char*)(((uintptr_t)dynamic_shared + 1023) & ~(uintptr_t)1023);
  for (int z = 0; z < grid_.z; z++)
    for (int y = 0; y < grid_.y; y++)
      for (int x = 0; x < grid_.x; x += cluster) {
        for (int i = 0; i < cluster * num_warps; i++) warps[i] = Warp();
        for (int c = 0; c < cluster; c++)
          blocks[c] = {{x + c, y, z}, {0, 0, shape[3]}, warps + c * num_warps, aligned + c * shared_bytes};
        run_cluster(cluster, order);
      }
  free(all), free(blocks), free(warps), free(stacks), free(dynamic_shared);
}
static float of_bf16(u32 bits) {
  const u32 wide = bits << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
static u32 to_bf16(double v) {  // to the nearest, ties to even, also below the normal numbers
  if (__builtin_isnan(v)) return 0x7fff;
  const u32 sign = __builtin_signbit(v) ? 0x8000 : 0;
  v = fabs(v);
  if (v < 0x1p-126) return sign | (u32)nearbyint(v * 0x1p133);
  u64 bits;
  memcpy(&bits, &v, 8);
  bits += (1ull << 44) - 1 + (bits >> 45 & 1);  // 7 of 52 digits stay; the exponent takes the carry
  const u64 rounded = (bits >> 45) - ((1023 - 127) << 7);
  return sign | (rounded < 0x7f80 ? (u32)rounded : 0x7f80);
}
}  // namespace emu

#define threadIdx (emu::self->index)
#define blockIdx (emu::self->block->index)
#define blockDim (emu::threads_)
#define gridDim (emu::grid_)
static inline void __syncthreads() { emu::wait(emu::self->block->barrier, emu::self->block->barrier.arrive()); }
static inline void sync_some(int barrier, int threads) {
  emu::Barrier& some = emu::self->block->named[barrier];
  some.alive = threads;
  emu::wait(some, some.arrive());
}
#define CLUSTERS 1
static inline void cluster_arrive() { emu::self->cluster_arrival = emu::cluster_barrier.arrive(); }
static inline void cluster_wait() { emu::wait(emu::cluster_barrier, emu::self->cluster_arrival); }
static inline void cluster_sync() { cluster_arrive(), cluster_wait(); }
template <class T>
static T* of_block(T* own, int rank) { return (T*)((char*)own - emu::shared_base + emu::blocks[rank].shared); }
static inline void __syncwarp() { u32 none = 0; emu::exchange(&none, 1); }
template <class T>
static T __shfl_sync(u32, T v, int from) {
  T out;
  memcpy(&out, emu::exchange(&v, sizeof(T) / 4)[from & 31], sizeof(T));
  return out;
}
template <class T>
static T __shfl_xor_sync(u32, T v, int mask) { return __shfl_sync(~0u, v, emu::lane() ^ mask); }
template <class T>
static T __shfl_up_sync(u32, T v, int by) {
  const T other = __shfl_sync(~0u, v, emu::lane() - by);
  return emu::lane() >= by ? other : v;
}
static inline u32 __ballot_sync(u32, bool v) {
  const u32 mine = v;
  u32(*const slots)[8] = emu::exchange(&mine, 1);
  u32 out = 0;
  for (int i = 0; i < 32; i++) out |= slots[i][0] << i;
  return out;
}
static inline u32 __match_any_sync(u32, int v) {
  u32(*const slots)[8] = emu::exchange(&v, 1);
  u32 out = 0;
  for (int i = 0; i < 32; i++) out |= (u32)((int)slots[i][0] == v) << i;
  return out;
}
static inline int __ffs(u32 v) { return __builtin_ffs(v); }
static inline int __clz(u32 v) { return v ? __builtin_clz(v) : 32; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int __popc(u32 v) { return __builtin_popcount(v); }
template <class T>
static T atomicAdd(T* at, T v) { const T before = *at; *at += v; return before; }
static inline float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static inline u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static inline long long __double_as_longlong(double d) { long long v; memcpy(&v, &d, 8); return v; }
static inline float __int_as_float(int v) { return __uint_as_float(v); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline u32 __funnelshift_l(u32 low, u32 high, u32 by) {
  return (u32)(((u64)high << 32 | low) << (by & 31) >> 32);
}
static inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 out = 0;
  for (int i = 0; i < 4; i++) out |= (u32)(both >> ((selector >> 4 * i & 7) * 8) & 255) << 8 * i;
  return out;
}

// ---- ptx.cuh
static inline u32 fma_bf16x2(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int i = 0; i < 32; i += 16) {
    const double x = emu::of_bf16(a >> i & 0xffff), y = emu::of_bf16(b >> i & 0xffff), z = emu::of_bf16(c >> i & 0xffff);
    out |= emu::to_bf16(fma(x, y, z)) << i;
  }
  return out;
}
static inline u32 mul_bf16x2(u32 a, u32 b) { return fma_bf16x2(a, b, 0x80008000u); }
static inline u32 bf16x2(float low, float high) { return emu::to_bf16(low) | emu::to_bf16(high) << 16; }
static inline u16 fp16(float v) { _Float16 h = (_Float16)v; u16 out; memcpy(&out, &h, 2); return out; }
static inline u32 fp16x2(float low, float high) { return fp16(low) | (u32)fp16(high) << 16; }
static inline float power_of_2(float a) { return exp2f(a); }
static inline float quotient(float a, float b) { return a / b; }
static inline u32 twice_bf16(float a) { return bf16x2(a, a); }
static inline float low_half(u32 h) { u16 bits = (u16)h; _Float16 f; memcpy(&f, &bits, 2); return (float)f; }
static inline float high_half(u32 h) { return low_half(h >> 16); }
static inline float plus_2_23(u32 v) { return __uint_as_float(v | 0x4B000000u); }
static constexpr u32 power_x2(int e) { return ((u32)(127 + e) << 7) * 0x00010001u; }
constexpr u32 MINUS_X2 = 0x80008000u;
static inline void load4(u32* d, const char* p) { memcpy(d, __builtin_assume_aligned(p, 16), 16); }
static inline void load2(u32* d, const char* p) { memcpy(d, p, 8); }
static inline u32 load1(const char* p) { u32 d; memcpy(&d, p, 4); return d; }
static inline u32 load_u16(const char* p) { u16 d; memcpy(&d, p, 2); return d; }
template <class F>
static void mma_of(float* c, const u32* a, const u32* b, F value) {
  u32 mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  u32(*const slots)[8] = emu::exchange(mine, 6);
  const int g = emu::lane() >> 2, quad = emu::lane() & 3;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (int k = 0; k < 16; k++) {
    double x[2], y[2];
    for (int half = 0; half < 2; half++) {
      x[half] = value(slots[g * 4 + (k & 7) / 2][half + (k >> 3) * 2] >> (k & 1) * 16 & 0xffff);
      y[half] = value(slots[(quad * 2 + half) * 4 + (k & 7) / 2][4 + (k >> 3)] >> (k & 1) * 16 & 0xffff);
    }
    for (int i = 0; i < 4; i++) sums[i] += x[i >> 1] * y[i & 1];
  }
  for (int i = 0; i < 4; i++) c[i] = (float)sums[i];
}
static inline void mma(float* c, const u32* a, const u32* b) {
  mma_of(c, a, b, [](u32 bits) { return emu::of_bf16(bits); });
}
static inline void mma_fp16(float* c, const u32* a, const u32* b) {
  mma_of(c, a, b, low_half);  // as a pointer: from fp16 to double at once would take a call
}
static inline void load_matrix4(u32* d, u32 shared) {
  u32(*const slots)[8] = emu::exchange(&shared, 1);
  for (int i = 0; i < 4; i++)
    memcpy(d + i, emu::shared_base + slots[i * 8 + (emu::lane() >> 2)][0] + (emu::lane() & 3) * 4, 4);
}
static inline void load_matrix4_ordered(u32* d, u32 shared) { load_matrix4(d, shared); }
static inline void load_matrix4_turned(u32* d, u32 shared) {
  u32(*const slots)[8] = emu::exchange(&shared, 1);
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++)
      memcpy((u16*)(d + i) + e, emu::shared_base + slots[i * 8 + (emu::lane() & 3) * 2 + e][0] + (emu::lane() >> 2) * 2, 2);
}
static inline u32 shared_address(const void* p) { return (u32)((const char*)p - emu::shared_base); }

// ---- async.cuh
static inline void start_next_kernel() {}
static inline void await_previous_kernel() {}
static inline void copy16(u32 shared, const void* from) { memcpy(emu::shared_base + shared, from, 16); }
static inline void copies_done() {}
static inline void copy16_or_zeros(u32 shared, const void* from, bool is_there) {
  if (is_there) copy16(shared, from);
  else memset(emu::shared_base + shared, 0, 16);
}
static inline void close_copies() {}
template <int LATEST>
static inline void await_copies() {}
static inline uint4 fresh(const uint4* p) { return *p; }
static inline int fresh(const int* p) { return *p; }
static inline long long fresh(const long long* p) { return *p; }

// ---- of Hopper: barriers in shared memory, copies that are there at once, and wgmma.cuh
struct SharedBarrier {
  u8 phase, count, pending, none;
  int bytes;  // that are still to come
  void check() {
    if (!pending && !bytes) phase ^= 1, pending = count;
  }
};
static inline SharedBarrier& shared_barrier(u32 at) { return *(SharedBarrier*)(emu::shared_base + at); }
static inline void barrier_init(u32 barrier, u32 count) { shared_barrier(barrier) = {0, (u8)count, (u8)count, 0, 0}; }
static inline void barrier_init_done() {}
static inline void barrier_arrive(u32 barrier) { shared_barrier(barrier).pending--, shared_barrier(barrier).check(); }
static inline void barrier_expect(u32 barrier, u32 bytes) {
  shared_barrier(barrier).bytes += bytes;
  barrier_arrive(barrier);
}
static inline void barrier_wait(u32 barrier, u32 phase) {
  while (shared_barrier(barrier).phase == phase) emu::yield();
}
static inline bool barrier_is_past(u32 barrier, u32 phase) {
  if (!shared_barrier(barrier).count) fprintf(stderr, "a barrier that nobody made\n"), abort();
  return shared_barrier(barrier).phase != phase;
}
static inline void set_zero16(u32 shared) { memset(emu::shared_base + shared, 0, 16); }
static inline void fence_async() {}
static inline void bulk_copy(u32 shared, const void* from, u32 bytes, u32 barrier) {
  memcpy(emu::shared_base + shared, from, bytes);
  shared_barrier(barrier).bytes -= bytes, shared_barrier(barrier).check();
}
#ifdef TOKENS
static inline void wgmma(float* d, const u32* a, u64 descriptor, u32 adds) {  // a warp's 16 rows; 128-byte swizzle
  u32(*const slots)[8] = emu::exchange(a, 4);
  const int g = emu::lane() >> 2, quad = emu::lane() & 3;
  const u32 start = (descriptor & 0x3fff) * 16;
  float rows[2][16];
  for (int half = 0; half < 2; half++)
    for (int k = 0; k < 16; k++)
      rows[half][k] = emu::of_bf16(slots[g * 4 + (k & 7) / 2][half + (k >> 3) * 2] >> (k & 1) * 16 & 0xffff);
  for (int i = 0; i < TOKENS / 2; i += 4)
    for (int e = 0; e < 2; e++) {
      const u32 token = start + i / 4 * 1024 + (quad * 2 + e) * 128;
      u16 bits[16];
      for (u32 k = 0; k < 16; k += 8) {
        const u32 at = token + k * 2;
        memcpy(bits + k, emu::shared_base + (at ^ (at >> 7 & 7) << 4), 16);
      }
      for (int half = 0; half < 2; half++) {
        double sum = adds ? d[i + half * 2 + e] : 0;
        for (int k = 0; k < 16; k++) sum += (double)rows[half][k] * emu::of_bf16(bits[k]);
        d[i + half * 2 + e] = (float)sum;
      }
    }
}
#endif
