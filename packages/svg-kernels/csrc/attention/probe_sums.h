// What a call of probe_sums works on, as raw pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace svg::probe_sums {

// What a listed row counts: agreement and energy, bf16 in the low and the high half, and the column
// of its segment; kMean is added for a mean key, kNobody stands for a row that only fills up.
struct Mark {
  uint32_t counts;
  int of;
};
constexpr int kMean = 8, kNobody = 16;

// A segment that ends in a stage, -1 for none, and the energy of its mean value.
struct Ending {
  int segment;
  float energy;
};

// Strides are in elements.
struct Arguments {
  const void* means;           // [B, H, P, D], bf16: the probes
  const void* key;             // [B, Hk, N, D]
  const void* value;           // as key
  const int32_t* order;        // [B, Hk, N]: rows of key, segment by segment
  const void* centroids;       // [B, Hk, C, D]
  const void* value_means;     // [B, Hk, C, D]
  const float* constants;      // [B, Hk, D]: the mean value of a head
  const int32_t* sizes;        // [B, Hk, C]
  const int32_t* starts;       // [B, Hk, C]: first entry of a segment in order
  const int32_t* list_starts;  // [B, Hk, C + 1]: first listed row of a segment, and their number
  const int32_t* columns;      // [B, Hk, C]: filled segments counted from 0, modulo 8
  int32_t* rows;               // [B, Hk, R]: row of key, or -1 - c for a centroid; R = capacity
  Mark* marks;                 // [B, Hk, R]
  Ending* endings;             // [B, Hk, R / 128, 8], -1 where lay_out writes none
  uint2* scratch;              // [programs, probes of a block, C]
  float* errors;               // [B, H, T, C]
  float* gaps;                 // [B, H, T, C]
  float* output;               // [B, H, P, D] or null
  float* log_sum_exp;          // [B, H, P] or null with output
  int64_t key_strides[3];      // batch, head, token
  int64_t value_strides[3];
  int64_t batch, length, capacity;
  int heads, key_heads, probes, keys, segments, tiles, per_tile, probe_rows, programs, head_dim;
  float scale, largest_gap;
};

// Reads what `probe_sums/cuda.py` packs: 38 integers in the order of the fields above.
inline Arguments read_arguments(const int64_t* packed, double scale, double largest_gap) {
  Arguments a{};
  int next = 0;
  const auto pointer = [&] { return reinterpret_cast<void*>(packed[next++]); };
  const auto number = [&] { return static_cast<int>(packed[next++]); };
  a.means = pointer(), a.key = pointer(), a.value = pointer();
  a.order = static_cast<const int32_t*>(pointer());
  a.centroids = pointer(), a.value_means = pointer();
  a.constants = static_cast<const float*>(pointer());
  a.sizes = static_cast<const int32_t*>(pointer());
  a.starts = static_cast<const int32_t*>(pointer());
  a.list_starts = static_cast<const int32_t*>(pointer());
  a.columns = static_cast<const int32_t*>(pointer());
  a.rows = static_cast<int32_t*>(pointer());
  a.marks = static_cast<Mark*>(pointer());
  a.endings = static_cast<Ending*>(pointer());
  a.scratch = static_cast<uint2*>(pointer());
  a.errors = static_cast<float*>(pointer()), a.gaps = static_cast<float*>(pointer());
  a.output = static_cast<float*>(pointer()), a.log_sum_exp = static_cast<float*>(pointer());
  for (int64_t& stride : a.key_strides) stride = packed[next++];
  for (int64_t& stride : a.value_strides) stride = packed[next++];
  a.batch = packed[next++], a.length = packed[next++], a.capacity = packed[next++];
  a.heads = number(), a.key_heads = number(), a.probes = number(), a.keys = number();
  a.segments = number(), a.tiles = number(), a.per_tile = number(), a.probe_rows = number();
  a.programs = number(), a.head_dim = number();
  a.scale = static_cast<float>(scale), a.largest_gap = static_cast<float>(largest_gap);
  return a;
}

}  // namespace svg::probe_sums
