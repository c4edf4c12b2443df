// Tensor maps of TMA loads: how rows of [sequences, rows, head_dim] are described. Host side.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace svg::hopper {

// The driver's encoder, found at run time so that the library needs no libcuda at load.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
                                : nullptr;
  }();
  return encoder;
}

// Describes 16-bit rows so that one load fetches `atoms` swizzle atoms of eight consecutive rows
// from any first row, each atom as 1,024 bytes for every block of 64 columns.
//
// The axes are 64 columns, row within an atom, block of columns, atom, sequence. The axis of atoms
// strides over eight rows of the same memory that the axis of rows walks, so a box of many atoms
// has the layout of as many boxes of one. TMA checks the row of the first atom only: a box of
// several atoms must end inside the sequence, a single atom may overrun it (zeros).
inline cudaError_t encode_row_map(CUtensorMap* map, bool bfloat16, const void* base, int head_dim,
                                  int64_t rows, int64_t row_stride, int64_t sequences,
                                  int64_t sequence_stride, int atoms) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t row_bytes = static_cast<cuuint64_t>(row_stride) * 2;
  const cuuint64_t sizes[5] = {
      64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(head_dim / 64),
      static_cast<cuuint64_t>((rows + 7) / 8), static_cast<cuuint64_t>(sequences)};
  const cuuint64_t strides[4] = {row_bytes, 128, 8 * row_bytes,
                                 static_cast<cuuint64_t>(sequence_stride) * 2};
  const cuuint32_t box[5] = {64, 8, static_cast<cuuint32_t>(head_dim / 64),
                             static_cast<cuuint32_t>(atoms), 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result =
      encode(map, bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 5,
             const_cast<void*>(base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Describes rows of 128 bytes so that one load fetches `box` consecutive rows from any first row
// into 128-byte swizzled shared memory; rows past the last arrive as zeros.
inline cudaError_t encode_byte_row_map(CUtensorMap* map, const void* base, int64_t rows,
                                       int64_t row_stride, int64_t sequences,
                                       int64_t sequence_stride, int box) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[3] = {128, static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(sequences)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(row_stride),
                                 static_cast<cuuint64_t>(sequence_stride)};
  const cuuint32_t boxes[3] = {128, static_cast<cuuint32_t>(box), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 3, const_cast<void*>(base), sizes, strides, boxes,
             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace svg::hopper
