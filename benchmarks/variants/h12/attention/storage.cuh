// What the producer and the consumers of a thread block share: parameters, shared memory, barriers.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "attention/arguments.h"
#include "attention/runs.cuh"
#include "hopper/mbarrier.cuh"

namespace svg::attention {

constexpr int kBoxes = 5;        // TMA boxes of 8, 16, 32, 64 and 128 rows
constexpr int kStages = 3;       // of values, and of keys in 16 bits
constexpr int kByteStages = 4;   // of keys in 8 bits
constexpr int kConsumers = 256;  // threads of the two consumer warpgroups
constexpr int kThreads = kConsumers + 128;
constexpr uint64_t kAllValid = 0x8888888888888888ull;

// Named barriers; each is followed by one for the second warpgroup.
enum NamedBarrier { kQueryReady = 1, kWarpScheduler = 3, kOutputReady = 5, kRescaleVotes = 7 };

struct Params : Arguments {
  CUtensorMap key_maps[kBoxes];  // boxes of 1, 2, 4, 8 and 16 swizzle atoms
  CUtensorMap value_maps[kBoxes];
  CUtensorMap summary_key_map;  // boxes of one atom
  CUtensorMap summary_value_map;
  int* spoiled;  // how many tiles are computed again, and which
};

// What keys in 8 bits have beside them: key = rotated back (integer * row scale) * scale + mean.
struct ByteKeys {
  const float* row_scale;  // [B, Hk, S]
  const float* key_scale;  // [B, Hk, D]
  const float* key_mean;   // [B, Hk, D]
};
struct ByteParams : Params, ByteKeys {};
template <typename Key>
using ParamsOf = std::conditional_t<std::is_same_v<Key, int8_t>, ByteParams, Params>;

// `Key` is the type of the keys of runs: int8_t, or the 16-bit one of everything else. With int8_t
// the queries are first laid out as bytes, and the keys of the summaries follow those of the runs
// in the same memory, in fewer stages.
template <int kHeadDim, typename Key>
struct SharedStorage {
  static constexpr bool kBytes = std::is_same_v<Key, int8_t>;
  // Eight rows in 16 bits: one KB for each 64 columns.
  static constexpr int kAtomBytes = kAtomRows * kHeadDim * 2;
  static constexpr int kStageBytes = kStageAtoms * kAtomBytes;
  static constexpr int kKeyStages = kBytes ? kByteStages : kStages;

  alignas(1024) unsigned char query[kStageBytes];
  alignas(1024) unsigned char key[kKeyStages][kStageRows * kHeadDim * sizeof(Key)];
  alignas(1024) unsigned char value[kStages][kStageBytes];
  alignas(16) float row_scale[kBytes ? kKeyStages : 1][kStageRows];  // of keys in bytes
  float query_scale[kBytes ? kTileRows : 1];  // from products of bytes to units of log 2
  float
      query_shift[kBytes ? kTileRows : 1];  // the logit of the mean key, left out of all of a row's
  // Rows that count in each atom of a stage, four bits each; read where a tile is not whole.
  uint64_t valid[kKeyStages];
  alignas(16) int rescale_votes[2][kConsumers / 32];  // by stage modulo two, and warp
  int listed;  // whether the tile is among those that are computed again
  uint64_t key_full[kKeyStages], key_empty[kKeyStages], value_full[kStages], value_empty[kStages];
  uint64_t summary_full[kKeyStages], summary_empty[kKeyStages];  // of their keys, if not as above
};

// The ring of the stages of keys of type `K` in the shared memory of a kernel for `Key`.
template <typename K, int kHeadDim, typename Key>
struct KeyRing {
  using Storage = SharedStorage<kHeadDim, Key>;
  static constexpr bool kOfRuns = std::is_same_v<K, Key>;
  static constexpr int kAtomBytes = kAtomRows * kHeadDim * sizeof(K);
  static constexpr int kStageBytes = kStageAtoms * kAtomBytes;
  static constexpr int kCount = sizeof(Storage::key) / kStageBytes;
  using State = hopper::PipelineState<kCount>;

  static __device__ __forceinline__ uint64_t* full(Storage& shared) {
    return kOfRuns ? shared.key_full : shared.summary_full;
  }
  static __device__ __forceinline__ uint64_t* empty(Storage& shared) {
    return kOfRuns ? shared.key_empty : shared.summary_empty;
  }
};

}  // namespace svg::attention
