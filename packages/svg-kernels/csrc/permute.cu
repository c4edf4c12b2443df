// Gather or scatter rows of [B, H, S, D] by an int32 order per head; bytes are bytes, of any dtype.
#include "common.cuh"

namespace svg {
namespace {

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
__global__ void __launch_bounds__(kThreads, 8) permute_words(const PermuteArgs a, int64_t tiles) {
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
    const int64_t values[] = {reinterpret_cast<int64_t>(t.x), reinterpret_cast<int64_t>(t.y),
                              t.xb, t.xh, t.xs, t.row_bytes};
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
  permute_words<Word><<<grid, kThreads, 0, stream>>>(a, tiles);
  return cudaGetLastError();
}

}  // namespace

cudaError_t permute_rows(const PermuteArgs& a, cudaStream_t stream) {
  if (fits<uint4>(a)) return launch<uint4>(a, stream);
  if (fits<unsigned>(a)) return launch<unsigned>(a, stream);
  return launch<unsigned char>(a, stream);
}

}  // namespace svg
