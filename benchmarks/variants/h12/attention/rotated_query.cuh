// Queries in 8 bits: scaled and rotated as the keys were, and rounded where they lie.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "attention/query_tile.cuh"
#include "attention/softmax.cuh"

namespace svg::attention {

// The signs of the rotation, a bit for each channel; svg_kernels/rotation.py has the same.
constexpr uint64_t kLowSigns = 0x243F6A8885A308D3ull, kHighSigns = 0x13198A2E03707344ull;

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// The largest number of an 8-bit type, and four numbers rounded to it.
template <typename Byte>
constexpr float kLargest = 127.f;
template <>
constexpr float kLargest<__nv_fp8_e4m3> = 448.f;

template <typename Byte>
__device__ __forceinline__ uint32_t round_four(float a, float b, float c, float d);
template <>
__device__ __forceinline__ uint32_t round_four<int8_t>(float a, float b, float c, float d) {
  return hopper::round_to_int8(a, b, c, d);
}
template <>
__device__ __forceinline__ uint32_t round_four<__nv_fp8_e4m3>(float a, float b, float c, float d) {
  return hopper::join(hopper::round_to_e4m3(a, b), hopper::round_to_e4m3(c, d));
}

// Rounds the 64 rows that a warpgroup has loaded to bytes, in their place, with a scale for each
// row: `query_scale` takes sums of products of bytes to units of log 2, `query_shift` is the logit
// of the mean key. Two threads share a row, sixty-four channels each, so that all but the last of
// the rotation's seven steps stay within a thread.
template <typename Byte, typename T>
__device__ __forceinline__ void round_query(const QueryTile<T, 128>& tile, const float* key_mean,
                                            const float* key_scale, float* query_scale,
                                            float* query_shift) {
  constexpr int kHeadDim = 128, kHalf = kHeadDim / 2;
  const int local = tile.thread / 2, half = tile.thread % 2;
  const int64_t channels = int64_t{tile.key_sequence()} * kHeadDim + half * kHalf;
  const float4* means = reinterpret_cast<const float4*>(key_mean + channels);
  const float4* scales = reinterpret_cast<const float4*>(key_scale + channels);
  const uint64_t signs = half ? kHighSigns : kLowSigns;
  hopper::named_barrier_sync(kQueryReady + tile.group, 128);  // the rows are there
  float x[kHalf], dot = 0.f, largest = 0.f;
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const uint2 piece =
        *reinterpret_cast<const uint2*>(tile.element(local, half * 8 + i / 8) + i % 8 * 2);
    const float2 low = unpack<T>(piece.x), high = unpack<T>(piece.y);
    const float4 mean = means[i / 4], scale = scales[i / 4];
    dot = fmaf(low.x, mean.x, fmaf(low.y, mean.y, dot));
    dot = fmaf(high.x, mean.z, fmaf(high.y, mean.w, dot));
    x[i] = low.x * scale.x, x[i + 1] = low.y * scale.y;
    x[i + 2] = high.x * scale.z, x[i + 3] = high.y * scale.w;
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i) x[i] = signs >> i & 1 ? -x[i] : x[i];
#pragma unroll
  for (int step = 1; step < kHalf; step *= 2) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      if (i & step) continue;
      const float a = x[i], b = x[i + step];
      x[i] = a + b, x[i + step] = a - b;
    }
  }
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float other = __shfl_xor_sync(~0u, x[i], 1);
    x[i] = half ? other - x[i] : x[i] + other;
    largest = fmaxf(largest, fabsf(x[i]));
  }
  dot += __shfl_xor_sync(~0u, dot, 1);
  largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
  largest = largest > 0.f ? largest : 1.f;
  const float inverse = kLargest<Byte> / largest;
  hopper::named_barrier_sync(kQueryReady + tile.group, 128);  // all have read what bytes replace
#pragma unroll
  for (int i = 0; i < kHalf; i += 16) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const float* four = x + i + 4 * w;
      words[w] = round_four<Byte>(four[0] * inverse, four[1] * inverse, four[2] * inverse,
                                  four[3] * inverse);
    }
    *reinterpret_cast<uint4*>(tile.rows() + local * kHeadDim +
                              ((half * 4 + i / 16) ^ local % 8) * 16) =
        make_uint4(words[0], words[1], words[2], words[3]);
  }
  if (half == 0) {
    // What the sums of the rotation are too large by is sqrt(128). A row with a NaN or an infinity
    // has one in every channel now, and gets a scale of NaN.
    const float unit = tile.params.scale * kLog2E * (0.08838834764831845f / kLargest<Byte>);
    query_scale[tile.group * 64 + local] = fmaf(x[0], 0.f, largest) * unit;
    query_shift[tile.group * 64 + local] = dot * tile.params.scale;
  }
  tile.show();
}

}  // namespace svg::attention
