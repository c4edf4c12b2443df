// Attention over runs of key rows whose keys are in 8 bits, for Hopper (sm_90a).
//
// kernel.cuh has the kernel. Queries are gathered in 16 bits, and each row is rotated, divided by
// its largest element and rounded to an integer where it is laid out for the product. S = Q K^T is
// summed in integers, exactly and at twice the rate, then scaled by row and by key. Probabilities
// and values stay in 16 bits, and so do the summaries, which follow the runs.
#include "attention/kernel.cuh"
#include "ffi/launch.h"

namespace svg::attention {

struct ByteCall : Arguments, ByteKeys {
  int* spoiled;  // a zero, and room for the number of every tile
};

cudaError_t attend_bytes(const ByteCall& call, cudaStream_t stream) {
  if (call.head_dim != 128) return cudaErrorInvalidValue;
  ByteParams params{};
  static_cast<Arguments&>(params) = call;
  static_cast<ByteKeys&>(params) = call;
  params.spoiled = call.spoiled;
  return call.dtype == kBFloat16 ? launch<__nv_bfloat16, 128, int8_t>(params, stream)
                                 : launch<__half, 128, int8_t>(params, stream);
}

}  // namespace svg::attention

#ifndef __CUDA_ARCH__
namespace svg::attention {
namespace {

// Takes addresses as integers: the operands are described once in Python, where some are copied.
void block_sparse_attention_int8(int64_t packed, double scale, int device, int64_t stream) {
  const auto* numbers = reinterpret_cast<const int64_t*>(packed);
  const auto floats = [&](int i) {
    return reinterpret_cast<const float*>(numbers[kArguments + i]);
  };
  ByteCall call{read_arguments(numbers, scale),
                {floats(0), floats(1), floats(2)},
                reinterpret_cast<int*>(numbers[kArguments + 3])};
  launch_on(attend_bytes, call, device, stream);
}

}  // namespace
}  // namespace svg::attention

TVM_FFI_DLL_EXPORT_TYPED_FUNC(block_sparse_attention_int8,
                              svg::attention::block_sparse_attention_int8);
#endif
