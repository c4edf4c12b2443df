// RMSNorm, LayerNorm and LayerNorm with modulation: one read and one write of the tensor.
//
// A row stays in registers; the variance is a second pass over them. Narrow rows share a warp. Wide
// rows get a block, which walks over many rows: it keeps weight and modulation in registers and
// loads the next row while it works on this one. `norm_any` takes what vectors cannot serve.
//
// These kernels would be bound by instructions, not by memory, if dtypes were run-time values, so
// DTYPE names the common ones (input and output alike) at compile time; kAnyDType reads them.
#include "common.cuh"

namespace svg {
namespace {

constexpr int kThreads = 256;      // of blocks whose warps hold several rows
constexpr int kWideThreads = 320;  // of a block that holds a row of up to 5120
constexpr int kMaxThreads = 512;   // of a block that holds a longer row
constexpr int kVecs = 2;           // vectors of a wide row per thread
constexpr int kRows = 4;           // narrow rows in flight per thread
constexpr int kAnyDType = -1;

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
  if (column >= a.width) return;
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

// Which rows share gain and lift: all, those of a batch element, or none.
__device__ __forceinline__ int64_t affine_key(const NormArgs& a, const Row& row, int64_t index) {
  if (a.scale.data == nullptr) return 0;
  return a.scale.inner_stride || a.shift.inner_stride ? index : row.outer;
}

// y = gain * (x - mean) * rstd + lift for one vector; `rest` is what rounding left of the mean.
template <bool CENTER>
__device__ __forceinline__ void finish(float (&x)[kVec], float rstd, float rest,
                                       const float (&gain)[kVec], const float (&lift)[kVec]) {
  const float bias = -rest * rstd;
#pragma unroll
  for (int k = 0; k < kVec; ++k) {
    x[k] = CENTER ? fmaf(fmaf(x[k], rstd, bias), gain[k], lift[k]) : x[k] * rstd * gain[k];
  }
}

__device__ __forceinline__ float sum_of(const float (&x)[kVec]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

__device__ __forceinline__ float square_sum_of(const float (&x)[kVec]) {
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < kVec; ++k) sum = fmaf(x[k], x[k], sum);
  return sum;
}

__device__ __forceinline__ void subtract(float (&x)[kVec], float mean) {
#pragma unroll
  for (int k = 0; k < kVec; ++k) x[k] -= mean;
}

template <int LANES>
__device__ __forceinline__ float group_sum(float v) {
#pragma unroll
  for (int o = LANES / 2; o > 0; o /= 2) v += __shfl_xor_sync(kAll, v, o);
  return v;
}

// LANES lanes own kRows rows, one vector of each per lane; no modulation.
template <int DTYPE, bool CENTER, int LANES>
__global__ void __launch_bounds__(kThreads) norm_narrow(const NormArgs a) {
  constexpr int kGroups = 32 / LANES;
  const int in = DTYPE == kAnyDType ? a.x.dtype : DTYPE;
  const int out = DTYPE == kAnyDType ? a.y_dtype : DTYPE;
  const int column = (threadIdx.x & (LANES - 1)) * kVec;
  const bool inside = column < a.width;
  const int64_t rows = a.outer * a.inner;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + (threadIdx.x >> 5);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const float inverse = 1.f / a.width;
  float gain[kVec], lift[kVec];
  affine(a, {0, 0}, column, gain, lift);
  // All lanes of a warp take the same trips: they meet in shuffles.
  for (int64_t base = warp * kGroups * kRows; base < rows; base += warps * kGroups * kRows) {
    const int64_t first = base + (threadIdx.x & 31) / LANES;
    Raw raw[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * kGroups;
      if (inside && row < rows) raw[r] = load_raw(a.x.data, offset(a.x, row_of(a, row)) + column, in);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = first + r * kGroups;
      float x[kVec] = {};
      if (inside && row < rows) unpack(raw[r], in, x);
      float rest = 0.f;  // 16-bit inputs cannot have a mean so large that this matters
      if (CENTER) {
        const float mean = group_sum<LANES>(sum_of(x)) * inverse;
        if (inside) subtract(x, mean);
        if (in == kFloat32) rest = group_sum<LANES>(sum_of(x)) * inverse;
      }
      const float square = group_sum<LANES>(square_sum_of(x)) * inverse - rest * rest;
      const float rstd = rsqrtf(fmaxf(square, 0.f) + a.eps);
      if (inside && row < rows) {
        finish<CENTER>(x, rstd, rest, gain, lift);
        store_vec(a.y, row * a.width + column, out, x);
      }
    }
  }
}

// Sums over the block. Three buffers in turn: a thread may write one while others still read the one
// before, but not the one before that, since all have passed a barrier since.
template <int THREADS>
struct BlockSum {
  static constexpr int kWarps = (THREADS / 32 + 3) / 4 * 4;
  float buffer[3][kWarps];
};

template <int THREADS>
__device__ __forceinline__ float block_sum(float v, BlockSum<THREADS>& shared, int& turn) {
  v = group_sum<32>(v);
  float* mine = shared.buffer[turn];
  turn = turn == 2 ? 0 : turn + 1;
  if ((threadIdx.x & 31) == 0) mine[threadIdx.x >> 5] = v;
  __syncthreads();
  float total = 0.f;
  const int warps = blockDim.x >> 5;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) total += w < warps ? mine[w] : 0.f;
  return total;
}

template <int DTYPE>
__device__ __forceinline__ void load_row(const NormArgs& a, int64_t row, Raw (&raw)[kVecs]) {
  const int in = DTYPE == kAnyDType ? a.x.dtype : DTYPE;
  const int64_t base = offset(a.x, row_of(a, row));
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * kVec;
    if (column < a.width) raw[j] = load_raw(a.x.data, base + column, in);
  }
}

// A block owns a row at a time, kVecs vectors of it per thread.
template <int DTYPE, bool CENTER, int THREADS>
__global__ void __launch_bounds__(THREADS, THREADS == kWideThreads && DTYPE != kAnyDType ? 2 : 1)
    norm_wide(const NormArgs a) {
  __shared__ BlockSum<THREADS> shared;
  const int in = DTYPE == kAnyDType ? a.x.dtype : DTYPE;
  const int out = DTYPE == kAnyDType ? a.y_dtype : DTYPE;
  const int64_t rows = a.outer * a.inner;
  const float inverse = 1.f / a.width;
  float gain[kVecs][kVec], lift[kVecs][kVec];
  int64_t key = -1;
  int turn = 0;
  Raw next[kVecs];
  load_row<DTYPE>(a, blockIdx.x, next);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Row at_row = row_of(a, row);
    const int64_t wanted = affine_key(a, at_row, row);
    if (wanted != key) {
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        affine(a, at_row, (threadIdx.x + j * blockDim.x) * kVec, gain[j], lift[j]);
      }
      key = wanted;
    }
    float x[kVecs][kVec];
    float mean = 0.f, rest = 0.f, square = 0.f;
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
#pragma unroll
      for (int k = 0; k < kVec; ++k) x[j][k] = 0.f;
      if ((threadIdx.x + j * blockDim.x) * kVec < a.width) unpack(next[j], in, x[j]);
    }
    if (row + gridDim.x < rows) load_row<DTYPE>(a, row + gridDim.x, next);
    if (CENTER) {
#pragma unroll
      for (int j = 0; j < kVecs; ++j) mean += sum_of(x[j]);
      mean = block_sum(mean, shared, turn) * inverse;
#pragma unroll
      for (int j = 0; j < kVecs; ++j) {
        if ((threadIdx.x + j * blockDim.x) * kVec < a.width) subtract(x[j], mean);
      }
      if (in == kFloat32) {
#pragma unroll
        for (int j = 0; j < kVecs; ++j) rest += sum_of(x[j]);
        rest = block_sum(rest, shared, turn) * inverse;
      }
    }
#pragma unroll
    for (int j = 0; j < kVecs; ++j) square += square_sum_of(x[j]);
    square = block_sum(square, shared, turn) * inverse - rest * rest;
    const float rstd = rsqrtf(fmaxf(square, 0.f) + a.eps);
#pragma unroll
    for (int j = 0; j < kVecs; ++j) {
      const int column = (threadIdx.x + j * blockDim.x) * kVec;
      if (column < a.width) {
        finish<CENTER>(x[j], rstd, rest, gain[j], lift[j]);
        store_vec(a.y, row * a.width + column, out, x[j]);
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

using Kernel = void (*)(NormArgs);

// One vector of a row per lane; modulation is left to the wide kernels.
bool narrow(const NormArgs& a) { return a.width <= 32 * kVec && a.scale.data == nullptr; }

// Lanes per narrow row. Dtypes without kernels of their own get fewer choices.
int lanes_for(int vectors, bool any_dtype) {
  int lanes = any_dtype ? 8 : 4;
  while (lanes < vectors) lanes *= any_dtype ? 4 : 2;
  return lanes;
}

template <int DTYPE, bool CENTER>
Kernel kernel_of(const NormArgs& a) {
  constexpr bool any = DTYPE == kAnyDType;
  const int vectors = a.width / kVec;
  if (narrow(a)) {
    switch (lanes_for(vectors, any)) {
      case 4: return norm_narrow<DTYPE, CENTER, any ? 8 : 4>;
      case 8: return norm_narrow<DTYPE, CENTER, 8>;
      case 16: return norm_narrow<DTYPE, CENTER, any ? 32 : 16>;
      default: return norm_narrow<DTYPE, CENTER, 32>;
    }
  }
  if (vectors <= kVecs * kWideThreads) return norm_wide<DTYPE, CENTER, kWideThreads>;
  return norm_wide<kAnyDType, CENTER, kMaxThreads>;
}

template <int DTYPE>
Kernel kernel_of(const NormArgs& a) {
  return a.center ? kernel_of<DTYPE, true>(a) : kernel_of<DTYPE, false>(a);
}

int common_dtype(const NormArgs& a) {
  return a.x.dtype == a.y_dtype && a.x.dtype != kFloat32 ? a.x.dtype : kAnyDType;
}

}  // namespace

cudaError_t norm(const NormArgs& a, cudaStream_t stream) {
  const int64_t rows = a.outer * a.inner;
  if (rows == 0 || a.width == 0) return cudaSuccess;
  const int vectors = a.width / kVec;
  const bool vector = a.width % kVec == 0 && vectors <= kVecs * kMaxThreads && aligned(a.y) &&
                      vector_rows(a.x) && vector_rows(a.weight) && vector_rows(a.bias) &&
                      vector_rows(a.scale) && vector_rows(a.shift);
  if (!vector) {
    const int64_t blocks = ceil_div(rows, kThreads / 32);
    norm_any<<<static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, 0, stream>>>(
        a);
    return cudaGetLastError();
  }
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int dtype = common_dtype(a);
  const Kernel kernel = dtype == kBFloat16  ? kernel_of<kBFloat16>(a)
                        : dtype == kFloat16 ? kernel_of<kFloat16>(a)
                                            : kernel_of<kAnyDType>(a);
  int64_t blocks, most;
  int threads = kThreads;
  if (narrow(a)) {
    const int lanes = lanes_for(vectors, dtype == kAnyDType);
    blocks = ceil_div(rows, kThreads / lanes * kRows);
    most = static_cast<int64_t>(processors) * 32;
  } else {
    threads = static_cast<int>(ceil_div(vectors, kVecs * 32)) * 32;
    blocks = rows;
    most = static_cast<int64_t>(processors) * (2048 / threads);
  }
  kernel<<<static_cast<unsigned>(blocks < most ? blocks : most), threads, 0, stream>>>(a);
  return cudaGetLastError();
}

cudaError_t probe() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, probe_kernel);
}

}  // namespace svg
