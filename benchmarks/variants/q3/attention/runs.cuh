// How one warp turns a tile's list of runs into stages of key rows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace svg::attention {

constexpr int kAtomRows = 8;     // rows of a swizzle atom: the finest TMA load
constexpr int kStageRows = 128;  // key rows of a stage
constexpr int kStageAtoms = kStageRows / kAtomRows;

// What a tile's runs amount to: each takes atoms of its own, the last of them perhaps in part.
struct Extent {
  int atoms;
  bool whole;  // no atom is taken in part: every length is a multiple of eight
};

// Called by one warp.
__device__ inline Extent measure(const int* lengths, int runs, int lane) {
  int atoms = 0, rows = 0;
  for (int run = lane; run < runs; run += 32) {
    const int length = lengths[run];
    atoms += (length + kAtomRows - 1) / kAtomRows;
    rows |= length;
  }
  return {__reduce_add_sync(~0u, atoms), __reduce_or_sync(~0u, rows) % kAtomRows == 0};
}

// A warp's window on the run list: lane r holds run r of the current 32, and where it ends counted
// in atoms.
class RunReader {
 public:
  __device__ RunReader(const int* starts, const int* lengths, int runs, int lane)
      : starts_(starts), lengths_(lengths), runs_(runs), lane_(lane) {
    load(0);
  }

  // Lane g < 16 learns the first row and the valid rows of atom g of the next stage; past the
  // end both the row (beyond every key, so that TMA fills zeros) and the count say so.
  // Returns false when the list is exhausted.
  __device__ bool next(int past_the_end, int* row, int* count) {
    int wanted = taken_ + lane_;
    bool open = lane_ < kStageAtoms;
    *row = past_the_end + lane_ * kAtomRows;
    *count = 0;
    while (true) {
      int run = 0;
#pragma unroll
      for (int step = 16; step; step >>= 1) {
        const int end = __shfl_sync(~0u, end_, run + step - 1);
        if (wanted >= end) run += step;
      }
      const int start = __shfl_sync(~0u, start_, run & 31);
      const int length = __shfl_sync(~0u, length_, run & 31);
      const int end = __shfl_sync(~0u, end_, run & 31);
      if (open && wanted < total_) {
        const int offset = (wanted - (end - (length + kAtomRows - 1) / kAtomRows)) * kAtomRows;
        *row = start + offset;
        *count = min(kAtomRows, length - offset);
        open = false;
      }
      if (!__any_sync(~0u, open) || first_ + 32 >= runs_) break;
      wanted -= total_;
      taken_ -= total_;
      load(first_ + 32);
    }
    taken_ += kStageAtoms;
    return __shfl_sync(~0u, *count, 0) > 0;
  }

 private:
  __device__ void load(int first) {
    first_ = first;
    const int run = first + lane_;
    length_ = run < runs_ ? lengths_[run] : 0;
    start_ = run < runs_ ? starts_[run] : 0;
    end_ = (length_ + kAtomRows - 1) / kAtomRows;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
      const int below = __shfl_up_sync(~0u, end_, step);
      if (lane_ >= step) end_ += below;
    }
    total_ = __shfl_sync(~0u, end_, 31);
  }

  const int* starts_;
  const int* lengths_;
  int runs_, lane_, first_ = 0, taken_ = 0, total_ = 0;
  int start_ = 0, length_ = 0, end_ = 0;
};

// Log2 of the atoms in this lane's TMA box, or -1 when another lane's box covers its atom. A
// segment of n consecutive atoms is cut into the powers of two of n, the largest first. Only a box
// of a single atom may reach beyond the last key: TMA checks the bounds of the first atom of a box
// only.
__device__ __forceinline__ int box_log2(int row, int key_length, int lane) {
  const int below = __shfl_up_sync(~0u, row, 1);
  const bool joined =
      lane > 0 && lane < kStageAtoms && row == below + kAtomRows && row + kAtomRows <= key_length;
  const uint32_t breaks =
      ~__ballot_sync(~0u, joined);  // lanes that begin a segment; lanes beyond 16 always do
  if (lane >= kStageAtoms) return -1;
  const int begin = 31 - __clz(breaks & (2u << lane) - 1);
  const int end = __ffs(breaks & ~((2u << lane) - 1)) - 1;
  const int place = lane - begin, size = end - begin;
  const int bit = 31 - __clz(place ^ size);
  return (place & ((2 << bit) - 1)) == 0 ? bit : -1;
}

}  // namespace svg::attention
