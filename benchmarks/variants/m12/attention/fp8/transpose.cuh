// The transposing warps: the tensor cores want eight-bit operands with the reduced axis, here the
// keys, contiguous, and values arrive as rows.
#pragma once

#include "attention/fp8/storage.cuh"
#include "hopper/matrix.cuh"
#include "hopper/tma.cuh"

namespace svg::attention::fp8 {

// Turns 128 rows of 128 channels into 128 channels of 128 keys, both swizzled by 128 bytes. Of each
// sixteen keys, bytes 4 t .. 4 t + 3 of a channel are keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: those
// whose probabilities lane t of a quad holds.
//
// A matrix of 16-bit elements transposed leaves a lane two channels of two keys; two of them, eight
// keys apart, hold a word of each channel. Lanes 0 to 15 store their even channels where lanes 16
// to 31 store odd ones, so that the eight rows of a matrix begin in different banks.
__device__ __forceinline__ void transpose(const unsigned char* rows, unsigned char* values,
                                          int warp, int lane) {
  constexpr int kGroups = kHeadDim / 32 / kTransposers;  // of 32 channels, for each warp
  const int matrix = lane / 8, line = lane % 8;
  // The channel, of the 32 of a group, whose row this lane addresses.
  const int channel = matrix / 2 * 16 + 2 * line + (line < 4 ? matrix % 2 : 1 - matrix % 2);
  const uint32_t to = hopper::shared_address(values) + (warp * kGroups * 32 + channel) * kStageRows;
  const uint32_t swizzle = channel % 8 << 4;
  const bool odd = lane >= 16;
  const uint32_t first = odd ? 0x7531 : 0x6420, second = odd ? 0x6420 : 0x7531;
  uint32_t from[kGroups];
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int piece = 2 * (warp * kGroups + group) + matrix / 2 ^ line;
    from[group] = hopper::shared_address(rows) + (matrix % 2 * 8 + line) * kHeadDim + 16 * piece;
  }
#pragma unroll 4
  for (int keys = 0; keys < kStageRows / 16; ++keys) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t pairs[4], words[4];
      hopper::ldmatrix_transposed(pairs, from[group] + keys * 16 * kHeadDim);
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        words[half] = __byte_perm(pairs[half], pairs[half + 1], first);
        words[half + 1] = __byte_perm(pairs[half], pairs[half + 1], second);
      }
      hopper::stmatrix(to + group * 32 * kStageRows + (keys << 4 ^ swizzle), words);
    }
  }
}

// Called by warp `warp` of the transposers: transposes the values of a tile's runs.
__device__ inline void transpose_runs(const Params& params, SharedStorage& shared, int64_t tile, int warp,
                               int lane) {
  const Extent extent = measure(params.run_lengths + tile * params.runs, params.runs, lane);
  const int stages = (extent.atoms + kStageAtoms - 1) / kStageAtoms;
  hopper::PipelineState<kRowStages> row;
  hopper::PipelineState<kValueStages> value;
  for (int j = 0; j < stages; ++j) {
    hopper::mbarrier_wait(&shared.row_full[row.stage], row.phase);
    hopper::mbarrier_wait(&shared.value_empty[value.stage], value.phase ^ 1);
    transpose(shared.runs.row[row.stage], shared.runs.value[value.stage], warp, lane);
    hopper::fence_proxy_async();
    __syncwarp();
    if (lane == 0) {
      hopper::mbarrier_arrive(&shared.value_full[value.stage]);
      hopper::mbarrier_arrive(&shared.row_empty[row.stage]);
    }
    row.advance();
    value.advance();
  }
}

}  // namespace svg::attention::fp8
