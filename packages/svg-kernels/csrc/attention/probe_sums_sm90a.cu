// Attention of probes over every key, with sums by segment of the keys, for Hopper (sm_90a).
//
// A probe is a query; a segment is a set of keys that a caller thinks of replacing by its mean key
// and mean value. One pass over the keys gives, for each group of probes and each segment, what the
// replacement would cost and how much weight a mean key lacks, and on request each probe's exact
// attention output. No score and no sum of a single probe is ever kept in memory for long.
//
// lay_out       lists the rows of every segment, its mean key behind its keys, and what each row
//               counts: its `energy`, beside the square of its weight, and its `agreement`, beside
//               its weight.
// probe_sums    a persistent grid. A thread block owns 64 probes for each of its consumer
//               warpgroups; its producer warpgroup gathers 128 listed rows a stage. A warpgroup
//               multiplies and exponentiates. Sums by segment are further small products, of
//               weights and of their squares, with matrices that have a row for each key and one
//               column for each of eight segments; a key fills the column of its own. Segments take
//               columns in turn, and no stage meets more than eight. Where one ends, a thread has
//               all its sums of a probe, and leaves them in scratch until the probe's denominator
//               is known.
//
// Weights are relative to a number chosen once for each probe, its largest score among 128 keys
// spread over the list, so nothing is rescaled on the way. Where a probe's sum shows that this was
// too low for squares to fit fp32, the block goes over the keys again with a better one.

#include "attention/probe_sums.h"
#include "attention/softmax.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"

#ifndef __CUDA_ARCH__
#include "ffi/launch.h"
#endif

namespace svg::probe_sums {
namespace {

using attention::exp2_approx;
using attention::kLog2E;
using hopper::shared_address;
using bf16 = __nv_bfloat16;

constexpr int kAtomRows = 8;  // rows of one swizzle atom
constexpr int kStageRows = 128;
constexpr int kStageAtoms = kStageRows / kAtomRows;
constexpr int kColumns = 8;  // segments that a stage can meet, none of fewer than 19 rows
constexpr int kPasses = 8;
// A sum of weights above this asks for another pass: squares of weights must fit fp32.
constexpr float kLargestSum = 0x1p50f;

// The matrices of a stage, one column block of eight each: which segment a key is of, its agreement,
// which segment a mean key is of, and a key's energy.
enum Matrix { kMember, kAgreement, kCenter, kEnergy, kMatrices };
constexpr int kMatrixBytes = kStageRows * kColumns * 2;

// The first two are followed by one for each further consumer warpgroup.
enum NamedBarrier { kQueryReady = 1, kTurn = 4, kSumsReady = 7 };

// How a thread block is made up, with the probes' outputs and without.
template <int kHeadDim, bool kOutputs>
struct Shape {
  static constexpr int kGroups = kOutputs ? 2 : 3;  // consumer warpgroups
  static constexpr int kRows = 64 * kGroups;        // probes of a block
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kKeyStages = kOutputs ? 3 : 4;
  static constexpr int kValueStages = 2;
  // What makes sums by segment of weights is read with the values where there are any.
  static constexpr int kMatrixStages = kOutputs ? kValueStages : kKeyStages;
  static constexpr int kAtomBytes = kAtomRows * kHeadDim * 2;
  static constexpr int kStageBytes = kStageAtoms * kAtomBytes;
};

template <int kHeadDim, bool kOutputs>
struct SharedStorage {
  using S = Shape<kHeadDim, kOutputs>;
  alignas(1024) unsigned char query[S::kRows * kHeadDim * 2];
  alignas(1024) unsigned char key[S::kKeyStages][S::kStageBytes];
  alignas(1024) unsigned char value[kOutputs ? S::kValueStages : 1][kOutputs ? S::kStageBytes : 16];
  alignas(128) unsigned char matrices[S::kMatrixStages][kMatrices][kMatrixBytes];
  alignas(16) Ending endings[S::kMatrixStages][kColumns];
  float weight[S::kRows];  // of a probe in its group, over its denominator
  float weight_square[S::kRows];
  uint64_t key_full[S::kKeyStages], key_empty[S::kKeyStages];
  uint64_t value_full[S::kValueStages], value_empty[S::kValueStages];
};

// ---- rows and what they count ----

__device__ __forceinline__ uint32_t bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

template <int kHeadDim>
__global__ void __launch_bounds__(128) lay_out(const __grid_constant__ Arguments a) {
  constexpr int kLanes = kHeadDim / 8;    // lanes of a row, 16 bytes each
  constexpr int kWarpRows = 32 / kLanes;  // rows of a warp at a time
  constexpr int kBlockRows = 4 * kWarpRows;
  const int segment = blockIdx.x % a.segments;
  const int64_t sequence = blockIdx.x / a.segments;
  const int lane = threadIdx.x % 32, chunk = lane % kLanes;
  const int64_t place = sequence * a.segments + segment;
  const int size = a.sizes[place];
  if (size == 0) return;
  const int* order = a.order + sequence * a.keys + a.starts[place];
  const int* list_starts = a.list_starts + sequence * (a.segments + 1);
  const int begin = list_starts[segment], own = list_starts[segment + 1] - begin;
  const int end = list_starts[a.segments];
  int* rows = a.rows + sequence * a.capacity;
  Mark* marks = a.marks + sequence * a.capacity;
  const int column = a.columns[place];

  if (begin + own == end) {
    // The last segment fills up the last stage, with rows that count for nobody.
    const int full = (end + kStageRows - 1) / kStageRows * kStageRows;
    for (int i = end + threadIdx.x; i < full; i += blockDim.x) {
      rows[i] = -1 - segment;
      marks[i] = {0, kNobody};
    }
  }

  const float share = 1.f / static_cast<float>(size);
  float constant[8], mean[8], mean_energy = 0.f;
  {
    const float* from = a.constants + sequence * kHeadDim + chunk * 8;
    const bf16* means = static_cast<const bf16*>(a.value_means) + place * kHeadDim + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      constant[i] = from[i];
      mean[i] = __bfloat162float(means[i]) - constant[i];
      mean_energy += mean[i] * mean[i];
    }
  }
  const bf16* values = static_cast<const bf16*>(a.value) +
                       sequence / a.key_heads * a.value_strides[0] +
                       sequence % a.key_heads * a.value_strides[1] + chunk * 8;
  constexpr int kTogether = 4;  // rows in flight
  for (int first = threadIdx.x / 32 * kWarpRows; first < own;
       first += kBlockRows * kTogether) {
    int token[kTogether];
    uint4 data[kTogether];
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int slot = first + t * kBlockRows + lane / kLanes;
      token[t] = order[slot < size ? slot : 0];
    }
#pragma unroll
    for (int t = 0; t < kTogether; ++t)
      data[t] = __ldg(reinterpret_cast<const uint4*>(values + token[t] * a.value_strides[2]));
#pragma unroll
    for (int t = 0; t < kTogether; ++t) {
      const int slot = first + t * kBlockRows + lane / kLanes;
      const uint32_t words[4] = {data[t].x, data[t].y, data[t].z, data[t].w};
      float energy = 0.f, agreement = 0.f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t bits = i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16;
        const float v = __uint_as_float(bits) - constant[i];
        energy += v * v;
        agreement += v * mean[i];
      }
      const bool is_mean = slot == size;
      if (is_mean) energy = mean_energy;
#pragma unroll
      for (int step = kLanes / 2; step; step >>= 1) {
        energy += __shfl_xor_sync(~0u, energy, step);
        agreement += __shfl_xor_sync(~0u, agreement, step);
      }
      if (chunk == 0 && slot < own) {
        rows[begin + slot] = slot < size ? token[t] : -1 - segment;
        marks[begin + slot] = {bits(energy * share) << 16 | bits(agreement * share),
                               slot < size ? column : is_mean ? column | kMean : kNobody};
        if (is_mean)
          a.endings[(sequence * (a.capacity / kStageRows) + (begin + own - 1) / kStageRows) *
                        kColumns +
                    column] = {segment, energy};
      }
    }
  }
}

// ---- the pass over the keys ----

__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
  int done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.b32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done;
}

__device__ __forceinline__ void copy_async(uint32_t destination, const void* source,
                                           int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(bytes)
               : "memory");
}

template <int kPending>
__device__ __forceinline__ void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Waits for the whole block; true everywhere if any thread says so.
__device__ __forceinline__ bool any_of_block(bool mine) {
  int any;
  asm volatile(
      "{\n.reg .pred p, q;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "bar.red.or.pred q, 0, p;\n"
      "selp.b32 %0, 1, 0, q;\n}"
      : "=r"(any)
      : "r"(static_cast<int>(mine))
      : "memory");
  return hopper::warp_uniform(any);
}

// Which block of probes of which sequence.
struct Item {
  int64_t sequence;  // of queries
  int64_t key_sequence;
  int block;
};

template <int kHeadDim, bool kOutputs>
__device__ __forceinline__ Item item_of(const Arguments& a, int index) {
  const int blocks = (a.probes + Shape<kHeadDim, kOutputs>::kRows - 1) /
                     Shape<kHeadDim, kOutputs>::kRows;
  const int sequence = index / blocks;
  return {sequence, sequence / (a.heads / a.key_heads), index % blocks};
}

__device__ __forceinline__ int stages_of(const Arguments& a, int64_t key_sequence) {
  const int rows = a.list_starts[key_sequence * (a.segments + 1) + a.segments];
  return hopper::warp_uniform((rows + kStageRows - 1) / kStageRows);
}

// The producer warpgroup: gathers rows through the list, 16 bytes a thread at a time.
template <int kHeadDim, bool kOutputs>
class Producer {
  using S = Shape<kHeadDim, kOutputs>;
  static constexpr int kChunks = kHeadDim / 8;
  static constexpr int kWarpRows = 32 / kChunks;  // rows of a warp in one round
  static constexpr int kRoundRows = 4 * kWarpRows;
  static constexpr int kRounds = kStageRows / kRoundRows;

 public:
  __device__ Producer(const Arguments& a, SharedStorage<kHeadDim, kOutputs>& shared)
      : a_(a), shared_(shared), thread_(threadIdx.x % 128), lane_(threadIdx.x % 32) {
    const int row = thread_ / kChunks, chunk = thread_ % kChunks;  // row within a round
    place_ = row / kAtomRows * S::kAtomBytes + chunk / 8 * 1024 + row % kAtomRows * 128 +
             ((chunk % 8) ^ (row % kAtomRows)) * 16;
    // The row of a stage that this lane looks up for its warp.
    looked_up_ = lane_ / kWarpRows * kRoundRows + thread_ / 32 * kWarpRows + lane_ % kWarpRows;
  }

  __device__ void run(int items) {
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      const Item item = item_of<kHeadDim, kOutputs>(a_, index);
      const int64_t b = item.key_sequence / a_.key_heads, h = item.key_sequence % a_.key_heads;
      keys_ = static_cast<const bf16*>(a_.key) + b * a_.key_strides[0] + h * a_.key_strides[1];
      values_ =
          static_cast<const bf16*>(a_.value) + b * a_.value_strides[0] + h * a_.value_strides[1];
      means_ = static_cast<const bf16*>(a_.centroids) +
               item.key_sequence * a_.segments * kHeadDim;
      const int stages = stages_of(a_, item.key_sequence);
      const int* rows = a_.rows + item.key_sequence * a_.capacity + looked_up_;
      const Mark* marks = a_.marks + item.key_sequence * a_.capacity + thread_;
      const char* endings = reinterpret_cast<const char*>(
                                a_.endings + item.key_sequence * (a_.capacity / kStageRows) *
                                                 kColumns) +
                            thread_ * 16;

      sample(item.key_sequence);
      do {
        const int* at = rows;
        const Mark* mark_at = marks;
        const char* ending_at = endings;
        int next = *at;
        Mark next_mark = *mark_at;
        for (int left = stages; left; --left) {
          const int row = next;
          const Mark mark = next_mark;
          at += kStageRows;
          mark_at += kStageRows;
          if (left > 1) {
            next = *at;
            next_mark = *mark_at;
          }
          wait_empty(&shared_.key_empty[key_.stage], key_.phase);
          gather(shared_address(shared_.key) + key_.stage * S::kStageBytes, key_source(row));
          if constexpr (!kOutputs) fill_matrices(key_.stage, mark, ending_at);
          commit(&shared_.key_full[key_.stage]);
          key_.advance();
          if constexpr (kOutputs) {
            wait_empty(&shared_.value_empty[value_.stage], value_.phase);
            // Mean keys have no values: an odd address asks for zeros.
            gather<true>(shared_address(shared_.value) + value_.stage * S::kStageBytes,
                         values_ + max(row, 0) * a_.value_strides[2], row < 0);
            fill_matrices(value_.stage, mark, ending_at);
            commit(&shared_.value_full[value_.stage]);
            value_.advance();
          }
          ending_at += sizeof(Ending) * kColumns;
        }
        drain();
      } while (any_of_block(false));
    }
  }

 private:
  // One stage of 128 keys spread over all.
  __device__ void sample(int64_t key_sequence) {
    const int64_t at = static_cast<int64_t>(looked_up_) * a_.keys / kStageRows;
    const int row = a_.order[key_sequence * a_.keys + at];
    wait_empty(&shared_.key_empty[key_.stage], key_.phase);
    gather(shared_address(shared_.key) + key_.stage * S::kStageBytes, key_source(row));
    commit(&shared_.key_full[key_.stage]);
    key_.advance();
  }

  __device__ __forceinline__ const bf16* key_source(int row) const {
    return row >= 0 ? keys_ + row * a_.key_strides[2]
                    : means_ + static_cast<int64_t>(-1 - row) * kHeadDim;
  }

  // Writes this thread's row of a stage's matrices, and loads which segments end there.
  __device__ __forceinline__ void fill_matrices(int stage, const Mark& mark, const char* endings) {
    constexpr uint32_t kOne = 0x3f80;
    const bool key = mark.of < kMean, mean = mark.of >= kMean && mark.of < kNobody;
    const uint32_t numbers[kMatrices] = {key ? kOne : 0, key ? mark.counts & 0xffff : 0,
                                         mean ? kOne : 0, key ? mark.counts >> 16 : 0};
    const int at = mark.of % kColumns / 2, shift = mark.of % 2 * 16;
#pragma unroll
    for (int m = 0; m < kMatrices; ++m) {
      const uint32_t word = numbers[m] << shift;
      *reinterpret_cast<uint4*>(shared_.matrices[stage][m] + thread_ * 16) = make_uint4(
          at == 0 ? word : 0, at == 1 ? word : 0, at == 2 ? word : 0, at == 3 ? word : 0);
    }
    if (thread_ < kColumns / 2)
      copy_async(shared_address(shared_.endings[stage]) + thread_ * 16, endings);
  }

  // Every lane gives the address of the row that it looked up.
  template <bool kZeros = false>
  __device__ __forceinline__ void gather(uint32_t stage, const bf16* looked_up, bool zeros = false) {
    const uint64_t address = reinterpret_cast<uint64_t>(looked_up) | zeros;
    const int chunk = thread_ % kChunks;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const uint64_t row = __shfl_sync(~0u, address, i * kWarpRows + lane_ / kChunks);
      const uint32_t to = stage + place_ + i * (kRoundRows / kAtomRows) * S::kAtomBytes;
      if constexpr (kZeros)
        copy_async(to, reinterpret_cast<const uint4*>(row & ~uint64_t{1}) + chunk,
                   row & 1 ? 0 : 16);
      else
        copy_async(to, reinterpret_cast<const uint4*>(row) + chunk);
    }
  }

  __device__ __forceinline__ void commit(uint64_t* full) {
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (pending_[0]) {
      copies_wait<2>();
      hopper::fence_proxy_async();
      arrive(pending_[0]);
    }
    pending_[0] = pending_[1];
    pending_[1] = shared_address(full);
  }

  // Before it blocks a thread hands over all that it has in flight, for the consumers may need it to
  // empty the stage it waits for.
  __device__ __forceinline__ void wait_empty(uint64_t* empty, uint32_t phase) {
    if (mbarrier_test(empty, phase ^ 1)) return;
    drain();
    hopper::mbarrier_wait(empty, phase ^ 1);
  }

  __device__ __forceinline__ void drain() {
    copies_wait<0>();
    hopper::fence_proxy_async();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (pending_[i]) arrive(pending_[i]);
      pending_[i] = 0;
    }
  }

  __device__ __forceinline__ static void arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }

  const Arguments& a_;
  SharedStorage<kHeadDim, kOutputs>& shared_;
  int thread_, lane_, place_, looked_up_;
  const bf16 *keys_, *values_, *means_;
  hopper::PipelineState<S::kKeyStages> key_;
  hopper::PipelineState<S::kValueStages> value_;
  uint32_t pending_[2] = {0, 0};  // barriers of copies in flight, the older first
};

// d[64, 8 kBlocks] += a[64, 16] b[16, 8 kBlocks], a in registers, b in shared memory in blocks of
// eight columns, each 16 bytes a row and kMatrixBytes from the next.
template <int kBlocks>
__device__ __forceinline__ void multiply_columns(float (&d)[4 * kBlocks], const uint32_t* a,
                                                 uint64_t b);
template <>
__device__ __forceinline__ void multiply_columns<3>(float (&d)[12], const uint32_t* a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n24k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, %16, 1, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
        "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <>
__device__ __forceinline__ void multiply_columns<1>(float (&d)[4], const uint32_t* a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 1;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// A matrix without swizzle: eight rows of a column block are 128 bytes.
__device__ __forceinline__ uint64_t columns_descriptor(const void* pointer) {
  return static_cast<uint64_t>((shared_address(pointer) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(128 >> 4) << 16 |
         static_cast<uint64_t>(kMatrixBytes >> 4) << 32;
}

__device__ __forceinline__ uint32_t square(uint32_t pair) {
  const __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(&pair);
  const __nv_bfloat162 y = __hmul2(x, x);
  return *reinterpret_cast<const uint32_t*>(&y);
}

// A consumer warpgroup and its 64 probes. A thread holds columns of two rows, lane / 4 and
// lane / 4 + 8 of its warp's sixteen.
template <int kHeadDim, bool kOutputs>
class Consumer {
  using S = Shape<kHeadDim, kOutputs>;
  static constexpr int kChunks = kHeadDim / 8;

 public:
  __device__ Consumer(const Arguments& a, SharedStorage<kHeadDim, kOutputs>& shared)
      : a_(a), shared_(shared) {
    group_ = hopper::warp_uniform(threadIdx.x / 128) - 1;
    lane_ = threadIdx.x % 32;
    scale_log2_ = a.scale * kLog2E;
    const int row = first_row();
    found_ = a.scratch + static_cast<int64_t>(blockIdx.x) * S::kRows * a.segments +
             static_cast<int64_t>(row / a.per_tile) * a.segments * a.per_tile + row % a.per_tile;
    second_ = a.per_tile > kColumns ? 8 : 8 * a.segments;
  }

  __device__ void run(int items) {
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      item_ = item_of<kHeadDim, kOutputs>(a_, index);
      load_probes();
      if constexpr (kOutputs) sample();
      const int stages = stages_of(a_, item_.key_sequence);
      for (int pass = 1;; ++pass) {
        ended_[0] = ended_[1] = true;
        clear();
        total_[0] = total_[1] = 0.f;
        if constexpr (kOutputs)
          attend(stages);
        else
          score(stages, pass > 1);
        bool low = false;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          total_[r] = attention::quad_sum(total_[r]);
          low |= !(total_[r] <= kLargestSum);
        }
        if (!any_of_block(low && pass < kPasses)) break;
        raise();
      }
      finish();
    }
  }

 private:
  __device__ __forceinline__ int first_row() const {
    return threadIdx.x / 32 * 16 - 64 + lane_ / 4;
  }

  __device__ void load_probes() {
    const bf16* base = static_cast<const bf16*>(a_.means) + item_.sequence * a_.probes * kHeadDim;
    const int first = item_.block * S::kRows + group_ * 64;
#pragma unroll
    for (int pass = 0; pass < 64 * kChunks / 128; ++pass) {
      const int piece = pass * 128 + threadIdx.x % 128;
      const int local = piece / kChunks, chunk = piece % kChunks;
      uint4 data = make_uint4(0, 0, 0, 0);
      if (first + local < a_.probes)
        data = __ldg(reinterpret_cast<const uint4*>(base + int64_t{first + local} * kHeadDim) +
                     chunk);
      *reinterpret_cast<uint4*>(shared_.query + (group_ * 8 + local / 8) * S::kAtomBytes +
                                chunk / 8 * 1024 + local % 8 * 128 +
                                ((chunk % 8) ^ (local % 8)) * 16) = data;
    }
    hopper::fence_proxy_async();
    hopper::named_barrier_sync(kQueryReady + group_, 128);
  }

  // Issues S = Q K^T.
  __device__ __forceinline__ void multiply_keys(float (&scores)[64], int stage) {
    hopper::fence_registers(scores);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(
        shared_.query + group_ * 8 * S::kAtomBytes, S::kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.key, S::kAtomBytes, 0), S::kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const int offset = k / 4 * 1024 + k % 4 * 32;
      hopper::WgmmaSS<bf16, kStageRows>::run(scores, hopper::advance_descriptor(query, offset),
                                             hopper::advance_descriptor(key, offset), k > 0);
    }
    hopper::wgmma_commit();
  }

  // Chooses what weights are relative to.
  __device__ __forceinline__ void choose(const float (&scores)[64]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = scores[2 * r];
#pragma unroll
      for (int i = 0; i < 16; ++i)
        highest = fmaxf(highest, fmaxf(scores[4 * i + 2 * r], scores[4 * i + 2 * r + 1]));
      reference_[r] = attention::quad_max(highest) * scale_log2_;
    }
  }

  __device__ void sample() {
    float scores[64];
    hopper::mbarrier_wait(&shared_.key_full[key_.stage], key_.phase);
    multiply_keys(scores, key_.stage);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    choose(scores);
    release_keys();
  }

  __device__ __forceinline__ void release_keys() {
    __syncwarp();
    if (lane_ == 0) hopper::mbarrier_arrive(&shared_.key_empty[key_.stage]);
    key_.advance();
  }

  // Warpgroups take turns to issue products of keys, so that they do not all wait for the tensor
  // cores at once and then all exponentiate at once.
  __device__ __forceinline__ void take_turn() {
    hopper::named_barrier_sync(kTurn + group_, 256);
  }
  __device__ __forceinline__ void give_turn() {
    hopper::named_barrier_arrive(kTurn + (group_ + 1) % S::kGroups, 256);
  }

  // While weights become sums by segment and these are put away, the tensor cores run the product of
  // the next stage. The first stage of a first pass is a sample.
  __device__ void score(int stages, bool sampled) {
    float scores[64];
    uint32_t weights[16], squares[16];
    if (group_ == S::kGroups - 1) give_turn();  // the first warpgroup starts
    hopper::mbarrier_wait(&shared_.key_full[key_.stage], key_.phase);
    take_turn();
    multiply_keys(scores, key_.stage);
    give_turn();
    for (int j = sampled ? 0 : -1; j < stages; ++j) {
      hopper::wgmma_wait<0>();
      hopper::fence_registers(scores);
      if (j < 0) {
        choose(scores);
      } else {
        clear();
        to_weights<16>(scores, weights);
        multiply_members<4>(weights, key_.stage, 0);
        to_squares<16>(weights, squares);
        multiply_squares<4>(squares, key_.stage, 0);
        uint32_t others[16];
        to_weights<16>(scores + 32, others);
        hopper::wgmma_wait<0>();
        to_squares<16>(others, squares);
        multiply_members<4>(others, key_.stage, 4);
        multiply_squares<4>(squares, key_.stage, 4);
      }
      auto next = key_;
      next.advance();
      if (j + 1 < stages) {
        hopper::mbarrier_wait(&shared_.key_full[next.stage], next.phase);
        take_turn();
        multiply_keys(scores, next.stage);
        give_turn();
        hopper::wgmma_wait<1>();
      } else {
        hopper::wgmma_wait<0>();
      }
      if (j >= 0) put_away(key_.stage);
      release_keys();
    }
    if (group_ == 0) take_turn();  // every turn that was given is taken
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
  }

  // As in attention: while one warpgroup takes the exponentials of stage j, the tensor cores run its
  // products with the values and matrices of stage j-1, and the products of the other.
  __device__ void attend(int stages) {
    float scores[64];
    uint32_t weights[32];
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.f;
    if (group_ == S::kGroups - 1) give_turn();  // the first warpgroup starts
    hopper::mbarrier_wait(&shared_.key_full[key_.stage], key_.phase);
    take_turn();
    multiply_keys(scores, key_.stage);
    give_turn();
    hopper::wgmma_wait<0>();
    hopper::fence_registers(scores);
    release_keys();
    to_weights<32>(scores, weights);
    add_squares(weights);
    for (int j = 1; j < stages; ++j) {
      hopper::mbarrier_wait(&shared_.key_full[key_.stage], key_.phase);
      take_turn();
      multiply_keys(scores, key_.stage);
      multiply_values(weights);
      multiply_members<8>(weights, value_.stage, 0);
      give_turn();
      hopper::wgmma_wait<2>();
      hopper::fence_registers(scores);
      release_keys();
#pragma unroll
      for (int i = 0; i < 64; ++i) scores[i] = weight_of(scores[i], i / 2 % 2);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(output_);
      put_away(value_.stage);
      clear();
      release_values();
#pragma unroll
      for (int i = 0; i < 32; ++i)
        weights[i] = attention::pack<bf16>(scores[2 * i], scores[2 * i + 1]);
      add_squares(weights);
    }
    if (group_ == 0) take_turn();  // every turn that was given is taken
    multiply_values(weights);
    multiply_members<8>(weights, value_.stage, 0);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(output_);
    put_away(value_.stage);
    release_values();
  }

  // The sums of squares of a stage, ahead of the others: there are no registers to keep squares.
  __device__ __forceinline__ void add_squares(const uint32_t (&weights)[32]) {
    uint32_t squares[32];
    to_squares<32>(weights, squares);
    hopper::mbarrier_wait(&shared_.value_full[value_.stage], value_.phase);
    multiply_squares<8>(squares, value_.stage, 0);
    hopper::wgmma_wait<0>();
  }

  // Exponentiates scores. The accumulator layout of S is the register layout of an operand, two
  // column groups of eight at a time.
  template <int kCount>
  __device__ __forceinline__ void to_weights(const float* scores, uint32_t* weights) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      weights[i] = attention::pack<bf16>(weight_of(scores[2 * i], i % 2),
                                         weight_of(scores[2 * i + 1], i % 2));
  }

  __device__ __forceinline__ float weight_of(float score, int row) const {
    return exp2_approx(fmaf(score, scale_log2_, -reference_[row]));
  }

  template <int kCount>
  __device__ __forceinline__ static void to_squares(const uint32_t* weights, uint32_t* squares) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) squares[i] = square(weights[i]);
  }

  // Issues the products of weights with the matrices of a stage, from 16 `first` rows on.
  template <int kSteps>
  __device__ __forceinline__ void multiply_members(const uint32_t* weights, int stage, int first) {
    hopper::fence_registers(sums_);
    hopper::wgmma_fence();
    const uint64_t matrix = matrix_of(kMember, stage, first);
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      multiply_columns<3>(sums_, weights + 4 * k,
                          hopper::advance_descriptor(matrix, 16 * kColumns * 2, k));
    hopper::wgmma_commit();
  }

  template <int kSteps>
  __device__ __forceinline__ void multiply_squares(const uint32_t* squares, int stage, int first) {
    hopper::fence_registers(energies_);
    hopper::wgmma_fence();
    const uint64_t matrix = matrix_of(kEnergy, stage, first);
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      multiply_columns<1>(energies_, squares + 4 * k,
                          hopper::advance_descriptor(matrix, 16 * kColumns * 2, k));
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ uint64_t matrix_of(Matrix matrix, int stage, int first) const {
    const uint64_t matrices = hopper::advance_descriptor(columns_descriptor(shared_.matrices),
                                                         kMatrices * kMatrixBytes, stage);
    return hopper::advance_descriptor(matrices, matrix * kMatrixBytes + first * 16 * kColumns * 2);
  }

  // Issues O += P V.
  __device__ __forceinline__ void multiply_values(const uint32_t (&weights)[32]) {
    hopper::fence_registers(output_);
    hopper::wgmma_fence();
    const uint64_t value =
        hopper::advance_descriptor(hopper::matrix_descriptor(shared_.value, S::kAtomBytes, 1024),
                                   S::kStageBytes, value_.stage);
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k)
      hopper::WgmmaRS<bf16, kHeadDim>::run(
          output_, weights + 4 * k, hopper::advance_descriptor(value, 2 * k * S::kAtomBytes));
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void release_values() {
    __syncwarp();
    if (lane_ == 0) hopper::mbarrier_arrive(&shared_.value_empty[value_.stage]);
    value_.advance();
  }

  // Leaves the sums of the segments that end in this stage in scratch.
  __device__ __forceinline__ void put_away(int stage) {
    hopper::fence_registers(sums_);
    hopper::fence_registers(energies_);
    const int4 both = reinterpret_cast<const int4*>(shared_.endings[stage])[lane_ % 4];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int segment = e ? both.z : both.x;
      const bool ends = segment >= 0;
      const float mean_energy = __int_as_float(e ? both.w : both.y);
      uint2* found = found_ + static_cast<int64_t>(segment) * a_.per_tile;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = 2 * r + e;
        const float sum = sums_[i], agreement = sums_[4 + i], center = sums_[8 + i];
        const float error =
            fmaxf(energies_[i] + center * (center * mean_energy - 2.f * agreement), 0.f);
        const float log_sum = log2_approx(sum), log_center = log2_approx(center);
        const float ratio = sum > 0.f ? log_sum - log_center : 0.f;
        const uint2 data = make_uint2(
            __float_as_uint(error),
            static_cast<uint32_t>(__half_as_ushort(__float2half_rn(ratio))) << 16 |
                __bfloat16_as_ushort(__float2bfloat16_rn(sum)));
        if (ends) found[r * second_] = data;
        total_[r] += ends ? sum : 0.f;
      }
      ended_[e] = ends;
    }
  }

  // Empties the columns whose segments have ended.
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool ended = ended_[i % 2];
      sums_[i] = ended ? 0.f : sums_[i];
      sums_[4 + i] = ended ? 0.f : sums_[4 + i];
      sums_[8 + i] = ended ? 0.f : sums_[8 + i];
      energies_[i] = ended ? 0.f : energies_[i];
    }
  }

  // Moves the reference of a row whose weights were too large up to its sum, or a long way where
  // that did not fit fp32.
  __device__ void raise() {
#pragma unroll
    for (int r = 0; r < 2; ++r)
      if (!(total_[r] <= kLargestSum))
        reference_[r] += total_[r] < INFINITY ? log2_approx(total_[r]) : 120.f;
  }

  // Turns the sums of all segments into results.
  __device__ void finish() {
    const int per_tile = a_.per_tile, tiles = S::kRows / per_tile;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row() + 8 * r, probe = item_.block * S::kRows + row;
      inverse[r] = total_[r] > 0.f ? 1.f / total_[r] : 0.f;
      if (lane_ % 4 != 0) continue;
      const int64_t covered = int64_t{probe} * a_.probe_rows;
      const int64_t rows = min(max(a_.length - covered, int64_t{0}), int64_t{a_.probe_rows});
      const int64_t tile_rows = int64_t{a_.probe_rows} * per_tile;
      const int64_t all = min(max(a_.length - probe / per_tile * tile_rows, int64_t{1}), tile_rows);
      const float share = static_cast<float>(rows) / static_cast<float>(all);
      shared_.weight[row] = share * inverse[r];
      shared_.weight_square[row] = share * inverse[r] * inverse[r];
      if (kOutputs && probe < a_.probes)
        a_.log_sum_exp[item_.sequence * a_.probes + probe] =
            (reference_[r] + log2f(total_[r])) / kLog2E;
    }
    if constexpr (kOutputs) store_output(inverse);
    hopper::named_barrier_sync(kSumsReady, S::kConsumers);
    const uint2* found =
        a_.scratch + static_cast<int64_t>(blockIdx.x) * S::kRows * a_.segments;
    const int first = item_.block * tiles;
    const int present = min(tiles, a_.tiles - first);
    if (per_tile == 8)
      average<8>(found, first, present);
    else if (per_tile == 4)
      average<4>(found, first, present);
    else
      average<0>(found, first, present);
    hopper::named_barrier_sync(kSumsReady, S::kConsumers);
  }

  // Averages the probes of each tile. The number of probes is a constant where it is known, so that
  // all are loaded at once.
  template <int kPerTile>
  __device__ void average(const uint2* found, int first, int present) const {
    const int per_tile = kPerTile ? kPerTile : a_.per_tile;
    const int* sizes = a_.sizes + item_.key_sequence * a_.segments;
#pragma unroll 2
    for (int i = threadIdx.x - 128; i < present * a_.segments; i += S::kConsumers) {
      const int tile = i / a_.segments, segment = i % a_.segments;
      const int size = sizes[segment];
      const uint2* parts = found + static_cast<int64_t>(i) * per_tile;
      float error = 0.f, mass = 0.f, gap = 0.f;
      const float log_size = log2_approx(static_cast<float>(size));
      const auto count = [&](const uint2& part, int k) {
        const float sum = __uint_as_float(part.y << 16);
        const float ratio = __half2float(__ushort_as_half(part.y >> 16));
        const float share = sum * shared_.weight[tile * per_tile + k];
        error += __uint_as_float(part.x) * shared_.weight_square[tile * per_tile + k];
        mass += share;
        gap += share * fminf(fmaxf((ratio - log_size) / kLog2E, 0.f), a_.largest_gap);
      };
      if constexpr (kPerTile > 0) {
        uint4 pairs[kPerTile / 2];
#pragma unroll
        for (int k = 0; k < kPerTile / 2; ++k) pairs[k] = reinterpret_cast<const uint4*>(parts)[k];
#pragma unroll
        for (int k = 0; k < kPerTile / 2; ++k) {
          count(make_uint2(pairs[k].x, pairs[k].y), 2 * k);
          count(make_uint2(pairs[k].z, pairs[k].w), 2 * k + 1);
        }
      } else {
        for (int k = 0; k < per_tile; ++k) count(parts[k], k);
      }
      // What an empty segment has in scratch is of no meaning.
      const bool filled = size > 0;
      const int64_t at = (item_.sequence * a_.tiles + first + tile) * a_.segments + segment;
      a_.errors[at] = filled ? fminf(error, 0x1.fffffep127f) : 0.f;
      a_.gaps[at] = filled && mass > 0.f && mass < INFINITY ? gap / mass : 0.f;
    }
  }

  __device__ void store_output(const float (&inverse)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int probe = item_.block * S::kRows + first_row() + 8 * r;
      if (probe >= a_.probes) continue;
      float* to = a_.output + (item_.sequence * a_.probes + probe) * kHeadDim + 2 * (lane_ % 4);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i)
        *reinterpret_cast<float2*>(to + 8 * i) = make_float2(
            output_[4 * i + 2 * r] * inverse[r], output_[4 * i + 2 * r + 1] * inverse[r]);
    }
  }

  const Arguments& a_;
  SharedStorage<kHeadDim, kOutputs>& shared_;
  int group_, lane_;
  int second_;  // entries from the first row's sums to those of the second
  float scale_log2_;
  uint2* found_;  // where this thread's first row leaves its sums
  Item item_;
  hopper::PipelineState<S::kKeyStages> key_;
  hopper::PipelineState<S::kValueStages> value_;
  float reference_[2];  // in units of log 2
  // Of both rows and two of the eight columns: sums of weights, beside agreements, of mean keys.
  float sums_[12], energies_[4];
  float total_[2];
  bool ended_[2];
  float output_[kOutputs ? kHeadDim / 2 : 1];
};

template <int kHeadDim, bool kOutputs>
__global__ void __launch_bounds__(Shape<kHeadDim, kOutputs>::kThreads, 1)
    probe_sums_block(const __grid_constant__ Arguments a, int items) {
  using S = Shape<kHeadDim, kOutputs>;
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& shared = *reinterpret_cast<SharedStorage<kHeadDim, kOutputs>*>(raw);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::kKeyStages; ++s) {
      hopper::mbarrier_init(&shared.key_full[s], 128);
      hopper::mbarrier_init(&shared.key_empty[s], S::kConsumers / 32);
    }
    for (int s = 0; s < S::kValueStages; ++s) {
      hopper::mbarrier_init(&shared.value_full[s], 128);
      hopper::mbarrier_init(&shared.value_empty[s], S::kConsumers / 32);
    }
    hopper::mbarrier_init_fence();
  }
  __syncthreads();
  if (hopper::warp_uniform(threadIdx.x / 128) == 0) {
    hopper::setmaxnreg_dec<56>();
    Producer<kHeadDim, kOutputs>(a, shared).run(items);
  } else {
    hopper::setmaxnreg_inc<kOutputs ? 224 : 152>();
    Consumer<kHeadDim, kOutputs>(a, shared).run(items);
  }
}

template <int kHeadDim, bool kOutputs>
cudaError_t launch(const Arguments& a, cudaStream_t stream) {
  using S = Shape<kHeadDim, kOutputs>;
  constexpr int bytes = sizeof(SharedStorage<kHeadDim, kOutputs>);
  static_assert(bytes <= 227 * 1024, "a block's shared memory");
  const int64_t segments = a.batch * a.key_heads * a.segments;
  const int64_t items = a.batch * a.heads * ((a.probes + S::kRows - 1) / S::kRows);
  if (items == 0) return cudaSuccess;
  if (max(segments, items) > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const auto kernel = probe_sums_block<kHeadDim, kOutputs>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  lay_out<kHeadDim><<<static_cast<unsigned>(segments), 128, 0, stream>>>(a);
  const int64_t blocks = items < a.programs ? items : a.programs;
  kernel<<<static_cast<unsigned>(blocks), S::kThreads, bytes, stream>>>(a, static_cast<int>(items));
  return cudaGetLastError();
}

}  // namespace

cudaError_t run(const Arguments& a, cudaStream_t stream) {
  if (a.head_dim == 128)
    return a.output ? launch<128, true>(a, stream) : launch<128, false>(a, stream);
  if (a.head_dim == 64)
    return a.output ? launch<64, true>(a, stream) : launch<64, false>(a, stream);
  return cudaErrorInvalidValue;
}

}  // namespace svg::probe_sums

#ifndef __CUDA_ARCH__
namespace svg::probe_sums {
namespace {

// Takes addresses as integers: the operands are described once in Python, where some are copied.
void exported(int64_t packed, double scale, double largest_gap, int device, int64_t stream) {
  const auto* numbers = reinterpret_cast<const int64_t*>(packed);
  launch_on(run, read_arguments(numbers, scale, largest_gap), device, stream);
}

}  // namespace
}  // namespace svg::probe_sums

TVM_FFI_DLL_EXPORT_TYPED_FUNC(probe_sums, svg::probe_sums::exported);
#endif
