// What a call of block-sparse attention works on, as raw pointers.
#pragma once

#include <cstdint>

namespace svg::attention {

// Strides are in elements.
struct Arguments {
  const void* query;             // [B, H, Sq, D], 16-bit
  const void* key;               // [B, Hk, Sk, D]
  const void* value;             // as key
  void* output;                  // [B, H, Sq, D]
  float* log_sum_exp;            // [B, H, Sq] or null
  const int32_t* query_order;    // [B, H, Sq] or null
  const int32_t* run_starts;     // [B, H, T, R]
  const int32_t* run_lengths;    // [B, H, T, R]
  const int32_t* tile_order;     // [B * H * T] or null: which tile each block computes
  const void* summary_key;       // [B, Hk, C, D] or null
  const void* summary_value;     // [B, Hk, C, D]
  const float* summary_weights;  // [B, H, T, C], natural logarithms
  int64_t query_strides[3];      // batch, head, token
  int64_t output_strides[3];
  int64_t key_strides[2];  // sequence, token: B * Hk sequences, evenly spaced
  int64_t value_strides[2];
  int64_t batch;
  int heads, key_heads, query_length, key_length, runs, summaries, head_dim, dtype;
  float scale;
};

// Reads what `attention/cuda.py` packs: so many integers, in the order of the fields above.
constexpr int kArguments = 31;
inline Arguments read_arguments(const int64_t* packed, double scale) {
  Arguments a{};
  const auto pointer = [&](int i) { return reinterpret_cast<void*>(packed[i]); };
  const auto number = [&](int i) { return static_cast<int>(packed[i]); };
  a.query = pointer(0), a.key = pointer(1), a.value = pointer(2);
  a.output = pointer(3);
  a.log_sum_exp = static_cast<float*>(pointer(4));
  a.query_order = static_cast<const int32_t*>(pointer(5));
  a.run_starts = static_cast<const int32_t*>(pointer(6));
  a.run_lengths = static_cast<const int32_t*>(pointer(7));
  a.tile_order = static_cast<const int32_t*>(pointer(8));
  a.summary_key = pointer(9), a.summary_value = pointer(10);
  a.summary_weights = static_cast<const float*>(pointer(11));
  for (int i = 0; i < 3; ++i) a.query_strides[i] = packed[12 + i];
  for (int i = 0; i < 3; ++i) a.output_strides[i] = packed[15 + i];
  for (int i = 0; i < 2; ++i) a.key_strides[i] = packed[18 + i];
  for (int i = 0; i < 2; ++i) a.value_strides[i] = packed[20 + i];
  a.batch = packed[22];
  a.heads = number(23), a.key_heads = number(24);
  a.query_length = number(25), a.key_length = number(26);
  a.runs = number(27), a.summaries = number(28);
  a.head_dim = number(29), a.dtype = number(30);
  a.scale = static_cast<float>(scale);
  return a;
}

}  // namespace svg::attention
