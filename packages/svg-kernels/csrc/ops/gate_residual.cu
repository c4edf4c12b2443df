// residual + x * gate: three vectors in, one out, no reduction.
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "ops/common.cuh"

namespace svg {
namespace {

struct GateArgs {
  Rows residual, x, gate;
  void* y;  // contiguous
  int y_dtype;
  int64_t outer, inner;
  int width;
};

constexpr int kUnroll = 2;
constexpr int kThreads = 256;

__device__ __forceinline__ int64_t offset(const Rows& r, int64_t outer, int64_t inner) {
  return outer * r.outer_stride + inner * r.inner_stride;
}

struct Place {
  int64_t outer, inner;
  int column;
};

// Splits a flat index over [outer, inner, per_row]; 32-bit division where it suffices.
__device__ __forceinline__ Place place_of(const GateArgs& a, int64_t index, int per_row,
                                          bool narrow) {
  int64_t row;
  if (narrow) {
    row = static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row);
  } else {
    row = index / per_row;
  }
  const int column = static_cast<int>(index - row * per_row);
  int64_t outer = 0;
  if (a.outer > 1) {
    outer = narrow ? static_cast<uint32_t>(row) / static_cast<uint32_t>(a.inner) : row / a.inner;
  }
  return {outer, row - outer * a.inner, column};
}

__global__ void __launch_bounds__(kThreads)
    gate_residual_kernel(const GateArgs a, int64_t total, bool narrow) {
  const int per_row = a.width / kVec;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  Raw residual[kUnroll], x[kUnroll];
  int64_t gate_at[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int64_t index = first + j * kThreads;
    if (index < total) {
      const Place p = place_of(a, index, per_row, narrow);
      const int column = p.column * kVec;
      residual[j] = load_raw(a.residual.data, offset(a.residual, p.outer, p.inner) + column,
                             a.residual.dtype);
      x[j] = load_raw(a.x.data, offset(a.x, p.outer, p.inner) + column, a.x.dtype);
      gate_at[j] = offset(a.gate, p.outer, p.inner) + column;
    }
  }
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int64_t index = first + j * kThreads;
    if (index < total) {
      float y[kVec], v[kVec], g[kVec];
      unpack(residual[j], a.residual.dtype, y);
      unpack(x[j], a.x.dtype, v);
      load_cached(a.gate.data, gate_at[j], a.gate.dtype, g);
#pragma unroll
      for (int k = 0; k < kVec; ++k) y[k] += v[k] * g[k];
      store_vec(a.y, index * kVec, a.y_dtype, y);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    gate_residual_scalar_kernel(const GateArgs a, int64_t total) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const Place p = place_of(a, i, a.width, false);
    const float v = load_one(a.x.data, offset(a.x, p.outer, p.inner) + p.column, a.x.dtype);
    const float g =
        load_one(a.gate.data, offset(a.gate, p.outer, p.inner) + p.column, a.gate.dtype);
    const float r = load_one(a.residual.data, offset(a.residual, p.outer, p.inner) + p.column,
                             a.residual.dtype);
    store_one(a.y, i, a.y_dtype, r + v * g);
  }
}

}  // namespace

cudaError_t launch_gate_residual(const GateArgs& a, cudaStream_t stream) {
  const int64_t elements = a.outer * a.inner * a.width;
  if (elements == 0) return cudaSuccess;
  const bool vector = a.width % kVec == 0 && aligned(a.y) && vector_rows(a.residual) &&
                      vector_rows(a.x) && vector_rows(a.gate);
  const int64_t vectors = elements / kVec;
  const int64_t blocks = ceil_div(vectors, kThreads * kUnroll);
  if (vector && blocks <= kMaxGrid) {
    const bool narrow = vectors < (int64_t{1} << 31);
    gate_residual_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, vectors,
                                                                                 narrow);
  } else {
    const int64_t wanted = ceil_div(elements, kThreads);
    const unsigned grid = static_cast<unsigned>(wanted < (1 << 20) ? wanted : 1 << 20);
    gate_residual_scalar_kernel<<<grid, kThreads, 0, stream>>>(a, elements);
  }
  return cudaGetLastError();
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

bool read_gate(const DLTensor& residual, const DLTensor& x, const DLTensor& gate, const DLTensor& y,
               GateArgs* out) {
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

bool gate_residual(DLTensor* residual, DLTensor* x, DLTensor* gate, DLTensor* y) {
  GateArgs args{};
  return read_gate(*residual, *x, *gate, *y, &args) &&
         launch_on(launch_gate_residual, args, *residual);
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual, svg::gate_residual);
#endif
