// RMSNorm, LayerNorm and LayerNorm with modulation: one read and one write of the tensor.
//
// A row stays in registers; the variance is a second pass over them, and the rounding error of the
// mean that this pass sees is taken out again. Narrow rows share a warp, several per thread in
// flight; wide rows get a block. Any width or alignment that vectors cannot serve: `norm_any`.
#include "common.cuh"

namespace svg {
namespace {

constexpr int kThreads = 256;     // of blocks whose warps hold several rows
constexpr int kMaxThreads = 512;  // of a block that holds one row; more would spill registers
constexpr int kVecs = 4;

struct Row {
  int64_t outer, inner;
};

__device__ __forceinline__ Row row_of(const NormArgs& a, int64_t row) {
  if (a.outer == 1) return {0, row};
  const int64_t outer = row / a.inner;
  return {outer, row - outer * a.inner};
}

__device__ __forceinline__ int64_t offset(const Rows& r, const Row& row) {
  return row.outer * r.outer_stride + row.inner * r.inner_stride;
}

// gain and lift such that y = gain * xhat + lift, for kVec columns from `column` on.
__device__ __forceinline__ void affine(const NormArgs& a, const Row& row, int column,
                                       float (&gain)[kVec], float (&lift)[kVec]) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) gain[k] = 1.f, lift[k] = 0.f;
  if (a.weight.data) load_cached(a.weight.data, column, a.weight.dtype, gain);
  if (a.bias.data) load_cached(a.bias.data, column, a.bias.dtype, lift);
  if (a.scale.data) {
    float s[kVec], t[kVec];
    load_cached(a.scale.data, offset(a.scale, row) + column, a.scale.dtype, s);
    load_cached(a.shift.data, offset(a.shift, row) + column, a.shift.dtype, t);
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      gain[k] *= 1.f + s[k];
      lift[k] = lift[k] * (1.f + s[k]) + t[k];
    }
  }
}

template <bool BLOCK, int N>
__device__ __forceinline__ void sum(float (&v)[N], int lanes, float* shared) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = lane_sum(v[i], lanes);
  if (!BLOCK) return;
  const int warps = blockDim.x >> 5;
  if (warps == 1) return;
  const int warp = threadIdx.x >> 5;
  if ((threadIdx.x & 31) == 0) {
#pragma unroll
    for (int i = 0; i < N; ++i) shared[warp * N + i] = v[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float total = 0.f;
    for (int w = 0; w < warps; ++w) total += shared[w * N + i];
    v[i] = total;
  }
}

// BLOCK: a block owns ROWS rows, VECS vectors of each per thread. Otherwise `lanes` lanes own ROWS
// rows, one vector of each per thread (VECS = 1).
template <bool BLOCK, int VECS, int ROWS>
__global__ void __launch_bounds__(BLOCK ? kMaxThreads : kThreads)
    norm_vec(const NormArgs a, int lanes) {
  __shared__ float shared[BLOCK ? 3 * 32 * ROWS : 1];
  const int64_t rows = a.outer * a.inner;
  int64_t first;
  int step, column0, column_step;
  if (BLOCK) {
    first = static_cast<int64_t>(blockIdx.x) * ROWS;
    step = 1;
    column0 = threadIdx.x * kVec;
    column_step = blockDim.x * kVec;
  } else {
    const int per_warp = 32 / lanes;
    const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
    first = warp * per_warp * ROWS + (threadIdx.x & 31) / lanes;
    step = per_warp;
    column0 = (threadIdx.x & (lanes - 1)) * kVec;
    column_step = 0;
  }

  Raw raw[ROWS][VECS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const int64_t row = first + static_cast<int64_t>(r) * step;
    if (row < rows) {
      const int64_t base = offset(a.x, row_of(a, row));
#pragma unroll
      for (int j = 0; j < VECS; ++j) {
        const int column = column0 + j * column_step;
        if (column < a.width) raw[r][j] = load_raw(a.x.data, base + column, a.x.dtype);
      }
    }
  }

  float x[ROWS][VECS][kVec], mean[ROWS], rstd[ROWS];
  const float inverse = 1.f / a.width;
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const bool live = first + static_cast<int64_t>(r) * step < rows;
    mean[r] = 0.f;
#pragma unroll
    for (int j = 0; j < VECS; ++j) {
      if (live && column0 + j * column_step < a.width) {
        unpack(raw[r][j], a.x.dtype, x[r][j]);
      } else {
#pragma unroll
        for (int k = 0; k < kVec; ++k) x[r][j][k] = 0.f;
      }
#pragma unroll
      for (int k = 0; k < kVec; ++k) mean[r] += x[r][j][k];
    }
  }
  if (a.center) {
    sum<BLOCK>(mean, lanes, shared);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] *= inverse;
  } else {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) mean[r] = 0.f;
  }

  float moment[2 * ROWS];  // of the deviations: their sum (0 but for rounding) and square sum
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    moment[2 * r] = moment[2 * r + 1] = 0.f;
#pragma unroll
    for (int j = 0; j < VECS; ++j) {
      if (column0 + j * column_step < a.width) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          const float d = x[r][j][k] - mean[r];
          x[r][j][k] = d;
          moment[2 * r] += d;
          moment[2 * r + 1] += d * d;
        }
      }
    }
  }
  sum<BLOCK>(moment, lanes, shared + 32 * ROWS);
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
    const float rest = a.center ? moment[2 * r] * inverse : 0.f;
    const float variance = fmaxf(moment[2 * r + 1] * inverse - rest * rest, 0.f);
    rstd[r] = rsqrtf(variance + a.eps);
    mean[r] = -rest * rstd[r];
  }

  const bool fixed = a.scale.data == nullptr;
#pragma unroll
  for (int j = 0; j < VECS; ++j) {
    const int column = column0 + j * column_step;
    float gain[kVec], lift[kVec];
    if (fixed && column < a.width) affine(a, {0, 0}, column, gain, lift);
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t row = first + static_cast<int64_t>(r) * step;
      if (row < rows && column < a.width) {
        if (!fixed) affine(a, row_of(a, row), column, gain, lift);
        float y[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
          y[k] = (x[r][j][k] * rstd[r] + mean[r]) * gain[k] + lift[k];
        }
        store_vec(a.y, row * a.width + column, a.y_dtype, y);
      }
    }
  }
}

// A warp per row, element by element: any width, any alignment.
__global__ void __launch_bounds__(kThreads) norm_any(const NormArgs a) {
  const int lane = threadIdx.x & 31;
  const int64_t rows = a.outer * a.inner;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * (blockDim.x >> 5);
  const float inverse = 1.f / a.width;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
       row < rows; row += stride) {
    const Row at_row = row_of(a, row);
    const int64_t base = offset(a.x, at_row);
    float mean = 0.f;
    if (a.center) {
      for (int c = lane; c < a.width; c += 32) mean += load_one(a.x.data, base + c, a.x.dtype);
      mean = lane_sum(mean, 32) * inverse;
    }
    float rest = 0.f, square = 0.f;
    for (int c = lane; c < a.width; c += 32) {
      const float d = load_one(a.x.data, base + c, a.x.dtype) - mean;
      rest += d;
      square += d * d;
    }
    rest = a.center ? lane_sum(rest, 32) * inverse : 0.f;
    square = lane_sum(square, 32) * inverse;
    const float rstd = rsqrtf(fmaxf(square - rest * rest, 0.f) + a.eps);
    for (int c = lane; c < a.width; c += 32) {
      float y = ((load_one(a.x.data, base + c, a.x.dtype) - mean) - rest) * rstd;
      if (a.weight.data) y *= load_one(a.weight.data, c, a.weight.dtype);
      if (a.bias.data) y += load_one(a.bias.data, c, a.bias.dtype);
      if (a.scale.data) {
        y *= 1.f + load_one(a.scale.data, offset(a.scale, at_row) + c, a.scale.dtype);
        y += load_one(a.shift.data, offset(a.shift, at_row) + c, a.shift.dtype);
      }
      store_one(a.y, row * a.width + c, a.y_dtype, y);
    }
  }
}

__global__ void probe_kernel() {}

}  // namespace

cudaError_t norm(const NormArgs& a, cudaStream_t stream) {
  const int64_t rows = a.outer * a.inner;
  if (rows == 0 || a.width == 0) return cudaSuccess;
  const int vectors = a.width / kVec;
  const bool vector = a.width % kVec == 0 && vectors <= kVecs * kMaxThreads && aligned(a.y) &&
                      vector_rows(a.x) && vector_rows(a.weight) && vector_rows(a.bias) &&
                      vector_rows(a.scale) && vector_rows(a.shift);
  if (vector && vectors <= 32) {
    constexpr int kRows = 4;
    int lanes = 1;
    while (lanes < vectors) lanes *= 2;
    const int64_t blocks = ceil_div(rows, static_cast<int64_t>(kThreads) / lanes * kRows);
    if (blocks <= kMaxGrid) {
      norm_vec<false, 1, kRows><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, lanes);
      return cudaGetLastError();
    }
  } else if (vector && rows <= kMaxGrid) {
    const int threads = static_cast<int>(ceil_div(vectors, kVecs * 32)) * 32;
    norm_vec<true, kVecs, 1><<<static_cast<unsigned>(rows), threads, 0, stream>>>(a, 32);
    return cudaGetLastError();
  }
  const int64_t blocks = ceil_div(rows, kThreads / 32);
  norm_any<<<static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

}  // namespace svg
