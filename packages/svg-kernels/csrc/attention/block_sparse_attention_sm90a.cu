// Attention over runs of key rows, for Hopper (sm_90a); kernel.cuh says how.
#include "attention/kernel.cuh"
#include "ffi/launch.h"

namespace svg::attention {
namespace {

struct Call : Arguments {
  int* spoiled;  // a zero, and room for the number of every tile
};

template <typename T>
cudaError_t launch(Params& params, cudaStream_t stream) {
  return params.head_dim == 128 ? launch<T, 128>(params, stream) : launch<T, 64>(params, stream);
}

}  // namespace

cudaError_t attend(const Call& call, cudaStream_t stream) {
  if (call.head_dim != 64 && call.head_dim != 128) return cudaErrorInvalidValue;
  Params params{};
  static_cast<Arguments&>(params) = call;
  params.spoiled = call.spoiled;
  return call.dtype == kBFloat16 ? launch<__nv_bfloat16>(params, stream)
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
