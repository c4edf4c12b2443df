// csrc/hopper/matrix.cuh by shuffles.
#pragma once
#include "hopper/address.cuh"

namespace svg::hopper {

inline void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t address) {
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    uint32_t word = 0;
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = __shfl_sync(~0u, address, 8 * m + 2 * (lane % 4) + half);
      uint16_t element;
      std::memcpy(&element, emulated::dynamic_shared() + row + lane / 4 * 2, 2);
      word |= uint32_t{element} << 16 * half;
    }
    matrix[m] = word;
  }
}

inline void stmatrix(uint32_t address, const uint32_t (&matrix)[4]) {
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    const uint32_t row = __shfl_sync(~0u, address, 8 * m + lane / 4);
    std::memcpy(emulated::dynamic_shared() + row + lane % 4 * 4, &matrix[m], 4);
  }
}

}  // namespace svg::hopper
