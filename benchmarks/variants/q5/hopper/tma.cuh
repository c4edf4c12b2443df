// Loads by the tensor memory accelerator (TMA); tensor_map.h describes what they read.
#pragma once

#include <cuda.h>

#include "hopper/address.cuh"

namespace svg::hopper {

// Loads as many swizzle atoms of eight rows as the map's box has, from `row` on; the barrier counts
// their bytes. tensor_map.h has the axes.
__device__ __forceinline__ void tma_load_rows(void* destination, const CUtensorMap* map,
                                              uint64_t* barrier, int row, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %3, %3, %5}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(row), "r"(sequence)
      : "memory");
}

// Loads as many rows of 128 bytes as the map's box has; those past the last are zeros.
__device__ __forceinline__ void tma_load_byte_rows(void* destination, const CUtensorMap* map,
                                                   uint64_t* barrier, int row, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(destination)),
      "l"(map), "r"(shared_address(barrier)), "r"(0), "r"(row), "r"(sequence)
      : "memory");
}

__device__ __forceinline__ void tma_prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Makes this thread's stores to shared memory visible to wgmma and TMA (the async proxy).
__device__ __forceinline__ void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace svg::hopper
