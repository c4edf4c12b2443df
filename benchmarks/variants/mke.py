import pathlib
def patch(name):
    root=pathlib.Path(name)
    def edit(f,*pairs):
        p=root/f; s=p.read_text()
        for a,b in pairs:
            assert s.count(a)==1,(f,s.count(a),a)
            s=s.replace(a,b)
        p.write_text(s)
    edit('attention/fp8/storage.cuh',
      ('constexpr int kRowStages = 4; ','constexpr int kRowStages = 3; '),
      ('constexpr int kValueStages = 3; ','constexpr int kValueStages = 2; '),
      ('  float query_scale[kTileRows];','  float output[2][64][128];  // of each warpgroup, by register and thread\n  float query_scale[kTileRows];'))
    edit('attention/block_sparse_attention_fp8_sm90a.cu',('setmaxnreg_dec<40>','setmaxnreg_dec<32>') ,('setmaxnreg_inc<232>','setmaxnreg_inc<240>'))
    # wgmma for e4m3 with 64 columns
    edit('hopper/wgmma.cuh',('''template <>
struct WgmmaRS<__nv_fp8_e4m3, 128> {''','''template <>
struct WgmmaSS<__nv_fp8_e4m3, 64> {
  static __device__ __forceinline__ void run(float (&d)[32], uint64_t a, uint64_t b,
                                             int accumulate) {
    asm volatile(
        "{\\n.reg .pred p;\\nsetp.ne.b32 p, %34, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" SVG_NAMES_32
        "}, %32, %33, p, 1, 1;\\n}"
        : SVG_BIND_32
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

template <>
struct WgmmaRS<__nv_fp8_e4m3, 128> {'''))
    # softmax
    p=root/'attention/fp8/softmax.cuh'; s=p.read_text()
    i=s.index('  // Replaces scores by probabilities relative to a maximum that includes'); j=s.index('  __device__ __forceinline__ float log_sum_exp')
    s=s[:i]+'''  // Replaces scores by probabilities relative to a maximum that includes them; returns what older
  // results must be multiplied by.
  __device__ __forceinline__ void rescale(float (&scores)[2][32], const float (&scale)[2],
                                        float (&correction)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float highest =
          fmaxf(maximum[r], quad_max(fmaxf(largest(scores[0], r, -INFINITY),
                                           largest(scores[1], r, -INFINITY))) * scale[r]);
      correction[r] = exp2_approx(maximum[r] - (highest == -INFINITY ? 0.f : highest));
      maximum[r] = highest;
      sum[r] *= correction[r];
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      exponentiate(k, scores[0], scale, sum);
      exponentiate(k, scores[1], scale, sum);
    }
  }

  // Replaces half k of half a stage's scores by probabilities relative to the maximum as it is, and
  // adds them to the sums.
  __device__ __forceinline__ void exponentiate(int k, float (&scores)[32], const float (&scale)[2],
                                               float (&sums)[2]) const {
    const float down[2] = {shift(0), shift(1)};
#pragma unroll
    for (int i = 16 * k; i < 16 * k + 16; ++i) {
      const int r = i / 2 % 2;
      scores[i] = exp2_approx(fmaf(scores[i], scale[r], -down[r]));
      sums[r] += scores[i];
    }
  }

  // Raises the maximum of row r to its largest probability, which then stands at 2^kMaximumLog2, where
  // e4m3 rounds nothing; returns by what results relative to the old one must be multiplied.
  __device__ __forceinline__ float lower(const float (&probabilities)[32], int r) {
    const float above = fmaxf(
        hopper::log2_approx(quad_max(largest(probabilities, r, 0.f))) - kMaximumLog2, 0.f);
    const float factor = exp2_approx(-above);
    maximum[r] += above;
    sum[r] *= factor;
    return factor;
  }

  static __device__ __forceinline__ float largest(const float (&x)[32], int r, float highest) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      highest = fmaxf(highest, fmaxf(x[4 * i + 2 * r], x[4 * i + 2 * r + 1]));
    return highest;
  }

'''+s[j:]
    p.write_text(s)
    p=root/'attention/fp8/consumer.cuh'; s=p.read_text()
    def sub(a,b,n=1):
        nonlocal s
        assert s.count(a)==n,(s.count(a),a)
        s=s.replace(a,b)
    # run: zero the shared output
    sub('''#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] = 0.f;
    if (stages > 0) attend(stages);''','''    zero_ = hopper::warp_uniform(params_.tiles >> 28);
#pragma unroll
    for (int i = 0; i < 64; ++i) sums()[128 * i] = 0.f;
    if (stages > 0) attend(stages);
#pragma unroll
    for (int i = 0; i < 64; ++i) output_[i] = sums()[128 * i];''')
    i=s.index('    float scores[64], partial[64];'); j=s.index('  __device__ __forceinline__ void warp_scheduler_barrier_sync()')
    s=s[:i]+'''    float scores[2][32], partial[64];
    uint32_t probabilities[2][8];
    hopper::PipelineState<kRowStages> key;
    hopper::PipelineState<kValueStages> value;
#pragma unroll
    for (int r = 0; r < 2; ++r) scale_[r] = shared_.query_scale[group_ * 64 + row() + 8 * r];

    hopper::mbarrier_wait(&shared_.key_full[key.stage], key.phase);
    renew<true, true>(0, scores, partial, probabilities, key.stage);
    vote_rescale(0, false);
    if (stages > 1) {
      multiply_next_keys(scores, key);
      hopper::wgmma_wait<0>();
      hopper::fence_registers(scores[0]);
    }
    int j = 1;
    for (; j < min(filled, stages - 1); ++j)
      step<false, false>(j, scores, partial, probabilities, key, value);
    for (; j < stages - 1; ++j) step<true, false>(j, scores, partial, probabilities, key, value);
    if (j < stages) step<true, true>(j++, scores, partial, probabilities, key, value);

    hopper::named_barrier_sync(kRescaleVotes + group_, 128);
    if (must_rescale(j - 1))
      renew<true, false>(j - 1, scores, partial, probabilities, key.stage);
    add_pending_sum();
    hopper::mbarrier_wait(&shared_.value_full[value.stage], value.phase);
    multiply_values<0>(partial, probabilities, value.stage, (j - 1) % kPromoteStages > 0, [](int) {});
    multiply_values<1>(partial, probabilities, value.stage, true, [](int) {});
    hopper::wgmma_wait<0>();
    hopper::fence_registers(partial);
    promote(partial);
  }

  template <bool kMasked, bool kLast>
  __device__ __forceinline__ void step(int j, float (&scores)[2][32], float (&partial)[64],
                                       uint32_t (&probabilities)[2][8], hopper::PipelineState<kRowStages>& key,
                                       hopper::PipelineState<kValueStages>& value) {
    const int before = key.stage;
    key.advance();
    hopper::named_barrier_sync(kRescaleVotes + group_, 128);
    multiply_keys<1>(scores, key.stage);
    if (must_rescale(j - 1)) {
      hopper::wgmma_wait<0>();
      renew<kMasked, false>(j - 1, scores, partial, probabilities, opaque(before));
      multiply_keys<0>(scores, opaque(key.stage));
      multiply_keys<1>(scores, opaque(key.stage));
      hopper::wgmma_wait<1>();
      hopper::fence_registers(scores[0]);
    }
    add_pending_sum();
    release_keys(before);
    hopper::mbarrier_wait(&shared_.value_full[value.stage], value.phase);

    if (kMasked) mask<0>(scores, j, key.stage);
    pending_sum_[0] = pending_sum_[1] = 0.f;
    float half[2] = {0.f, 0.f};
    multiply_values<0>(partial, probabilities, value.stage, (j - 1) % kPromoteStages > 0,
                       [&](int k) { softmax_.exponentiate(k, scores[0], scale_, half); });
    bool lost = false, lowers = false;
    lower_if_asked<0>(scores[0], half, lost, lowers, nullptr);
    uint32_t first[8];  // its place is still read
    to_operand(scores[0], first);
    hopper::keep_order<0>(zero_);

    hopper::wgmma_wait<2>();  // for the second half of S
    hopper::fence_registers(scores[1]);
    if (kMasked) mask<1>(scores, j, key.stage);
    if (!kLast) multiply_next_keys(scores, key);
    hopper::keep_order<1>(zero_);
    half[0] = half[1] = 0.f;
    multiply_values<1>(partial, probabilities, value.stage, true,
                       [&](int k) { softmax_.exponentiate(k, scores[1], scale_, half); });
    lower_if_asked<1>(scores[1], half, lost, lowers, first);
    vote_rescale(j, lost || min(softmax_.maximum[0], softmax_.maximum[1]) == -INFINITY);
    uint32_t second[8];
    to_operand(scores[1], second);
    hopper::wgmma_wait<0>();
    hopper::fence_registers(partial);
    if (!kLast) hopper::fence_registers(scores[0]);
    release_values(value.stage);
    value.advance();
    if (lowers) lower_partial(partial);
    if (j % kPromoteStages == 0) promote(partial);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      probabilities[0][i] = first[i] ^ zero_;
      probabilities[1][i] = second[i] ^ zero_;
    }
  }

  // Adds the sums of half a stage. If a probability may be too large for e4m3, its warp raises its
  // maxima; `before` are the bytes of the other half, if it is the second.
  template <int kHalf>
  __device__ __forceinline__ void lower_if_asked(float (&scores)[32], const float (&half)[2], bool& lost,
                                                 bool& lowers, uint32_t* before) {
#pragma unroll
    for (int r = 0; r < 2; ++r) pending_sum_[r] += half[r];
    const float largest = max(half[0], half[1]);
    lost = lost || largest > kLargestLowered;
    if (!__any_sync(~0u, largest > kLargestByte) || __any_sync(~0u, lost)) return;
    float factor[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = softmax_.lower(scores, r);
      pending_sum_[r] *= factor[r];
      float& all = shared_.factors[group_ * 64 + row() + 8 * r];
      if (lane_ % 4 == 0) all = kHalf == 1 && lowers ? all * factor[r] : factor[r];
    }
    __syncwarp();
    lowers = true;
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] *= factor[i / 2 % 2];
#pragma unroll
    for (int i = 0; i < 64; ++i) sums()[128 * i] *= factor[i / 2 % 2];
    if (kHalf == 1) {
#pragma unroll
      for (int i = 0; i < 8; ++i) before[i] = hopper::scale_e4m3(before[i], factor[i % 2]);
    }
  }

  __device__ __forceinline__ float* sums() const { return &shared_.output[group_][0][thread_]; }

'''+s[j:]
    i=s.index('  // Computes the probabilities of stage j once more'); j=s.index('  // The same for sums of products that were not done then.')
    s=s[:i]+'''  // Computes the probabilities of stage j, relative to a maximum that includes them.
  template <bool kMasked, bool kFirst>
  __device__ __forceinline__ void renew(int j, float (&scores)[2][32], float (&partial)[64],
                                        uint32_t (&probabilities)[2][8], int stage) {
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
    softmax_.rescale(scores, scale_, correction);
    if (!kFirst) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums()[128 * i] *= correction[i / 2 % 2];
      if (j % kPromoteStages > 0) multiply(partial, correction);
    }
    to_operand(scores[0], probabilities[0]);
    to_operand(scores[1], probabilities[1]);
    pending_sum_[0] = pending_sum_[1] = 0.f;
  }

'''+s[j:]
    i=s.index('  // Adds what the tensor cores have summed up to the output.'); j=s.index('  // ---- summaries ----')
    s=s[:i]+'''  // Adds what the tensor cores have summed up to the output.
  __device__ __forceinline__ void promote(const float (&partial)[64]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) sums()[128 * i] += partial[i];
  }

'''+s[j:]
    # products
    i=s.index('  // Issues S = Q K^T; whoever needs it'); j=s.index('  __device__ __forceinline__ void multiply_summary_keys')
    s=s[:i]+'''  // Issues a half of S = Q K^T; whoever needs it waits for it.
  template <int kHalf>
  __device__ __forceinline__ void multiply_keys(float (&scores)[2][32], int stage) {
    hopper::fence_registers(scores[kHalf]);
    hopper::wgmma_fence();
    const uint64_t query = hopper::matrix_descriptor(shared_.query[group_], kAtomBytes, 0);
    const uint64_t key = hopper::advance_descriptor(hopper::matrix_descriptor(shared_.runs.key, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < kHeadDim / 32; ++k)
      hopper::WgmmaSS<__nv_fp8_e4m3, kStageRows / 2>::run(
          scores[kHalf], hopper::advance_descriptor(query, 32 * k),
          hopper::advance_descriptor(key, kHalf * kStageBytes / 2 + 32 * k), k > 0);
    hopper::wgmma_commit();
  }

  __device__ __forceinline__ void multiply_next_keys(float (&scores)[2][32],
                                                     hopper::PipelineState<kRowStages> key) {
    key.advance();
    hopper::mbarrier_wait(&shared_.key_full[key.stage], key.phase);
    multiply_keys<0>(scores, key.stage);
  }

  template <int kHalf, typename Behind>
  __device__ __forceinline__ void multiply_values(float (&partial)[64],
                                                  const uint32_t (&probabilities)[2][8], int stage,
                                                  bool accumulate, Behind behind) {
    hopper::fence_registers(partial);
    const uint64_t value = hopper::advance_descriptor(
        hopper::matrix_descriptor(shared_.runs.value, kAtomBytes, 0), kStageBytes, stage);
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      hopper::wgmma_fence();
      hopper::WgmmaRS<__nv_fp8_e4m3, kHeadDim>::run(
          partial, probabilities[kHalf] + 4 * k,
          hopper::advance_descriptor(value, 64 * kHalf + 32 * k), k > 0 || accumulate);
      hopper::wgmma_commit();
      behind(k);
    }
  }

'''+s[j:]
    # masks
    sub('''  __device__ __forceinline__ void mask(float (&scores)[64], int j, int stage) {''','''  template <int kHalf>
  __device__ __forceinline__ void mask(float (&scores)[2][32], int j, int stage) {
    constexpr int kFirst = kHalf * 8;''')
    sub('''        keep(scores, [&](int atom) { return static_cast<int>(valid >> (4 * atom)) & 15; });''','''        keep(scores[kHalf], [&](int atom) { return static_cast<int>(valid >> (4 * (kFirst + atom))) & 15; });''')
    sub('''      keep(scores, [&](int atom) { return atom < filled ? kAtomRows : 0; });''','''      keep(scores[kHalf], [&](int atom) { return kFirst + atom < filled ? kAtomRows : 0; });''')
    sub('''  __device__ __forceinline__ void keep(float (&scores)[64], Rows rows) {
#pragma unroll
    for (int i = 0; i < kStageAtoms; ++i) {''','''  __device__ __forceinline__ void keep(float (&scores)[32], Rows rows) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {''')
    i=s.index('  __device__ __forceinline__ void to_operand(const uint16_t'); j=s.index('  // Normalises, adds the mean value, turns fragments')
    s=s[:i]+'''  __device__ __forceinline__ void to_operand(const float (&scores)[32],
                                             uint32_t (&probabilities)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = 2 * (i / 2 * 4 + i % 2);
      probabilities[i] = hopper::join(hopper::round_to_e4m3(scores[at], scores[at + 1]),
                                      hopper::round_to_e4m3(scores[at + 4], scores[at + 5]));
    }
  }

'''+s[j:]
    # summaries use 64 scores and a softmax over 64
    sub('''      float scores[64];
      hopper::mbarrier_wait(&shared_.summary_full''','''      float both[2][32], scores[64];
      hopper::mbarrier_wait(&shared_.summary_full''')
    sub('''      float correction[2];
      softmax_.rescale(scores, unit, correction);
      multiply(output_, correction);''','''      float correction[2];
#pragma unroll
      for (int i = 0; i < 64; ++i) both[i / 32][i % 32] = scores[i];
      softmax_.rescale(both, unit, correction);
#pragma unroll
      for (int i = 0; i < 64; ++i) scores[i] = both[i / 32][i % 32];
      multiply(output_, correction);''')
    sub('''  int key_arrivals_;  //''','''  int zero_;  // which the compiler does not know
  int key_arrivals_;  //''')
    p.write_text(s)
    edit('hopper/arithmetic.cuh',('''__device__ __forceinline__ uint32_t join(''','''// Four numbers in e4m3, each times a factor.
__device__ __forceinline__ uint32_t scale_e4m3(uint32_t four, float factor) {
  uint32_t out;
  asm("{\\n.reg .b16 l, h;\\n.reg .b32 a, b;\\n.reg .b16 f;\\n.reg .b32 ff;\\n"
      "mov.b32 {l, h}, %1;\\ncvt.rn.f16x2.e4m3x2 a, l;\\ncvt.rn.f16x2.e4m3x2 b, h;\\n"
      "cvt.rn.f16.f32 f, %2;\\nmov.b32 ff, {f, f};\\nmul.rn.f16x2 a, a, ff;\\nmul.rn.f16x2 b, b, ff;\\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 l, a;\\ncvt.rn.satfinite.e4m3x2.f16x2 h, b;\\nmov.b32 %0, {l, h};\\n}"
      : "=r"(out) : "r"(four), "f"(factor));
  return out;
}

__device__ __forceinline__ uint32_t join('''))
patch('e12')
