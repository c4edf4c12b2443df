// A consumer warpgroup of the kernel for 8-bit keys and values. consumer.cuh has the loop in 16 bits;
// what products at twice the rate change is that exponentials take longer than they do:
//
//   a turn at the tensor cores is only that of S = Q K^T. O += P V is issued step by step among the
//   exponentials of the next stage (multiply_values).
//   rows outgrow their maxima more often, since e4m3 has less room above them, and must be cheaper to
//   raise: a warp raises those of its sixteen rows by itself, from the probabilities that it holds
//   in fp32. Only where these may be infinite is a stage's S computed once more, by the warpgroup.
#pragma once

#include "attention/fp8/softmax.cuh"
#include "attention/fp8/storage.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"

namespace svg::attention::fp8 {

// The tensor cores keep sums of e4m3 products to some 14 bits, cut off: after this many stages what
// they hold is added to a sum in fp32.
constexpr int kPromoteStages = 16;
// The signs of the rotation, a bit for each channel; svg_kernels/key_value_fp8/rows.py has the same.
constexpr uint64_t kLowSigns = 0x243F6A8885A308D3ull, kHighSigns = 0x13198A2E03707344ull;

// The same value, of which the compiler knows nothing: what is rarely computed from it is not kept
// in registers meanwhile.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

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
    load_query([&] {
      extent_ = measure(params_.run_lengths + tile() * params_.runs, params_.runs, lane_);
    });
    hopper::named_barrier_sync(kQueryReady + group_, 128);
    round_query();
    const int stages = hopper::warp_uniform((extent_.atoms + kStageAtoms - 1) / kStageAtoms);
    key_arrivals_ = !extent_.whole ? 1 : lane_ == 0 ? 32 : 0;
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] = 0.f;
    if (stages > 0) attend(stages);
    scale_output();
    if (params_.summaries > 0) attend_to_summaries();
    store();
  }

 private:
  __device__ __forceinline__ void attend(int stages) {
    // Stages that need no mask, a loop of their own.
    const int filled = hopper::warp_uniform(extent_.whole ? extent_.atoms / kStageAtoms : 0);
    float scores[64], partial[64];
    uint32_t probabilities[16];
    hopper::PipelineState<kRowStages> key;
    hopper::PipelineState<kValueStages> value;
#pragma unroll
    for (int r = 0; r < 2; ++r) scale_[r] = shared_.query_scale[group_ * 64 + row() + 8 * r];

    if (group_ == 1) hopper::named_barrier_arrive(kWarpScheduler, kConsumers);  // the first warpgroup starts
    hopper::mbarrier_wait(&shared_.key_full[key.stage], key.phase);
    warp_scheduler_barrier_sync();
    multiply_keys(scores, key.stage);
    warp_scheduler_barrier_arrive();
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    mask(scores, 0, key.stage);
    float correction[2];
    softmax_.rescale(scores, scale_, correction);
    to_operand(scores, probabilities);
    vote_rescale(0, false);
    pending_sum_[0] = pending_sum_[1] = 0.f;

    int j = 1;
    for (; j < filled; ++j) step<false>(j, scores, partial, probabilities, key, value);
    for (; j < stages; ++j) step<true>(j, scores, partial, probabilities, key, value);

    hopper::named_barrier_sync(kRescaleVotes + group_, 128);
    if (must_rescale(j - 1)) rescale<true>(j - 1, scores, partial, probabilities, key.stage);
    add_pending_sum();
    hopper::mbarrier_wait(&shared_.value_full[value.stage], value.phase);
    multiply_values(partial, probabilities, value.stage, (j - 1) % kPromoteStages > 0, [](int) {});
    hopper::wgmma_wait<0>();
    hopper::fence_registers(partial);
    promote(partial);
  }

  // The scores and probabilities of stage j, and the product of those of the stage before with its
  // values. Keys stay until no warp asks to compute their scores once more.
  template <bool kMasked>
  __device__ __forceinline__ void step(int j, float (&scores)[64], float (&partial)[64],
                                       uint32_t (&probabilities)[16], hopper::PipelineState<kRowStages>& key,
                                       hopper::PipelineState<kValueStages>& value) {
    const int before = key.stage;
    key.advance();
    hopper::mbarrier_wait(&shared_.key_full[key.stage], key.phase);
    warp_scheduler_barrier_sync();
    multiply_keys(scores, key.stage);
    if (must_rescale(j - 1)) {
      hopper::wgmma_wait<0>();
      rescale<kMasked>(j - 1, scores, partial, probabilities, opaque(before));
      multiply_keys(scores, opaque(key.stage));
    }
    add_pending_sum();
    release_keys(before);
    hopper::mbarrier_wait(&shared_.value_full[value.stage], value.phase);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    warp_scheduler_barrier_arrive();
    if (kMasked) mask(scores, j, key.stage);
    pending_sum_[0] = pending_sum_[1] = 0.f;
    multiply_values(partial, probabilities, value.stage, (j - 1) % kPromoteStages > 0,
                    [&](int k) { softmax_.exponentiate(k, scores, scale_, pending_sum_); });
    const float largest = max(pending_sum_[0], pending_sum_[1]);
    const bool lost = largest > kLargestLowered ||
                      min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY;
    // A warp lowers by itself, and so must not wait for products there, which all four do together:
    // what is being summed up follows behind the wait that is theirs.
    const bool lowers = __any_sync(~0u, largest > kLargestByte) && !__any_sync(~0u, lost);
    if (lowers) lower(scores);
    vote_rescale(j, lost);
    uint16_t halves[32];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      halves[i] = hopper::round_to_e4m3(scores[2 * i], scores[2 * i + 1]);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(partial);
    release_values(value.stage);
    value.advance();
    if (lowers) lower_partial(partial);
    if (j % kPromoteStages == 0) promote(partial);
    to_operand(halves, probabilities);
  }

  __device__ __forceinline__ void warp_scheduler_barrier_sync() const {
    hopper::named_barrier_sync(kWarpScheduler + group_, kConsumers);
  }

  __device__ __forceinline__ void warp_scheduler_barrier_arrive() const {
    hopper::named_barrier_arrive(kWarpScheduler + 1 - group_, kConsumers);
  }

  // Tells the other warps of the warpgroup, after their next barrier, whether this one has lost its
  // probabilities of stage j. Warps may be a stage apart, hence the two places.
  __device__ __forceinline__ void vote_rescale(int j, bool lost) {
    const bool any = __any_sync(~0u, lost);
    if (lane_ == 0) shared_.rescale_votes[j & 1][threadIdx.x / 32 - 4] = any;
  }

  // The same in all four warps, which may wait for products on it: they read the same votes, given
  // before a barrier of the warpgroup and replaced behind the next one.
  __device__ __forceinline__ bool must_rescale(int j) const {
    const int4 any = *reinterpret_cast<const int4*>(&shared_.rescale_votes[j & 1][group_ * 4]);
    return __any_sync(~0u, any.x | any.y | any.z | any.w);
  }

  // Computes the probabilities of stage j once more, relative to a maximum that includes them.
  template <bool kMasked>
  __device__ __forceinline__ void rescale(int j, float (&scores)[64], float (&partial)[64],
                                        uint32_t (&probabilities)[16], int stage) {
    multiply_keys(scores, stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    if (kMasked) mask(scores, j, stage);
    float correction[2];
    softmax_.rescale(scores, scale_, correction);
    multiply(output_, correction);
    if (j % kPromoteStages > 0) multiply(partial, correction);
    to_operand(scores, probabilities);
    pending_sum_[0] = pending_sum_[1] = 0.f;
  }

  // Raises the maxima of a warp's rows to those of its last stage, and lowers its probabilities and
  // the output alike.
  __device__ __forceinline__ void lower(float (&scores)[64]) {
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = softmax_.lower(scores, r);
      pending_sum_[r] *= factor[r];
      if (lane_ % 4 == 0) shared_.factors[group_ * 64 + row() + 8 * r] = factor[r];
    }
    __syncwarp();
    multiply(scores, factor);
    multiply(output_, factor);
  }

  // The same for sums of products that were not done then. Factors would not fit in registers.
  __device__ __forceinline__ void lower_partial(float (&partial)[64]) const {
    const float* factors = shared_.factors + group_ * 64 + row();
    const float factor[2] = {factors[0], factors[8]};
    multiply(partial, factor);
  }

  // Multiplies what belongs to each of a thread's two rows by a factor of its own.
  __device__ __forceinline__ static void multiply(float (&x)[64], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] *= factor[i / 2 % 2];
  }

  // Counts the last stage's probabilities, which nobody asks to compute once more.
  __device__ __forceinline__ void add_pending_sum() {
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.sum[r] += pending_sum_[r];
  }

  // Adds what the tensor cores have summed up to the output.
  __device__ __forceinline__ void promote(const float (&partial)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] += partial[i];
  }

  // ---- summaries ----

  // Gives the output the scale of the values; from here on all is in 16 bits.
  __device__ void scale_output() {
    const float* scale = params_.value_scale + int64_t{key_sequence()} * kHeadDim + column();
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      const float2 both = *reinterpret_cast<const float2*>(scale + 8 * i);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        output_[4 * i + 2 * r] *= both.x;
        output_[4 * i + 2 * r + 1] *= both.y;
      }
    }
  }

  __device__ void attend_to_summaries() {
    hopper::named_barrier_sync(kRescaleVotes + group_, 128);  // nobody reads the bytes of the queries any more
    load_query([] {});
    show_query();
    if (lane_ == 0) hopper::mbarrier_arrive(&shared_.runs_read);
    const float unit[2] = {1.f, 1.f};
    hopper::PipelineState<kSummaryStages> state;
    for (int first = 0; first < params_.summaries; first += kStageRows) {
      float scores[64];
      hopper::mbarrier_wait(&shared_.summary_full[state.stage], state.phase);
      multiply_summary_keys(scores, state.stage);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(scores);
      weigh(scores, first);
      float correction[2];
      softmax_.rescale(scores, unit, correction);
      multiply(output_, correction);
      uint32_t probabilities[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
      multiply_summary_values(probabilities, state.stage);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(output_);
      if (lane_ == 0) hopper::mbarrier_arrive(&shared_.summary_empty[state.stage]);
      state.advance();
    }
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

  __device__ __forceinline__ int token(int row) const {
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

  // Gathers this warpgroup's 64 rows into shared memory as they are, and does `meanwhile` while they
  // are on their way. Rows past the last repeat it; nobody stores what comes of them.
  template <typename Meanwhile>
  __device__ __forceinline__ void load_query(Meanwhile meanwhile) {
    const T* base = in_head(static_cast<const T*>(params_.query), params_.query_strides);
    uint4 pieces[8];
#pragma unroll
    for (int pass = 0; pass < 8; ++pass) {
      const int row = min(first_row_ + pass * 8 + thread_ / 16, params_.query_length - 1);
      pieces[pass] = __ldg(
          reinterpret_cast<const uint4*>(base + token(row) * params_.query_strides[2]) +
          thread_ % 16);
    }
    meanwhile();
#pragma unroll
    for (int pass = 0; pass < 8; ++pass)
      *reinterpret_cast<uint4*>(element(pass * 8 + thread_ / 16, thread_ % 16)) = pieces[pass];
  }

  // Scales and rotates the rows in shared memory as the keys were, and rounds them to bytes in their
  // place. Two threads share a row, sixty-four channels each, so that all but the last of the
  // rotation's seven steps stay within a thread.
  __device__ __forceinline__ void round_query() {
    constexpr int kHalf = kHeadDim / 2;
    const int local = thread_ / 2, half = thread_ % 2;
    const int64_t channels = int64_t{key_sequence()} * kHeadDim + half * kHalf;
    const float4* means = reinterpret_cast<const float4*>(params_.key_mean + channels);
    const float4* scales = reinterpret_cast<const float4*>(params_.key_scale + channels);
    const uint64_t signs = half ? kHighSigns : kLowSigns;
    float x[kHalf], dot = 0.f, largest = 0.f;
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      const uint2 piece =
          *reinterpret_cast<const uint2*>(element(local, half * 8 + i / 8) + i % 8 * 2);
      const float2 low = unpack<T>(piece.x), high = unpack<T>(piece.y);
      const float4 mean = means[i / 4], scale = scales[i / 4];
      dot = fmaf(low.x, mean.x, fmaf(low.y, mean.y, dot));
      dot = fmaf(high.x, mean.z, fmaf(high.y, mean.w, dot));
      x[i] = low.x * scale.x, x[i + 1] = low.y * scale.y;
      x[i + 2] = high.x * scale.z, x[i + 3] = high.y * scale.w;
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) x[i] = signs >> i & 1 ? -x[i] : x[i];
#pragma unroll
    for (int step = 1; step < kHalf; step *= 2) {
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        if (i & step) continue;
        const float a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
    }
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float other = __shfl_xor_sync(~0u, x[i], 1);
      x[i] = half ? other - x[i] : x[i] + other;
      largest = fmaxf(largest, fabsf(x[i]));
    }
    dot += __shfl_xor_sync(~0u, dot, 1);
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = largest > 0.f ? largest : 1.f;
    const float inverse = kLargestByte / largest;
    hopper::named_barrier_sync(kQueryReady + group_, 128);  // all have read what bytes replace
#pragma unroll
    for (int i = 0; i < kHalf; i += 16) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const float* four = x + i + 4 * w;
        words[w] = hopper::join(hopper::round_to_e4m3(four[0] * inverse, four[1] * inverse),
                                hopper::round_to_e4m3(four[2] * inverse, four[3] * inverse));
      }
      *reinterpret_cast<uint4*>(shared_.query[group_] + local * kHeadDim +
                                ((half * 4 + i / 16) ^ local % 8) * 16) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    if (half == 0) {
      // What the sums of the rotation are too large by is sqrt(128).
      const float unit = params_.scale * kLog2E * (0.08838834764831845f / kLargestByte);
      shared_.query_scale[group_ * 64 + local] = largest * unit;
      shared_.query_shift[group_ * 64 + local] = dot * params_.scale;
    }
    show_query();
  }

  // Makes the queries visible to the products of the whole warpgroup.
  __device__ __forceinline__ void show_query() {
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group_, 128);
  }

  // ---- products ----

  // Issues S = Q K^T; whoever needs it waits for it.
  __device__ __forceinline__ void multiply_keys(float (&scores)[64], int stage) {
    hopper::fence_registers(scores);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(shared_.query[group_], kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(hopper::matrix_descriptor(shared_.runs.key, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k)
      hopper::WgmmaSS<__nv_fp8_e4m3, kStageRows>::run(scores, hopper::advance_descriptor(query, 32 * k), hopper::advance_descriptor(key, 32 * k),
                                           k > 0);
    hopper::wgmma_commit();
  }

  // Issues O (+)= P V in four steps, and calls `behind(k)` behind step k. A warp cannot issue a step,
  // whose probabilities are in its registers, before the tensor cores have room for it: if all four
  // came at once, it would wait where it has something else to do.
  template <typename Behind>
  __device__ __forceinline__ void multiply_values(float (&partial)[64],
                                                  const uint32_t (&probabilities)[16], int stage,
                                                  bool accumulate, Behind behind) {
    constexpr int kSteps = kStageRows / 32;
    hopper::fence_registers(partial);
    hopper::wgmma_fence();
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.runs.value, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      hopper::WgmmaRS<__nv_fp8_e4m3, kHeadDim>::run(partial, probabilities + 4 * k,
                                                    hopper::advance_descriptor(value, 32 * k),
                                                    k > 0 || accumulate);
      if (k == kSteps - 1) hopper::wgmma_commit();
      behind(k);
    }
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
  __device__ __forceinline__ void mask(float (&scores)[64], int j, int stage) {
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
  __device__ __forceinline__ void keep(float (&scores)[64], Rows rows) {
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column() + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = -INFINITY;
    }
  }

  // Where lanes read how many rows of a stage count, each gives the stage back itself; else one
  // answers for its warp.
  __device__ __forceinline__ void release_keys(int stage) {
    if (key_arrivals_ > 0) hopper::mbarrier_arrive(&shared_.key_empty[stage], key_arrivals_);
  }

  __device__ __forceinline__ void release_values(int stage) {
    if (lane_ == 0) hopper::mbarrier_arrive(&shared_.value_empty[stage]);
  }

  // Word 4 k + 2 h + r of P holds, of row r, the columns that a lane has among the sixteen from
  // 32 k + 16 h on; the transposers laid out the values' keys to match. Halves may be made while a
  // product still reads the words, words may not.
  __device__ __forceinline__ void to_operand(const uint16_t (&halves)[32],
                                             uint32_t (&probabilities)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      probabilities[i] = hopper::join(halves[i / 2 * 4 + i % 2], halves[i / 2 * 4 + i % 2 + 2]);
  }

  __device__ __forceinline__ void to_operand(const float (&scores)[64],
                                             uint32_t (&probabilities)[16]) {
    uint16_t halves[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) halves[i] = hopper::round_to_e4m3(scores[2 * i], scores[2 * i + 1]);
    to_operand(halves, probabilities);
  }

  // Normalises, adds the mean value, turns fragments into rows through shared memory, and scatters
  // them to their tokens.
  __device__ void store() {
    int tokens[8];  // asked for first: they take longest
#pragma unroll
    for (int pass = 0; pass < 8; ++pass)
      tokens[pass] = token(min(first_row_ + pass * 8 + thread_ / 16, params_.query_length - 1));
    const float* mean = params_.value_mean + int64_t{key_sequence()} * kHeadDim + column();
    hopper::named_barrier_sync(kRescaleVotes + group_, 128);  // nobody reads the queries any more
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float sum = quad_sum(softmax_.sum[r]);
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int local = row() + 8 * r;
      if (params_.log_sum_exp && lane_ % 4 == 0 && first_row_ + local < params_.query_length)
        params_.log_sum_exp[row_of_all(token(first_row_ + local))] =
            sum > 0.f ? softmax_.log_sum_exp(r, sum) + shared_.query_shift[group_ * 64 + local]
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
            reinterpret_cast<uint4*>(base + tokens[pass] * params_.output_strides[2]) + chunk,
            *reinterpret_cast<const uint4*>(element(local, chunk)));
    }
  }

  const Params& params_;
  SharedStorage& shared_;
  int sequence_, thread_, group_, lane_, first_row_;
  Extent extent_;
  int key_arrivals_;  // on behalf of how many lanes this one gives keys back
  float scale_[2];    // from scores of bytes to units of log 2
  Softmax softmax_;
  float pending_sum_[2];  // sums of the last stage's probabilities, which may be renewed
  float output_[64];
};

}  // namespace svg::attention::fp8
