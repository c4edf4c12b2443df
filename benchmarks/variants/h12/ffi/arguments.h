// From DLPack tensors to what the launchers take.
//
// Each reader checks what it is given and returns false, with nothing launched, for whatever the
// caller has to convert first (dtypes, strides) or to refuse in words. Checking here costs a few
// nanoseconds an argument; reading the same properties from Python costs microseconds.
#pragma once
#include <cuda_runtime_api.h>
#include <dlpack/dlpack.h>

#include <cstdint>

namespace svg {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A matrix of rows seen as [outer, inner] rows; strides are in elements and may be 0.
struct Rows {
  const void* data;
  int64_t outer_stride;
  int64_t inner_stride;
  int dtype;
};

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

}  // namespace svg
