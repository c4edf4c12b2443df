// How an exported function launches: on the right device and stream, with errors as exceptions.
//
// An operation's .cu file exports its function itself, below its kernels and behind
// `#ifndef __CUDA_ARCH__`: passes that compile device code need not read tvm-ffi.
#pragma once
#include <cuda_runtime_api.h>

#ifndef __CUDA_ARCH__
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

namespace svg {

using Maybe = tvm::ffi::Optional<DLTensor*>;  // None where absent

inline const DLTensor* get(const Maybe& tensor) { return tensor.has_value() ? *tensor : nullptr; }

inline void check(cudaError_t error) {
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

// Makes `device` current for one launch.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

template <typename Args>
void launch_on(cudaError_t (*run)(const Args&, cudaStream_t), const Args& args, int device,
               int64_t stream) {
  OnDevice guard(device);
  check(guard.error());
  check(run(args, reinterpret_cast<cudaStream_t>(stream)));
}

// Launches on the stream that the caller has made current for the device of `on`.
template <typename Args>
bool launch_on(cudaError_t (*run)(const Args&, cudaStream_t), const Args& args,
               const DLTensor& on) {
  const DLDevice device = on.device;
  const TVMFFIStreamHandle stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
  launch_on(run, args, device.device_id, reinterpret_cast<int64_t>(stream));
  return true;
}

}  // namespace svg
#endif
