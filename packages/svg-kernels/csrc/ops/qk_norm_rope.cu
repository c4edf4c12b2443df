// RMSNorm of q and k (per head or across heads), RoPE and [B, S, H*D] -> [B, H, S, D] in one pass.
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "ops/rotate.cuh"

namespace svg {
namespace {

struct QkTensor {
  const void* x;
  const void* weight;
  void* y;
  int64_t xb, xs;
  int64_t yb, yh, ys;
  int heads, weight_dtype;
  bool across;  // the mean is over all heads
};

struct QkArgs {
  QkTensor tensor[2];
  int dtype;
  int64_t batch, tokens;
  int dim;
  float eps;
  bool half;
  Tables tables;
};

constexpr int kVecs = 4;
constexpr int kMaxThreads = 512;  // more would spill registers

// A block per token of one of the two tensors. Lanes of a head are a power of two that divides 32,
// so a thread sees the same channel of a head in all its vectors: one set of angles serves them.
template <int DTYPE, bool HALF, int LANES>
__global__ void __launch_bounds__(kMaxThreads, 1) qk_norm_rope_kernel(const QkArgs a) {
  __shared__ float shared[32];
  const int which = blockIdx.x & 1;
  const int64_t place = blockIdx.x >> 1;
  const int64_t batch = place / a.tokens;
  const int64_t token = place - batch * a.tokens;
  const QkTensor& t = a.tensor[which];
  const int width = t.heads * (LANES * kVec);
  const int channel = (threadIdx.x & (LANES - 1)) * kVec;

  Raw raw[kVecs];
  const int64_t base = batch * t.xb + token * t.xs;
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * kVec;
    if (column < width) raw[j] = load_raw(t.x, base + column, DTYPE);
  }
  const int64_t row = token - a.tables.start;
  const bool turn = a.tables.cos != nullptr && row >= 0 && row < a.tables.length;
  Angles<HALF> angles;
  if (turn) angles = load_angles<HALF>(a.tables, batch, row, channel, LANES * kVec);

  float x[kVecs][kVec], square[kVecs];
#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    square[j] = 0.f;
    if ((threadIdx.x + j * blockDim.x) * kVec < width) {
      unpack(raw[j], DTYPE, x[j]);
    } else {
#pragma unroll
      for (int k = 0; k < kVec; ++k) x[j][k] = 0.f;
    }
#pragma unroll
    for (int k = 0; k < kVec; ++k) square[j] += x[j][k] * x[j][k];
  }
  if (t.across) {
    float total = 0.f;
#pragma unroll
    for (int j = 0; j < kVecs; ++j) total += square[j];
    total = lane_sum(total, 32);
    if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = total;
    __syncthreads();
    total = 0.f;
    for (int w = 0; w < blockDim.x >> 5; ++w) total += shared[w];
#pragma unroll
    for (int j = 0; j < kVecs; ++j) square[j] = total / width;
  } else {
#pragma unroll
    for (int j = 0; j < kVecs; ++j) square[j] = lane_sum(square[j], LANES) * (1.f / (LANES * kVec));
  }

#pragma unroll
  for (int j = 0; j < kVecs; ++j) {
    const int column = (threadIdx.x + j * blockDim.x) * kVec;
    const float rstd = rsqrtf(square[j] + a.eps);
    if (column < width) {
      float w[kVec];
      load_cached(t.weight, t.across ? column : channel, t.weight_dtype, w);
#pragma unroll
      for (int k = 0; k < kVec; ++k) x[j][k] *= rstd * w[k];
    }
    rotate<HALF>(x[j], angles, turn, LANES, threadIdx.x & 31);
    if (column < width) {
      const int head = column / (LANES * kVec);
      store_vec(t.y, batch * t.yb + head * t.yh + token * t.ys + channel, DTYPE, x[j]);
    }
  }
}

// A warp per token and head (the mean is taken again for each head): any even head_dim, any
// alignment, any width.
__global__ void __launch_bounds__(256)
    qk_norm_rope_scalar_kernel(const QkArgs a, int which, int64_t total) {
  const QkTensor& t = a.tensor[which];
  const int lane = threadIdx.x & 31, pairs = a.dim / 2;
  const int width = t.heads * a.dim;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * 8;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5); i < total;
       i += stride) {
    const int head = static_cast<int>(i % t.heads);
    const int64_t token = i / t.heads % a.tokens;
    const int64_t batch = i / t.heads / a.tokens;
    const int64_t base = batch * t.xb + token * t.xs;
    const int skip = head * a.dim;
    const int from = t.across ? 0 : skip, count = t.across ? width : a.dim;
    float square = 0.f;
    for (int c = lane; c < count; c += 32) {
      const float v = load_one(t.x, base + from + c, a.dtype);
      square += v * v;
    }
    const float rstd = rsqrtf(lane_sum(square, 32) / count + a.eps);
    const int64_t row = token - a.tables.start;
    const bool turn = a.tables.cos != nullptr && row >= 0 && row < a.tables.length;
    const int64_t y = batch * t.yb + head * t.yh + token * t.ys;
    for (int pair = lane; pair < pairs; pair += 32) {
      const int first = a.half ? pair : 2 * pair;
      const int second = a.half ? pair + pairs : 2 * pair + 1;
      const int w = t.across ? skip : 0;
      const float u = load_one(t.x, base + skip + first, a.dtype) * rstd *
                      load_one(t.weight, w + first, t.weight_dtype);
      const float v = load_one(t.x, base + skip + second, a.dtype) * rstd *
                      load_one(t.weight, w + second, t.weight_dtype);
      float c = 1.f, s = 0.f;
      if (turn) {
        const int64_t at = batch * a.tables.batch_stride + row * a.tables.row_stride +
                           static_cast<int64_t>(pair) * a.tables.pair_stride;
        c = a.tables.cos[at];
        s = a.tables.sin[at];
      }
      store_one(t.y, y + first, a.dtype, turn ? u * c - v * s : u);
      store_one(t.y, y + second, a.dtype, turn ? v * c + u * s : v);
    }
  }
}

using Kernel = void (*)(QkArgs);

template <int DTYPE, bool HALF>
Kernel kernel_of(int lanes) {
  switch (lanes) {
    case 8:
      return qk_norm_rope_kernel<DTYPE, HALF, 8>;  // head_dim 64
    case 16:
      return qk_norm_rope_kernel<DTYPE, HALF, 16>;  // 128
    default:
      return qk_norm_rope_kernel<DTYPE, HALF, 32>;  // 256
  }
}

template <int DTYPE>
Kernel kernel_of(const QkArgs& a) {
  const int lanes = a.dim / kVec;
  return a.half ? kernel_of<DTYPE, true>(lanes) : kernel_of<DTYPE, false>(lanes);
}

bool vector_tensor(const QkTensor& t) {
  const int64_t strides[] = {t.xb, t.xs, t.yb, t.yh, t.ys};
  for (int64_t s : strides) {
    if (s % kVec != 0) return false;
  }
  return aligned(t.x) && aligned(t.y) && aligned(t.weight);
}

}  // namespace

cudaError_t launch_qk_norm_rope(const QkArgs& a, cudaStream_t stream) {
  const int64_t places = a.batch * a.tokens;
  if (places == 0 || a.dim == 0) return cudaSuccess;
  const int lanes = a.dim / kVec;
  const int heads = a.tensor[0].heads > a.tensor[1].heads ? a.tensor[0].heads : a.tensor[1].heads;
  const int vectors = heads * lanes;
  const bool vector = (a.dim == 64 || a.dim == 128 || a.dim == 256) &&
                      vectors <= kVecs * kMaxThreads && 2 * places <= kMaxGrid &&
                      vector_tensor(a.tensor[0]) && vector_tensor(a.tensor[1]);
  if (vector) {
    const int threads = static_cast<int>(ceil_div(vectors, kVecs * 32)) * 32;
    const Kernel kernel = a.dtype == kBFloat16  ? kernel_of<kBFloat16>(a)
                          : a.dtype == kFloat16 ? kernel_of<kFloat16>(a)
                                                : kernel_of<kFloat32>(a);
    kernel<<<static_cast<unsigned>(2 * places), threads, 0, stream>>>(a);
    return cudaGetLastError();
  }
  for (int which = 0; which < 2; ++which) {
    const int64_t total = places * a.tensor[which].heads;
    if (total == 0) continue;
    const int64_t wanted = ceil_div(total, 8);
    const unsigned grid = static_cast<unsigned>(wanted < (1 << 20) ? wanted : 1 << 20);
    qk_norm_rope_scalar_kernel<<<grid, 256, 0, stream>>>(a, which, total);
  }
  return cudaGetLastError();
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

// x [B, S, H * D], weight [D] or [H * D], y [B, H, S, D].
bool read_qk_tensor(const DLTensor& x, const DLTensor& weight, const DLTensor& y, QkTensor* out) {
  if (x.ndim != 3 || y.ndim != 4 || weight.ndim != 1) return false;
  const int64_t heads = y.shape[1], dim = y.shape[3];
  if (y.shape[0] != x.shape[0] || y.shape[2] != x.shape[1] || x.shape[2] != heads * dim ||
      (weight.shape[0] != dim && weight.shape[0] != x.shape[2]) || !packed(x) || !packed(y) ||
      !packed(weight) || dtype_of(x) == kNoDType || dtype_of(weight) == kNoDType ||
      !same_dtype(x, y) || !same_device(x, y) || !same_device(x, weight)) {
    return false;
  }
  *out = {data_of(x),
          data_of(weight),
          data_of(y),
          step(x, 0),
          step(x, 1),
          step(y, 0),
          step(y, 1),
          step(y, 2),
          static_cast<int>(heads),
          dtype_of(weight),
          weight.shape[0] != dim || heads == 1};
  return true;
}

bool read_qk(const DLTensor* const (&x)[2], const DLTensor* const (&weight)[2],
             const DLTensor* const (&y)[2], const DLTensor* cos, const DLTensor* sin, double eps,
             bool half, int64_t start, QkArgs* out) {
  for (int i = 0; i < 2; ++i) {
    if (!read_qk_tensor(*x[i], *weight[i], *y[i], &out->tensor[i])) return false;
  }
  const int64_t dim = y[0]->shape[3];
  // A single head is normalized alike per head and across heads, so it fits either kind.
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

bool qk_norm_rope(DLTensor* query, DLTensor* key, DLTensor* query_weight, DLTensor* key_weight,
                  DLTensor* query_out, DLTensor* key_out, Maybe cos, Maybe sin, double eps,
                  bool half, int64_t start) {
  QkArgs args{};
  return read_qk({query, key}, {query_weight, key_weight}, {query_out, key_out}, get(cos), get(sin),
                 eps, half, start, &args) &&
         launch_on(launch_qk_norm_rope, args, *query);
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope, svg::qk_norm_rope);
#endif
