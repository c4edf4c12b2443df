// What the producer and the consumers of a thread block share: parameters, shared memory, barriers.
#pragma once

#include <cuda.h>

#include "attention/arguments.h"
#include "attention/runs.cuh"
#include "hopper/mbarrier.cuh"

namespace svg::attention {

constexpr int kTileRows = 128;  // query rows of a tile
constexpr int kBoxes = 5;       // TMA boxes of 8, 16, 32, 64 and 128 rows
constexpr int kStages = 3;
constexpr int kConsumers = 256;  // threads of the two consumer warpgroups
constexpr int kThreads = kConsumers + 128;
constexpr uint64_t kAllValid = 0x8888888888888888ull;

using PipelineState = hopper::PipelineState<kStages>;

// Named barriers; each is followed by one for the second warpgroup.
enum NamedBarrier { kQueryReady = 1, kWarpScheduler = 3, kOutputReady = 5, kRescaleVotes = 7 };

struct Params : Arguments {
  CUtensorMap key_maps[kBoxes];  // boxes of 1, 2, 4, 8 and 16 swizzle atoms
  CUtensorMap value_maps[kBoxes];
  CUtensorMap summary_key_map;  // boxes of one atom
  CUtensorMap summary_value_map;
  int* spoiled;  // how many tiles are computed again, and which
  int tiles;
};

template <int kHeadDim>
struct SharedStorage {
  // Eight rows: one KB for each 64 columns.
  static constexpr int kAtomBytes = kAtomRows * kHeadDim * 2;
  static constexpr int kStageBytes = kStageAtoms * kAtomBytes;

  alignas(1024) unsigned char query[kStageBytes];
  alignas(1024) unsigned char key[kStages][kStageBytes];
  alignas(1024) unsigned char value[kStages][kStageBytes];
  // Rows that count in each atom of a stage, four bits each; read where a tile is not whole.
  uint64_t valid[kStages];
  alignas(16) int rescale_votes[2][kConsumers / 32];  // by stage modulo two, and warp
  int listed;  // whether the tile is among those that are computed again
  uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

}  // namespace svg::attention
