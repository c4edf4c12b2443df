// From DLPack tensors to what the launchers take.
//
// Each reader checks what it is given and returns false, with nothing launched, for whatever the
// caller has to convert first (dtypes, strides) or to refuse in words. Checking here costs a few
// nanoseconds an argument; reading the same properties from Python costs microseconds.
#pragma once
#include <dlpack/dlpack.h>

#include "launch.h"

namespace svg {

constexpr int kNoDType = -1;

inline int dtype_of(const DLTensor& t) {
  if (t.dtype.lanes != 1) return kNoDType;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 32) return kFloat32;
  if (t.dtype.code == kDLFloat && t.dtype.bits == 16) return kFloat16;
  return t.dtype.code == kDLBfloat && t.dtype.bits == 16 ? kBFloat16 : kNoDType;
}

inline bool same_dtype(const DLTensor& a, const DLTensor& b) {
  return a.dtype.code == b.dtype.code && a.dtype.bits == b.dtype.bits &&
         a.dtype.lanes == b.dtype.lanes;
}

inline bool same_device(const DLTensor& a, const DLTensor& b) {
  return a.device.device_type == b.device.device_type && a.device.device_id == b.device.device_id;
}

inline bool same_shape(const DLTensor& a, const DLTensor& b) {
  if (a.ndim != b.ndim) return false;
  for (int i = 0; i < a.ndim; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

inline void* data_of(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// Elements from one index of an axis to the next; 0 along an axis of length 1, whatever it says.
inline int64_t step(const DLTensor& t, int axis) { return t.shape[axis] > 1 ? t.strides[axis] : 0; }

inline bool packed(const DLTensor& t) {  // the last axis is contiguous
  return t.shape[t.ndim - 1] <= 1 || t.strides[t.ndim - 1] == 1;
}

inline int64_t elements(const DLTensor& t) {
  int64_t count = 1;
  for (int i = 0; i < t.ndim; ++i) count *= t.shape[i];
  return count;
}

inline bool contiguous(const DLTensor& t) {
  if (elements(t) == 0) return true;
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] > 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

inline Rows rows_of(const DLTensor& t, int64_t outer_stride, int64_t inner_stride) {
  return {data_of(t), outer_stride, inner_stride, dtype_of(t)};
}

// One float per column of `x`, or absent.
inline bool read_vector(const DLTensor* t, const DLTensor& x, Rows* out) {
  if (t == nullptr) return true;
  if (t->ndim != 1 || t->shape[0] != x.shape[x.ndim - 1] || dtype_of(*t) == kNoDType ||
      !packed(*t) || !same_device(*t, x)) {
    return false;
  }
  *out = rows_of(*t, 0, 0);
  return true;
}

// [B or 1, C] or [B or 1, S or 1, C] beside x [B, S, C].
inline bool read_modulation(const DLTensor& t, const DLTensor& x, Rows* out) {
  if (t.ndim != 2 && t.ndim != 3) return false;
  const bool fits = (t.shape[0] == 1 || t.shape[0] == x.shape[0]) &&
                    (t.ndim == 2 || t.shape[1] == 1 || t.shape[1] == x.shape[1]) &&
                    t.shape[t.ndim - 1] == x.shape[2];
  if (!fits || dtype_of(t) == kNoDType || !packed(t) || !same_device(t, x)) return false;
  *out = rows_of(t, step(t, 0), t.ndim == 3 ? step(t, 1) : 0);
  return true;
}

// Folds all axes but the last into [outer, inner]; false if that takes more than two strides.
inline bool fold(const DLTensor& x, int64_t* outer, int64_t* inner, Rows* out) {
  int64_t size[2] = {1, 1}, stride[2] = {0, 0};  // inner, outer
  if (elements(x) == 0) {
    *inner = *outer = 0;
    *out = rows_of(x, 0, 0);
    return true;
  }
  int level = 0;
  for (int i = x.ndim - 2; i >= 0; --i) {
    if (x.shape[i] == 1) continue;
    if (size[level] == 1) {
      size[level] = x.shape[i], stride[level] = x.strides[i];
    } else if (x.strides[i] == stride[level] * size[level]) {
      size[level] *= x.shape[i];
    } else if (++level == 2) {
      return false;
    } else {
      size[1] = x.shape[i], stride[1] = x.strides[i];
    }
  }
  *inner = size[0], *outer = size[1];
  *out = rows_of(x, stride[1], stride[0]);
  return true;
}

inline bool read_norm(const DLTensor& x, const DLTensor* weight, const DLTensor* bias,
                      const DLTensor* scale, const DLTensor* shift, const DLTensor& y, double eps,
                      bool center, NormArgs* out) {
  if (x.ndim == 0 || dtype_of(x) == kNoDType || dtype_of(y) == kNoDType || !packed(x) ||
      !same_shape(x, y) || !contiguous(y) || !same_device(x, y) ||
      !read_vector(weight, x, &out->weight) || !read_vector(bias, x, &out->bias)) {
    return false;
  }
  if (scale != nullptr) {
    if (x.ndim != 3 || !read_modulation(*scale, x, &out->scale) ||
        !read_modulation(*shift, x, &out->shift)) {
      return false;
    }
    out->outer = x.shape[0], out->inner = x.shape[1];
    out->x = rows_of(x, step(x, 0), step(x, 1));
  } else if (!fold(x, &out->outer, &out->inner, &out->x)) {
    return false;
  }
  out->y = data_of(y);
  out->y_dtype = dtype_of(y);
  out->width = static_cast<int>(x.shape[x.ndim - 1]);
  out->eps = static_cast<float>(eps);
  out->center = center;
  return true;
}

inline bool read_gate(const DLTensor& residual, const DLTensor& x, const DLTensor& gate,
                      const DLTensor& y, GateArgs* out) {
  if (residual.ndim != 3 || !same_shape(residual, x) || !same_shape(residual, y) ||
      dtype_of(residual) == kNoDType || dtype_of(x) == kNoDType || dtype_of(y) == kNoDType ||
      !packed(residual) || !packed(x) || !contiguous(y) || !same_device(residual, x) ||
      !same_device(residual, y) || !read_modulation(gate, residual, &out->gate)) {
    return false;
  }
  out->residual = rows_of(residual, step(residual, 0), step(residual, 1));
  out->x = rows_of(x, step(x, 0), step(x, 1));
  out->y = data_of(y);
  out->y_dtype = dtype_of(y);
  out->outer = residual.shape[0], out->inner = residual.shape[1];
  out->width = static_cast<int>(residual.shape[2]);
  return true;
}

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

inline bool read_rope_tensor(const DLTensor& x, const DLTensor& y, RopeTensor* out) {
  if (x.ndim != 4 || dtype_of(x) == kNoDType || !packed(x) || !packed(y) || !same_shape(x, y) ||
      !same_dtype(x, y) || !same_device(x, y)) {
    return false;
  }
  *out = {data_of(x), data_of(y), step(x, 0), step(x, 1), step(x, 2), step(y, 0),
          step(y, 1), step(y, 2), static_cast<int>(x.shape[1])};
  return true;
}

// One tensor [B, H, S, D], or two that differ in heads and strides alone; null where absent.
inline bool read_rope(const DLTensor* const (&x)[2], const DLTensor* const (&y)[2],
                      const DLTensor& cos, const DLTensor* sin, bool half, int64_t start,
                      RopeArgs* out) {
  const DLTensor& first = *x[0];
  out->count = x[1] == nullptr ? 1 : 2;
  for (int i = 0; i < out->count; ++i) {
    if (!read_rope_tensor(*x[i], *y[i], &out->tensor[i])) return false;
  }
  if (out->count == 2) {
    const DLTensor& second = *x[1];
    if (second.shape[0] != first.shape[0] || second.shape[2] != first.shape[2] ||
        second.shape[3] != first.shape[3] || !same_dtype(first, second) ||
        !same_device(first, second)) {
      return false;
    }
  }
  const int64_t tokens = first.shape[2], dim = first.shape[3];
  if (dim % 2 != 0 || !read_tables(cos, sin, first, tokens, dim, half, start, &out->tables)) {
    return false;
  }
  out->dtype = dtype_of(first);
  out->batch = first.shape[0], out->tokens = tokens;
  out->dim = static_cast<int>(dim);
  out->half = half;
  return true;
}

// x [B, S, H * D], weight [D] or [H * D], y [B, H, S, D].
inline bool read_qk_tensor(const DLTensor& x, const DLTensor& weight, const DLTensor& y,
                           QkTensor* out) {
  if (x.ndim != 3 || y.ndim != 4 || weight.ndim != 1) return false;
  const int64_t heads = y.shape[1], dim = y.shape[3];
  if (y.shape[0] != x.shape[0] || y.shape[2] != x.shape[1] || x.shape[2] != heads * dim ||
      (weight.shape[0] != dim && weight.shape[0] != x.shape[2]) || !packed(x) || !packed(y) ||
      !packed(weight) || dtype_of(x) == kNoDType || dtype_of(weight) == kNoDType ||
      !same_dtype(x, y) || !same_device(x, y) || !same_device(x, weight)) {
    return false;
  }
  *out = {data_of(x), data_of(weight), data_of(y), step(x, 0), step(x, 1), step(y, 0),
          step(y, 1), step(y, 2), static_cast<int>(heads), dtype_of(weight),
          weight.shape[0] != dim || heads == 1};
  return true;
}

inline bool read_qk(const DLTensor* const (&x)[2], const DLTensor* const (&weight)[2],
                    const DLTensor* const (&y)[2], const DLTensor* cos, const DLTensor* sin,
                    double eps, bool half, int64_t start, QkArgs* out) {
  for (int i = 0; i < 2; ++i) {
    if (!read_qk_tensor(*x[i], *weight[i], *y[i], &out->tensor[i])) return false;
  }
  const int64_t dim = y[0]->shape[3];
  // A single head is normalised alike per head and across heads, so it fits either kind.
  const bool one = out->tensor[0].heads == 1 || out->tensor[1].heads == 1;
  if (dim % 2 != 0 || y[1]->shape[3] != dim || x[0]->shape[0] != x[1]->shape[0] ||
      x[0]->shape[1] != x[1]->shape[1] || !same_dtype(*x[0], *x[1]) || !same_device(*x[0], *x[1]) ||
      (out->tensor[0].across != out->tensor[1].across && !one)) {
    return false;
  }
  if (cos != nullptr) {
    if (!read_tables(*cos, sin, *x[0], x[0]->shape[1], dim, half, start, &out->tables)) {
      return false;
    }
  } else if (sin != nullptr) {
    return false;
  }
  out->dtype = dtype_of(*x[0]);
  out->batch = x[0]->shape[0], out->tokens = x[0]->shape[1];
  out->dim = static_cast<int>(dim);
  out->eps = static_cast<float>(eps);
  out->half = half;
  return true;
}

// Row `order[b, h, i]` of x [B, H, S, D] becomes row i of y [B, H, T, D]; or the other way round.
inline bool read_permuted(const DLTensor& x, const DLTensor& order, const DLTensor& y, bool inverse,
                          PermuteTensor* out) {
  if (x.ndim != 4 || y.ndim != 4 || order.ndim < 1 || order.ndim > 3) return false;
  const DLDataType kind = order.dtype;
  const int64_t count = order.shape[order.ndim - 1];
  int64_t step_of[2] = {0, 0};  // head, batch
  for (int i = 0; i < order.ndim - 1; ++i) {
    const int axis = order.ndim - 2 - i;
    if (order.shape[axis] != 1 && order.shape[axis] != x.shape[1 - i]) return false;
    step_of[i] = step(order, axis);
  }
  if (kind.code != kDLInt || kind.bits != 32 || kind.lanes != 1 || !packed(order) || !packed(x) ||
      !contiguous(y) || !same_dtype(x, y) || !same_device(x, y) || !same_device(x, order) ||
      y.shape[0] != x.shape[0] || y.shape[1] != x.shape[1] || y.shape[2] != count ||
      y.shape[3] != x.shape[3] || (inverse && count != x.shape[2])) {
    return false;
  }
  const int64_t size = x.dtype.bits * x.dtype.lanes / 8;
  *out = {data_of(x), data_of(y), static_cast<const int32_t*>(data_of(order)), step(x, 0) * size,
          step(x, 1) * size, step(x, 2) * size, step_of[1], step_of[0], x.shape[2], count,
          x.shape[3] * size};
  return true;
}

}  // namespace svg
