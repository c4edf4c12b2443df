// Rotary embedding of [B, H, S, D]: a thread keeps the angles of its token and walks the heads.
#include "rotate.cuh"

namespace svg {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 2;  // heads in flight per thread

// Block b works on `kThreads / lanes` tokens and one share of the heads.
template <int DTYPE, bool HALF>
__global__ void __launch_bounds__(kThreads) rope_vec(const RopeArgs a, int lanes, int shares,
                                                     int64_t tiles) {
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
  const bool write = turn || (live && a.x != a.y);
  Angles<HALF> angles;
  if (turn) angles = load_angles<HALF>(a.tables, batch, row, channel, a.dim);

  const int each = (a.heads + shares - 1) / shares;
  const int stop = min(a.heads, (share + 1) * each);
  const int64_t x0 = batch * a.xb + token * a.xs + channel;
  const int64_t y0 = batch * a.yb + token * a.ys + channel;
  for (int head = share * each; head < stop; head += kHeads) {
    Raw raw[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      if (write && head + h < stop) raw[h] = load_raw(a.x, x0 + (head + h) * a.xh, DTYPE);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float v[kVec];
      unpack(raw[h], DTYPE, v);
      rotate<HALF>(v, angles, turn, lanes, threadIdx.x & 31);
      if (write && head + h < stop) store_vec(a.y, y0 + (head + h) * a.yh, DTYPE, v);
    }
  }
}

// A thread per pair: any even head_dim, any alignment.
__global__ void __launch_bounds__(kThreads) rope_any(const RopeArgs a, int64_t total) {
  const int pairs = a.dim / 2;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int pair = static_cast<int>(i % pairs);
    int64_t rest = i / pairs;
    const int64_t token = rest % a.tokens;
    rest /= a.tokens;
    const int head = static_cast<int>(rest % a.heads);
    const int64_t batch = rest / a.heads;
    const int first = a.half ? pair : 2 * pair;
    const int second = a.half ? pair + pairs : 2 * pair + 1;
    const int64_t x = batch * a.xb + head * a.xh + token * a.xs;
    const int64_t y = batch * a.yb + head * a.yh + token * a.ys;
    const float u = load_one(a.x, x + first, a.dtype), v = load_one(a.x, x + second, a.dtype);
    const int64_t row = token - a.tables.start;
    float c = 1.f, s = 0.f;
    const bool turn = row >= 0 && row < a.tables.length;
    if (turn) {
      const int64_t t = batch * a.tables.batch_stride + row * a.tables.row_stride +
                        static_cast<int64_t>(pair) * a.tables.pair_stride;
      c = a.tables.cos[t];
      s = a.tables.sin[t];
    }
    store_one(a.y, y + first, a.dtype, turn ? u * c - v * s : u);
    store_one(a.y, y + second, a.dtype, turn ? v * c + u * s : v);
  }
}

using Kernel = void (*)(RopeArgs, int, int, int64_t);

template <bool HALF>
Kernel kernel_for(int dtype) {
  if (dtype == kFloat32) return rope_vec<kFloat32, HALF>;
  return dtype == kBFloat16 ? rope_vec<kBFloat16, HALF> : rope_vec<kFloat16, HALF>;
}

template <bool HALF>
cudaError_t launch(const RopeArgs& a, cudaStream_t stream, int lanes) {
  const Kernel kernel = kernel_for<HALF>(a.dtype);
  const int64_t tiles = ceil_div(a.tokens, kThreads / lanes);
  int shares = 1;  // split the heads until the grid fills a large GPU; each reads the tables again
  while (tiles * a.batch * shares < 1024 && shares * 2 * kHeads <= a.heads) shares *= 2;
  const int64_t blocks = tiles * a.batch * shares;
  if (blocks > kMaxGrid) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(a, lanes, shares, tiles);
  return cudaGetLastError();
}

bool vector_strides(const RopeArgs& a) {
  const int64_t strides[] = {a.xb, a.xh, a.xs, a.yb, a.yh, a.ys};
  for (int64_t s : strides) {
    if (s % kVec != 0) return false;
  }
  return aligned(a.x) && aligned(a.y);
}

}  // namespace

cudaError_t rope(const RopeArgs& a, cudaStream_t stream) {
  const int64_t pairs = a.batch * a.heads * a.tokens * (a.dim / 2);
  if (pairs == 0) return cudaSuccess;
  const int lanes = a.dim / kVec;
  const bool vector = a.dim % kVec == 0 && vector_strides(a);
  if (vector && !a.half && lanes <= kThreads) return launch<false>(a, stream, lanes);
  if (vector && a.half && lanes >= 2 && lanes <= 32 && power_of_two(lanes)) {
    return launch<true>(a, stream, lanes);
  }
  const int64_t wanted = ceil_div(pairs, kThreads);
  const unsigned grid = static_cast<unsigned>(wanted < (1 << 20) ? wanted : 1 << 20);
  rope_any<<<grid, kThreads, 0, stream>>>(a, pairs);
  return cudaGetLastError();
}

}  // namespace svg
