// A consumer warpgroup: S = Q K^T, online softmax, O += P V over the stages of the pipeline.
//
// The two warpgroups play ping-pong: while one takes the exponentials of stage j, the tensor cores
// run its product with the values of stage j-1 and the products of the other. They take turns to
// issue through warp-scheduler barriers.
//
// Rescaling is lazy: probabilities are relative to the maximum of the first stage, and floating
// point does not mind that they exceed one, so no later stage looks for its maximum or rescales O,
// which is half of the work between products. Only where a sum passes kRescaleThreshold is that
// stage's S computed once more and the maximum raised.
//
// Keys may be 8-bit integers: then S is summed in integers and scaled by key and by row.
#pragma once

#include "attention/epilogue.cuh"
#include "attention/query_tile.cuh"
#include "attention/rotated_query.cuh"
#include "attention/softmax.cuh"
#include "attention/storage.cuh"
#include "hopper/wgmma.cuh"

namespace svg::attention {

// `Key` is the type of the keys of runs, T or int8_t. Methods are templates of the type `K` of the
// keys at hand: those of summaries are of type T.
//
// With `kClears` value rows that count for nothing are cleared before they are multiplied by their
// probabilities of 0, which do not silence NaN and infinity. That costs a twelfth of the time, so
// only tiles whose output would not be finite without are computed so, in a launch of their own.
template <typename T, int kHeadDim, typename Key, bool kClears>
class Consumer {
 public:
  using Storage = SharedStorage<kHeadDim, Key>;
  static constexpr bool kBytes = Storage::kBytes;
  static constexpr int kAtomBytes = Storage::kAtomBytes;
  static constexpr int kStageBytes = Storage::kStageBytes;
  template <typename K>
  using Ring = KeyRing<K, kHeadDim, Key>;
  // What products with keys are summed up in.
  template <typename K>
  using Sum = std::conditional_t<std::is_same_v<K, int8_t>, int, float>;

  __device__ Consumer(const ParamsOf<Key>& params, Storage& shared, int tile)
      : params_(params), shared_(shared), tile_(params, shared.query, tile) {}

  __device__ void run(int summary_stages) {
    tile_.load([&] {
      extent_ = measure(params_.run_lengths + int64_t{tile_.index} * params_.runs, params_.runs,
                        tile_.lane);
    });
    run_stages_ = (extent_.atoms + kStageAtoms - 1) / kStageAtoms;
    nothing_ = hopper::warp_uniform(params_.tiles >> 24);
    key_arrivals_ = !extent_.whole ? 1 : tile_.lane == 0 ? 32 : 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.f;
    if (tile_.group == 1)  // the first warpgroup starts
      hopper::named_barrier_arrive(kWarpScheduler, kConsumers);
    if constexpr (kBytes) {
      round_query<int8_t>(tile_, params_.key_mean, params_.key_scale, shared_.query_scale,
                          shared_.query_shift);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        softmax_.scale[r] = shared_.query_scale[tile_.group * 64 + tile_.row() + 8 * r] * params_.row_scale[int64_t{tile_.key_sequence()} * params_.key_length];
      softmax_.offset = 12582912.f;
      attend_bytes(hopper::warp_uniform(run_stages_));
      softmax_.offset = 0.f;
      if (summary_stages > 0) {
        hopper::named_barrier_sync(kQueryReady + tile_.group, 128);  // nobody reads the bytes now
        tile_.find_places();
        tile_.load([] {});
        run_stages_ = 0;
        extent_ = {0, true};
        attend_wide(summary_stages);
      }
    } else {
      attend_wide(hopper::warp_uniform(run_stages_) + summary_stages);
    }
    if (!kClears && (!extent_.whole || summary_stages > 0)) list_if_spoiled();
    tile_.find_places();
    store_output(tile_, softmax_, output_, kBytes ? shared_.query_shift : nullptr);
  }

 private:
  // Attends to keys in 16 bits.
  __device__ __forceinline__ void attend_wide(int stages) {
    tile_.show();
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.scale[r] = params_.scale * kLog2E;
    attend<T>(stages);
  }

  template <typename K>
  __device__ __forceinline__ void attend(int stages) {
    if (stages == 0) return;
    // Stages that need no mask, a loop of their own.
    const int filled =
        hopper::warp_uniform(extent_.whole && !kClears ? extent_.atoms / kStageAtoms : 0);
    Sum<K> sums[64];
    uint32_t probabilities[32];
    typename Ring<K>::State key;

    hopper::mbarrier_wait(&Ring<K>::full(shared_)[key.stage], key.phase);
    warp_scheduler_barrier_sync();
    {
      float converted[64], correction[2];
      multiply_keys<K>(sums, key.stage);
      warp_scheduler_barrier_arrive();
      hopper::wgmma_wait<0>();
      hopper::fence_registers(sums);
      auto& scores = to_scores<K>(sums, converted, key.stage);
      mask(scores, 0, key.stage);
      softmax_.rescale(scores, correction);
      if (!Ring<K>::kOfRuns) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
      }
      to_operand(scores, probabilities);
    }
    vote_rescale(0, false);
    pending_sum_[0] = pending_sum_[1] = 0.f;

    int j = 1;
    for (; j < filled; ++j) step<K, false>(j, sums, probabilities, key);
    for (; j < stages; ++j) step<K, true>(j, sums, probabilities, key);

    hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);
    if (must_rescale(j - 1)) rescale<K, true>(j - 1, sums, probabilities, key.stage);
    add_pending_sum();
    if (kClears) clear_values(j - 1, key.stage);
    release_keys<K>(key.stage);
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    multiply_values(probabilities, value_.stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    release_values(value_.stage);
    value_.advance();
  }

  // Leaves a tile whose output is not finite to the next launch, which clears values.
  __device__ __forceinline__ void list_if_spoiled() {
    float zero = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) zero = fmaf(output_[i], 0.f, zero);
    if (!__any_sync(~0u, zero != 0.f) || tile_.lane != 0) return;
    if (atomicExch(&shared_.listed, 1) != 0) return;  // by another warp
    int* spoiled = params_.spoiled;
    spoiled[1 + atomicAdd(spoiled, 1)] = tile_.index;
  }

  // The scores and probabilities of stage j, and the product of those of the stage before with its
  // values. Keys stay until no warp asks to rescale what was made of them.
  template <typename K, bool kMasked>
  __device__ __forceinline__ void step(int j, Sum<K> (&sums)[64], uint32_t (&probabilities)[32],
                                       typename Ring<K>::State& key) {
    float converted[64];
    const int before = key.stage;
    key.advance();
    hopper::mbarrier_wait(&Ring<K>::full(shared_)[key.stage], key.phase);
    warp_scheduler_barrier_sync();
    multiply_keys<K>(sums, key.stage);
    if (must_rescale(j - 1)) {
      hopper::wgmma_wait<0>();
      rescale<K, kMasked>(j - 1, sums, probabilities, opaque(before));
      multiply_keys<K>(sums, opaque(key.stage));
    }
    add_pending_sum();
    if (kClears) clear_values(j - 1, before);
    release_keys<K>(before);
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    if constexpr (std::is_same_v<K, T>) {
      multiply_values(probabilities, value_.stage);
      warp_scheduler_barrier_arrive();
      hopper::wgmma_wait<1>();
    } else {
      hopper::wgmma_wait<0>();
      warp_scheduler_barrier_arrive();
    }
    hopper::fence_registers(sums);
    auto& scores = to_scores<K>(sums, converted, key.stage);
    if (kMasked) mask(scores, j, key.stage);
    if constexpr (std::is_same_v<K, T>) {
      softmax_.exponentiate(scores, pending_sum_);
    } else {
      // These products are longer than those of the scores, and not part of the turn: issued step
      // by step among the exponentials, they let those of the other warpgroup through.
      pending_sum_[0] = pending_sum_[1] = 0.f;
      multiply_values(probabilities, value_.stage,
                      [&](int k) { softmax_.exponentiate(k, scores, pending_sum_); });
    }
    vote_rescale(j, max(pending_sum_[0], pending_sum_[1]) > kRescaleThreshold<T> ||
                        min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    release_values(value_.stage);
    value_.advance();
    to_operand(scores, probabilities);
  }

  // ---- keys in bytes, by halves ----

  static __device__ __forceinline__ float to_float(int x) { return __int_as_float(x + 0x4B400000); }

  // Keeps the compiler from moving instructions across.
  template <int kPlace>
  __device__ __forceinline__ void separate() const {
    if (nothing_ >> kPlace & 1) {
      do asm volatile("nanosleep.u32 100;");
      while (opaque(1) != 0);
    }
  }

  // Issues a half of S = Q K^T, of the first or the last 64 keys of a stage; whoever needs it waits.
  template <int kHalf>
  __device__ __forceinline__ void multiply_half(int (&sums)[64], int stage) {
    using Bytes = Ring<int8_t>;
    int* half_of_sums = sums + 32 * kHalf;
    hopper::fence_registers<32>(half_of_sums);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(tile_.rows(), Bytes::kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.key, Bytes::kAtomBytes, 0), Bytes::kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k)
      hopper::WgmmaSS<int8_t, 64>::run(
          half_of_sums, hopper::advance_descriptor(query, 32 * k),
          hopper::advance_descriptor(key, 8 * kHalf * Bytes::kAtomBytes + 32 * k), k > 0);
    hopper::wgmma_commit();
  }

  template <int kHalf, typename Behind>
  __device__ __forceinline__ void multiply_half_of_values(const uint32_t (&probabilities)[32], int stage,
                                                          Behind behind) {
    hopper::fence_registers(output_);
    hopper::wgmma_fence();
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.value, kAtomBytes, 1024), kStageBytes, stage);
#pragma unroll
    for (int k = 4 * kHalf; k < 4 * kHalf + 4; ++k) {
      if (k > 4 * kHalf) hopper::wgmma_fence();
      hopper::WgmmaRS<T, kHeadDim>::run(output_, probabilities + 4 * k,
                                        hopper::advance_descriptor(value, 2 * k * kAtomBytes));
      hopper::wgmma_commit();
      behind(k);
    }
  }

  // Probabilities of a stage, whose maxima are raised to include it.
  template <bool kMasked>
  __device__ __forceinline__ void renew(int j, int (&sums)[64], uint32_t (&probabilities)[32], int stage,
                                        float (&correction)[2]) {
    float scores[64];
    multiply_half<0>(sums, stage);
    multiply_half<1>(sums, stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(sums);
#pragma unroll
    for (int i = 0; i < 64; ++i) scores[i] = to_float(sums[i]);
    if (kMasked) {
      mask_half<0>(scores, j, stage);
      mask_half<1>(scores, j, stage);
    }
    softmax_.rescale(scores, correction);
    to_operand(scores, probabilities);
    pending_sum_[0] = pending_sum_[1] = 0.f;
  }

  __device__ __forceinline__ void attend_bytes(int stages) {
    using Bytes = Ring<int8_t>;
    if (stages == 0) return;
    const int filled =
        hopper::warp_uniform(extent_.whole && !kClears ? extent_.atoms / kStageAtoms : 0);
    int sums[64];
    uint32_t probabilities[32];
    typename Bytes::State key;
    float correction[2];
    hopper::mbarrier_wait(&Bytes::full(shared_)[key.stage], key.phase);
    renew<true>(0, sums, probabilities, key.stage, correction);
    vote_rescale(0, false);
    if (stages > 1) {
      typename Bytes::State next = key;
      next.advance();
      hopper::mbarrier_wait(&Bytes::full(shared_)[next.stage], next.phase);
      multiply_half<0>(sums, next.stage);
      hopper::wgmma_wait<0>();
      hopper::fence_registers<32>(&sums[0]);
    }
    int j = 1;
    const int whole = min(filled, stages - 1);
    for (; j < whole; ++j) step_bytes<false, false>(j, sums, probabilities, key);
    for (; j < stages - 1; ++j) step_bytes<true, false>(j, sums, probabilities, key);
    if (j < stages) step_bytes<true, true>(j++, sums, probabilities, key);

    hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);
    if (must_rescale(j - 1)) {
      renew<true>(j - 1, sums, probabilities, key.stage, correction);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
    }
    add_pending_sum();
    if (kClears) clear_values(j - 1, key.stage);
    release_keys<int8_t>(key.stage);
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    multiply_half_of_values<0>(probabilities, value_.stage, [](int) {});
    multiply_half_of_values<1>(probabilities, value_.stage, [](int) {});
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    release_values(value_.stage);
    value_.advance();
  }

  template <bool kMasked, bool kLast>
  __device__ __forceinline__ void step_bytes(int j, int (&sums)[64], uint32_t (&probabilities)[32],
                                             typename Ring<int8_t>::State& key) {
    using Bytes = Ring<int8_t>;
    const int before = key.stage;
    key.advance();
    hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);
    multiply_half<1>(sums, key.stage);
    if (must_rescale(j - 1)) {
      float correction[2];
      hopper::wgmma_wait<0>();
      renew<kMasked>(j - 1, sums, probabilities, opaque(before), correction);
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
      multiply_half<0>(sums, opaque(key.stage));
      hopper::wgmma_wait<0>();
      hopper::fence_registers<32>(&sums[0]);
      multiply_half<1>(sums, opaque(key.stage));
    }
    
    add_pending_sum();
    if (kClears) clear_values(j - 1, before);
    release_keys<int8_t>(before);
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    float scores[64];
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = to_float(sums[i]);
    if (kMasked) mask_half<0>(scores, j, key.stage);
    pending_sum_[0] = pending_sum_[1] = 0.f;
    multiply_half_of_values<0>(probabilities, value_.stage,
                               [&](int k) { softmax_.exponentiate(k, scores, pending_sum_); });
    
    uint32_t first[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) first[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    separate<9>();
    hopper::wgmma_wait<4>();
    hopper::fence_registers<32>(&sums[32]);
    if (!kLast) {
      typename Bytes::State next = key;
      next.advance();
      hopper::mbarrier_wait(&Bytes::full(shared_)[next.stage], next.phase);
      multiply_half<0>(sums, next.stage);
      separate<8>();
    }
#pragma unroll
    for (int i = 32; i < 64; ++i) scores[i] = to_float(sums[i]);
    if (kMasked) mask_half<1>(scores, j, key.stage);
    multiply_half_of_values<1>(probabilities, value_.stage,
                               [&](int k) { softmax_.exponentiate(k, scores, pending_sum_); });
    vote_rescale(j, max(pending_sum_[0], pending_sum_[1]) > kRescaleThreshold<T> ||
                        min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    if (!kLast) hopper::fence_registers<32>(&sums[0]);
    release_values(value_.stage);
    value_.advance();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      probabilities[i] = first[i] ^ nothing_;
      probabilities[16 + i] = pack<T>(scores[32 + 2 * i], scores[33 + 2 * i]);
    }
  }

  // Ping-pong: waits for this warpgroup's turn to issue products, and hands the turn over.
  __device__ __forceinline__ void warp_scheduler_barrier_sync() const {
    hopper::named_barrier_sync(kWarpScheduler + tile_.group, kConsumers);
  }

  __device__ __forceinline__ void warp_scheduler_barrier_arrive() const {
    hopper::named_barrier_arrive(kWarpScheduler + 1 - tile_.group, kConsumers);
  }

  // Tells the other warps of the warpgroup, after their next barrier, whether this one needs its
  // probabilities of stage j rescaled. Warps may be a stage apart, hence the two places.
  __device__ __forceinline__ void vote_rescale(int j, bool needed) {
    const bool any = __any_sync(~0u, needed);
    if (tile_.lane == 0) shared_.rescale_votes[j & 1][threadIdx.x / 32 - 4] = any;
  }

  // The same in all four warps, which may wait for products on it: they read the same votes, given
  // before a barrier of the warpgroup and replaced behind the next one.
  __device__ __forceinline__ bool must_rescale(int j) const {
    const int4 any = *reinterpret_cast<const int4*>(&shared_.rescale_votes[j & 1][tile_.group * 4]);
    return __any_sync(~0u, any.x | any.y | any.z | any.w);
  }

  // Computes the probabilities of stage j once more, relative to a maximum that includes them.
  template <typename K, bool kMasked>
  __device__ __forceinline__ void rescale(int j, Sum<K> (&sums)[64], uint32_t (&probabilities)[32],
                                          int stage) {
    float converted[64], correction[2];
    multiply_keys<K>(sums, stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(sums);
    auto& scores = to_scores<K>(sums, converted, stage);
    if (kMasked) mask(scores, j, stage);
    softmax_.rescale(scores, correction);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
    to_operand(scores, probabilities);
    pending_sum_[0] = pending_sum_[1] = 0.f;
  }

  // Counts the last stage's probabilities, which nobody will rescale any more.
  __device__ __forceinline__ void add_pending_sum() {
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.sum[r] += pending_sum_[r];
  }

  // Issues S = Q K^T; whoever needs it waits for it.
  template <typename K>
  __device__ __forceinline__ void multiply_keys(Sum<K> (&sums)[64], int stage) {
    hopper::fence_registers(sums);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(tile_.rows(), Ring<K>::kAtomBytes, 0);
    const uint64_t key =
        hopper::advance_descriptor(hopper::matrix_descriptor(shared_.key, Ring<K>::kAtomBytes, 0),
                                   Ring<K>::kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim * sizeof(K) / 32; ++k) {
      const int offset = k / 4 * 1024 + k % 4 * 32;
      hopper::WgmmaSS<K, kStageRows>::run(sums, hopper::advance_descriptor(query, offset),
                                          hopper::advance_descriptor(key, offset), k > 0);
    }
    hopper::wgmma_commit();
  }

  // Gives sums of products of bytes the scales of their keys.
  template <typename K>
  __device__ __forceinline__ auto& to_scores(Sum<K> (&sums)[64], float (&scores)[64],
                                             int stage) const {
    if constexpr (std::is_same_v<K, int8_t>) {
      const float* scales = shared_.row_scale[stage] + tile_.column();
#pragma unroll
      for (int i = 0; i < kStageAtoms; ++i) {
        const float2 both = *reinterpret_cast<const float2*>(scales + 8 * i);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scores[4 * i + 2 * r] = __int_as_float(sums[4 * i + 2 * r] + 0x4B400000);
          scores[4 * i + 2 * r + 1] = __int_as_float(sums[4 * i + 2 * r + 1] + 0x4B400000);
        }
      }
      return scores;
    } else {
      return sums;
    }
  }

  // Issues O += P V, and calls `behind(k)` behind each of eight steps.
  template <typename Behind>
  __device__ __forceinline__ void multiply_values(const uint32_t (&probabilities)[32], int stage,
                                                  Behind behind) {
    hopper::fence_registers(output_);
    hopper::wgmma_fence();
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.value, kAtomBytes, 1024), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k) {
      hopper::WgmmaRS<T, kHeadDim>::run(output_, probabilities + 4 * k,
                                        hopper::advance_descriptor(value, 2 * k * kAtomBytes));
      if (k == kStageRows / 16 - 1) hopper::wgmma_commit();
      behind(k);
    }
  }

  __device__ __forceinline__ void multiply_values(const uint32_t (&probabilities)[32], int stage) {
    multiply_values(probabilities, stage, [](int) {});
  }

  // Takes out the rows an atom read beyond its run, and weighs the summaries of keys that were not
  // read.
  __device__ __forceinline__ void mask(float (&scores)[64], int j, int stage) {
    if (j >= run_stages_) {
      weigh_summaries(scores, j - run_stages_);
    } else if (!extent_.whole) {
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
    const int column = tile_.column();
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = -INFINITY;
    }
  }

  __device__ __forceinline__ void weigh_summaries(float (&scores)[64], int j) {
    const int first = j * kStageRows + tile_.column();
    const float* weights = params_.summary_weights + int64_t{tile_.index} * params_.summaries;
    const float inverse_scale = 1.f / params_.scale;
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = first + 8 * i + e;
        const float weight = c < params_.summaries ? weights[c] * inverse_scale : -INFINITY;
        const bool left_out = weight == -INFINITY;  // even where the score is NaN
        scores[4 * i + e] = left_out ? weight : scores[4 * i + e] + weight;
        scores[4 * i + 2 + e] = left_out ? weight : scores[4 * i + 2 + e] + weight;
      }
    }
  }

  template <int kHalf>
  __device__ __forceinline__ void mask_half(float (&scores)[64], int j, int stage) {
    if (!extent_.whole) {
      const uint64_t valid = shared_.valid[stage];
      if (valid != kAllValid)
        keep_half<kHalf>(scores, [&](int atom) { return static_cast<int>(valid >> (4 * atom)) & 15; });
    } else if ((j + 1) * kStageAtoms > extent_.atoms) {
      const int filled = extent_.atoms - j * kStageAtoms;
      keep_half<kHalf>(scores, [&](int atom) { return atom < filled ? kAtomRows : 0; });
    }
  }

  // Keeps the first rows(i) rows of each atom i.
  template <int kHalf, typename Rows>
  __device__ __forceinline__ void keep_half(float (&scores)[64], Rows rows) {
    const int column = tile_.column();
#pragma unroll
    for (int i = 8 * kHalf; i < 8 * kHalf + 8; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = -INFINITY;
    }
  }

  // Zeros the value rows of stage j that count for nothing, a thread a row. Both warpgroups write
  // the same zeros, each before its own product; the keys of the stage are not given back yet, so
  // `valid` still belongs to it.
  __device__ __forceinline__ void clear_values(int j, int key_stage) {
    const int row = tile_.thread;
    bool counts = true;
    if (j >= run_stages_) {
      const int c = (j - run_stages_) * kStageRows + row;
      if (c < params_.summaries)  // TMA fills rows beyond with zeros
        counts = params_.summary_weights[int64_t{tile_.index} * params_.summaries + c] != -INFINITY;
    } else if (!extent_.whole) {
      const uint64_t valid = shared_.valid[key_stage];
      if (valid == kAllValid) return;
      counts = row % kAtomRows < (static_cast<int>(valid >> (4 * (row / kAtomRows))) & 15);
    } else {
      return;
    }
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    if (!counts) {
      unsigned char* place =
          shared_.value[value_.stage] + row / kAtomRows * kAtomBytes + row % kAtomRows * 128;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        *reinterpret_cast<uint4*>(place + i / 8 * 1024 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + tile_.group, 128);
  }

  // Where lanes read how many rows of a stage count, each gives the stage back itself; else one
  // answers for its warp, which is 7 % faster.
  template <typename K>
  __device__ __forceinline__ void release_keys(int stage) {
    if (key_arrivals_ > 0) hopper::mbarrier_arrive(&Ring<K>::empty(shared_)[stage], key_arrivals_);
  }

  __device__ __forceinline__ void release_values(int stage) {
    if (tile_.lane == 0) hopper::mbarrier_arrive(&shared_.value_empty[stage]);
  }

  // The accumulator layout of S is the register layout of P's operand, two column groups of eight
  // at a time.
  __device__ __forceinline__ void to_operand(const float (&scores)[64],
                                             uint32_t (&probabilities)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  const ParamsOf<Key>& params_;
  Storage& shared_;
  QueryTile<T, kHeadDim> tile_;
  int run_stages_;
  Extent extent_;
  int nothing_;  // zero, which the compiler does not know
  int key_arrivals_;  // on behalf of how many lanes this one gives keys back
  hopper::PipelineState<kStages> value_;
  Softmax softmax_;
  float pending_sum_[2];  // of the last stage's probabilities, which may yet be rescaled
  float output_[kHeadDim / 2];
};

}  // namespace svg::attention
