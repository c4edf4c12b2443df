// What the launchers take: plain structs of raw pointers, shared by the kernels and exports.cc.
#pragma once
#include <cstdint>

#include <cuda_runtime_api.h>

namespace svg {

enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A matrix of rows seen as [outer, inner] rows; strides are in elements and may be 0.
struct Rows {
  const void* data;
  int64_t outer_stride;
  int64_t inner_stride;
  int dtype;
};

struct NormArgs {
  Rows x;
  void* y;  // contiguous
  int y_dtype;
  Rows weight, bias, scale, shift;  // data may be null
  int64_t outer, inner;
  int width;
  float eps;
  bool center;  // LayerNorm, else RMSNorm
};

struct GateArgs {
  Rows residual, x, gate;
  void* y;  // contiguous
  int y_dtype;
  int64_t outer, inner;
  int width;
};

// cos and sin of pair i of table row t: data[b * batch_stride + t * row_stride + i * pair_stride].
struct Tables {
  const float* cos;  // null: do not rotate
  const float* sin;
  int64_t batch_stride, row_stride;
  int pair_stride;
  int64_t start, length;
};

struct RopeTensor {
  const void* x;
  void* y;  // equal to x: in place
  int64_t xb, xh, xs;
  int64_t yb, yh, ys;
  int heads;
};

struct RopeArgs {
  RopeTensor tensor[2];
  int count;
  int dtype;
  int64_t batch, tokens;
  int dim;
  bool half;
  Tables tables;
};

struct QkTensor {
  const void* x;
  const void* weight;
  void* y;
  int64_t xb, xs;
  int64_t yb, yh, ys;
  int heads, weight_dtype;
  bool across;  // the mean is over all heads
};

struct QkArgs {
  QkTensor tensor[2];
  int dtype;
  int64_t batch, tokens;
  int dim;
  float eps;
  bool half;
  Tables tables;
};

constexpr int kMaxPermuted = 4;

// Strides are in bytes, those of `order` in elements.
struct PermuteTensor {
  const void* x;
  void* y;
  const int32_t* order;
  int64_t xb, xh, xs;
  int64_t ob, oh;
  int64_t x_rows, y_rows, row_bytes;
};

struct PermuteArgs {
  PermuteTensor tensor[kMaxPermuted];
  int count;
  int64_t batch;
  int heads;
  bool inverse;
};

// Attention over runs of key rows; see block_sparse_attention_sm90a.cu. Strides are in elements.
struct AttentionArgs {
  const void* query;              // [B, H, Sq, D], 16-bit
  const void* key;                // [B, Hk, Sk, D]
  const void* value;
  void* output;                   // [B, H, Sq, D]
  float* log_sum_exp;             // [B, H, Sq] or null
  const int32_t* query_order;     // [B, H, Sq] or null
  const int32_t* run_starts;      // [B, H, T, R]
  const int32_t* run_lengths;     // [B, H, T, R]
  const int32_t* tile_order;      // [B * H * T] or null: which tile each block computes
  const void* summary_key;        // [B, Hk, C, D] or null
  const void* summary_value;      // [B, Hk, C, D]
  const float* summary_weights;   // [B, H, T, C], natural logarithms
  int64_t query_strides[3];       // batch, head, token
  int64_t output_strides[3];
  int64_t key_strides[2];         // sequence, token: B * Hk sequences, evenly spaced
  int64_t value_strides[2];
  int64_t batch;
  int heads, key_heads, query_length, key_length, runs, summaries, head_dim, dtype;
  float scale;
};

cudaError_t norm(const NormArgs& args, cudaStream_t stream);
cudaError_t gate_residual(const GateArgs& args, cudaStream_t stream);
cudaError_t rope(const RopeArgs& args, cudaStream_t stream);
cudaError_t qk_norm_rope(const QkArgs& args, cudaStream_t stream);
cudaError_t permute_rows(const PermuteArgs& args, cudaStream_t stream);
// Absent (null) where the library was not built for sm_90a.
__attribute__((weak)) cudaError_t block_sparse_attention(const AttentionArgs& args,
                                                         cudaStream_t stream);
cudaError_t probe();  // is there machine code for the current device, and does the driver take it?

}  // namespace svg
