// csrc/hopper/tensor_map.h: a map says what it was told.
#pragma once
#include <cuda.h>

namespace svg::hopper {

inline cudaError_t encode_row_map(CUtensorMap* map, bool, const void* base, int head_dim,
                                  int64_t rows, int64_t row_stride, int64_t sequences,
                                  int64_t sequence_stride, int atoms) {
  *map = {static_cast<const unsigned char*>(base), rows, 2 * row_stride, sequences,
          2 * sequence_stride, 2 * head_dim, 8 * atoms, true};
  return cudaSuccess;
}

inline cudaError_t encode_byte_row_map(CUtensorMap* map, const void* base, int64_t rows,
                                       int64_t row_stride, int64_t sequences,
                                       int64_t sequence_stride, int box) {
  *map = {static_cast<const unsigned char*>(base), rows, row_stride, sequences, sequence_stride,
          128, box, false};
  return cudaSuccess;
}

}  // namespace svg::hopper
