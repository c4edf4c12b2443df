// What warpgroups agree on: named barriers between them, and how many registers each takes.
#pragma once

#include <cuda_runtime.h>

namespace svg::hopper {

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Keeps the compiler from moving arithmetic across, which it does as it likes within a basic block:
// ends one with a branch that is never taken, since no bit of `zero` is set, of which the compiler
// must not know. Each place in a function takes a bit of its own. (Where the branch would end the
// kernel, ptxas serialises products.)
template <int kBit>
__device__ __forceinline__ void keep_order(int zero) {
  if (zero >> kBit & 1) {
    int forever = 1;
    do {
      asm volatile("nanosleep.u32 100;");
      asm volatile("" : "+r"(forever));
    } while (forever != 0);
  }
}

// The same value in every lane, in a form the compiler knows to be the same.
__device__ __forceinline__ int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

}  // namespace svg::hopper
