// Matrices of 8 x 8 16-bit elements between shared memory and the registers of a warp.
#pragma once

#include "hopper/address.cuh"

namespace svg::hopper {

// Lane l names row l % 8 of matrix l / 8. Each lane gets, of every matrix, rows 2 (l % 4) and the
// next of column l / 4.
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&matrix)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrix[0]), "=r"(matrix[1]), "=r"(matrix[2]), "=r"(matrix[3])
               : "r"(address)
               : "memory");
}

// Lane l names row l % 8 of matrix l / 8. Each lane gives, of every matrix, columns 2 (l % 4) and
// the next of row l / 4.
__device__ __forceinline__ void stmatrix(uint32_t address, const uint32_t (&matrix)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(matrix[0]), "r"(matrix[1]), "r"(matrix[2]), "r"(matrix[3])
               : "memory");
}

}  // namespace svg::hopper
