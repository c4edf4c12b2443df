// Attention over runs of key rows, for Hopper (sm_90a).
//
// A tile is 128 consecutive rows of the reordered queries. Its operand is a list of runs (first
// row, rows) of the reordered keys; everything a tile does not read is left out of its softmax. One
// thread block computes one tile:
//
//   producer warp   turns runs into full 128-row stages of K and V. A stage is sixteen granules of
//                   eight rows, a granule comes from one run, and neighbouring granules are
//                   fetched by one copy of 8 to 128 rows.
//   two warpgroups  each own 64 query rows: S = Q K^T, online softmax, O += P V. While one takes the
//                   exponentials of stage j, the tensor cores run its product with the values of
//                   stage j-1 and the products of the other: the two take turns to issue.
//
// Probabilities are relative to the maximum of the first stage. Floating point does not mind that
// they exceed one, so no later stage looks for its maximum or rescales O, which is half of the work
// between products; only where one comes near the largest number of its type is that stage's S
// computed once more, and the maximum raised.
//
// Rows a granule reads beyond its run are masked, so any run length is exact; runs whose lengths
// are multiples of eight need no mask and waste nothing. Q rows are gathered and O rows scattered
// through the query order, so that queries are never permuted in memory.

#include "hopper.cuh"
#include "launch.h"
#include "rows_map.h"
#include "runs.cuh"
#include "wgmma.cuh"

namespace svg {
namespace {

using namespace hopper;
using namespace runs;

constexpr int kTileRows = 128;  // query rows of a tile
constexpr int kBoxes = 5;       // copies of 8, 16, 32, 64 and 128 rows
constexpr int kStages = 3;
constexpr int kConsumers = 256;  // threads of the two computing warpgroups
constexpr int kThreads = kConsumers + 128;
constexpr uint64_t kAllValid = 0x8888888888888888ull;
constexpr float kLog2E = 1.4426950408889634f;

// Each is followed by one for the second warpgroup.
enum NamedBarrier { kQueryReady = 1, kTurn = 3, kOutputReady = 5, kSettle = 7 };

struct Params : AttentionArgs {
  CUtensorMap key_maps[kBoxes];  // boxes of 1, 2, 4, 8 and 16 groups of eight rows
  CUtensorMap value_maps[kBoxes];
  CUtensorMap summary_key_map;  // boxes of one group
  CUtensorMap summary_value_map;
  int tiles;
};

template <int kHeadDim>
struct Shared {
  // Eight rows: one KB for each 64 columns.
  static constexpr int kGroupBytes = kGranule * kHeadDim * 2;
  static constexpr int kStageBytes = kGranules * kGroupBytes;

  alignas(1024) unsigned char query[kStageBytes];
  alignas(1024) unsigned char key[kStages][kStageBytes];
  alignas(1024) unsigned char value[kStages][kStageBytes];
  // Rows that count in each granule of a stage, four bits each; read where a tile is not whole.
  uint64_t valid[kStages];
  alignas(16) int doubts[2][kConsumers / 32];  // by stage modulo two, and warp
  uint64_t key_full[kStages], key_empty[kStages], value_full[kStages], value_empty[kStages];
};

// A ring position: which stage, and how often the ring has wrapped.
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The same value in every lane, in a form the compiler knows to be the same.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// The same value, of which the compiler knows nothing: what is rarely computed from it is not kept
// in registers meanwhile.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Fills one stage of the ring with keys, then one with values.
template <int kHeadDim>
__device__ __forceinline__ void fill(Shared<kHeadDim>& shared, const Ring& ring,
                                     const CUtensorMap* key_map, const CUtensorMap* value_map,
                                     int row, int count, bool copies, int sequence, int lane) {
  const uint64_t nibble = lane < kGranules ? static_cast<uint64_t>(count) << (4 * lane) : 0;
  const uint32_t low = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble));
  const uint32_t high = __reduce_or_sync(~0u, static_cast<uint32_t>(nibble >> 32));
  const int offset = lane * Shared<kHeadDim>::kGroupBytes;
  barrier_wait(&shared.key_empty[ring.stage], ring.phase ^ 1);
  if (lane == 0) {
    shared.valid[ring.stage] = static_cast<uint64_t>(high) << 32 | low;
    barrier_expect(&shared.key_full[ring.stage], Shared<kHeadDim>::kStageBytes);
  }
  __syncwarp();
  if (copies)
    copy_rows(shared.key[ring.stage] + offset, key_map, &shared.key_full[ring.stage], row,
              sequence);
  barrier_wait(&shared.value_empty[ring.stage], ring.phase ^ 1);
  if (lane == 0) barrier_expect(&shared.value_full[ring.stage], Shared<kHeadDim>::kStageBytes);
  __syncwarp();
  if (copies)
    copy_rows(shared.value[ring.stage] + offset, value_map, &shared.value_full[ring.stage], row,
              sequence);
}

template <int kHeadDim>
__device__ void produce(const Params& params, Shared<kHeadDim>& shared, int sequence, int64_t tile,
                        int lane) {
  RunReader reader(params.run_starts + tile * params.runs, params.run_lengths + tile * params.runs,
                   params.runs, lane);
  Ring ring;
  int row, count;
  while (reader.next(params.key_length, &row, &count)) {
    const int size = copy_size(row, params.key_length, lane);
    fill(shared, ring, &params.key_maps[max(size, 0)], &params.value_maps[max(size, 0)], row, count,
         size >= 0, sequence, lane);
    ring.advance();
  }
  for (int first = 0; first < params.summaries; first += kStageRows) {
    row = first + lane * kGranule;
    count = max(0, min(kGranule, params.summaries - row));
    fill(shared, ring, &params.summary_key_map, &params.summary_value_map, row, count,
         lane < kGranules, sequence, lane);
    ring.advance();
  }
}

// ---- consumers ----

template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// exp2 in one instruction; its error, 2^-22, is far below the rounding of P.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Sums of a thread's probabilities above this are in doubt: one may not fit T, or with large values
// the output may not fit fp32.
template <typename T>
constexpr float kDoubtful = 0x1p40f;
template <>
constexpr float kDoubtful<__half> = 0x1p15f;

// The running softmax of the two rows a thread holds. Scores arrive unscaled.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.f, 0.f};  // of this thread's columns only
  float scale_log2;

  // Replaces scores by probabilities relative to a maximum that includes them; returns what older
  // results must be multiplied by.
  __device__ __forceinline__ void raise(float (&scores)[64], float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = maximum[r];
#pragma unroll
      for (int i = 0; i < 16; ++i)
        highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      highest = quad_max(highest);
      correction[r] = exp2_fast(maximum[r] * scale_log2 - offset(highest));
      maximum[r] = highest;
      sum[r] = sum[r] * correction[r] + exponentiate(scores, r);
    }
  }

  // Replaces scores by probabilities relative to the maximum as it is; returns their sums.
  __device__ __forceinline__ void follow(float (&scores)[64], float (&sums)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) sums[r] = exponentiate(scores, r);
  }

 private:
  __device__ __forceinline__ float offset(float highest) const {
    return highest == -INFINITY ? 0.f : highest * scale_log2;
  }

  __device__ __forceinline__ float exponentiate(float (&scores)[64], int r) {
    const float shift = offset(maximum[r]);
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * i + 2 * r + e];
        score = exp2_fast(fmaf(score, scale_log2, -shift));
        total += score;
      }
    }
    return total;
  }
};

template <typename T, int kHeadDim>
class Consumer {
 public:
  static constexpr int kGroupBytes = Shared<kHeadDim>::kGroupBytes;
  static constexpr int kStageBytes = Shared<kHeadDim>::kStageBytes;
  static constexpr int kChunks = kHeadDim / 8;  // 16-byte pieces of a row

  __device__ Consumer(const Params& params, Shared<kHeadDim>& shared, int sequence, int tile)
      : params_(params), shared_(shared), sequence_(sequence) {
    thread_ = threadIdx.x % 128;
    group_ = uniform(threadIdx.x / 128) - 1;
    lane_ = threadIdx.x % 32;
    first_row_ = tile * kTileRows + group_ * 64;
    softmax_.scale_log2 = params.scale * kLog2E;
  }

  __device__ void run(int summary_stages) {
    load_query();
    extent_ = measure(params_.run_lengths + tile() * params_.runs, params_.runs, lane_);
    run_stages_ = (extent_.granules + kGranules - 1) / kGranules;
    key_arrivals_ = !extent_.whole ? 1 : lane_ == 0 ? 32 : 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.f;
    const int stages = uniform(run_stages_) + summary_stages;
    if (stages > 0) attend(stages);
    store();
  }

 private:
  __device__ __forceinline__ void attend(int stages) {
    // Stages that need no mask, a loop of their own.
    const int filled = uniform(extent_.whole ? extent_.granules / kGranules : 0);
    float scores[64];
    uint32_t probabilities[32];
    Ring key, value;

    if (group_ == 1) named_arrive(kTurn, kConsumers);  // the first warpgroup starts
    barrier_wait(&shared_.key_full[key.stage], key.phase);
    named_sync(kTurn + group_, kConsumers);
    multiply_keys(scores, key.stage);
    named_arrive(kTurn + 1 - group_, kConsumers);
    product_wait<0>();
    pin(scores);
    mask(scores, 0, key.stage);
    float correction[2];
    softmax_.raise(scores, correction);
    to_operand(scores, probabilities);
    doubt(0, false);
    unsettled_[0] = unsettled_[1] = 0.f;

    int j = 1;
    for (; j < filled; ++j) step<false>(j, scores, probabilities, key, value);
    for (; j < stages; ++j) step<true>(j, scores, probabilities, key, value);

    named_sync(kSettle + group_, 128);
    if (doubted(j - 1)) renew<true>(j - 1, scores, probabilities, key.stage);
    settle();
    barrier_wait(&shared_.value_full[value.stage], value.phase);
    multiply_values(probabilities, value.stage);
    product_wait<0>();
    pin(output_);
  }

  // The scores and probabilities of stage j, and the product of those of the stage before with its
  // values. Keys stay until no warp doubts what was made of them.
  template <bool kMasked>
  __device__ __forceinline__ void step(int j, float (&scores)[64], uint32_t (&probabilities)[32],
                                       Ring& key, Ring& value) {
    const int before = key.stage;
    key.advance();
    barrier_wait(&shared_.key_full[key.stage], key.phase);
    named_sync(kTurn + group_, kConsumers);
    multiply_keys(scores, key.stage);
    if (doubted(j - 1)) {
      product_wait<0>();
      renew<kMasked>(j - 1, scores, probabilities, opaque(before));
      multiply_keys(scores, opaque(key.stage));
    }
    settle();
    release_keys(before);
    barrier_wait(&shared_.value_full[value.stage], value.phase);
    multiply_values(probabilities, value.stage);
    named_arrive(kTurn + 1 - group_, kConsumers);
    product_wait<1>();
    pin(scores);
    if (kMasked) mask(scores, j, key.stage);
    softmax_.follow(scores, unsettled_);
    doubt(j, max(unsettled_[0], unsettled_[1]) > kDoubtful<T> ||
                 min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY);
    product_wait<0>();
    pin(output_);
    release_values(value.stage);
    value.advance();
    to_operand(scores, probabilities);
  }

  // Tells the other warps of the warpgroup, after their next barrier, whether this one doubts its
  // probabilities of stage j. Warps may be a stage apart, hence the two places.
  __device__ __forceinline__ void doubt(int j, bool doubtful) {
    const bool any = __any_sync(~0u, doubtful);
    if (lane_ == 0) shared_.doubts[j & 1][threadIdx.x / 32 - 4] = any;
  }

  __device__ __forceinline__ bool doubted(int j) const {
    const int4 any = *reinterpret_cast<const int4*>(&shared_.doubts[j & 1][group_ * 4]);
    return __any_sync(~0u, any.x | any.y | any.z | any.w);
  }

  // Computes the probabilities of stage j once more, relative to a maximum that includes them.
  template <bool kMasked>
  __device__ __forceinline__ void renew(int j, float (&scores)[64], uint32_t (&probabilities)[32],
                                        int stage) {
    multiply_keys(scores, stage);
    product_wait<0>();
    pin(scores);
    if (kMasked) mask(scores, j, stage);
    float correction[2];
    softmax_.raise(scores, correction);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
    to_operand(scores, probabilities);
    unsettled_[0] = unsettled_[1] = 0.f;
  }

  // Counts the last stage's probabilities, which nobody doubts any more.
  __device__ __forceinline__ void settle() {
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.sum[r] += unsettled_[r];
  }

  // Places are worked out where they are needed: registers are scarcer than instructions.
  __device__ __forceinline__ int64_t tile() const {
    return static_cast<int64_t>(sequence_) * params_.tiles + first_row_ / kTileRows;
  }

  template <typename Pointer>
  __device__ __forceinline__ Pointer in_head(Pointer base, const int64_t (&strides)[3]) const {
    return base + sequence_ / params_.heads * strides[0] + sequence_ % params_.heads * strides[1];
  }

  __device__ __forceinline__ int64_t token(int row) const {
    return params_.query_order ? params_.query_order[row_of_all(row)] : row;
  }

  __device__ __forceinline__ int64_t row_of_all(int row) const {
    return static_cast<int64_t>(sequence_) * params_.query_length + row;
  }

  // Where the 16 bytes `chunk` of this warpgroup's row `local` lie in the swizzled query tile.
  __device__ __forceinline__ unsigned char* element(int local, int chunk) const {
    return shared_.query + (group_ * 8 + local / 8) * kGroupBytes + chunk / 8 * 1024 +
           local % 8 * 128 + ((chunk % 8) ^ (local % 8)) * 16;
  }

  // Gathers this warpgroup's 64 rows into shared memory.
  __device__ void load_query() {
    const T* base = in_head(static_cast<const T*>(params_.query), params_.query_strides);
#pragma unroll
    for (int pass = 0; pass < 64 * kChunks / 128; ++pass) {
      const int piece = pass * 128 + thread_;
      const int local = piece / kChunks, chunk = piece % kChunks;
      const int row = first_row_ + local;
      uint4 data = make_uint4(0, 0, 0, 0);
      if (row < params_.query_length)
        data = __ldg(reinterpret_cast<const uint4*>(base + token(row) * params_.query_strides[2]) +
                     chunk);
      *reinterpret_cast<uint4*>(element(local, chunk)) = data;
    }
    shared_to_async_fence();
    named_sync(kQueryReady + group_, 128);
  }

  // Issues S = Q K^T; whoever needs it waits for it.
  __device__ __forceinline__ void multiply_keys(float (&scores)[64], int stage) {
    pin(scores);
    product_fence();
    const uint64_t query = operand(shared_.query + group_ * 8 * kGroupBytes, kGroupBytes, 0);
    const uint64_t key = advance(operand(shared_.key, kGroupBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int offset = k / 4 * 1024 + k % 4 * 32;
      ProductShared<T, kStageRows>::run(scores, advance(query, offset), advance(key, offset),
                                        k > 0);
    }
    product_commit();
  }

  // Issues O += P V.
  __device__ __forceinline__ void multiply_values(const uint32_t (&probabilities)[32], int stage) {
    pin(output_);
    product_fence();
    const uint64_t value = advance(operand(shared_.value, kGroupBytes, 1024), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k)
      ProductRegister<T, kHeadDim>::run(output_, probabilities + 4 * k,
                                        advance(value, 2 * k * kGroupBytes));
    product_commit();
  }

  // Takes out the rows a granule read beyond its run, and weighs the summaries of keys that were
  // not read.
  __device__ __forceinline__ void mask(float (&scores)[64], int j, int stage) {
    if (j >= run_stages_) {
      weigh_summaries(scores, j - run_stages_);
    } else if (!extent_.whole) {
      const uint64_t valid = shared_.valid[stage];
      if (valid != kAllValid)
        keep(scores, [&](int granule) { return static_cast<int>(valid >> (4 * granule)) & 15; });
    } else if ((j + 1) * kGranules > extent_.granules) {
      const int filled = extent_.granules - j * kGranules;
      keep(scores, [&](int granule) { return granule < filled ? kGranule : 0; });
    }
  }

  // Keeps the first rows(i) rows of each granule i.
  template <typename Rows>
  __device__ __forceinline__ void keep(float (&scores)[64], Rows rows) {
    const int column = 2 * (lane_ % 4);
#pragma unroll
    for (int i = 0; i < kGranules; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = -INFINITY;
    }
  }

  __device__ __forceinline__ void weigh_summaries(float (&scores)[64], int j) {
    const int first = j * kStageRows + 2 * (lane_ % 4);
    const float* weights = params_.summary_weights + tile() * params_.summaries;
    const float inverse_scale = 1.f / params_.scale;
#pragma unroll
    for (int i = 0; i < kGranules; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = first + 8 * i + e;
        const float weight = c < params_.summaries ? weights[c] * inverse_scale : -INFINITY;
        scores[4 * i + e] += weight;
        scores[4 * i + 2 + e] += weight;
      }
    }
  }

  // Where lanes read how many rows of a stage count, each gives the stage back itself; else one
  // answers for its warp, which is 7 % faster.
  __device__ __forceinline__ void release_keys(int stage) {
    if (key_arrivals_ > 0) barrier_arrive(&shared_.key_empty[stage], key_arrivals_);
  }

  __device__ __forceinline__ void release_values(int stage) {
    if (lane_ == 0) barrier_arrive(&shared_.value_empty[stage]);
  }

  // The accumulator layout of S is the register layout of P's operand, two column groups of eight
  // at a time.
  __device__ __forceinline__ void to_operand(const float (&scores)[64],
                                             uint32_t (&probabilities)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // Normalises, turns fragments into rows through shared memory, and scatters them to their tokens.
  __device__ void store() {
    const int row = thread_ / 32 * 16 + lane_ / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax_.sum[r]);
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int local = row + 8 * r;
      if (params_.log_sum_exp && lane_ % 4 == 0 && first_row_ + local < params_.query_length)
        params_.log_sum_exp[row_of_all(token(first_row_ + local))] =
            sum > 0.f ? softmax_.maximum[r] * params_.scale + logf(sum) : -INFINITY;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        *reinterpret_cast<uint32_t*>(element(local, i) + lane_ % 4 * 4) =
            pack<T>(output_[4 * i + 2 * r] * inverse, output_[4 * i + 2 * r + 1] * inverse);
    }
    named_sync(kOutputReady + group_, 128);
    T* base = in_head(static_cast<T*>(params_.output), params_.output_strides);
#pragma unroll
    for (int pass = 0; pass < 64 * kChunks / 128; ++pass) {
      const int piece = pass * 128 + thread_;
      const int local = piece / kChunks, chunk = piece % kChunks;
      if (first_row_ + local < params_.query_length)
        __stcs(
            reinterpret_cast<uint4*>(base + token(first_row_ + local) * params_.output_strides[2]) +
                chunk,
            *reinterpret_cast<const uint4*>(element(local, chunk)));
    }
  }

  const Params& params_;
  Shared<kHeadDim>& shared_;
  int sequence_, thread_, group_, lane_, first_row_, run_stages_;
  Extent extent_;
  int key_arrivals_;  // on behalf of how many lanes this one gives keys back
  Softmax softmax_;
  float unsettled_[2];  // sums of the last stage's probabilities, which may be renewed
  float output_[kHeadDim / 2];
};

// ---- kernel ----

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    block_sparse_attention_tile(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<Shared<kHeadDim>*>(raw);
  const int tile = params.tile_order ? params.tile_order[blockIdx.x] : blockIdx.x;
  const int sequence = tile / params.tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (warp == 0) {
    if (lane == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(&shared.key_full[s], 1);
        barrier_init(&shared.value_full[s], 1);
        barrier_init(&shared.key_empty[s], kConsumers);
        barrier_init(&shared.value_empty[s], kConsumers / 32);
      }
      barrier_init_fence();
    }
  } else if (warp == 1 && lane < kBoxes) {
    prefetch_map(&params.key_maps[lane]);
    prefetch_map(&params.value_maps[lane]);
  }
  __syncthreads();

  if (uniform(threadIdx.x / 128) == 0) {
    registers_decrease<40>();
    const int key_sequence = sequence / (params.heads / params.key_heads);
    if (warp == 0) produce(params, shared, key_sequence, tile, lane);
  } else {
    registers_increase<232>();
    Consumer<T, kHeadDim>(params, shared, sequence, tile % params.tiles)
        .run((params.summaries + kStageRows - 1) / kStageRows);
  }
}

// Fills in the maps of the bulk copies.
cudaError_t describe(Params& params) {
  const int64_t sequences = params.batch * params.key_heads;
  const auto encode = [&](CUtensorMap& map, const void* base, int64_t rows, int64_t row_stride,
                          int64_t sequence_stride, int groups) {
    return encode_rows(&map, params.dtype == kBFloat16, base, params.head_dim, rows, row_stride,
                       sequences, sequence_stride, groups);
  };
  cudaError_t error = cudaSuccess;
  for (int box = 0; box < kBoxes && error == cudaSuccess; ++box) {
    error = encode(params.key_maps[box], params.key, params.key_length, params.key_strides[1],
                   params.key_strides[0], 1 << box);
    if (error != cudaSuccess) break;
    error = encode(params.value_maps[box], params.value, params.key_length, params.value_strides[1],
                   params.value_strides[0], 1 << box);
  }
  if (error != cudaSuccess || params.summaries == 0) return error;
  const int64_t stride = int64_t{params.summaries} * params.head_dim;
  error = encode(params.summary_key_map, params.summary_key, params.summaries, params.head_dim,
                 stride, 1);
  if (error != cudaSuccess) return error;
  return encode(params.summary_value_map, params.summary_value, params.summaries, params.head_dim,
                stride, 1);
}

template <typename T, int kHeadDim>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<kHeadDim>);
  static_assert(bytes <= 227 * 1024, "a block's shared memory");
  const auto kernel = block_sparse_attention_tile<T, kHeadDim>;
  const int64_t blocks = params.batch * params.heads * params.tiles;
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, stream>>>(params);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch(const Params& params, cudaStream_t stream) {
  return params.head_dim == 128 ? launch<T, 128>(params, stream) : launch<T, 64>(params, stream);
}

}  // namespace

cudaError_t block_sparse_attention(const AttentionArgs& args, cudaStream_t stream) {
  if (args.head_dim != 64 && args.head_dim != 128) return cudaErrorInvalidValue;
  Params params{};
  static_cast<AttentionArgs&>(params) = args;
  params.tiles = static_cast<int>((args.query_length + kTileRows - 1) / kTileRows);
  const cudaError_t error = describe(params);
  if (error != cudaSuccess) return error;
  return args.dtype == kBFloat16 ? launch<__nv_bfloat16>(params, stream)
                                 : launch<__half>(params, stream);
}

}  // namespace svg
