// A consumer warpgroup of the kernel for 8-bit keys and values. consumer.cuh has the loop in 16 bits;
// here the two warpgroups take no turns, since products take half the time, and a barrier at the end of
// a step carries the vote on rescaling.
#pragma once

#include <cuda_fp8.h>

#include "attention/fp8/softmax.cuh"
#include "attention/fp8/storage.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"

namespace svg::attention::fp8 {

// The tensor cores keep sums of e4m3 products to some 14 bits, cut off: after this many stages what
// they hold is added to a sum in fp32.
constexpr int kPromoteStages = 16;
constexpr float kLargestByte = 127.f;
constexpr int kAnyStage = -1;
// The signs of the rotation, a bit for each channel; svg_kernels/key_value_fp8/rows.py has the same.
constexpr uint64_t kLowSigns = 0x243F6A8885A308D3ull, kHighSigns = 0x13198A2E03707344ull;

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t both);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t both) {
  return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t both) {
  return __half22float2(*reinterpret_cast<const __half2*>(&both));
}

// Four elements of a query, times `factor`, in a word.
__device__ __forceinline__ uint32_t round_to_bytes(const float* x, float factor) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) word |= (__float2int_rn(x[i] * factor) & 255) << 8 * i;
  return word;
}

template <typename T>
class Consumer {
 public:
  __device__ Consumer(const Params& params, SharedStorage& shared, int sequence, int tile)
      : params_(params), shared_(shared), sequence_(sequence) {
    thread_ = threadIdx.x % 128;
    group_ = hopper::warp_uniform(threadIdx.x / 128) - 1;
    lane_ = threadIdx.x % 32;
    first_row_ = tile * kTileRows + group_ * 64;
  }

  __device__ void run() {
    load_query_bytes();
    extent_ = measure(params_.run_lengths + tile() * params_.runs, params_.runs, lane_);
    const int stages = hopper::warp_uniform((extent_.atoms + kStageAtoms - 1) / kStageAtoms);
    leader_ = lane_ == 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] = 0.f;
    sum_[0] = sum_[1] = 0.f;
    if (stages > 0) attend(stages);
    scale_output();
    if (params_.summaries > 0) attend_to_summaries();
    store();
  }

 private:
  // What one step hands to the next.
  struct Pipeline {
    hopper::PipelineState<kRowStages> key;
    hopper::PipelineState<kValueStages> value;
    uint32_t probabilities[16];
    float partial[64], partial_sum[4];  // what the tensor cores have summed up since the promotion
    int unpromoted = 0;                 // stages that are in them
    uint32_t phase = 0;                 // of the rings, where steps know their stages
    bool vote;  // whether a thread of the warpgroup must have its probabilities made anew
  };

  __device__ __forceinline__ void attend(int stages) {
    // Stages that need no mask, a loop of their own.
    const int filled = hopper::warp_uniform(extent_.whole ? extent_.atoms / kStageAtoms : 0);
    int32_t scores[64];
    Pipeline p;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = shared_.query_scale[group_ * 64 + row() + 8 * r];
      codes_.scale[r] = __float2int_rn(fminf(scale * 0x1p32f, 0x1.fffffep30f));
    }

    hopper::mbarrier_wait(&shared_.key_full[p.key.stage], p.key.phase);
    multiply_keys(scores, p.key.stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    mask(scores, 0, p.key.stage);
    float correction[2];
    codes_.raise(scores, correction);
    uint32_t pairs[32];
    codes_.template encode<true>(scores, pairs);
    to_operand(pairs, p.probabilities);
    p.vote = false;

    int j = 1;
    for (; j + 3 < filled; j += 4) {
      step<false, 1>(j, scores, p);
      step<false, 2>(j + 1, scores, p);
      step<false, 3>(j + 2, scores, p);
      step<false, 0>(j + 3, scores, p);
      p.phase ^= 1;
    }
    p.key.phase = p.value.phase = p.phase;
    for (; j < stages; ++j) step<true, kAnyStage>(j, scores, p);

    if (p.vote) rescale<true>(j - 1, scores, p, p.key.stage);
    hopper::mbarrier_wait(&shared_.value_full[p.value.stage], p.value.phase);
    multiply_values(p, p.value.stage, false);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(p.partial);
    hopper::fence_registers(p.partial_sum);
    promote(p);
  }

  // The scores and probabilities of stage j, and the product of those of the stage before with its
  // values. Keys stay until no warp asks to rescale what was made of them. kStage is j modulo the
  // rings' depth, where it is known.
  template <bool kMasked, int kStage>
  __device__ __forceinline__ void step(int j, int32_t (&scores)[64], Pipeline& p) {
    constexpr bool kKnown = kStage != kAnyStage;
    constexpr int kBefore = (kStage + kRowStages - 1) % kRowStages;
    const int before = kKnown ? kBefore : p.key.stage;
    if (p.vote) rescale<kMasked>(j - 1, scores, p, before);
    release_keys<kMasked>(before);
    if (!kKnown) p.key.advance();
    const int stage = kKnown ? kStage : p.key.stage;
    hopper::mbarrier_wait(&shared_.key_full[stage],
                          kKnown ? p.phase ^ (kStage == 0) : p.key.phase);
    multiply_keys(scores, stage);
    const int value = kKnown ? kBefore : p.value.stage;
    hopper::mbarrier_wait(&shared_.value_full[value], kKnown ? p.phase : p.value.phase);
    multiply_values(p, value, kKnown && kStage != 1);
    hopper::wgmma_wait<1>();
    hopper::fence_registers(scores);
    if (kMasked) mask(scores, j, stage);
    uint32_t pairs[32];
    const bool useless = codes_.template encode<kMasked>(scores, pairs);
    // Also keeps the compiler from moving the exponentials behind the wait.
    p.vote = hopper::named_barrier_any(kRescaleVotes + group_, 128, useless);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(p.partial);
    hopper::fence_registers(p.partial_sum);
    if (leader_) hopper::mbarrier_arrive(&shared_.value_empty[value]);
    if (!kKnown) p.value.advance();
    if ((!kKnown || kStage == 0) && p.unpromoted >= kPromoteStages) promote(p);
    to_operand(pairs, p.probabilities);
  }

  // Computes the probabilities of stage j, whose keys are still there, once more, relative to
  // maxima that include them.
  template <bool kMasked>
  __device__ __forceinline__ void rescale(int j, int32_t (&scores)[64], Pipeline& p, int stage) {
    multiply_keys(scores, stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    if (kMasked) mask(scores, j, stage);
    float correction[2];
    codes_.raise(scores, correction);
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] *= correction[i / 2 % 2];
#pragma unroll
    for (int r = 0; r < 2; ++r) sum_[r] *= correction[r];
    if (p.unpromoted > 0) {
#pragma unroll
      for (int i = 0; i < 64; ++i) p.partial[i] *= correction[i / 2 % 2];
#pragma unroll
      for (int i = 0; i < 4; ++i) p.partial_sum[i] *= correction[i / 2];
    }
    uint32_t pairs[32];
    codes_.template encode<kMasked>(scores, pairs);
    to_operand(pairs, p.probabilities);
  }

  // Adds what the tensor cores have summed up to the sums in fp32.
  __device__ __forceinline__ void promote(Pipeline& p) {
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] += p.partial[i];
#pragma unroll
    for (int r = 0; r < 2; ++r) sum_[r] += p.partial_sum[2 * r];
    p.unpromoted = 0;
  }

  // ---- summaries ----

  // Gives the output the scale of the values, and takes what the codes are too large by out of it
  // and of the sums. From here on probabilities are exact.
  __device__ void scale_output() {
    const float* scale = params_.value_scale + int64_t{key_sequence()} * kHeadDim + column();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      base_[r] = codes_.maximum[r] == Codes::kNone ? -INFINITY : codes_.base(r);
      sum_[r] *= 1.f / kCodeBias;
    }
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const float2 both = *reinterpret_cast<const float2*>(scale + 8 * i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        output_[4 * i + 2 * r] *= both.x * (1.f / kCodeBias);
        output_[4 * i + 2 * r + 1] *= both.y * (1.f / kCodeBias);
      }
    }
  }

  __device__ void attend_to_summaries() {
    hopper::named_barrier_sync(kRescaleVotes + group_, 128);  // nobody reads the bytes any more
    load_query();
    if (leader_) hopper::mbarrier_arrive(&shared_.runs_read);
    hopper::PipelineState<kSummaryStages> state;
    for (int first = 0; first < params_.summaries; first += kStageRows) {
      float scores[64];
      hopper::mbarrier_wait(&shared_.summary_full[state.stage], state.phase);
      multiply_summary_keys(scores, state.stage);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(scores);
      weigh(scores, first);
#pragma unroll
      for (int r = 0; r < 2; ++r) exponentiate(scores, r);
      uint32_t probabilities[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
      multiply_summary_values(probabilities, state.stage);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(output_);
      if (leader_) hopper::mbarrier_arrive(&shared_.summary_empty[state.stage]);
      state.advance();
    }
  }

  // Replaces the scores of row r by probabilities relative to a base that none exceeds.
  __device__ __forceinline__ void exponentiate(float (&scores)[64], int r) {
    float highest = base_[r];
#pragma unroll
    for (int i = 0; i < 16; ++i)
      highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
    highest = quad_max(highest);
    const float base = highest == -INFINITY ? 0.f : highest;
    const float correction = exp2_approx(base_[r] - base);
    base_[r] = highest;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[4 * i + 2 * r + e];
        score = exp2_approx(score - base);
        total += score;
        output_[4 * i + 2 * r + e] *= correction;
      }
    }
    sum_[r] = sum_[r] * correction + quad_sum(total);
  }

  // Scales scores to units of log 2 and adds the weights; what lies past the end counts nothing.
  __device__ __forceinline__ void weigh(float (&scores)[64], int first) const {
    const float* weights = params_.summary_weights + tile() * params_.summaries;
    const float scale = params_.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = first + column() + 8 * i + e;
        const float weight = c < params_.summaries ? weights[c] * kLog2E : -INFINITY;
        scores[4 * i + e] = fmaf(scores[4 * i + e], scale, weight);
        scores[4 * i + 2 + e] = fmaf(scores[4 * i + 2 + e], scale, weight);
      }
    }
  }

  // ---- places; worked out where they are needed: registers are scarcer than instructions ----

  __device__ __forceinline__ int64_t tile() const {
    return static_cast<int64_t>(sequence_) * params_.tiles + first_row_ / kTileRows;
  }

  __device__ __forceinline__ int key_sequence() const {
    return sequence_ / (params_.heads / params_.key_heads);
  }

  // The first of the two rows, of this warpgroup's 64, that a thread's registers hold; the other is
  // eight further on. Of each eight columns it holds two.
  __device__ __forceinline__ int row() const { return thread_ / 32 * 16 + lane_ / 4; }
  __device__ __forceinline__ int column() const { return 2 * (lane_ % 4); }

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

  // Where the 16 bytes `chunk` of this warpgroup's row `local` lie in the swizzled tile of 16-bit
  // elements.
  __device__ __forceinline__ unsigned char* element(int local, int chunk) const {
    return shared_.query[group_] + local / 8 * kWideAtomBytes + chunk / 8 * 1024 +
           local % 8 * 128 + ((chunk % 8) ^ (local % 8)) * 16;
  }

  __device__ __forceinline__ uint4 query_piece(const T* base, int row, int chunk) const {
    if (row >= params_.query_length) return make_uint4(0, 0, 0, 0);
    return __ldg(reinterpret_cast<const uint4*>(base + token(row) * params_.query_strides[2]) +
                 chunk);
  }

  // Gathers this warpgroup's 64 rows into shared memory as they are.
  __device__ void load_query() {
    const T* base = in_head(static_cast<const T*>(params_.query), params_.query_strides);
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int local = pass * 8 + thread_ / 16, chunk = thread_ % 16;
      *reinterpret_cast<uint4*>(element(local, chunk)) =
          query_piece(base, first_row_ + local, chunk);
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group_, 128);
  }

  // Of the vector of this tile's key head, the eight channels of a chunk.
  __device__ __forceinline__ void load_channels(const float* vectors, int chunk,
                                                float (&channels)[8]) const {
    const float4* vector =
        reinterpret_cast<const float4*>(vectors + int64_t{key_sequence()} * kHeadDim) + 2 * chunk;
    const float4 low = vector[0], high = vector[1];
    channels[0] = low.x, channels[1] = low.y, channels[2] = low.z, channels[3] = low.w;
    channels[4] = high.x, channels[5] = high.y, channels[6] = high.z, channels[7] = high.w;
  }

  // Gathers this warpgroup's 64 rows, scales and rotates them as the keys were, and rounds them to
  // bytes. Sixteen lanes hold a row, eight channels each.
  __device__ void load_query_bytes() {
    const T* base = in_head(static_cast<const T*>(params_.query), params_.query_strides);
    const int chunk = thread_ % 16;
    float means[8], scales[8];
    load_channels(params_.key_mean, chunk, means);
    load_channels(params_.key_scale, chunk, scales);
    const uint32_t signs =
        static_cast<uint32_t>((chunk < 8 ? kLowSigns : kHighSigns) >> (chunk % 8 * 8));
    // What the sums below are too large by is sqrt(128).
    const float unit =
        params_.scale * kLog2E * (kCodesPerOctave * 0.08838834764831845f / kLargestByte);
#pragma unroll 2
    for (int pass = 0; pass < 8; ++pass) {
      const int local = pass * 8 + thread_ / 16;
      const uint4 piece = query_piece(base, first_row_ + local, chunk);
      const uint32_t pairs[4] = {piece.x, piece.y, piece.z, piece.w};
      float x[8], dot = 0.f, largest = 0.f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 both = unpack<T>(pairs[i]);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        dot = fmaf(x[i], means[i], dot);
        x[i] *= signs >> i & 1 ? -scales[i] : scales[i];
      }
#pragma unroll
      for (int half = 1; half < 8; half *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i & half) continue;
          const float a = x[i], b = x[i + half];
          x[i] = a + b, x[i + half] = a - b;
        }
      }
#pragma unroll
      for (int lanes = 1; lanes < 16; lanes *= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float other = __shfl_xor_sync(~0u, x[i], lanes);
          x[i] = chunk & lanes ? other - x[i] : x[i] + other;
        }
        dot += __shfl_xor_sync(~0u, dot, lanes);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
      for (int lanes = 1; lanes < 16; lanes *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
      largest = largest > 0.f ? largest : 1.f;
      const float inverse = kLargestByte / largest;
      const uint2 bytes = make_uint2(round_to_bytes(x, inverse), round_to_bytes(x + 4, inverse));
      *reinterpret_cast<uint2*>(shared_.query[group_] + local * kHeadDim +
                                ((chunk / 2 ^ local % 8) << 4) + chunk % 2 * 8) = bytes;
      if (chunk == 0) {
        shared_.query_scale[group_ * 64 + local] = largest * unit;
        shared_.query_shift[group_ * 64 + local] = dot * params_.scale;
      }
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group_, 128);
  }

  // ---- products ----

  // Issues S = Q K^T; whoever needs it waits for it.
  __device__ __forceinline__ void multiply_keys(int32_t (&scores)[64], int stage) {
    hopper::fence_registers(scores);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(shared_.query[group_], kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(hopper::matrix_descriptor(shared_.runs.key, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k)
      hopper::WgmmaSS<int8_t, kStageRows>::run(scores, hopper::advance_descriptor(query, 32 * k), hopper::advance_descriptor(key, 32 * k),
                                           k > 0);
    hopper::wgmma_commit();
  }

  // Issues O += P V, and the sums of P's rows as a product with ones.
  __device__ __forceinline__ void multiply_values(Pipeline& p, int stage, bool accumulates) {
    hopper::fence_registers(p.partial);
    hopper::fence_registers(p.partial_sum);
    hopper::wgmma_fence();
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.runs.value, kAtomBytes, 0), kStageBytes, stage);
    const uint64_t ones = hopper::matrix_descriptor(shared_.ones, 0, 0);
    const int accumulate = accumulates ? 1 : p.unpromoted;
#pragma unroll
    for (int k = 0; k < kStageRows / 32; ++k) {
      hopper::WgmmaRS<__nv_fp8_e4m3, kHeadDim>::run(p.partial, p.probabilities + 4 * k,
                                           hopper::advance_descriptor(value, 32 * k),
                                           k > 0 ? 1 : accumulate);
      hopper::WgmmaRS<__nv_fp8_e4m3, 8>::run(p.partial_sum, p.probabilities + 4 * k, ones,
                                    k > 0 ? 1 : accumulate);
    }
    hopper::wgmma_commit();
    ++p.unpromoted;
  }

  __device__ __forceinline__ void multiply_summary_keys(float (&scores)[64], int stage) {
    hopper::fence_registers(scores);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(shared_.query[group_], kWideAtomBytes, 0);
    const uint64_t key =
        hopper::advance_descriptor(hopper::matrix_descriptor(shared_.summaries.key, kWideAtomBytes, 0), kWideStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int offset = k / 4 * 1024 + k % 4 * 32;
      hopper::WgmmaSS<T, kStageRows>::run(scores, hopper::advance_descriptor(query, offset), hopper::advance_descriptor(key, offset),
                                        k > 0);
    }
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_summary_values(const uint32_t (&probabilities)[32],
                                                          int stage) {
    hopper::fence_registers(output_);
    hopper::wgmma_fence();
    const uint64_t value =
        hopper::advance_descriptor(hopper::matrix_descriptor(shared_.summaries.value, kWideAtomBytes, 1024), kWideStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k)
      hopper::WgmmaRS<T, kHeadDim>::run(output_, probabilities + 4 * k,
                                        hopper::advance_descriptor(value, 2 * k * kWideAtomBytes));
    hopper::wgmma_commit();
  }

  // Takes out the rows a atom read beyond its run.
  __device__ __forceinline__ void mask(int32_t (&scores)[64], int j, int stage) {
    if (!extent_.whole) {
      const uint64_t valid = shared_.valid[stage];
      if (valid != kAllValid)
        keep(scores, [&](int atom) { return static_cast<int>(valid >> (4 * atom)) & 15; });
    } else if ((j + 1) * kStageAtoms > extent_.atoms) {
      const int filled = extent_.atoms - j * kStageAtoms;
      keep(scores, [&](int atom) { return atom < filled ? kAtomRows : 0; });
    }
  }

  // Keeps the first rows(i) rows of each atom i.
  template <typename Rows>
  __device__ __forceinline__ void keep(int32_t (&scores)[64], Rows rows) {
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column() + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = kMaskedScore;
    }
  }

  // Where lanes read how many rows of a stage count, each gives the stage back itself; else one
  // answers for its warp.
  template <bool kMasked>
  __device__ __forceinline__ void release_keys(int stage) {
    if (kMasked && !extent_.whole)
      hopper::mbarrier_arrive(&shared_.key_empty[stage]);
    else if (leader_)
      hopper::mbarrier_arrive(&shared_.key_empty[stage], 32);
  }

  // Word 4 k + 2 h + r of P holds, of row r, the columns that a lane has among the sixteen from
  // 32 k + 16 h on; the transposers laid out the values' keys to match. Pairs may be made while a
  // product still reads the words, words may not.
  __device__ __forceinline__ void to_operand(const uint32_t (&pairs)[32],
                                             uint32_t (&probabilities)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      probabilities[i] = __byte_perm(pairs[i / 2 * 4 + i % 2], pairs[i / 2 * 4 + i % 2 + 2], 0x6420);
  }

  // Normalises, adds the mean value, turns fragments into rows through shared memory, and scatters
  // them to their tokens.
  __device__ void store() {
    const float* mean = params_.value_mean + int64_t{key_sequence()} * kHeadDim + column();
    hopper::named_barrier_sync(kRescaleVotes + group_, 128);  // nobody reads the queries any more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = sum_[r];
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int local = row() + 8 * r;
      if (params_.log_sum_exp && lane_ % 4 == 0 && first_row_ + local < params_.query_length)
        params_.log_sum_exp[row_of_all(token(first_row_ + local))] =
            sum > 0.f ? base_[r] * kLn2 + logf(sum) + shared_.query_shift[group_ * 64 + local]
                      : -INFINITY;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        float2 both = *reinterpret_cast<const float2*>(mean + 8 * i);
        if (!(sum > 0.f)) both = make_float2(0.f, 0.f);
        *reinterpret_cast<uint32_t*>(element(local, i) + lane_ % 4 * 4) =
            pack<T>(fmaf(output_[4 * i + 2 * r], inverse, both.x),
                    fmaf(output_[4 * i + 2 * r + 1], inverse, both.y));
      }
    }
    hopper::named_barrier_sync(kOutputReady + group_, 128);
    T* base = in_head(static_cast<T*>(params_.output), params_.output_strides);
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int local = pass * 8 + thread_ / 16, chunk = thread_ % 16;
      if (first_row_ + local < params_.query_length)
        __stcs(
            reinterpret_cast<uint4*>(base + token(first_row_ + local) * params_.output_strides[2]) +
                chunk,
            *reinterpret_cast<const uint4*>(element(local, chunk)));
    }
  }

  const Params& params_;
  SharedStorage& shared_;
  int sequence_, thread_, group_, lane_, first_row_;
  Extent extent_;
  bool leader_;
  Codes codes_;
  float base_[2];  // what probabilities are relative to once the runs are read, in units of log 2
  float sum_[2];
  float output_[64];
};

}  // namespace svg::attention::fp8
