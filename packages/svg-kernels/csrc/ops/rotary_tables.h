// Tables of rotary angles, shared by rope.cu and qk_norm_rope.cu.
#pragma once
#include "ffi/arguments.h"

namespace svg {

// cos and sin of pair i of table row t: data[b * batch_stride + t * row_stride + i * pair_stride].
struct Tables {
  const float* cos;  // null: do not rotate
  const float* sin;
  int64_t batch_stride, row_stride;
  int pair_stride;
  int64_t start, length;
};

// fp32 cos and sin of equal strides, or complex64 alone: [length, n], [B or 1, length, n], or
// [B or 1, length, 1, n] either way round; n is dim / 2, or dim with each value given twice.
inline bool read_tables(const DLTensor& cos, const DLTensor* sin, const DLTensor& x, int64_t tokens,
                        int64_t dim, bool half, int64_t start, Tables* out) {
  const bool complex = sin == nullptr;
  const DLDataType kind = cos.dtype;
  if (kind.lanes != 1 || kind.code != (complex ? kDLComplex : kDLFloat) ||
      kind.bits != (complex ? 64 : 32) || !same_device(cos, x)) {
    return false;
  }
  int batch = -1, token = 0;
  const int pair = cos.ndim - 1;
  if (cos.ndim == 3) {
    batch = 0, token = 1;
  } else if (cos.ndim == 4 && (cos.shape[1] == 1 || cos.shape[2] == 1)) {
    batch = 0, token = cos.shape[2] == 1 ? 1 : 2;
  } else if (cos.ndim != 2) {
    return false;
  }
  const int64_t length = cos.shape[token], given = cos.shape[pair];
  if ((given != dim / 2 && (given != dim || complex)) || start < 0 || start + length > tokens ||
      (batch == 0 && cos.shape[0] != 1 && cos.shape[0] != x.shape[0])) {
    return false;
  }
  if (!complex) {
    if (!same_dtype(cos, *sin) || !same_shape(cos, *sin) || !same_device(cos, *sin)) return false;
    for (int i = 0; i < cos.ndim; ++i) {
      if (step(cos, i) != step(*sin, i)) return false;
    }
  }
  const int64_t unit = complex ? 2 : 1;
  out->cos = static_cast<const float*>(data_of(cos));
  out->sin = complex ? out->cos + 1 : static_cast<const float*>(data_of(*sin));
  out->batch_stride = batch == 0 ? step(cos, 0) * unit : 0;
  out->row_stride = step(cos, token) * unit;
  int64_t between = step(cos, pair) * unit;
  if (given == dim && !half) {
    out->sin += between;  // each value twice: sin is read from the pair's second channel
    between *= 2;
  }
  out->pair_stride = static_cast<int>(between);
  out->start = start;
  out->length = length;
  return between == out->pair_stride;
}

}  // namespace svg
