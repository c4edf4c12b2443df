// RMSNorm, LayerNorm and LayerNorm with modulation: one read and one write of the tensor.
//
// A row stays in registers; the variance is a second pass over them. Narrow rows share a warp. Wide
// rows get a block, which walks over many rows: it keeps weight and modulation in registers while
// the next rows are on their way to shared memory. `RowOfScalars` takes what vectors cannot serve.
//
// These kernels would be bound by instructions, not by memory, if dtypes were run-time values, so
// DTYPE names the common ones (input and output alike) at compile time; kAnyDType reads them.
#include <algorithm>
#include <type_traits>

#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "ops/common.cuh"

namespace svg {
namespace {

struct NormArgs {
  Rows x;
  void* y;  // contiguous
  int y_dtype;
  Rows weight, bias, scale, shift;  // data may be null
  int64_t outer, inner;
  int width;
  float eps;
  bool center;  // LayerNorm, else RMSNorm
};

constexpr int kThreads = 256;  // of blocks whose warps hold several rows
constexpr int kRows = 4;       // narrow rows in flight per thread
constexpr int kAnyDType = -1;

// Blocks that hold wide rows, of up to VECS * THREADS vectors; a processor works on as many blocks
// as fill `kResident` threads. Measured on an H200 at 75,600 x 5120 and 118,806 x 3072, 2026-11-22:
// more blocks, or more rows on their way, are slower.
struct Common {  // one 16-bit dtype, rows of up to 5120
  static constexpr int kVecs = 4, kThreads = 160, kDepth = 2, kBlocks = 2, kResident = 384;
};
struct Mixed {  // any dtypes, up to 5120
  static constexpr int kVecs = 2, kThreads = 320, kDepth = 2, kBlocks = 1, kResident = 640;
};
struct Long {  // any dtypes, up to 8192
  static constexpr int kVecs = 2, kThreads = 512, kDepth = 1, kBlocks = 1, kResident = 512;
};
constexpr int kLongest = Long::kVecs * Long::kThreads;

struct Row {
  int64_t outer, inner;
};

__device__ __forceinline__ Row row_of(const NormArgs& a, int64_t row) {
  if (a.outer == 1) return {0, row};
  const bool small = (row | a.inner) >> 32 == 0;  // 64-bit division takes a hundred instructions
  const int64_t outer =
      small ? static_cast<uint32_t>(row) / static_cast<uint32_t>(a.inner) : row / a.inner;
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

// Rounding may leave a mean square just below 0. NaN stays NaN, which fmaxf would turn into 0 and a
// row with one NaN into large numbers.
__device__ __forceinline__ float reciprocal_std(float square, float eps) {
  return rsqrtf((square < 0.f ? 0.f : square) + eps);
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

// LANES lanes own ROWS rows, one vector of each per lane; no modulation.
template <int DTYPE, int LANES, int ROWS>
struct RowsOfWarp {
  static constexpr int kThreads = svg::kThreads, kBlocks = 0;
  template <bool CENTER>
  static __device__ __forceinline__ void normalize(const NormArgs& a) {
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
    for (int64_t base = warp * kGroups * ROWS; base < rows; base += warps * kGroups * ROWS) {
      const int64_t first = base + (threadIdx.x & 31) / LANES;
      Raw raw[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int64_t row = first + r * kGroups;
        if (inside && row < rows)
          raw[r] = load_raw(a.x.data, offset(a.x, row_of(a, row)) + column, in);
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
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
        const float rstd = reciprocal_std(square, a.eps);
        if (inside && row < rows) {
          finish<CENTER>(x, rstd, rest, gain, lift);
          store_vec(a.y, row * a.width + column, out, x);
        }
      }
    }
  }
};

// What a warp knows of its part of a row: mean, sum of squared deviations from it, elements.
struct alignas(16) Part {
  float mean, rest, square, count;  // the mean is `mean + rest`, rounded on its own
};

template <int THREADS>
struct Parts {
  // Used in turn: a thread may write one while others still read the one before, but not the one
  // before that, since all have passed a barrier since.
  Part part[2][THREADS / 32];
};

// Sums of `square` over the block, and for CENTER what to subtract from this warp's values so that
// the row's mean is 0. One barrier: partial means and deviations merge (Chan, Golub & LeVeque 1983)
// where a mean first and deviations later would take two.
template <bool CENTER, int THREADS>
__device__ __forceinline__ void merge(const Part& mine, Part (&parts)[THREADS / 32], float inverse,
                                      float& rest, float& square) {
  static_assert(THREADS <= 512, "half a warp reads the parts");
  if ((threadIdx.x & 31) == 0) parts[threadIdx.x >> 5] = mine;
  __syncthreads();
  const int warp = threadIdx.x & 15;
  Part other{};
  if (warp < blockDim.x >> 5) other = parts[warp];
  if (CENTER) {
    const float base = parts[0].mean;
    const float apart = (other.mean - base) + other.rest;
    const float sum = group_sum<16>(other.count * apart);
    const float shift = sum * inverse;
    square = group_sum<16>(fmaf(other.count * apart, apart, other.square)) - sum * shift;
    rest = shift - (mine.mean - base);
  } else {
    square = group_sum<16>(other.square);
  }
}

// A block owns a row at a time. SHAPE::kDepth further rows are on their way to shared memory
// meanwhile: a thread reads back what it asked for itself, so no barrier is needed.
template <int DTYPE, typename SHAPE>
struct RowOfBlock {
  static constexpr int kThreads = SHAPE::kThreads, kBlocks = SHAPE::kBlocks;
  template <bool CENTER>
  static __device__ __forceinline__ void normalize(const NormArgs& a) {
    constexpr int VECS = SHAPE::kVecs, THREADS = SHAPE::kThreads, DEPTH = SHAPE::kDepth;
    constexpr int kWords = DTYPE == kAnyDType ? 2 : 1;  // of 16 bytes, per vector
    __shared__ uint4 ring[DEPTH][VECS][kWords][THREADS];
    __shared__ Parts<THREADS> shared;
    const int in = DTYPE == kAnyDType ? a.x.dtype : DTYPE;
    const int out = DTYPE == kAnyDType ? a.y_dtype : DTYPE;
    const int64_t rows = a.outer * a.inner;
    const float inverse = 1.f / a.width;

    const auto request = [&](int64_t row, int slot) {
      if (row < rows) {
        const int64_t base = offset(a.x, row_of(a, row));
#pragma unroll
        for (int j = 0; j < VECS; ++j) {
          const int column = (threadIdx.x + j * blockDim.x) * kVec;
          if (column < a.width) {
            const char* from = at(a.x.data, base + column, in);
            copy_async(&ring[slot][j][0][threadIdx.x], from);
            if (kWords == 2 && in == kFloat32) {
              copy_async(&ring[slot][j][kWords - 1][threadIdx.x], from + 16);
            }
          }
        }
      }
      commit_copies();
    };

    // Elements of this warp, the same in every row.
    float count = 0.f;
#pragma unroll
    for (int j = 0; j < VECS; ++j) {
      if ((threadIdx.x + j * blockDim.x) * kVec < a.width) count += kVec;
    }
    count = group_sum<32>(count);
    const float inverse_count = count > 0.f ? 1.f / count : 0.f;

    float gain[VECS][kVec], lift[VECS][kVec];
    int64_t key = -1;
    int slot = 0, turn = 0;
#pragma unroll
    for (int ahead = 0; ahead < DEPTH; ++ahead) {
      request(blockIdx.x + static_cast<int64_t>(ahead) * gridDim.x, ahead);
    }
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
      const Row at_row = row_of(a, row);
      const int64_t wanted = affine_key(a, at_row, row);
      if (wanted != key) {
#pragma unroll
        for (int j = 0; j < VECS; ++j) {
          affine(a, at_row, (threadIdx.x + j * blockDim.x) * kVec, gain[j], lift[j]);
        }
        key = wanted;
      }
      float x[VECS][kVec];
      wait_copies<DEPTH - 1>();
#pragma unroll
      for (int j = 0; j < VECS; ++j) {
#pragma unroll
        for (int k = 0; k < kVec; ++k) x[j][k] = 0.f;
        if ((threadIdx.x + j * blockDim.x) * kVec < a.width) {
          Raw raw;
          raw.lo = ring[slot][j][0][threadIdx.x];
          if (kWords == 2 && in == kFloat32) raw.hi = ring[slot][j][kWords - 1][threadIdx.x];
          unpack(raw, in, x[j]);
        }
      }
      request(row + static_cast<int64_t>(DEPTH) * gridDim.x, slot);
      slot = slot == DEPTH - 1 ? 0 : slot + 1;
      Part mine{0.f, 0.f, 0.f, count};
      if (CENTER) {
#pragma unroll
        for (int j = 0; j < VECS; ++j) mine.mean += sum_of(x[j]);
        mine.mean = group_sum<32>(mine.mean) * inverse_count;
#pragma unroll
        for (int j = 0; j < VECS; ++j) {
          if ((threadIdx.x + j * blockDim.x) * kVec < a.width) subtract(x[j], mine.mean);
        }
        if (in == kFloat32) {  // 16-bit inputs cannot have a mean so large that this matters
#pragma unroll
          for (int j = 0; j < VECS; ++j) mine.rest += sum_of(x[j]);
          mine.rest = group_sum<32>(mine.rest) * inverse_count;
        }
      }
#pragma unroll
      for (int j = 0; j < VECS; ++j) mine.square += square_sum_of(x[j]);
      mine.square = group_sum<32>(mine.square) - count * mine.rest * mine.rest;
      float rest = 0.f, square;
      merge<CENTER, THREADS>(mine, shared.part[turn], inverse, rest, square);
      turn ^= 1;
      const float rstd = reciprocal_std(square * inverse, a.eps);
#pragma unroll
      for (int j = 0; j < VECS; ++j) {
        const int column = (threadIdx.x + j * blockDim.x) * kVec;
        if (column < a.width) {
          finish<CENTER>(x[j], rstd, rest, gain[j], lift[j]);
          store_vec(a.y, row * a.width + column, out, x[j]);
        }
      }
    }
  }
};

// A warp per row, element by element: any width, any alignment.
struct RowOfScalars {
  static constexpr int kThreads = svg::kThreads, kBlocks = 0;
  template <bool>
  static __device__ __forceinline__ void normalize(const NormArgs& a) {
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
      const float rstd = reciprocal_std(square - rest * rest, a.eps);
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
};

// The kernels under the names that a profiler shows.
template <typename Rows>
__global__ void __launch_bounds__(Rows::kThreads, Rows::kBlocks) rms_norm_kernel(const NormArgs a) {
  Rows::template normalize<false>(a);
}

template <typename Rows>
__global__ void __launch_bounds__(Rows::kThreads, Rows::kBlocks)
    layer_norm_kernel(const NormArgs a) {
  Rows::template normalize<true>(a);
}

using Kernel = void (*)(NormArgs);

template <bool CENTER, typename Rows>
Kernel kernel_of() {
  if constexpr (CENTER)
    return layer_norm_kernel<Rows>;
  else
    return rms_norm_kernel<Rows>;
}

// One vector of a row per lane; modulation is left to the wide kernels.
bool narrow(const NormArgs& a) { return a.width <= 32 * kVec && a.scale.data == nullptr; }

struct Plan {
  Kernel kernel;
  int threads;
  int64_t blocks;
};

template <int DTYPE, bool CENTER, int LANES>
Plan plan_narrow(int64_t rows, int processors) {
  const int64_t blocks = ceil_div(rows, kThreads / LANES * kRows);
  return {kernel_of<CENTER, RowsOfWarp<DTYPE, LANES, kRows>>(), kThreads,
          std::min(blocks, int64_t{32} * processors)};
}

template <int DTYPE, bool CENTER, typename SHAPE>
Plan plan_wide(int64_t rows, int vectors, int processors) {
  const int threads = static_cast<int>(ceil_div(vectors, SHAPE::kVecs * 32)) * 32;
  const int64_t most = SHAPE::kResident / threads * static_cast<int64_t>(processors);
  return {kernel_of<CENTER, RowOfBlock<DTYPE, SHAPE>>(), threads, std::min(rows, most)};
}

// Mixed dtypes get fewer kernels.
template <int DTYPE, bool CENTER>
Plan plan(const NormArgs& a, int processors) {
  constexpr bool mixed = DTYPE == kAnyDType;
  const int64_t rows = a.outer * a.inner;
  const int vectors = a.width / kVec;
  if (narrow(a)) {
    if (vectors > 16) return plan_narrow<DTYPE, CENTER, 32>(rows, processors);
    if (vectors > 8) return plan_narrow<DTYPE, CENTER, mixed ? 32 : 16>(rows, processors);
    if (vectors > 4) return plan_narrow<DTYPE, CENTER, 8>(rows, processors);
    return plan_narrow<DTYPE, CENTER, mixed ? 8 : 4>(rows, processors);
  }
  if (vectors > Common::kVecs * Common::kThreads) {
    return plan_wide<kAnyDType, CENTER, Long>(rows, vectors, processors);
  }
  return plan_wide<DTYPE, CENTER, std::conditional_t<mixed, Mixed, Common>>(rows, vectors,
                                                                            processors);
}

template <int DTYPE>
Plan plan(const NormArgs& a, int processors) {
  return a.center ? plan<DTYPE, true>(a, processors) : plan<DTYPE, false>(a, processors);
}

int common_dtype(const NormArgs& a) {
  return a.x.dtype == a.y_dtype && a.x.dtype != kFloat32 ? a.x.dtype : kAnyDType;
}

}  // namespace

cudaError_t launch_norm(const NormArgs& a, cudaStream_t stream) {
  const int64_t rows = a.outer * a.inner;
  if (rows == 0 || a.width == 0) return cudaSuccess;
  const int vectors = a.width / kVec;
  const bool vector = a.width % kVec == 0 && vectors <= kLongest && aligned(a.y) &&
                      vector_rows(a.x) && vector_rows(a.weight) && vector_rows(a.bias) &&
                      vector_rows(a.scale) && vector_rows(a.shift);
  if (!vector) {
    const int64_t blocks = ceil_div(rows, kThreads / 32);
    const Kernel kernel =
        a.center ? layer_norm_kernel<RowOfScalars> : rms_norm_kernel<RowOfScalars>;
    kernel<<<static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), kThreads, 0, stream>>>(
        a);
    return cudaGetLastError();
  }
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int dtype = common_dtype(a);
  const Plan p = dtype == kBFloat16  ? plan<kBFloat16>(a, processors)
                 : dtype == kFloat16 ? plan<kFloat16>(a, processors)
                                     : plan<kAnyDType>(a, processors);
  p.kernel<<<static_cast<unsigned>(p.blocks), p.threads, 0, stream>>>(a);
  return cudaGetLastError();
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

bool read_norm(const DLTensor& x, const DLTensor* weight, const DLTensor* bias,
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

bool norm(DLTensor* x, Maybe weight, Maybe bias, Maybe scale, Maybe shift, DLTensor* y, double eps,
          bool center) {
  NormArgs args{};
  return read_norm(*x, get(weight), get(bias), get(scale), get(shift), *y, eps, center, &args) &&
         launch_on(launch_norm, args, *x);
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm, svg::norm);
#endif
