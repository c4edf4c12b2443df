// csrc/hopper/mbarrier.cuh in a word of its own: arrivals expected and missing, bytes missing, phase.
#pragma once
#include "hopper/address.cuh"

namespace svg::hopper {

struct Mbarrier {
  uint16_t expected;
  int16_t missing;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t), "as large as the barrier it stands for");

inline Mbarrier& word(uint64_t* barrier) { return *reinterpret_cast<Mbarrier*>(barrier); }

inline void complete(Mbarrier& barrier) {
  if (barrier.missing < 0) emulated::block.error = "more arrivals than a barrier expects";
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.missing = static_cast<int16_t>(barrier.expected);
  ++emulated::block.progress;
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  word(barrier) = {static_cast<uint16_t>(arrivals), static_cast<int16_t>(arrivals), 0, 0};
}

inline void mbarrier_init_fence() {}

inline void mbarrier_invalidate(uint64_t* barrier) { *barrier = 0; }

inline void mbarrier_arrive(uint64_t* barrier, int arrivals = 1) {
  word(barrier).missing -= static_cast<int16_t>(arrivals);
  complete(word(barrier));
}

inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
  word(barrier).bytes += static_cast<int32_t>(bytes);
  mbarrier_arrive(barrier);
}

inline void arrive_bytes(uint64_t* barrier, uint32_t bytes) {
  word(barrier).bytes -= static_cast<int32_t>(bytes);
  complete(word(barrier));
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  while (word(barrier).phase == parity) emulated::wait();
}

template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;
  void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace svg::hopper
