// Addresses as the instructions of Hopper take them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace svg::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace svg::hopper
