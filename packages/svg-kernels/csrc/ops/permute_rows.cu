// Gather or scatter rows of [B, H, S, D] by an int32 order per head; bytes are bytes, of any dtype.
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "ops/common.cuh"

namespace svg {
namespace {

constexpr int kMaxPermuted = 4;

// Strides are in bytes, those of `order` in elements.
struct PermuteTensor {
  const void* x;
  void* y;
  const int32_t* order;
  int64_t xb, xh, xs;
  int64_t ob, oh;
  int64_t x_rows, y_rows, row_bytes;
};

struct PermuteArgs {
  PermuteTensor tensor[kMaxPermuted];
  int count;
  int64_t batch;
  int heads;
  bool inverse;
};

constexpr int kThreads = 128;
constexpr int kUnroll = 4;

__device__ __forceinline__ uint4 load_word(const uint4* p) { return load_quad(p); }
__device__ __forceinline__ unsigned load_word(const unsigned* p) { return *p; }
__device__ __forceinline__ unsigned char load_word(const unsigned char* p) { return *p; }
__device__ __forceinline__ void store_word(uint4* p, uint4 v) { store_quad(p, v); }
__device__ __forceinline__ void store_word(unsigned* p, unsigned v) { *p = v; }
__device__ __forceinline__ void store_word(unsigned char* p, unsigned char v) { *p = v; }

// blockIdx.y names the tensor; blockIdx.x a stretch of one head's output words.
template <typename Word>
__global__ void __launch_bounds__(kThreads, 8)
    permute_rows_kernel(const PermuteArgs a, int64_t tiles) {
  const PermuteTensor& t = a.tensor[blockIdx.y];
  const int64_t tile = blockIdx.x % tiles;
  const int64_t place = blockIdx.x / tiles;
  const int64_t batch = place / a.heads;
  const int64_t head = place - batch * a.heads;
  const int64_t per_row = t.row_bytes / static_cast<int64_t>(sizeof(Word));
  const int64_t total = t.y_rows * per_row;
  const char* x = static_cast<const char*>(t.x) + batch * t.xb + head * t.xh;
  char* y = static_cast<char*>(t.y) + place * t.y_rows * t.row_bytes;
  const int32_t* order = t.order + batch * t.ob + head * t.oh;
  const int64_t first = tile * (kThreads * kUnroll) + threadIdx.x;

  int64_t from[kUnroll], to[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    const int64_t index = first + j * kThreads;
    if (index < total) {
      const int64_t row = total < (int64_t{1} << 31)
                              ? static_cast<uint32_t>(index) / static_cast<uint32_t>(per_row)
                              : index / per_row;
      const int64_t other = __ldg(order + row);
      const int64_t within = (index - row * per_row) * static_cast<int64_t>(sizeof(Word));
      from[j] = (a.inverse ? row : other) * t.xs + within;
      to[j] = (a.inverse ? other : row) * t.row_bytes + within;
    }
  }
  Word words[kUnroll];
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    if (first + j * kThreads < total) {
      words[j] = load_word(reinterpret_cast<const Word*>(x + from[j]));
    }
  }
#pragma unroll
  for (int j = 0; j < kUnroll; ++j) {
    if (first + j * kThreads < total) store_word(reinterpret_cast<Word*>(y + to[j]), words[j]);
  }
}

template <typename Word>
bool fits(const PermuteArgs& a) {
  constexpr int64_t size = sizeof(Word);
  for (int i = 0; i < a.count; ++i) {
    const PermuteTensor& t = a.tensor[i];
    const int64_t values[] = {reinterpret_cast<int64_t>(t.x),
                              reinterpret_cast<int64_t>(t.y),
                              t.xb,
                              t.xh,
                              t.xs,
                              t.row_bytes};
    for (int64_t v : values) {
      if (v % size != 0) return false;
    }
  }
  return true;
}

template <typename Word>
cudaError_t launch(const PermuteArgs& a, cudaStream_t stream) {
  int64_t words = 0;
  for (int i = 0; i < a.count; ++i) {
    const PermuteTensor& t = a.tensor[i];
    const int64_t mine = t.y_rows * (t.row_bytes / static_cast<int64_t>(sizeof(Word)));
    words = words > mine ? words : mine;
  }
  const int64_t tiles = ceil_div(words, kThreads * kUnroll);
  const int64_t blocks = tiles * a.batch * a.heads;
  if (blocks == 0) return cudaSuccess;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(a.count));
  permute_rows_kernel<Word><<<grid, kThreads, 0, stream>>>(a, tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_permute_rows(const PermuteArgs& a, cudaStream_t stream) {
  if (fits<uint4>(a)) return launch<uint4>(a, stream);
  if (fits<unsigned>(a)) return launch<unsigned>(a, stream);
  return launch<unsigned char>(a, stream);
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

// Row `order[b, h, i]` of x [B, H, S, D] becomes row i of y [B, H, T, D]; or the other way round.
bool read_permuted(const DLTensor& x, const DLTensor& order, const DLTensor& y, bool inverse,
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
  *out = {data_of(x),
          data_of(y),
          static_cast<const int32_t*>(data_of(order)),
          step(x, 0) * size,
          step(x, 1) * size,
          step(x, 2) * size,
          step_of[1],
          step_of[0],
          x.shape[2],
          count,
          x.shape[3] * size};
  return true;
}

// One launch for all tensors of the same batch and head count; unused places are None.
bool permute_rows(bool inverse, DLTensor* x0, DLTensor* order0, DLTensor* y0, Maybe x1,
                  Maybe order1, Maybe y1, Maybe x2, Maybe order2, Maybe y2, Maybe x3, Maybe order3,
                  Maybe y3) {
  const DLTensor* xs[] = {x0, get(x1), get(x2), get(x3)};
  const DLTensor* orders[] = {order0, get(order1), get(order2), get(order3)};
  const DLTensor* ys[] = {y0, get(y1), get(y2), get(y3)};
  PermuteTensor tensors[kMaxPermuted];
  int count = 0;
  for (; count < kMaxPermuted && xs[count] != nullptr; ++count) {
    if (!read_permuted(*xs[count], *orders[count], *ys[count], inverse, &tensors[count]) ||
        !same_device(*xs[count], *x0)) {
      return false;
    }
  }
  bool done[kMaxPermuted] = {};
  for (int first = 0; first < count; ++first) {
    if (done[first]) continue;
    PermuteArgs args{};
    args.batch = xs[first]->shape[0];
    args.heads = static_cast<int>(xs[first]->shape[1]);
    args.inverse = inverse;
    for (int i = first; i < count; ++i) {
      if (xs[i]->shape[0] != args.batch || xs[i]->shape[1] != args.heads) continue;
      args.tensor[args.count++] = tensors[i];
      done[i] = true;
    }
    launch_on(launch_permute_rows, args, *x0);
  }
  return true;
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute_rows, svg::permute_rows);
#endif
