// The online softmax of the rows that a thread holds, with lazy rescaling, for probabilities in e4m3.
#pragma once

#include <cuda_fp8.h>

#include "attention/softmax.cuh"

namespace svg::attention::fp8 {

constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLargestByte = 448.f;  // of e4m3
constexpr float kLargestLowered = 0x1p100f;  // sums above are of probabilities that may be infinite
// What the maximum of a row stands at when it is set: 2^5.8 below the largest number, room for later
// scores that are higher, and as much above 2^-6, down to where e4m3 keeps all its digits.
constexpr float kMaximumLog2 = 3.f;

// The running softmax of the two rows a thread holds. Maxima are in units of log 2.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};  // of this thread's columns only

  // Replaces scores by probabilities relative to a maximum that includes them; returns what older
  // results must be multiplied by.
  __device__ __forceinline__ void rescale(float (&scores)[2][32], const float (&scale)[2],
                                        float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest =
          fmaxf(maximum[r], quad_max(fmaxf(largest(scores[0], r, -INFINITY),
                                           largest(scores[1], r, -INFINITY))) * scale[r]);
      correction[r] = exp2_approx(maximum[r] - (highest == -INFINITY ? 0.f : highest));
      maximum[r] = highest;
      sum[r] *= correction[r];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      exponentiate(k, scores[0], scale, sum);
      exponentiate(k, scores[1], scale, sum);
    }
  }

  // Replaces half k of half a stage's scores by probabilities relative to the maximum as it is, and
  // adds them to the sums.
  __device__ __forceinline__ void exponentiate(int k, float (&scores)[32], const float (&scale)[2],
                                               float (&sums)[2]) const {
    const float down[2] = {shift(0), shift(1)};
#pragma unroll
    for (int i = 16 * k; i < 16 * k + 16; ++i) {
      const int r = i / 2 % 2;
      scores[i] = exp2_approx(fmaf(scores[i], scale[r], -down[r]));
      sums[r] += scores[i];
    }
  }

  // Raises the maximum of row r to its largest probability, which then stands at 2^kMaximumLog2, where
  // e4m3 rounds nothing; returns by what results relative to the old one must be multiplied.
  __device__ __forceinline__ float lower(const float (&probabilities)[32], int r) {
    const float above = fmaxf(
        hopper::log2_approx(quad_max(largest(probabilities, r, 0.f))) - kMaximumLog2, 0.f);
    const float factor = exp2_approx(-above);
    maximum[r] += above;
    sum[r] *= factor;
    return factor;
  }

  static __device__ __forceinline__ float largest(const float (&x)[32], int r, float highest) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      highest = fmaxf(highest, fmaxf(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]));
    return highest;
  }

  __device__ __forceinline__ float log_sum_exp(int r, float total) const {
    return shift(r) * kLn2 + logf(total);
  }

 private:
  __device__ __forceinline__ float shift(int r) const {
    return maximum[r] == -INFINITY ? 0.f : maximum[r] - kMaximumLog2;
  }
};

}  // namespace svg::attention::fp8
