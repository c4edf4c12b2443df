// The online softmax of the rows that a thread holds, with lazy rescaling.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "hopper/arithmetic.cuh"

namespace svg::attention {

using hopper::exp2_approx;  // its error is far below the rounding of P

constexpr float kLog2E = 1.4426950408889634f;

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sums of a thread's probabilities above this ask for rescaling: one may not fit T, or with large
// values the output may not fit fp32.
template <typename T>
constexpr float kRescaleThreshold = 0x1p40f;
template <>
constexpr float kRescaleThreshold<__half> = 0x1p15f;

// The running softmax of the two rows a thread holds. Scores arrive unscaled.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};  // of this thread's columns only
  float scale_log2;

  // Replaces scores by probabilities relative to a maximum that includes them; returns what older
  // results must be multiplied by.
  __device__ __forceinline__ void rescale(float (&scores)[64], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int i = 0; i < 16; ++i)
        highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      highest = quad_max(highest);
      correction[r] = exp2_approx(maximum[r] * scale_log2 - offset(highest));
      maximum[r] = highest;
      sum[r] = sum[r] * correction[r] + exponentiate(scores, r);
    }
  }

  // Replaces scores by probabilities relative to the maximum as it is; returns their sums.
  __device__ __forceinline__ void exponentiate(float (&scores)[64], float (&sums)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sums[r] = exponentiate(scores, r);
  }

 private:
  __device__ __forceinline__ float offset(float highest) const {
    return highest == -INFINITY ? 0.f : highest * scale_log2;
  }

  __device__ __forceinline__ float exponentiate(float (&scores)[64], int r) {
    const float shift = offset(maximum[r]);
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * i + 2 * r + e];
        score = exp2_approx(fmaf(score, scale_log2, -shift));
        total += score;
      }
    }
    return total;
  }
};

}  // namespace svg::attention
