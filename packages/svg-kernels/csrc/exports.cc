// The library's only exported symbols: typed functions on integers, floats and raw pointers.
//
// Pointers and the stream arrive as integers, so the library knows neither torch nor DLPack; the
// Python launchers allocate and keep the tensors alive.
#include <tvm/ffi/function.h>

#include "launch.h"

namespace {

using svg::Rows;

template <typename T>
T* ptr(int64_t address) {
  return reinterpret_cast<T*>(address);
}

Rows rows(int64_t data, int dtype, int64_t outer_stride, int64_t inner_stride) {
  return {ptr<const void>(data), outer_stride, inner_stride, dtype};
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
void launch(cudaError_t (*run)(const Args&, cudaStream_t), const Args& args, int device,
            int64_t stream) {
  OnDevice guard(device);
  cudaError_t error = guard.error();
  if (error == cudaSuccess) error = run(args, ptr<CUstream_st>(stream));
  if (error != cudaSuccess) TVM_FFI_THROW(RuntimeError) << cudaGetErrorString(error);
}

void norm(int64_t x, int x_dtype, int64_t x_outer, int64_t x_inner, int64_t y, int y_dtype,
          int64_t weight, int weight_dtype, int64_t bias, int bias_dtype, int64_t scale,
          int scale_dtype, int64_t scale_outer, int64_t scale_inner, int64_t shift, int shift_dtype,
          int64_t shift_outer, int64_t shift_inner, int64_t outer, int64_t inner, int width,
          double eps, bool center, int device, int64_t stream) {
  svg::NormArgs args{};
  args.x = rows(x, x_dtype, x_outer, x_inner);
  args.y = ptr<void>(y);
  args.y_dtype = y_dtype;
  args.weight = rows(weight, weight_dtype, 0, 0);
  args.bias = rows(bias, bias_dtype, 0, 0);
  args.scale = rows(scale, scale_dtype, scale_outer, scale_inner);
  args.shift = rows(shift, shift_dtype, shift_outer, shift_inner);
  args.outer = outer;
  args.inner = inner;
  args.width = width;
  args.eps = static_cast<float>(eps);
  args.center = center;
  launch(svg::norm, args, device, stream);
}

void gate_residual(int64_t residual, int residual_dtype, int64_t residual_outer,
                   int64_t residual_inner, int64_t x, int x_dtype, int64_t x_outer, int64_t x_inner,
                   int64_t gate, int gate_dtype, int64_t gate_outer, int64_t gate_inner, int64_t y,
                   int y_dtype, int64_t outer, int64_t inner, int width, int device,
                   int64_t stream) {
  svg::GateArgs args{};
  args.residual = rows(residual, residual_dtype, residual_outer, residual_inner);
  args.x = rows(x, x_dtype, x_outer, x_inner);
  args.gate = rows(gate, gate_dtype, gate_outer, gate_inner);
  args.y = ptr<void>(y);
  args.y_dtype = y_dtype;
  args.outer = outer;
  args.inner = inner;
  args.width = width;
  launch(svg::gate_residual, args, device, stream);
}

svg::Tables tables(int64_t cos, int64_t sin, int64_t batch_stride, int64_t row_stride,
                   int pair_stride, int64_t start, int64_t length) {
  return {ptr<const float>(cos), ptr<const float>(sin), batch_stride, row_stride, pair_stride,
          start, length};
}

void rope(int64_t x, int64_t xb, int64_t xh, int64_t xs, int64_t y, int64_t yb, int64_t yh,
          int64_t ys, int dtype, int64_t batch, int heads, int64_t tokens, int dim, bool half,
          int64_t cos, int64_t sin, int64_t batch_stride, int64_t row_stride, int pair_stride,
          int64_t start, int64_t length, int device, int64_t stream) {
  svg::RopeArgs args{};
  args.x = ptr<const void>(x);
  args.y = ptr<void>(y);
  args.xb = xb, args.xh = xh, args.xs = xs;
  args.yb = yb, args.yh = yh, args.ys = ys;
  args.dtype = dtype;
  args.batch = batch, args.tokens = tokens, args.heads = heads, args.dim = dim;
  args.half = half;
  args.tables = tables(cos, sin, batch_stride, row_stride, pair_stride, start, length);
  launch(svg::rope, args, device, stream);
}

// `described` holds 11 integers for q, then 11 for k: x, weight, y, strides, heads, weight dtype,
// across.
svg::QkTensor qk_tensor(const int64_t* d) {
  return {ptr<const void>(d[0]), ptr<const void>(d[1]), ptr<void>(d[2]), d[3], d[4], d[5], d[6],
          d[7], static_cast<int>(d[8]), static_cast<int>(d[9]), d[10] != 0};
}

void qk_norm_rope(int64_t described, int dtype, int64_t batch, int64_t tokens, int dim, double eps,
                  bool half, int64_t cos, int64_t sin, int64_t batch_stride, int64_t row_stride,
                  int pair_stride, int64_t start, int64_t length, int device, int64_t stream) {
  svg::QkArgs args{};
  const int64_t* d = ptr<const int64_t>(described);
  args.tensor[0] = qk_tensor(d);
  args.tensor[1] = qk_tensor(d + 11);
  args.dtype = dtype;
  args.batch = batch, args.tokens = tokens, args.dim = dim;
  args.eps = static_cast<float>(eps);
  args.half = half;
  args.tables = tables(cos, sin, batch_stride, row_stride, pair_stride, start, length);
  launch(svg::qk_norm_rope, args, device, stream);
}

// `described` holds 11 integers for each tensor, in the order of svg::PermuteTensor.
void permute_rows(int64_t described, int count, int64_t batch, int heads, bool inverse, int device,
                  int64_t stream) {
  svg::PermuteArgs args{};
  if (count > svg::kMaxPermuted) TVM_FFI_THROW(ValueError) << "too many tensors";
  const int64_t* d = ptr<const int64_t>(described);
  for (int i = 0; i < count; ++i, d += 11) {
    args.tensor[i] = {ptr<const void>(d[0]), ptr<void>(d[1]), ptr<const int32_t>(d[2]), d[3], d[4],
                      d[5], d[6], d[7], d[8], d[9], d[10]};
  }
  args.count = count;
  args.batch = batch;
  args.heads = heads;
  args.inverse = inverse;
  launch(svg::permute_rows, args, device, stream);
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
