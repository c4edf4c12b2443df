// Attention over runs of key rows with 8-bit keys and values, for Hopper (sm_90a).
//
// Plans, tiles, stages and lazy rescaling are those of block_sparse_attention_sm90a.cu. What eight
// bits change:
//
//   queries         are gathered in 16 bits; each row is rotated, divided by its largest element and
//                   rounded to e4m3 where it is laid out for the product (fp8/consumer.cuh).
//   values          arrive as rows. Two warps beside the producer transpose each stage once, and
//                   leave the keys in the order in which the registers of the scores hold
//                   probabilities, so that those are packed without a shuffle (fp8/transpose.cuh).
//   probabilities   are scaled to make use of e4m3's range, summed in fp32, and rounded
//                   (fp8/softmax.cuh).
//   O += P V        is promoted to a sum in fp32 every few stages.
//   summaries       follow the runs in 16 bits, in the memory of the drained stages.

#include "attention/fp8/consumer.cuh"
#include "attention/fp8/producer.cuh"
#include "attention/fp8/transpose.cuh"
#include "ffi/arguments.h"
#include "ffi/launch.h"
#include "hopper/tensor_map.h"

namespace svg::attention::fp8 {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_fp8_kernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<SharedStorage*>(raw);
  const int tile = params.tile_order ? params.tile_order[blockIdx.x] : blockIdx.x;
  const int sequence = tile / params.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (warp == 0) {
    if (lane == 0) {
      constexpr int kWarps = kConsumers / 32;
      for (int s = 0; s < kRowStages; ++s) {
        hopper::mbarrier_init(&shared.key_full[s], 1);
        hopper::mbarrier_init(&shared.key_empty[s], kConsumers);
        hopper::mbarrier_init(&shared.row_full[s], 1);
        hopper::mbarrier_init(&shared.row_empty[s], kTransposers);
      }
      for (int s = 0; s < kValueStages; ++s) {
        hopper::mbarrier_init(&shared.value_full[s], kTransposers);
        hopper::mbarrier_init(&shared.value_empty[s], kWarps);
      }
      for (int s = 0; s < kSummaryStages; ++s) {
        hopper::mbarrier_init(&shared.summary_full[s], 1);
        hopper::mbarrier_init(&shared.summary_empty[s], kWarps);
      }
      hopper::mbarrier_init(&shared.runs_read, kWarps);
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
    if (warp == 0) {
      produce_runs(params, shared, key_sequence, tile, lane);
      produce_summaries(params, shared, key_sequence, lane);
    } else if (warp <= kTransposers) {
      transpose_runs(params, shared, tile, warp - 1, lane);
    }
  } else {
    hopper::setmaxnreg_inc<240>();
    Consumer<T>(params, shared, sequence, tile % params.tiles).run();
  }
}

// Fills in the maps of the bulk copies.
cudaError_t encode_maps(Params& params) {
  const int64_t sequences = params.batch * params.key_heads;
  cudaError_t error = cudaSuccess;
  for (int box = 0; box < kBoxes && error == cudaSuccess; ++box) {
    const auto encode = [&](CUtensorMap& map, const void* base, const int64_t (&strides)[2]) {
      return hopper::encode_byte_row_map(&map, base, params.key_length, strides[1], sequences, strides[0],
                              kAtomRows << box);
    };
    error = encode(params.key_maps[box], params.key, params.key_strides);
    if (error == cudaSuccess)
      error = encode(params.value_maps[box], params.value, params.value_strides);
  }
  if (error != cudaSuccess || params.summaries == 0) return error;
  const auto encode = [&](CUtensorMap& map, const void* base) {
    return hopper::encode_row_map(&map, params.dtype == kBFloat16, base, kHeadDim, params.summaries, kHeadDim,
                       sequences, int64_t{params.summaries} * kHeadDim, 1);
  };
  error = encode(params.summary_key_map, params.summary_key);
  return error != cudaSuccess ? error : encode(params.summary_value_map, params.summary_value);
}

template <typename T>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  constexpr int bytes = sizeof(SharedStorage);
  static_assert(bytes <= 227 * 1024, "a block's shared memory");
  const auto kernel = block_sparse_attention_fp8_kernel<T>;
  const int64_t blocks = params.batch * params.heads * params.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t attend(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.head_dim != kHeadDim) return cudaErrorInvalidValue;
  Params params{};
  static_cast<Arguments&>(params) = arguments;
  params.tiles = static_cast<int>((arguments.query_length + kTileRows - 1) / kTileRows);
  const cudaError_t error = encode_maps(params);
  if (error != cudaSuccess) return error;
  return arguments.dtype == kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                                      : launch<__half>(params, stream);
}

// Reads what `attention/cuda.py` packs: the integers of attention::Arguments, then four pointers.
Arguments read(const int64_t* packed, double scale) {
  Arguments a{};
  static_cast<attention::Arguments&>(a) = read_arguments(packed, scale);
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(packed[i]); };
  a.key_scale = floats(kArguments), a.key_mean = floats(kArguments + 1);
  a.value_scale = floats(kArguments + 2), a.value_mean = floats(kArguments + 3);
  return a;
}

}  // namespace svg::attention::fp8

#ifndef __CUDA_ARCH__
namespace svg::attention::fp8 {
namespace {

// Takes addresses as integers: the operands are described once in Python, where some are copied.
void block_sparse_attention(int64_t packed, double scale, int device, int64_t stream) {
  launch_on(attend, read(reinterpret_cast<const int64_t*>(packed), scale), device, stream);
}

}  // namespace
}  // namespace svg::attention::fp8

TVM_FFI_DLL_EXPORT_TYPED_FUNC(block_sparse_attention_fp8,
                              svg::attention::fp8::block_sparse_attention);
#endif
