// The 64 query rows of a warpgroup: where they and their output lie, in global and shared memory.
#pragma once

#include "attention/storage.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"

namespace svg::attention {

// The same value, of which the compiler knows nothing: what is rarely computed from it is not kept
// in registers meanwhile.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Places are worked out where they are needed: registers are scarcer than instructions.
template <typename T, int kHeadDim>
struct QueryTile {
  static constexpr int kAtomBytes = kAtomRows * kHeadDim * 2;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte pieces of a row
  static constexpr int kPasses = 64 * kChunks / 128;

  const Arguments& params;
  unsigned char* query;  // of both warpgroups, in shared memory
  int index;             // among the tiles of all sequences
  int thread, group, lane;

  __device__ __forceinline__ QueryTile(const Arguments& params, unsigned char* query, int index)
      : params(params), query(query), index(index) {
    find_places();
  }

  // Works out this thread's places, anew each time.
  __device__ __forceinline__ void find_places() {
    const int of_block = opaque(threadIdx.x);
    thread = of_block % 128;
    group = hopper::warp_uniform(of_block / 128) - 1;
    lane = of_block % 32;
  }

  __device__ __forceinline__ int sequence() const { return index / params.tiles; }

  __device__ __forceinline__ int first_row() const {
    return index % params.tiles * kTileRows + group * 64;
  }

  // The first of the two rows, of this warpgroup's 64, that a thread's registers hold; the other is
  // eight further on. Of each eight columns it holds two.
  __device__ __forceinline__ int row() const { return thread / 32 * 16 + lane / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane % 4); }

  __device__ __forceinline__ int key_sequence() const {
    return sequence() / (params.heads / params.key_heads);
  }

  template <typename Pointer>
  __device__ __forceinline__ Pointer in_head(Pointer base, const int64_t (&strides)[3]) const {
    return base + sequence() / params.heads * strides[0] + sequence() % params.heads * strides[1];
  }

  __device__ __forceinline__ int64_t token(int row) const {
    return params.query_order ? params.query_order[row_of_all(row)] : row;
  }

  __device__ __forceinline__ int64_t row_of_all(int row) const {
    return static_cast<int64_t>(sequence()) * params.query_length + row;
  }

  // The rows of this warpgroup.
  __device__ __forceinline__ unsigned char* rows() const { return query + group * 8 * kAtomBytes; }

  // Where the 16 bytes `chunk` of this warpgroup's row `local` lie in the swizzled query tile.
  __device__ __forceinline__ unsigned char* element(int local, int chunk) const {
    return rows() + local / 8 * kAtomBytes + chunk / 8 * 1024 + local % 8 * 128 +
           ((chunk % 8) ^ (local % 8)) * 16;
  }

  // Gathers the rows into shared memory; does `meanwhile` while they are on their way, all at once.
  // Rows past the last repeat it; nobody stores what comes of them.
  template <typename Meanwhile>
  __device__ __forceinline__ void load(Meanwhile meanwhile) const {
    const T* base = in_head(static_cast<const T*>(params.query), params.query_strides);
    uint4 pieces[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int piece = pass * 128 + thread;
      const int row = min(first_row() + piece / kChunks, params.query_length - 1);
      pieces[pass] =
          __ldg(reinterpret_cast<const uint4*>(base + token(row) * params.query_strides[2]) +
                piece % kChunks);
    }
    meanwhile();
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const int piece = pass * 128 + thread;
      *reinterpret_cast<uint4*>(element(piece / kChunks, piece % kChunks)) = pieces[pass];
    }
  }

  // Makes the rows visible to the products of the whole warpgroup.
  __device__ __forceinline__ void show() const {
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group, 128);
  }
};

}  // namespace svg::attention
