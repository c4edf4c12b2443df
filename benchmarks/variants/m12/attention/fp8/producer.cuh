// The producer warp: fills the stages of the pipeline with keys, with values as rows, and at the end
// with the summaries.
#pragma once

#include "attention/fp8/storage.cuh"
#include "hopper/tma.cuh"

namespace svg::attention::fp8 {

// Called by one warp: loads the rows of a tile's runs.
__device__ inline void produce_runs(const Params& params, SharedStorage& shared, int sequence, int64_t tile,
                             int lane) {
  RunReader reader(params.run_starts + tile * params.runs, params.run_lengths + tile * params.runs,
                   params.runs, lane);
  hopper::PipelineState<kRowStages> state;
  const int offset = lane * kAtomBytes;
  int row, count;
  while (reader.next(params.key_length, &row, &count)) {
    const int box = box_log2(row, params.key_length, lane);
    const uint64_t nibble = lane < kStageAtoms ? static_cast<uint64_t>(count) << (4 * lane) : 0;
    const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble));
    const uint32_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble >> 32));
    hopper::mbarrier_wait(&shared.key_empty[state.stage], state.phase ^ 1);
    if (lane == 0) {
      shared.valid[state.stage] = static_cast<uint64_t>(high) << 32 | low;
      hopper::mbarrier_arrive_expect_tx(&shared.key_full[state.stage], kStageBytes);
    }
    __syncwarp();
    if (box >= 0)
      hopper::tma_load_byte_rows(shared.runs.key[state.stage] + offset, &params.key_maps[box],
                     &shared.key_full[state.stage], row, sequence);
    hopper::mbarrier_wait(&shared.row_empty[state.stage], state.phase ^ 1);
    if (lane == 0) hopper::mbarrier_arrive_expect_tx(&shared.row_full[state.stage], kStageBytes);
    __syncwarp();
    if (box >= 0)
      hopper::tma_load_byte_rows(shared.runs.row[state.stage] + offset, &params.value_maps[box],
                     &shared.row_full[state.stage], row, sequence);
    state.advance();
  }
}

// Called by the same warp: loads the summaries once nobody needs the stages of runs.
__device__ inline void produce_summaries(const Params& params, SharedStorage& shared, int sequence, int lane) {
  if (params.summaries == 0) return;
  hopper::mbarrier_wait(&shared.runs_read, 0);
  hopper::PipelineState<kSummaryStages> state;
  for (int first = 0; first < params.summaries; first += kStageRows) {
    hopper::mbarrier_wait(&shared.summary_empty[state.stage], state.phase ^ 1);
    if (lane == 0) hopper::mbarrier_arrive_expect_tx(&shared.summary_full[state.stage], 2 * kWideStageBytes);
    __syncwarp();
    if (lane < kStageAtoms) {
      const int row = first + lane * kAtomRows, offset = lane * kWideAtomBytes;
      hopper::tma_load_rows(shared.summaries.key[state.stage] + offset, &params.summary_key_map,
                &shared.summary_full[state.stage], row, sequence);
      hopper::tma_load_rows(shared.summaries.value[state.stage] + offset, &params.summary_value_map,
                &shared.summary_full[state.stage], row, sequence);
    }
    state.advance();
  }
}

}  // namespace svg::attention::fp8
