// The epilogue: from accumulators to rows of the output, each at its token's place.
#pragma once

#include "attention/query_tile.cuh"
#include "attention/softmax.cuh"

namespace svg::attention {

// Normalizes, turns fragments into rows through the query tile's shared memory, and scatters them
// to their tokens, in any layout whose last axis is contiguous. Rows that read nothing give 0.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_output(const QueryTile<T, kHeadDim>& tile,
                                             const Softmax& softmax,
                                             const float (&output)[kHeadDim / 2]) {
  constexpr int kChunks = QueryTile<T, kHeadDim>::kChunks;
  const Params& params = tile.params;
  const int row = tile.thread / 32 * 16 + tile.lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(softmax.sum[r]);
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;  // NaN stays NaN
    const int local = row + 8 * r;
    if (params.log_sum_exp && tile.lane % 4 == 0 && tile.first_row + local < params.query_length)
      params.log_sum_exp[tile.row_of_all(tile.token(tile.first_row + local))] =
          sum == 0.f ? -INFINITY : softmax.maximum[r] * params.scale + logf(sum);
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i)
      *reinterpret_cast<uint32_t*>(tile.element(local, i) + tile.lane % 4 * 4) =
          pack<T>(output[4 * i + 2 * r] * inverse, output[4 * i + 2 * r + 1] * inverse);
  }
  hopper::named_barrier_sync(kOutputReady + tile.group, 128);
  T* base = tile.in_head(static_cast<T*>(params.output), params.output_strides);
#pragma unroll
  for (int pass = 0; pass < 64 * kChunks / 128; ++pass) {
    const int piece = pass * 128 + tile.thread;
    const int local = piece / kChunks, chunk = piece % kChunks;
    if (tile.first_row + local < params.query_length)
      __stcs(reinterpret_cast<uint4*>(base + tile.token(tile.first_row + local) *
                                                 params.output_strides[2]) +
                 chunk,
             *reinterpret_cast<const uint4*>(tile.element(local, chunk)));
  }
}

}  // namespace svg::attention
