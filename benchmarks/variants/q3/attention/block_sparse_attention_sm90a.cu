// Attention over runs of key rows, for Hopper (sm_90a).
//
// A tile is 128 consecutive rows of the reordered queries. Its operand is a list of runs (first
// row, rows) of the reordered keys; everything a tile does not read is left out of its softmax. One
// thread block computes one tile:
//
//   producer warp   turns runs into full 128-row stages of K and V. A stage is sixteen swizzle
//   atoms
//                   of eight rows, an atom comes from one run, and neighbouring atoms are fetched
//                   by one TMA load of 8 to 128 rows (producer.cuh).
//   two consumer    each own 64 query rows: S = Q K^T, online softmax with lazy rescaling,
//   warpgroups      O += P V, in ping-pong (consumer.cuh, softmax.cuh).
//
// Rows an atom reads beyond its run are masked, so any run length is exact; runs whose lengths are
// multiples of eight need no mask and waste nothing. Q rows are gathered and O rows scattered
// through the query order, so that queries are never permuted in memory (query_tile.cuh,
// epilogue.cuh).

#include "attention/consumer.cuh"
#include "attention/producer.cuh"
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "hopper/tensor_map.h"

namespace svg::attention {
namespace {

template <typename T, int kHeadDim, bool kClears>
__device__ __forceinline__ void attend_tile(const Params& params, int tile) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<SharedStorage<kHeadDim>*>(raw);
  const int sequence = tile / params.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (warp == 0) {
    if (lane == 0) {
      shared.listed = 0;
      for (int s = 0; s < kStages; ++s) {
        hopper::mbarrier_init(&shared.key_full[s], 1);
        hopper::mbarrier_init(&shared.value_full[s], 1);
        hopper::mbarrier_init(&shared.key_empty[s], kConsumers);
        hopper::mbarrier_init(&shared.value_empty[s], kConsumers / 32);
      }
      hopper::mbarrier_init_fence();
    }
  } else if (warp == 1 && lane < kBoxes) {
    hopper::tma_prefetch_map(&params.key_maps[lane]);
    hopper::tma_prefetch_map(&params.value_maps[lane]);
  }
  __syncthreads();

  if (hopper::warp_uniform(threadIdx.x / 128) == 0) {
    hopper::setmaxnreg_dec<32>();
    const int key_sequence = sequence / (params.heads / params.key_heads);
    if (warp == 0) produce(params, shared, key_sequence, tile, lane);
  } else {
    hopper::setmaxnreg_inc<240>();
    Consumer<T, kHeadDim, kClears>(params, shared, sequence, tile % params.tiles)
        .run((params.summaries + kStageRows - 1) / kStageRows);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_kernel(const __grid_constant__ Params params) {
  attend_tile<T, kHeadDim, false>(params,
                                  params.tile_order ? params.tile_order[blockIdx.x] : blockIdx.x);
}

// Computes the tiles again that the kernel before has listed; none, where all values are finite.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_spoiled_kernel(const __grid_constant__ Params params) {
  if (blockIdx.x < *params.spoiled)
    attend_tile<T, kHeadDim, true>(params, params.spoiled[1 + blockIdx.x]);
}

// Fills in the tensor maps.
cudaError_t encode_maps(Params& params) {
  const int64_t sequences = params.batch * params.key_heads;
  const auto encode = [&](CUtensorMap& map, const void* base, int64_t rows, int64_t row_stride,
                          int64_t sequence_stride, int atoms) {
    return hopper::encode_row_map(&map, params.dtype == kBFloat16, base, params.head_dim, rows,
                                  row_stride, sequences, sequence_stride, atoms);
  };
  cudaError_t error = cudaSuccess;
  for (int box = 0; box < kBoxes && error == cudaSuccess; ++box) {
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

template <typename T, int kHeadDim>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  constexpr int bytes = sizeof(SharedStorage<kHeadDim>);
  static_assert(bytes <= 227 * 1024, "a block's shared memory");
  const int64_t blocks = params.batch * params.heads * params.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  for (const auto kernel : {block_sparse_attention_kernel<T, kHeadDim>,
                            block_sparse_attention_spoiled_kernel<T, kHeadDim>}) {
    cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(params);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  return params.head_dim == 128 ? launch<T, 128>(params, stream) : launch<T, 64>(params, stream);
}

}  // namespace

struct Call : Arguments {
  int* spoiled;  // a zero, and room for the number of every tile
};

cudaError_t attend(const Call& arguments, cudaStream_t stream) {
  if (arguments.head_dim != 64 && arguments.head_dim != 128) return cudaErrorInvalidValue;
  Params params{};
  static_cast<Arguments&>(params) = arguments;
  params.spoiled = arguments.spoiled;
  params.tiles = static_cast<int>((arguments.query_length + kTileRows - 1) / kTileRows);
  const cudaError_t error = encode_maps(params);
  if (error != cudaSuccess) return error;
  return arguments.dtype == kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                                      : launch<__half>(params, stream);
}

}  // namespace svg::attention

#ifndef __CUDA_ARCH__
namespace svg::attention {
namespace {

// Takes addresses as integers: the operands are described once in Python, where some are copied.
void block_sparse_attention(int64_t packed, double scale, int device, int64_t stream) {
  const auto* numbers = reinterpret_cast<const int64_t*>(packed);
  Call call{read_arguments(numbers, scale), reinterpret_cast<int*>(numbers[kArguments])};
  launch_on(attend, call, device, stream);
}

}  // namespace
}  // namespace svg::attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(block_sparse_attention, svg::attention::block_sparse_attention);
#endif
