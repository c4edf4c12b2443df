// The library's only exported symbols: functions on DLPack tensors, which Python passes as they are.
//
// Each returns whether it has launched; false asks Python to convert the arguments, or to say what
// is wrong with them. Attention takes its addresses as integers instead.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include "arguments.h"

namespace {

using Maybe = tvm::ffi::Optional<DLTensor*>;  // None where absent

template <typename T>
T* ptr(int64_t address) {
  return reinterpret_cast<T*>(address);
}

const DLTensor* get(const Maybe& tensor) { return tensor.has_value() ? *tensor : nullptr; }

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
void launch(cudaError_t (*run)(const Args&, cudaStream_t), const Args& args, int device,
            int64_t stream) {
  OnDevice guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = run(args, ptr<CUstream_st>(stream));
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

// Launches on the stream that the caller has made current for the device of `on`.
template <typename Args>
bool launch(cudaError_t (*run)(const Args&, cudaStream_t), const Args& args, const DLTensor& on) {
  const DLDevice device = on.device;
  const TVMFFIStreamHandle stream = TVMFFIEnvGetStream(device.device_type, device.device_id);
  launch(run, args, device.device_id, reinterpret_cast<int64_t>(stream));
  return true;
}

bool norm(DLTensor* x, Maybe weight, Maybe bias, Maybe scale, Maybe shift, DLTensor* y,
          double eps, bool center) {
  svg::NormArgs args{};
  return svg::read_norm(*x, get(weight), get(bias), get(scale), get(shift), *y, eps, center,
                        &args) &&
         launch(svg::norm, args, *x);
}

bool gate_residual(DLTensor* residual, DLTensor* x, DLTensor* gate,
                   DLTensor* y) {
  svg::GateArgs args{};
  return svg::read_gate(*residual, *x, *gate, *y, &args) &&
         launch(svg::gate_residual, args, *residual);
}

// One launch for one tensor or two, the second None where there is one.
bool rope(DLTensor* x0, DLTensor* y0, Maybe x1, Maybe y1, DLTensor* cos, Maybe sin, bool half,
          int64_t start) {
  svg::RopeArgs args{};
  return svg::read_rope({x0, get(x1)}, {y0, get(y1)}, *cos, get(sin), half, start, &args) &&
         launch(svg::rope, args, *x0);
}

bool qk_norm_rope(DLTensor* query, DLTensor* key, DLTensor* query_weight,
                  DLTensor* key_weight, DLTensor* query_out, DLTensor* key_out,
                  Maybe cos, Maybe sin, double eps, bool half, int64_t start) {
  svg::QkArgs args{};
  return svg::read_qk({query, key}, {query_weight, key_weight}, {query_out, key_out}, get(cos),
                      get(sin), eps, half, start, &args) &&
         launch(svg::qk_norm_rope, args, *query);
}

// One launch for all tensors of the same batch and head count; unused places are None.
bool permute_rows(bool inverse, DLTensor* x0, DLTensor* order0, DLTensor* y0,
                  Maybe x1, Maybe order1, Maybe y1, Maybe x2, Maybe order2, Maybe y2, Maybe x3,
                  Maybe order3, Maybe y3) {
  const DLTensor* xs[] = {x0, get(x1), get(x2), get(x3)};
  const DLTensor* orders[] = {order0, get(order1), get(order2), get(order3)};
  const DLTensor* ys[] = {y0, get(y1), get(y2), get(y3)};
  svg::PermuteTensor tensors[svg::kMaxPermuted];
  int count = 0;
  for (; count < svg::kMaxPermuted && xs[count] != nullptr; ++count) {
    if (!svg::read_permuted(*xs[count], *orders[count], *ys[count], inverse, &tensors[count]) ||
        !svg::same_device(*xs[count], *x0)) {
      return false;
    }
  }
  bool done[svg::kMaxPermuted] = {};
  for (int first = 0; first < count; ++first) {
    if (done[first]) continue;
    svg::PermuteArgs args{};
    args.batch = xs[first]->shape[0];
    args.heads = static_cast<int>(xs[first]->shape[1]);
    args.inverse = inverse;
    for (int i = first; i < count; ++i) {
      if (xs[i]->shape[0] != args.batch || xs[i]->shape[1] != args.heads) continue;
      args.tensor[args.count++] = tensors[i];
      done[i] = true;
    }
    launch(svg::permute_rows, args, *x0);
  }
  return true;
}

// `described` holds 31 integers in the order of svg::AttentionArgs, up to its scale.
void block_sparse_attention(int64_t described, double scale, int device, int64_t stream) {
  if (svg::block_sparse_attention == nullptr) {
    TVM_FFI_THROW(RuntimeError) << "the library was not built for sm_90a";
  }
  const int64_t* d = ptr<const int64_t>(described);
  const auto number = [&](int i) { return static_cast<int>(d[i]); };
  svg::AttentionArgs args{};
  args.query = ptr<const void>(d[0]);
  args.key = ptr<const void>(d[1]);
  args.value = ptr<const void>(d[2]);
  args.output = ptr<void>(d[3]);
  args.log_sum_exp = ptr<float>(d[4]);
  args.query_order = ptr<const int32_t>(d[5]);
  args.run_starts = ptr<const int32_t>(d[6]);
  args.run_lengths = ptr<const int32_t>(d[7]);
  args.tile_order = ptr<const int32_t>(d[8]);
  args.summary_key = ptr<const void>(d[9]);
  args.summary_value = ptr<const void>(d[10]);
  args.summary_weights = ptr<const float>(d[11]);
  for (int i = 0; i < 3; ++i) args.query_strides[i] = d[12 + i];
  for (int i = 0; i < 3; ++i) args.output_strides[i] = d[15 + i];
  for (int i = 0; i < 2; ++i) args.key_strides[i] = d[18 + i];
  for (int i = 0; i < 2; ++i) args.value_strides[i] = d[20 + i];
  args.batch = d[22];
  args.heads = number(23), args.key_heads = number(24);
  args.query_length = number(25), args.key_length = number(26);
  args.runs = number(27), args.summaries = number(28);
  args.head_dim = number(29), args.dtype = number(30);
  args.scale = static_cast<float>(scale);
  launch(svg::block_sparse_attention, args, device, stream);
}

// Throws what the driver says when the library cannot run on `device`.
void probe(int device) {
  OnDevice guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = svg::probe();
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(norm, norm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate_residual, gate_residual);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope, rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope, qk_norm_rope);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(permute_rows, permute_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(block_sparse_attention, block_sparse_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe, probe);
