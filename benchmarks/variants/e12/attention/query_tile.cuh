// The 64 query rows of a warpgroup: where they and their output lie, in global and shared memory.
#pragma once

#include "attention/storage.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"

namespace svg::attention {

// Places are worked out where they are needed: registers are scarcer than instructions.
template <typename T, int kHeadDim>
struct QueryTile {
  static constexpr int kAtomBytes = SharedStorage<kHeadDim>::kAtomBytes;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte pieces of a row

  const Params& params;
  SharedStorage<kHeadDim>& shared;
  int sequence, thread, group, lane, first_row;

  __device__ QueryTile(const Params& params, SharedStorage<kHeadDim>& shared, int sequence,
                       int tile)
      : params(params), shared(shared), sequence(sequence) {
    thread = threadIdx.x % 128;
    group = hopper::warp_uniform(threadIdx.x / 128) - 1;
    lane = threadIdx.x % 32;
    first_row = tile * kTileRows + group * 64;
  }

  // This tile among those of all sequences.
  __device__ __forceinline__ int64_t index() const {
    return static_cast<int64_t>(sequence) * params.tiles + first_row / kTileRows;
  }

  template <typename Pointer>
  __device__ __forceinline__ Pointer in_head(Pointer base, const int64_t (&strides)[3]) const {
    return base + sequence / params.heads * strides[0] + sequence % params.heads * strides[1];
  }

  __device__ __forceinline__ int64_t token(int row) const {
    return params.query_order ? params.query_order[row_of_all(row)] : row;
  }

  __device__ __forceinline__ int64_t row_of_all(int row) const {
    return static_cast<int64_t>(sequence) * params.query_length + row;
  }

  // Where the 16 bytes `chunk` of this warpgroup's row `local` lie in the swizzled query tile.
  __device__ __forceinline__ unsigned char* element(int local, int chunk) const {
    return shared.query + (group * 8 + local / 8) * kAtomBytes + chunk / 8 * 1024 +
           local % 8 * 128 + ((chunk % 8) ^ (local % 8)) * 16;
  }

  // Gathers the rows into shared memory.
  __device__ void load() {
    const T* base = in_head(static_cast<const T*>(params.query), params.query_strides);
#pragma unroll
    for (int pass = 0; pass < 64 * kChunks / 128; ++pass) {
      const int piece = pass * 128 + thread;
      const int local = piece / kChunks, chunk = piece % kChunks;
      const int row = first_row + local;
      uint4 data = make_uint4(0, 0, 0, 0);
      if (row < params.query_length)
        data = __ldg(reinterpret_cast<const uint4*>(base + token(row) * params.query_strides[2]) +
                     chunk);
      *reinterpret_cast<uint4*>(element(local, chunk)) = data;
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group, 128);
  }
};

}  // namespace svg::attention
