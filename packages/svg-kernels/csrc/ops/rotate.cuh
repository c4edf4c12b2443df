// The rotation of kVec neighbouring channels, shared by rope.cu and qk_norm_rope.cu.
#pragma once
#include "ops/common.cuh"
#include "ops/rotary_tables.h"

namespace svg {

// Angles of kVec channels: 4 pairs when interleaved, 8 pairs (one member each) when half-split.
template <bool HALF>
struct Angles {
  static constexpr int kCount = HALF ? kVec : kVec / 2;
  float c[kCount], s[kCount];
};

template <bool HALF>
__device__ __forceinline__ Angles<HALF> load_angles(const Tables& t, int64_t batch, int64_t row,
                                                    int channel, int dim) {
  const int pair = HALF ? (channel < dim / 2 ? channel : channel - dim / 2) : channel / 2;
  const int64_t base =
      batch * t.batch_stride + row * t.row_stride + static_cast<int64_t>(pair) * t.pair_stride;
  Angles<HALF> a;
#pragma unroll
  for (int i = 0; i < Angles<HALF>::kCount; ++i) {
    a.c[i] = __ldg(t.cos + base + i * t.pair_stride);
    a.s[i] = __ldg(t.sin + base + i * t.pair_stride);
  }
  return a;
}

// `lanes` lanes hold one head. All 32 lanes of the warp must call this: half-split pairs meet by
// shuffle. Channels outside the tables (`turn` false) keep their values.
template <bool HALF>
__device__ __forceinline__ void rotate(float (&v)[kVec], const Angles<HALF>& a, bool turn,
                                       int lanes, int lane) {
  if (HALF) {
    const bool second = (lane & (lanes / 2)) != 0;
#pragma unroll
    for (int k = 0; k < kVec; ++k) {
      const float partner = __shfl_xor_sync(kAll, v[k], lanes / 2);
      if (turn) v[k] = v[k] * a.c[k] + (second ? partner : -partner) * a.s[k];
    }
  } else if (turn) {
#pragma unroll
    for (int i = 0; i < kVec / 2; ++i) {
      const float x = v[2 * i], y = v[2 * i + 1];
      v[2 * i] = x * a.c[i] - y * a.s[i];
      v[2 * i + 1] = y * a.c[i] + x * a.s[i];
    }
  }
}

inline bool power_of_two(int v) { return v > 0 && (v & (v - 1)) == 0; }

}  // namespace svg
