// csrc/hopper/tma.cuh: loads arrive at once, which a correct kernel cannot tell from later.
#pragma once
#include <cuda.h>

#include "hopper/mbarrier.cuh"

namespace svg::hopper {

// Rows of several 128-byte columns lie in atoms of eight rows, a column behind the other.
inline void load_rows(void* destination, const CUtensorMap* map, uint64_t* barrier, int row,
                      int sequence) {
  const uint32_t to = shared_address(destination);
  const int columns = map->row_bytes / 128;
  if (to % 1024) emulated::block.error = "a swizzled load must begin with a swizzle atom";
  for (int i = 0; i < map->box_rows; ++i) {
    // With atoms an axis of their own, only the row within the first atom is checked.
    const bool inside = map->first_atom_checked ? row + i % 8 < map->rows : row + i < map->rows;
    const unsigned char* from =
        map->base + sequence * map->sequence_stride + (row + i) * map->row_stride;
    if (inside && row + i >= map->rows) emulated::block.error = "a load passes the last row";
    for (int byte = 0; byte < map->row_bytes; ++byte) {
      const uint32_t at = to + i / 8 * columns * 1024 + byte / 128 * 1024 + i % 8 * 128 + byte % 128;
      *swizzled(at) = inside && row + i < map->rows ? from[byte] : 0;
    }
  }
  arrive_bytes(barrier, static_cast<uint32_t>(map->box_rows * map->row_bytes));
}

inline void tma_load_rows(void* destination, const CUtensorMap* map, uint64_t* barrier, int row,
                          int sequence) {
  load_rows(destination, map, barrier, row, sequence);
}

inline void tma_load_byte_rows(void* destination, const CUtensorMap* map, uint64_t* barrier,
                               int row, int sequence) {
  load_rows(destination, map, barrier, row, sequence);
}

inline void tma_prefetch_map(const CUtensorMap*) {}
inline void fence_proxy_async() {}

}  // namespace svg::hopper
