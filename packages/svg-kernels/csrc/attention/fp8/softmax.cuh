// The online softmax of the rows that a thread holds, with lazy rescaling, in codes of e4m3.
//
// An e4m3 code c stands for 2^(c / 8 - 7), or up to 6 % more between powers of two: the mantissa is
// a linear logarithm. A score becomes the code of its probability by one multiplication, and no
// exponential is taken: beside rounding to three digits, of 2.65 %, that leaves 3.1 % of error.
#pragma once

#include "attention/softmax.cuh"

namespace svg::attention::fp8 {

constexpr float kLn2 = 0.6931471805599453f;
constexpr int kCodesPerOctave = 8;
constexpr int kLargestCode = 126;  // 448
// The code of a row's maximum when it is set: room for later scores that are 2^3.75 higher, and
// twelve octaves until a probability is zero.
constexpr int kMaximumCode = 12 * kCodesPerOctave;
// What codes that are cut off stand for, relative to what they should, on average:
// 2^(-1/16) / (2 ln^2 2).
constexpr float kCodeBias = 0.9966f;
constexpr int32_t kMaskedScore = -0x7fffffff - 1;

__device__ __forceinline__ int32_t quad_max(int32_t x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

// The running softmax of the two rows a thread holds, in codes. A maximum is a whole number of
// codes, so that moving it changes no rounding.
struct Codes {
  static constexpr int kNone = -(1 << 24);
  int maximum[2] = {kNone, kNone};
  int scale[2];  // from scores to codes, times 2^32

  // Raises the maxima to include scores; returns what older results must be multiplied by.
  __device__ __forceinline__ void raise(const int32_t (&scores)[64], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int32_t highest = kMaskedScore;
#pragma unroll
      for (int i = 0; i < 16; ++i)
        highest = max(highest, max(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      highest = quad_max(highest);
      const int before = maximum[r];
      if (highest != kMaskedScore) maximum[r] = max(before, whole(highest, r));
      correction[r] =
          exp2_approx(static_cast<float>(before - maximum[r]) * (1.f / kCodesPerOctave));
    }
  }

  // Turns scores into codes relative to the maxima, two to a word; returns whether one does not fit
  // a byte, or a row has no maximum yet: such codes are not to be used. Codes are added up in 16
  // bits, so scores must lie within 2,800 nats of zero and of each other.
  template <bool kMasked>
  __device__ __forceinline__ bool encode(const int32_t (&scores)[64], uint32_t (&pairs)[32]) const {
    bool useless = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int offset = maximum[r] == kNone ? 0 : kMaximumCode - maximum[r];
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        int codes[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int32_t score = scores[4 * i + 2 * r + e];
          codes[e] = __mulhi(score, scale[r]);
          if (kMasked && score == kMaskedScore) codes[e] = ~offset;
        }
        pairs[2 * i + r] = __byte_perm(codes[0], codes[1], 0x5410);
      }
      uint32_t highest = pairs[r];
#pragma unroll
      for (int i = 1; i < 15; i += 2)
        highest = __vimax3_s16x2(highest, pairs[2 * i + r], pairs[2 * i + 2 + r]);
      highest = __vmaxs2(highest, pairs[30 + r]);
      const uint32_t offsets = __byte_perm(offset, offset, 0x1010);
#pragma unroll
      for (int i = 0; i < 16; ++i)
        pairs[2 * i + r] = __viaddmax_s16x2_relu(pairs[2 * i + r], offsets, 0);
      const int largest =
          max(static_cast<int>(highest) >> 16, static_cast<int>(highest << 16) >> 16);
      useless |= largest + offset > kLargestCode || maximum[r] == kNone;
    }
    return useless;
  }

  // The maximum in units of log 2, less what its probability is above one.
  __device__ __forceinline__ float base(int r) const {
    return static_cast<float>(maximum[r] - kMaximumCode) * (1.f / kCodesPerOctave) + 7.f;
  }

 private:
  __device__ __forceinline__ int whole(int32_t score, int r) const {
    return __mulhi(score, scale[r]);
  }
};

}  // namespace svg::attention::fp8
