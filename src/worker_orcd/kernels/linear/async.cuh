// Asynchronous copies into shared memory, and the overlap of one kernel's start with the end of the one before.
#pragma once
#include "ptx.cuh"

#if HOPPER
// What the kernel ahead writes is no `const __restrict__` argument: that promises memory nobody writes while this kernel
// lives, and loads of it may then be moved above the wait.
DEVICE void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }  // it may load its weights
DEVICE void await_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEVICE void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(barrier), "r"(count));
}
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_wait(u32 barrier, u32 phase) {
  asm volatile(
      "{.reg .pred P; W: mbarrier.try_wait.parity.shared::cta.b64 P,[%0],%1; @P bra D; bra W; D: }" ::"r"(barrier),
      "r"(phase) : "memory");
}
DEVICE bool barrier_is_past(u32 barrier, u32 phase) {  // no wait
  u32 is;
  asm volatile("{.reg .pred P; mbarrier.test_wait.parity.shared::cta.b64 P,[%1],%2; selp.u32 %0,1,0,P;}" : "=r"(is)
               : "r"(barrier), "r"(phase) : "memory");
  return is;
}
DEVICE void set_zero16(u32 shared) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%1,%1,%1};" ::"r"(shared), "r"(0) : "memory");
}
// Own loads and stores before what bulk copies and wgmma do from here on.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void bulk_copy(u32 shared, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(shared),
               "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
#else
DEVICE void start_next_kernel() {}
DEVICE void await_previous_kernel() {}
DEVICE void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

DEVICE void copy16(u32 shared, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16;" ::"r"(shared), "l"(from) : "memory");
}
// Groups of copies of 16 bytes, each closed when it has begun; zeros where there is nothing to copy.
DEVICE void copy16_or_zeros(u32 shared, const void* from, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared), "l"(from), "r"(is_there ? 16 : 0) : "memory");
}
DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LATEST>
DEVICE void await_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(LATEST) : "memory"); }  // all but the LATEST

DEVICE void sync_some(int barrier, int threads) {  // of a block; __syncthreads is barrier 0
  asm volatile("bar.sync %0,%1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Integers that were written before the kernel ahead began: they need not wait for it, but an L1 cache may hold what lay
// there before them.
DEVICE int fresh(const int* p) {
  int v;
  asm volatile("ld.relaxed.gpu.global.s32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE long long fresh(const long long* p) {
  long long v;
  asm volatile("ld.relaxed.gpu.global.s64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}

DEVICE uint4 fresh(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

// ---- clusters: blocks that run together. `arrive` and `wait` are the two halves of their barrier
#define CLUSTERS HOPPER
#if CLUSTERS
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
template <class T>
DEVICE T* of_block(T* own, int rank) {  // where another block of the cluster has what is here in `own`
  T* out;
  asm("mapa.u64 %0,%1,%2;" : "=l"(out) : "l"(own), "r"(rank));
  return out;
}
#else
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() { __syncthreads(); }
template <class T>
DEVICE T* of_block(T* own, int) { return own; }
#endif
DEVICE void cluster_sync() { cluster_arrive(), cluster_wait(); }
