// The producer warp: fills the stages of the pipeline with the key and value rows of a tile's runs.
#pragma once

#include "attention/storage.cuh"
#include "hopper/tma.cuh"

namespace svg::attention {

// Loads rows of keys: a box of swizzle atoms.
template <typename K>
__device__ __forceinline__ void load_rows(unsigned char* to, const CUtensorMap* map,
                                          uint64_t* barrier, int row, int sequence) {
  if constexpr (std::is_same_v<K, int8_t>)
    hopper::tma_load_byte_rows(to, map, barrier, row, sequence);
  else
    hopper::tma_load_rows(to, map, barrier, row, sequence);
}

// Called by one warp, once for each tile.
template <int kHeadDim, typename Key>
class Producer {
 public:
  using Storage = SharedStorage<kHeadDim, Key>;
  template <typename K>
  using Ring = KeyRing<K, kHeadDim, Key>;

  __device__ Producer(const ParamsOf<Key>& params, Storage& shared, int sequence, int lane)
      : params_(params), shared_(shared), sequence_(sequence), lane_(lane) {}

  // Loads the runs of a tile, then the summaries.
  template <typename Wide>
  __device__ void run(int64_t tile) {
    RunReader reader(params_.run_starts + tile * params_.runs,
                     params_.run_lengths + tile * params_.runs, params_.runs, lane_);
    typename Ring<Key>::State key;
    hopper::PipelineState<kStages> value;
    int row, count;
    while (reader.next(params_.key_length, &row, &count)) {
      const int box = box_log2(row, params_.key_length, lane_);
      load_stage<Key>(key, value, &params_.key_maps[max(box, 0)], &params_.value_maps[max(box, 0)],
                      row, count, box >= 0);
      key.advance();
      value.advance();
    }
    if constexpr (std::is_same_v<Wide, Key>) {
      load_summaries<Wide>(key, value);
    } else if (params_.summaries > 0) {
      for (int s = 0; s < Ring<Key>::kCount; ++s) {  // their memory is that of the keys of runs
        hopper::mbarrier_wait(&shared_.key_empty[key.stage], key.phase ^ 1);
        key.advance();
      }
      load_summaries<Wide>({}, value);
    }
  }

 private:
  template <typename Wide>
  __device__ __forceinline__ void load_summaries(typename Ring<Wide>::State key,
                                                 hopper::PipelineState<kStages> value) {
    for (int first = 0; first < params_.summaries; first += kStageRows) {
      const int row = first + lane_ * kAtomRows;
      const int count = max(0, min(kAtomRows, params_.summaries - row));
      load_stage<Wide>(key, value, &params_.summary_key_map, &params_.summary_value_map, row, count,
                       lane_ < kStageAtoms);
      key.advance();
      value.advance();
    }
  }

  // Fills one stage with keys, then one with values. Lane l < 16 brings the row and the valid rows
  // of atom l; lanes for which `loads` is true issue a TMA load.
  template <typename K>
  __device__ __forceinline__ void load_stage(const typename Ring<K>::State& key,
                                             const hopper::PipelineState<kStages>& value,
                                             const CUtensorMap* key_map,
                                             const CUtensorMap* value_map, int row, int count,
                                             bool loads) {
    const uint64_t nibble = lane_ < kStageAtoms ? static_cast<uint64_t>(count) << (4 * lane_) : 0;
    const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble));
    const uint32_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble >> 32));
    float4 scales;
    if constexpr (std::is_same_v<K, int8_t>) scales = row_scales(row);
    uint64_t* full = &Ring<K>::full(shared_)[key.stage];
    hopper::mbarrier_wait(&Ring<K>::empty(shared_)[key.stage], key.phase ^ 1);
    if constexpr (std::is_same_v<K, int8_t>)
      *reinterpret_cast<float4*>(&shared_.row_scale[key.stage][lane_ * 4]) = scales;
    if (lane_ == 0 && Ring<K>::kOfRuns)
      shared_.valid[key.stage] = static_cast<uint64_t>(high) << 32 | low;
    __syncwarp();
    if (lane_ == 0) hopper::mbarrier_arrive_expect_tx(full, Ring<K>::kStageBytes);
    __syncwarp();
    if (loads)
      load_rows<K>(shared_.key[0] + key.stage * Ring<K>::kStageBytes + lane_ * Ring<K>::kAtomBytes,
                   key_map, full, row, sequence_);
    hopper::mbarrier_wait(&shared_.value_empty[value.stage], value.phase ^ 1);
    if (lane_ == 0)
      hopper::mbarrier_arrive_expect_tx(&shared_.value_full[value.stage], Storage::kStageBytes);
    __syncwarp();
    if (loads)
      hopper::tma_load_rows(shared_.value[value.stage] + lane_ * Storage::kAtomBytes, value_map,
                            &shared_.value_full[value.stage], row, sequence_);
  }

  // The scales of four of the stage's keys, asked for before there is room for them.
  __device__ __forceinline__ float4 row_scales(int row) const {
    const int first = __shfl_sync(~0u, row, lane_ / 2) + lane_ % 2 * 4;
    const float* scales = params_.row_scale + int64_t{sequence_} * params_.key_length + first;
    float four[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) four[i] = first + i < params_.key_length ? __ldg(scales + i) : 0.f;
    return make_float4(four[0], four[1], four[2], four[3]);
  }

  const ParamsOf<Key>& params_;
  Storage& shared_;
  int sequence_, lane_;
};

}  // namespace svg::attention
