// The kernel for Hopper (sm_90a), for keys of runs in 16 bits or in int8.
//
// A tile is 128 consecutive rows of the reordered queries. Its operand is a list of runs (first
// row, rows) of the reordered keys; everything a tile does not read is left out of its softmax. One
// thread block computes one tile:
//
//   producer warp   turns runs into full 128-row stages of K and V. A stage is sixteen
//                   swizzle atoms of eight rows, an atom comes from one run, and neighbouring
//                   atoms are fetched by one TMA load of 8 to 128 rows (producer.cuh).
//   two consumer    each own 64 query rows: S = Q K^T, online softmax with lazy rescaling,
//   warpgroups      O += P V, in ping-pong (consumer.cuh, softmax.cuh).
//
// Rows an atom reads beyond its run are masked, so any run length is exact; runs whose lengths are
// multiples of eight need no mask and waste nothing. Q rows are gathered and O rows scattered
// through the query order, so that queries are never permuted in memory (query_tile.cuh,
// epilogue.cuh).

#pragma once

#include "attention/consumer.cuh"
#include "attention/producer.cuh"
#include "ffi/arguments.h"
#include "hopper/tensor_map.h"

namespace svg::attention {
namespace {

template <typename T, int kHeadDim, typename Key, bool kClears>
__device__ __forceinline__ void attend_tile(const ParamsOf<Key>& params, int tile) {
  extern __shared__ __align__(1024) unsigned char raw[];
  using Storage = SharedStorage<kHeadDim, Key>;
  auto& shared = *reinterpret_cast<Storage*>(raw);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (warp == 0) {
    if (lane == 0) {
      shared.listed = 0;
      for (int s = 0; s < kStages; ++s) {
        hopper::mbarrier_init(&shared.value_full[s], 1);
        hopper::mbarrier_init(&shared.value_empty[s], kConsumers / 32);
      }
      for (int s = 0; s < Storage::kKeyStages; ++s) {
        hopper::mbarrier_init(&shared.key_full[s], 1);
        hopper::mbarrier_init(&shared.key_empty[s], kConsumers);
        hopper::mbarrier_init(&shared.summary_full[s], 1);
        hopper::mbarrier_init(&shared.summary_empty[s], kConsumers);
      }
      hopper::mbarrier_init_fence();
    }
  } else if (warp == 1 && lane < kBoxes) {
    hopper::tma_prefetch_map(&params.key_maps[lane]);
    hopper::tma_prefetch_map(&params.value_maps[lane]);
  }
  __syncthreads();

  if (hopper::warp_uniform(threadIdx.x / 128) == 0) {
    hopper::setmaxnreg_dec<40>();
    const int key_sequence = tile / params.tiles / (params.heads / params.key_heads);
    if (warp == 0)
      Producer<kHeadDim, Key>(params, shared, key_sequence, lane).template run<T>(tile);
  } else {
    hopper::setmaxnreg_inc<232>();
    Consumer<T, kHeadDim, Key, kClears>(params, shared, tile)
        .run((params.summaries + kStageRows - 1) / kStageRows);
  }
}

template <typename T, int kHeadDim, typename Key>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_kernel(const __grid_constant__ ParamsOf<Key> params) {
  attend_tile<T, kHeadDim, Key, false>(
      params, params.tile_order ? params.tile_order[blockIdx.x] : blockIdx.x);
}

// Computes the tiles again that the kernel before has listed; none, where all values are finite.
template <typename T, int kHeadDim, typename Key>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_spoiled_kernel(const __grid_constant__ ParamsOf<Key> params) {
  if (blockIdx.x < *params.spoiled)
    attend_tile<T, kHeadDim, Key, true>(params, params.spoiled[1 + blockIdx.x]);
}

// Fills in the tensor maps.
template <typename Key>
cudaError_t encode_maps(ParamsOf<Key>& params) {
  const int64_t sequences = params.batch * params.key_heads;
  const auto encode = [&](CUtensorMap& map, const void* base, int64_t rows, int64_t row_stride,
                          int64_t sequence_stride, int atoms) {
    return hopper::encode_row_map(&map, params.dtype == kBFloat16, base, params.head_dim, rows,
                                  row_stride, sequences, sequence_stride, atoms);
  };
  cudaError_t error = cudaSuccess;
  for (int box = 0; box < kBoxes && error == cudaSuccess; ++box) {
    if constexpr (std::is_same_v<Key, int8_t>)
      error = hopper::encode_byte_row_map(&params.key_maps[box], params.key, params.key_length,
                                          params.key_strides[1], sequences, params.key_strides[0],
                                          kAtomRows << box);
    else
      error = encode(params.key_maps[box], params.key, params.key_length, params.key_strides[1],
                     params.key_strides[0], 1 << box);
    if (error != cudaSuccess) break;
    error = encode(params.value_maps[box], params.value, params.key_length, params.value_strides[1],
                   params.value_strides[0], 1 << box);
  }
  if (error != cudaSuccess || params.summaries == 0) return error;
  const int64_t stride = int64_t{params.summaries} * params.head_dim;
  error = encode(params.summary_key_map, params.summary_key, params.summaries, params.head_dim,
                 stride, 1);
  if (error != cudaSuccess) return error;
  return encode(params.summary_value_map, params.summary_value, params.summaries, params.head_dim,
                stride, 1);
}

template <typename T, int kHeadDim, typename Key = T>
cudaError_t launch(ParamsOf<Key>& params, cudaStream_t stream) {
  constexpr int bytes = sizeof(SharedStorage<kHeadDim, Key>);
  static_assert(bytes <= 227 * 1024, "a block's shared memory");
  const int64_t blocks = params.batch * params.heads * params.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  cudaError_t error = encode_maps<Key>(params);
  if (error != cudaSuccess) return error;
  for (const auto kernel : {block_sparse_attention_kernel<T, kHeadDim, Key>,
                            block_sparse_attention_spoiled_kernel<T, kHeadDim, Key>}) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(params);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace
}  // namespace svg::attention
