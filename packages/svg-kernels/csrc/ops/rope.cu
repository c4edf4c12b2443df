// Rotary embedding of [B, H, S, D], of one tensor or of query and key: a thread keeps the angles of
// its token and walks the heads.
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "ops/rotate.cuh"

namespace svg {
namespace {

struct RopeTensor {
  const void* x;
  void* y;  // equal to x: in place
  int64_t xb, xh, xs;
  int64_t yb, yh, ys;
  int heads;
};

struct RopeArgs {
  RopeTensor tensor[2];
  int count;
  int dtype;
  int64_t batch, tokens;
  int dim;
  bool half;
  Tables tables;
};

constexpr int kThreads = 128;
constexpr int kHeads = 2;  // heads in flight per thread

// Block b works on `kThreads / lanes` tokens and one share of the heads of all tensors together.
template <int DTYPE, bool HALF, int COUNT>
__global__ void __launch_bounds__(kThreads)
    rope_kernel(const RopeArgs a, int lanes, int shares, int64_t tiles) {
  const int per_block = kThreads / lanes;
  const int64_t tile = blockIdx.x % tiles;
  const int64_t rest = blockIdx.x / tiles;
  const int share = static_cast<int>(rest % shares);
  const int64_t batch = rest / shares;
  const int64_t token = tile * per_block + threadIdx.x / lanes;
  const int channel = (threadIdx.x % lanes) * kVec;
  const int64_t row = token - a.tables.start;
  const bool live = token < a.tokens && threadIdx.x / lanes < per_block;
  const bool turn = live && row >= 0 && row < a.tables.length;
  Angles<HALF> angles;
  if (turn) angles = load_angles<HALF>(a.tables, batch, row, channel, a.dim);

  const int heads = a.tensor[0].heads + (COUNT == 2 ? a.tensor[1].heads : 0);
  const int each = (heads + shares - 1) / shares;
  int first = share * each;  // of this share's heads, counted from the first of the tensor
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    const RopeTensor& t = a.tensor[i];
    const bool write = turn || (live && t.x != t.y);
    const int stop = min(t.heads, first + each);
    const int64_t x0 = batch * t.xb + token * t.xs + channel;
    const int64_t y0 = batch * t.yb + token * t.ys + channel;
    for (int head = max(first, 0); head < stop; head += kHeads) {
      Raw raw[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        if (write && head + h < stop) raw[h] = load_raw(t.x, x0 + (head + h) * t.xh, DTYPE);
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float v[kVec];
        unpack(raw[h], DTYPE, v);
        rotate<HALF>(v, angles, turn, lanes, threadIdx.x & 31);
        if (write && head + h < stop) store_vec(t.y, y0 + (head + h) * t.yh, DTYPE, v);
      }
    }
    first -= t.heads;
  }
}

// A thread per pair: any even head_dim, any alignment.
__global__ void __launch_bounds__(kThreads)
    rope_scalar_kernel(const RopeArgs a, int which, int64_t total) {
  const RopeTensor& t = a.tensor[which];
  const int pairs = a.dim / 2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int pair = static_cast<int>(i % pairs);
    int64_t rest = i / pairs;
    const int64_t token = rest % a.tokens;
    rest /= a.tokens;
    const int head = static_cast<int>(rest % t.heads);
    const int64_t batch = rest / t.heads;
    const int first = a.half ? pair : 2 * pair;
    const int second = a.half ? pair + pairs : 2 * pair + 1;
    const int64_t x = batch * t.xb + head * t.xh + token * t.xs;
    const int64_t y = batch * t.yb + head * t.yh + token * t.ys;
    const float u = load_one(t.x, x + first, a.dtype), v = load_one(t.x, x + second, a.dtype);
    const int64_t row = token - a.tables.start;
    float c = 1.f, s = 0.f;
    const bool turn = row >= 0 && row < a.tables.length;
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

using Kernel = void (*)(RopeArgs, int, int, int64_t);

template <bool HALF, int COUNT>
Kernel kernel_for(int dtype) {
  if (dtype == kFloat32) return rope_kernel<kFloat32, HALF, COUNT>;
  return dtype == kBFloat16 ? rope_kernel<kBFloat16, HALF, COUNT>
                            : rope_kernel<kFloat16, HALF, COUNT>;
}

template <bool HALF>
cudaError_t launch(const RopeArgs& a, cudaStream_t stream, int heads, int lanes) {
  const Kernel kernel = a.count == 1 ? kernel_for<HALF, 1>(a.dtype) : kernel_for<HALF, 2>(a.dtype);
  const int64_t tiles = ceil_div(a.tokens, kThreads / lanes);
  int shares = 1;  // split the heads until the grid fills a large GPU; each reads the tables again
  while (tiles * a.batch * shares < 1024 && shares * 2 * kHeads <= heads) shares *= 2;
  const int64_t blocks = tiles * a.batch * shares;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, lanes, shares, tiles);
  return cudaGetLastError();
}

bool vector_tensor(const RopeTensor& t) {
  const int64_t strides[] = {t.xb, t.xh, t.xs, t.yb, t.yh, t.ys};
  for (int64_t s : strides) {
    if (s % kVec != 0) return false;
  }
  return aligned(t.x) && aligned(t.y);
}

}  // namespace

cudaError_t launch_rope(const RopeArgs& a, cudaStream_t stream) {
  // An absent tensor is all zeros: it has no heads, and vectors can serve it.
  const int heads = a.tensor[0].heads + a.tensor[1].heads;
  if (a.batch * a.tokens * heads * a.dim == 0) return cudaSuccess;
  const int lanes = a.dim / kVec;
  const bool vector = a.dim % kVec == 0 && vector_tensor(a.tensor[0]) && vector_tensor(a.tensor[1]);
  if (vector && !a.half && lanes <= kThreads) return launch<false>(a, stream, heads, lanes);
  if (vector && a.half && lanes >= 2 && lanes <= 32 && power_of_two(lanes)) {
    return launch<true>(a, stream, heads, lanes);
  }
  for (int which = 0; which < a.count; ++which) {
    const int64_t pairs = a.batch * a.tensor[which].heads * a.tokens * (a.dim / 2);
    if (pairs == 0) continue;
    const int64_t wanted = ceil_div(pairs, kThreads);
    const unsigned grid = static_cast<unsigned>(wanted < (1 << 20) ? wanted : 1 << 20);
    rope_scalar_kernel<<<grid, kThreads, 0, stream>>>(a, which, pairs);
  }
  return cudaGetLastError();
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

bool read_rope_tensor(const DLTensor& x, const DLTensor& y, RopeTensor* out) {
  if (x.ndim != 4 || dtype_of(x) == kNoDType || !packed(x) || !packed(y) || !same_shape(x, y) ||
      !same_dtype(x, y) || !same_device(x, y)) {
    return false;
  }
  *out = {data_of(x), data_of(y), step(x, 0),
          step(x, 1), step(x, 2), step(y, 0),
          step(y, 1), step(y, 2), static_cast<int>(x.shape[1])};
  return true;
}

// One tensor [B, H, S, D], or two that differ in heads and strides alone; null where absent.
bool read_rope(const DLTensor* const (&x)[2], const DLTensor* const (&y)[2], const DLTensor& cos,
               const DLTensor* sin, bool half, int64_t start, RopeArgs* out) {
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

// One launch for one tensor or two, the second None where there is one.
bool rope(DLTensor* x0, DLTensor* y0, Maybe x1, Maybe y1, DLTensor* cos, Maybe sin, bool half,
          int64_t start) {
  RopeArgs args{};
  return read_rope({x0, get(x1)}, {y0, get(y1)}, *cos, get(sin), half, start, &args) &&
         launch_on(launch_rope, args, *x0);
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope, svg::rope);
#endif
