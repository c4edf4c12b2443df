// The producer warp: fills the stages of the pipeline with the key and value rows of a tile's runs.
#pragma once

#include "attention/storage.cuh"
#include "hopper/tma.cuh"

namespace svg::attention {

// Fills one stage of the pipeline with keys, then one with values. Lane l < 16 brings the row and
// the valid rows of atom l; lanes for which `loads` is true issue a TMA load.
template <int kHeadDim>
__device__ __forceinline__ void load_stage(SharedStorage<kHeadDim>& shared,
                                           const PipelineState& state, const CUtensorMap* key_map,
                                           const CUtensorMap* value_map, int row, int count,
                                           bool loads, int sequence, int lane) {
  const uint64_t nibble = lane < kStageAtoms ? static_cast<uint64_t>(count) << (4 * lane) : 0;
  const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble));
  const uint32_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble >> 32));
  const int offset = lane * SharedStorage<kHeadDim>::kAtomBytes;
  hopper::mbarrier_wait(&shared.key_empty[state.stage], state.phase ^ 1);
  if (lane == 0) {
    shared.valid[state.stage] = static_cast<uint64_t>(high) << 32 | low;
    hopper::mbarrier_arrive_expect_tx(&shared.key_full[state.stage],
                                      SharedStorage<kHeadDim>::kStageBytes);
  }
  __syncwarp();
  if (loads)
    hopper::tma_load_rows(shared.key[state.stage] + offset, key_map, &shared.key_full[state.stage],
                          row, sequence);
  hopper::mbarrier_wait(&shared.value_empty[state.stage], state.phase ^ 1);
  if (lane == 0)
    hopper::mbarrier_arrive_expect_tx(&shared.value_full[state.stage],
                                      SharedStorage<kHeadDim>::kStageBytes);
  __syncwarp();
  if (loads)
    hopper::tma_load_rows(shared.value[state.stage] + offset, value_map,
                          &shared.value_full[state.stage], row, sequence);
}

// Called by one warp: loads the runs of a tile, then the summaries.
template <int kHeadDim>
__device__ void produce(const Params& params, SharedStorage<kHeadDim>& shared, int sequence,
                        int64_t tile, int lane) {
  RunReader reader(params.run_starts + tile * params.runs, params.run_lengths + tile * params.runs,
                   params.runs, lane);
  PipelineState state;
  int row, count;
  while (reader.next(params.key_length, &row, &count)) {
    const int box = box_log2(row, params.key_length, lane);
    load_stage(shared, state, &params.key_maps[max(box, 0)], &params.value_maps[max(box, 0)], row,
               count, box >= 0, sequence, lane);
    state.advance();
  }
  for (int first = 0; first < params.summaries; first += kStageRows) {
    row = first + lane * kAtomRows;
    count = max(0, min(kAtomRows, params.summaries - row));
    load_stage(shared, state, &params.summary_key_map, &params.summary_value_map, row, count,
               lane < kStageAtoms, sequence, lane);
    state.advance();
  }
}

}  // namespace svg::attention
