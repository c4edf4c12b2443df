// csrc/hopper/address.cuh: addresses in shared memory count from its beginning.
#pragma once
#include <cuda_runtime.h>

namespace svg::hopper {

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) -
                               emulated::dynamic_shared());
}

// Where a byte of a 128-byte swizzled layout lies: its address chooses the sixteen bytes' place.
inline unsigned char* swizzled(uint32_t address) {
  return emulated::dynamic_shared() + (address ^ (address >> 7 & 7) << 4);
}

}  // namespace svg::hopper
