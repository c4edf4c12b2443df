import pathlib,shutil,sys
def make(name, add=True, turns=0):
    shutil.rmtree(name,ignore_errors=True); shutil.copytree('headadd',name)
    w=pathlib.Path(name+'/hopper/wgmma.cuh')
    # 64-column products
    w.write_text(pathlib.Path('headhalf/hopper/wgmma.cuh').read_text())
    p=pathlib.Path(name+'/attention/consumer.cuh'); s=p.read_text()
    def sub(a,b,n=1):
        nonlocal s
        assert a in s,a
        s=s.replace(a,b,n)
    sub('  int key_arrivals_;  //','  int nothing_;  // zero, which the compiler does not know\n  int key_arrivals_;  //')
    sub('    key_arrivals_ = !extent_','    nothing_ = hopper::warp_uniform(params_.tiles >> 24);\n    key_arrivals_ = !extent_')
    sub('      attend<int8_t>(hopper::warp_uniform(run_stages_));','      attend_bytes(hopper::warp_uniform(run_stages_));')
    # masks by halves
    i=s.index('  __device__ __forceinline__ void mask('); j=s.index('  // Zeros the value rows of stage j')
    old=s[i:j]
    half=old.replace('  __device__ __forceinline__ void mask(','  template <int kHalf>\n  __device__ __forceinline__ void mask_half(').replace('weigh_summaries(scores','weigh_half<kHalf>(scores').replace('keep(scores, [&]','keep_half<kHalf>(scores, [&]').replace('  template <typename Rows>\n  __device__ __forceinline__ void keep(','  template <int kHalf, typename Rows>\n  __device__ __forceinline__ void keep_half(').replace('  __device__ __forceinline__ void weigh_summaries(','  template <int kHalf>\n  __device__ __forceinline__ void weigh_half(').replace('for (int i = 0; i < kStageAtoms; ++i)','for (int i = 8 * kHalf; i < 8 * kHalf + 8; ++i)')
    a=half.index('    if (j >= run_stages_) {'); b=half.index('} else if (!extent_.whole) {')
    half=half[:a]+'    if (!extent_.whole) {'+half[b+len('} else if (!extent_.whole) {'):]
    half=half[:half.index('  template <int kHalf>\n  __device__ __forceinline__ void weigh_half')]
    s=s[:j]+half+s[j:]
    s=s.replace('if (kMasked) mask(scores, j, stage);\n    softmax_.rescale(scores, correction);\n    to_operand','@@')
    conv='__int_as_float(x + 0x4B400000)' if add else 'static_cast<float>(x)'
    if not add: sub('      softmax_.offset = 12582912.f;\n','')
    new='''
  // ---- keys in bytes, by halves ----

  static __device__ __forceinline__ float to_float(int x) { return @CONV@; }

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
      hopper::WgmmaRS<T, kHeadDim>::run(output_, probabilities + 4 * k,
                                        hopper::advance_descriptor(value, 2 * k * kAtomBytes));
      if (k == 4 * kHalf + 3) hopper::wgmma_commit();
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
    @SYNC@
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
    @ARRIVE1@
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
    @ARRIVE2@
    uint32_t first[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) first[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
    hopper::wgmma_wait<1>();
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

'''
    new=new.replace('@CONV@',conv).replace('@SYNC@','warp_scheduler_barrier_sync();' if turns else 'hopper::named_barrier_sync(kRescaleVotes + tile_.group, 128);').replace('@ARRIVE1@','warp_scheduler_barrier_arrive();' if turns==1 else '').replace('@ARRIVE2@','warp_scheduler_barrier_arrive();' if turns==2 else '')
    k=s.index('  // Ping-pong: waits for')
    s=s[:k]+new.lstrip('\n')+s[k:]
    p.write_text(s)
if __name__=='__main__':
    make('headpipe'); make('headpipe0',add=False); make('headpipet1',turns=1); make('headpipet2',turns=2)
