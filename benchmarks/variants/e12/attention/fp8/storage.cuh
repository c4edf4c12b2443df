// What the warps of a thread block share in the kernel for 8-bit keys and values.
#pragma once

#include "attention/storage.cuh"

namespace svg::attention::fp8 {

constexpr int kHeadDim = 128;    // bytes of a row of keys or values: one swizzle atom wide
constexpr int kRowStages = 3;    // of keys, and of values as rows
constexpr int kValueStages = 2;  // of values transposed
constexpr int kSummaryStages = 2;
constexpr int kTransposers = 2;  // warps that transpose values

constexpr int kAtomBytes = kAtomRows * kHeadDim;  // eight rows of bytes
constexpr int kStageBytes = kStageAtoms * kAtomBytes;
constexpr int kWideAtomBytes = 2 * kAtomBytes;  // eight rows of 16-bit elements
constexpr int kWideStageBytes = 2 * kStageBytes;

struct Arguments : attention::Arguments {
  const float* key_scale;    // [B, Hk, D]: key = rotated back (byte) * scale + mean
  const float* key_mean;     // [B, Hk, D]
  const float* value_scale;  // [B, Hk, D]: value = byte * scale + mean
  const float* value_mean;   // [B, Hk, D]
};

struct Params : Arguments {
  CUtensorMap key_maps[kBoxes];  // boxes of 1, 2, 4, 8 and 16 swizzle atoms
  CUtensorMap value_maps[kBoxes];
  CUtensorMap summary_key_map;  // boxes of one atom
  CUtensorMap summary_value_map;
  int tiles;
};

// The stages of the pipeline while runs are read.
struct RunStages {
  alignas(1024) unsigned char key[kRowStages][kStageBytes];
  alignas(1024) unsigned char row[kRowStages][kStageBytes];      // values
  alignas(1024) unsigned char value[kValueStages][kStageBytes];  // 128 channels of 128 keys
};

// The same memory while summaries are read, in 16 bits.
struct SummaryStages {
  alignas(1024) unsigned char key[kSummaryStages][kWideStageBytes];
  alignas(1024) unsigned char value[kSummaryStages][kWideStageBytes];
};

struct SharedStorage {
  // A half for each consumer warpgroup: queries in bytes, in 16 bits for the summaries, then the
  // output.
  alignas(1024) unsigned char query[2][kWideStageBytes / 2];
  union {
    RunStages runs;
    SummaryStages summaries;
  };
  float output[2][64][128];  // of each warpgroup, by register and thread
  float query_scale[kTileRows];  // from sums of products of bytes to units of log 2
  float query_shift[kTileRows];  // the logit of the mean key, which is left out of all of a row's
  float factors[kTileRows];  // by which a warp has lowered its rows
  // Rows that count in each atom of a stage, four bits each; read where a tile is not whole.
  uint64_t valid[kRowStages];
  alignas(16) int rescale_votes[2][kConsumers / 32];  // by stage modulo two, and warp
  uint64_t key_full[kRowStages], key_empty[kRowStages];
  uint64_t row_full[kRowStages], row_empty[kRowStages];
  uint64_t value_full[kValueStages], value_empty[kValueStages];
  uint64_t summary_full[kSummaryStages], summary_empty[kSummaryStages];
  uint64_t runs_read;  // the consumers need the stages of runs no more
};

}  // namespace svg::attention::fp8
