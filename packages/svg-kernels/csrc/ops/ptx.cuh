// The few instructions C++ has no word for.
#pragma once
#include <cuda_runtime_api.h>

namespace svg {

// Four words, loaded where it is written: left to itself the compiler sinks loads to their uses,
// one by one. Hints to the caches (no_allocate here, evict-first at the stores) cost 4 to 6 % of
// the bandwidth on an H200.
__device__ __forceinline__ uint4 load_quad(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A copy of 16 bytes into shared memory that the thread does not wait for.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// Closes a group of copies, which may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until all but the latest `PENDING` groups of this thread have arrived.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float half_bits(unsigned short h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}

__device__ __forceinline__ unsigned pack_f16(float low, float high) {
  unsigned w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(high), "f"(low));
  return w;
}

}  // namespace svg
