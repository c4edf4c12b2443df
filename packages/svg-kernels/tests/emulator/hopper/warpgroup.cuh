// csrc/hopper/warpgroup.cuh: named barriers count threads.
#pragma once
#include <cuda_runtime.h>

namespace svg::hopper {

inline void arrive_named(emulated::Meeting& barrier, int threads, bool mine) {
  barrier.members = static_cast<unsigned>(threads);
  unsigned& any = barrier.slots[barrier.generation & 1][0];
  if (barrier.arrived == 0) any = 0;
  any |= mine;
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
    ++emulated::block.progress;
  }
}

inline bool named_barrier_any(int id, int threads, bool mine) {
  emulated::Meeting& barrier = emulated::block.named[id];
  const unsigned generation = barrier.generation;
  arrive_named(barrier, threads, mine);
  while (barrier.generation == generation) emulated::wait();
  return barrier.slots[generation & 1][0];
}

inline void named_barrier_sync(int id, int threads) { named_barrier_any(id, threads, false); }

inline void named_barrier_arrive(int id, int threads) {
  arrive_named(emulated::block.named[id], threads, false);
}

template <int kRegisters>
void setmaxnreg_inc() {}
template <int kRegisters>
void setmaxnreg_dec() {}

inline int warp_uniform(int x) { return __shfl_sync(~0u, x, 0); }

}  // namespace svg::hopper
