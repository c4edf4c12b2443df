// A consumer warpgroup: S = Q K^T, online softmax, O += P V over the stages of the pipeline.
//
// Products and exponentials overlap within a warpgroup. S of a stage is computed in two halves of 64
// keys each, in registers of their own, so that one can be summed up while exponentials are taken of
// the other:
//
//   exponentials of       tensor cores
//   first half of j       second half of S(j), first half of P(j-1) V(j-1)
//   second half of j      first half of S(j+1), second half of P(j-1) V(j-1)
//
// A warp cannot issue a step of P V, whose P is in its registers, before the tensor cores have room
// for it; steps are issued one by one among the exponentials, so that it waits for none.
//
// Rescaling is lazy: probabilities are relative to the maximum of the first stage, and floating
// point does not mind that they exceed one, so no later stage looks for its maximum or rescales O,
// which is half of the work between products. Only where a sum passes kRescaleThreshold is that
// stage's S computed once more and the maximum raised.
#pragma once

#include "attention/epilogue.cuh"
#include "attention/query_tile.cuh"
#include "attention/softmax.cuh"
#include "attention/storage.cuh"
#include "hopper/wgmma.cuh"

namespace svg::attention {

// The same value, of which the compiler knows nothing: what is rarely computed from it is not kept
// in registers meanwhile.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// With `kClears` value rows that count for nothing are cleared before they are multiplied by their
// probabilities of 0, which do not silence NaN and infinity. That costs a twelfth of the time, so
// only tiles whose output would not be finite without are computed so, in a launch of their own.
template <typename T, int kHeadDim, bool kClears>
class Consumer {
 public:
  static constexpr int kAtomBytes = SharedStorage<kHeadDim>::kAtomBytes;
  static constexpr int kStageBytes = SharedStorage<kHeadDim>::kStageBytes;
  static constexpr int kHalfAtoms = kStageAtoms / 2;
  static constexpr int kValueSteps = kStageRows / 16;

  __device__ Consumer(const Params& params, SharedStorage<kHeadDim>& shared, int sequence, int tile)
      : tile_(params, shared, sequence, tile) {
    softmax_.scale_log2 = params.scale * kLog2E;
  }

  __device__ void run(int summary_stages) {
    tile_.load();
    const Params& params = tile_.params;
    extent_ = measure(params.run_lengths + tile_.index() * params.runs, params.runs, tile_.lane);
    run_stages_ = (extent_.atoms + kStageAtoms - 1) / kStageAtoms;
    zero_ = hopper::warp_uniform(params.tiles >> 28);  // of 2^31 / 128 at most
    key_arrivals_ = !extent_.whole ? 1 : tile_.lane == 0 ? 32 : 0;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.f;
    const int stages = hopper::warp_uniform(run_stages_) + summary_stages;
    if (stages > 0) attend(stages);
    if (!kClears && (!extent_.whole || summary_stages > 0)) list_if_spoiled();
    store_output(tile_, softmax_, output_);
  }

 private:
  __device__ __forceinline__ void attend(int stages) {
    // Stages that need no mask, a loop of their own.
    const int filled =
        hopper::warp_uniform(extent_.whole && !kClears ? extent_.atoms / kStageAtoms : 0);
    float scores[2][32];  // by half of a stage
    uint32_t probabilities[2][16];
    PipelineState key, value;
    SharedStorage<kHeadDim>& shared = tile_.shared;

    hopper::mbarrier_wait(&shared.key_full[key.stage], key.phase);
    rescale<true>(0, scores, probabilities, key.stage);
    vote_rescale(0, false);
    if (stages > 1) {
      multiply_next_keys(scores, key);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(scores[0]);
    }

    int j = 1;
    for (; j < min(filled, stages - 1); ++j)
      step<false, false>(j, scores, probabilities, key, value);
    for (; j < stages - 1; ++j) step<true, false>(j, scores, probabilities, key, value);
    if (j < stages) step<true, true>(j++, scores, probabilities, key, value);

    hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);
    if (must_rescale(j - 1)) rescale<true>(j - 1, scores, probabilities, key.stage);
    add_pending_sum();
    if (kClears) clear_values(j - 1, value);
    hopper::mbarrier_wait(&shared.value_full[value.stage], value.phase);
    multiply_values<0>(probabilities, value.stage, [](int) {});
    multiply_values<1>(probabilities, value.stage, [](int) {});
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
  }

  // Leaves a tile whose output is not finite to the next launch, which clears values.
  __device__ __forceinline__ void list_if_spoiled() {
    float zero = 0.f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) zero = fmaf(output_[i], 0.f, zero);
    if (!__any_sync(~0u, zero != 0.f) || tile_.lane != 0) return;
    if (atomicExch(&tile_.shared.listed, 1) != 0) return;  // by another warp
    int* spoiled = tile_.params.spoiled;
    spoiled[1 + atomicAdd(spoiled, 1)] = static_cast<int>(tile_.index());
  }

  // The probabilities of stage j, the product of those of the stage before with its values, the
  // second half of the scores of stage j and the first half of those of the stage after. Keys stay
  // until no warp asks to rescale what was made of them.
  template <bool kMasked, bool kLast>
  __device__ __forceinline__ void step(int j, float (&scores)[2][32],
                                       uint32_t (&probabilities)[2][16], PipelineState& key,
                                       PipelineState& value) {
    SharedStorage<kHeadDim>& shared = tile_.shared;
    const int before = key.stage;
    key.advance();
    hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);
    multiply_keys<1>(scores, key.stage);
    if (must_rescale(j - 1)) {
      hopper::wgmma_wait<0>();
      rescale<kMasked>(j - 1, scores, probabilities, opaque(before));
      multiply_keys<0>(scores, opaque(key.stage));
      multiply_keys<1>(scores, opaque(key.stage));
      hopper::wgmma_wait<1>();
      hopper::fence_registers(scores[0]);
    }
    add_pending_sum();
    if (kClears) clear_values(j - 1, value);
    release_keys(before);
    hopper::mbarrier_wait(&shared.value_full[value.stage], value.phase);

    if (kMasked) mask<0>(scores, j, key.stage);
    pending_sum_[0] = pending_sum_[1] = 0.f;
    multiply_values<0>(probabilities, value.stage,
                       [&](int k) { softmax_.exponentiate(k, scores[0], pending_sum_); });
    uint32_t first[16];  // its place is still read
    to_operand(scores[0], first);
    hopper::keep_order<0>(zero_);

    hopper::wgmma_wait<kValueSteps / 2>();  // for the second half of S
    hopper::fence_registers(scores[1]);
    if (kMasked) mask<1>(scores, j, key.stage);
    if (!kLast) multiply_next_keys(scores, key);
    hopper::keep_order<1>(zero_);
    multiply_values<1>(probabilities, value.stage,
                       [&](int k) { softmax_.exponentiate(k, scores[1], pending_sum_); });
    vote_rescale(j, max(pending_sum_[0], pending_sum_[1]) > kRescaleThreshold<T> ||
                        min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    if (!kLast) hopper::fence_registers(scores[0]);
    release_values(value.stage);
    value.advance();
    // An instruction between conversion and product, without which ptxas serialises all products.
#pragma unroll
    for (int i = 0; i < 16; ++i) probabilities[0][i] = first[i] ^ zero_;
    to_operand(scores[1], probabilities[1]);
  }

  // Tells the other warps of the warpgroup, after their next barrier, whether this one needs its
  // probabilities of stage j rescaled. Warps may be a stage apart, hence the two places.
  __device__ __forceinline__ void vote_rescale(int j, bool needed) {
    const bool any = __any_sync(~0u, needed);
    if (tile_.lane == 0) tile_.shared.rescale_votes[j & 1][threadIdx.x / 32 - 4] = any;
  }

  // The same in all four warps, which may wait for products on it: they read the same votes, given
  // before a barrier of the warpgroup and replaced behind the next one.
  __device__ __forceinline__ bool must_rescale(int j) const {
    const int4 any =
        *reinterpret_cast<const int4*>(&tile_.shared.rescale_votes[j & 1][tile_.group * 4]);
    return __any_sync(~0u, any.x | any.y | any.z | any.w);
  }

  // Computes the probabilities of stage j once more, relative to a maximum that includes them.
  template <bool kMasked>
  __device__ __forceinline__ void rescale(int j, float (&scores)[2][32],
                                          uint32_t (&probabilities)[2][16], int stage) {
    multiply_keys<0>(scores, stage);
    multiply_keys<1>(scores, stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores[0]);
    hopper::fence_registers(scores[1]);
    if (kMasked) {
      mask<0>(scores, j, stage);
      mask<1>(scores, j, stage);
    }
    float correction[2];
    softmax_.rescale(scores, correction);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= correction[i / 2 % 2];
    to_operand(scores[0], probabilities[0]);
    to_operand(scores[1], probabilities[1]);
    pending_sum_[0] = pending_sum_[1] = 0.f;
  }

  // Counts the last stage's probabilities, which nobody will rescale any more.
  __device__ __forceinline__ void add_pending_sum() {
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax_.sum[r] += pending_sum_[r];
  }

  // Issues a half of S = Q K^T; whoever needs it waits for it.
  template <int kHalf>
  __device__ __forceinline__ void multiply_keys(float (&scores)[2][32], int stage) {
    hopper::fence_registers(scores[kHalf]);
    hopper::wgmma_fence();
    const uint64_t query =
        hopper::matrix_descriptor(tile_.shared.query + tile_.group * 8 * kAtomBytes, kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(
        hopper::matrix_descriptor(tile_.shared.key, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int offset = k / 4 * 1024 + k % 4 * 32;
      hopper::WgmmaSS<T, kStageRows / 2>::run(
          scores[kHalf], hopper::advance_descriptor(query, offset),
          hopper::advance_descriptor(key, kHalf * kStageBytes / 2 + offset), k > 0);
    }
    hopper::wgmma_commit();
  }

  // Issues the first half of S of the stage after `key`.
  __device__ __forceinline__ void multiply_next_keys(float (&scores)[2][32], PipelineState key) {
    key.advance();
    hopper::mbarrier_wait(&tile_.shared.key_full[key.stage], key.phase);
    multiply_keys<0>(scores, key.stage);
  }

  // Issues a half of O += P V, and calls `behind(k)` behind each step k of the half. Each step is a
  // group of its own: ptxas expects a warp to wait before it issues a group, and puts other work
  // there.
  template <int kHalf, typename Behind>
  __device__ __forceinline__ void multiply_values(const uint32_t (&probabilities)[2][16], int stage,
                                                  Behind behind) {
    hopper::fence_registers(output_);
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(tile_.shared.value, kAtomBytes, 1024), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kValueSteps / 2; ++k) {
      const int rows = kHalf * kStageRows / 2 + 16 * k;
      hopper::wgmma_fence();
      hopper::WgmmaRS<T, kHeadDim>::run(
          output_, probabilities[kHalf] + 4 * k,
          hopper::advance_descriptor(value, rows / kAtomRows * kAtomBytes));
      hopper::wgmma_commit();
      behind(k);
    }
  }

  // Takes out the rows an atom read beyond its run, and weighs the summaries of keys that were not
  // read.
  template <int kHalf>
  __device__ __forceinline__ void mask(float (&scores)[2][32], int j, int stage) {
    constexpr int kFirst = kHalf * kHalfAtoms;
    if (j >= run_stages_) {
      weigh_summaries(scores[kHalf], (j - run_stages_) * kStageRows + kFirst * kAtomRows);
    } else if (!extent_.whole) {
      const uint64_t valid = tile_.shared.valid[stage];
      if (valid != kAllValid)
        keep(scores[kHalf], [&](int atom) {
          return static_cast<int>(valid >> (4 * (kFirst + atom))) & 15;
        });
    } else if ((j + 1) * kStageAtoms > extent_.atoms) {
      const int filled = extent_.atoms - j * kStageAtoms;
      keep(scores[kHalf], [&](int atom) { return kFirst + atom < filled ? kAtomRows : 0; });
    }
  }

  // Keeps the first rows(i) rows of each atom i of a half.
  template <typename Rows>
  __device__ __forceinline__ void keep(float (&scores)[32], Rows rows) {
    const int column = 2 * (tile_.lane % 4);
#pragma unroll
    for (int i = 0; i < kHalfAtoms; ++i) {
      const int count = rows(i);
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (column + e >= count) scores[4 * i + e] = scores[4 * i + 2 + e] = -INFINITY;
    }
  }

  // The scores of a half are those of the summaries from `first` on.
  __device__ __forceinline__ void weigh_summaries(float (&scores)[32], int first) {
    const Params& params = tile_.params;
    first += 2 * (tile_.lane % 4);
    const float* weights = params.summary_weights + tile_.index() * params.summaries;
    const float inverse_scale = 1.f / params.scale;
#pragma unroll
    for (int i = 0; i < kHalfAtoms; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = first + 8 * i + e;
        const float weight = c < params.summaries ? weights[c] * inverse_scale : -INFINITY;
        const bool left_out = weight == -INFINITY;  // even where the score is NaN
        scores[4 * i + e] = left_out ? weight : scores[4 * i + e] + weight;
        scores[4 * i + 2 + e] = left_out ? weight : scores[4 * i + 2 + e] + weight;
      }
    }
  }

  // Zeros the value rows of stage j that count for nothing, a thread a row. Both warpgroups write the same zeros, each before its own
  // product; the keys of the stage are not given back yet, so `valid` still belongs to it.
  __device__ __forceinline__ void clear_values(int j, const PipelineState& value) {
    SharedStorage<kHeadDim>& shared = tile_.shared;
    const int row = tile_.thread;
    bool counts = true;
    if (j >= run_stages_) {
      const Params& params = tile_.params;
      const int c = (j - run_stages_) * kStageRows + row;
      if (c < params.summaries)  // TMA fills rows beyond with zeros
        counts = params.summary_weights[tile_.index() * params.summaries + c] != -INFINITY;
    } else if (!extent_.whole) {
      const uint64_t valid = shared.valid[value.stage];
      if (valid == kAllValid) return;
      counts = row % kAtomRows < (static_cast<int>(valid >> (4 * (row / kAtomRows))) & 15);
    } else {
      return;
    }
    hopper::mbarrier_wait(&shared.value_full[value.stage], value.phase);
    if (!counts) {
      unsigned char* place =
          shared.value[value.stage] + row / kAtomRows * kAtomBytes + row % kAtomRows * 128;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        *reinterpret_cast<uint4*>(place + i / 8 * 1024 + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + tile_.group, 128);
  }

  // Where lanes read how many rows of a stage count, each gives the stage back itself; else one
  // answers for its warp, which is 7 % faster.
  __device__ __forceinline__ void release_keys(int stage) {
    if (key_arrivals_ > 0) hopper::mbarrier_arrive(&tile_.shared.key_empty[stage], key_arrivals_);
  }

  __device__ __forceinline__ void release_values(int stage) {
    if (tile_.lane == 0) hopper::mbarrier_arrive(&tile_.shared.value_empty[stage]);
  }

  // The accumulator layout of S is the register layout of P's operand, two column groups of eight
  // at a time.
  __device__ __forceinline__ static void to_operand(const float (&scores)[32],
                                                    uint32_t (&probabilities)[16]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) probabilities[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  QueryTile<T, kHeadDim> tile_;
  int run_stages_;
  Extent extent_;
  int zero_;  // which the compiler does not know
  int key_arrivals_;  // on behalf of how many lanes this one gives keys back
  Softmax softmax_;
  float pending_sum_[2];  // of the last stage's probabilities, which may yet be rescaled
  float output_[kHeadDim / 2];
};

}  // namespace svg::attention
