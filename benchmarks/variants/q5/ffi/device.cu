// Whether the library can run on a device at all.
#include "ffi/launch.h"

namespace svg {
namespace {

__global__ void empty_kernel() {}

}  // namespace

// Is there machine code for the current device, and does the driver take it?
cudaError_t find_machine_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, empty_kernel);
}

}  // namespace svg

#ifndef __CUDA_ARCH__
namespace svg {
namespace {

// Throws what the driver says when the library cannot run on `device`.
void check_device(int device) {
  OnDevice guard(device);
  check(guard.error());
  check(find_machine_code());
}

}  // namespace
}  // namespace svg

TVM_FFI_DLL_EXPORT_TYPED_FUNC(check_device, svg::check_device);
#endif
