import pathlib,shutil
name='m12'
shutil.rmtree(name,ignore_errors=True); shutil.copytree('e12',name)
root=pathlib.Path(name)
p=root/'hopper/wgmma.cuh'; s=p.read_text()
i=s.index('template <>\nstruct WgmmaSS<__nv_fp8_e4m3, 64>')
s=s[:i]+'''// The same for 8-bit integers; sums are exact.
template <>
struct WgmmaSS<int8_t, 64> {
  static __device__ __forceinline__ void run(int (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\\n.reg .pred p;\\nsetp.ne.b32 p, %34, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" SVG_NAMES_32 "}, %32, %33, p;\\n}"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]),
          "+r"(d[8]), "+r"(d[9]), "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]),
          "+r"(d[16]), "+r"(d[17]), "+r"(d[18]), "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]),
          "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]), "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31])
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

'''+s[i:]
s=s.replace('''// d[64, N] += a[64, 16] b[N, 16]^T, both''','''template <int kCount>
__device__ __forceinline__ void fence_registers(int (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// d[64, N] += a[64, 16] b[N, 16]^T, both''',1)
p.write_text(s)
p=root/'hopper/arithmetic.cuh'; s=p.read_text()
h=pathlib.Path('headadd/hopper/arithmetic.cuh').read_text()
i=h.index('// Four numbers up to 127.5'); j=h.index('__device__ __forceinline__ uint32_t join')
k=s.index('// Four numbers in e4m3, each times a factor')
s=s[:k]+h[i:j]+s[k:]
p.write_text(s)
p=root/'attention/fp8/consumer.cuh'; s=p.read_text()
def sub(a,b,n=1):
    global s
    assert s.count(a)==n,(s.count(a),a)
    s=s.replace(a,b)
sub('float scores[2][32], partial[64];','int sums_[2][32];\n    float partial[64];')
i=s.index('__device__ __forceinline__ void attend(int stages)'); j=s.index('  template <bool kMasked, bool kLast>')
body=s[i:j].replace('scores','sums_')
s=s[:i]+body+s[j:]
i=s.index('  template <bool kMasked, bool kLast>'); j=s.index('  // Adds the sums of half a stage.')
b=s[i:j]
b=b.replace('float (&scores)[2][32]','int (&integers)[2][32]')
b=b.replace('multiply_keys<1>(scores','multiply_keys<1>(integers').replace('multiply_keys<0>(scores','multiply_keys<0>(integers').replace('multiply_next_keys(scores','multiply_next_keys(integers').replace('(j - 1, scores, partial','(j - 1, integers, partial').replace('fence_registers(scores[0])','fence_registers(integers[0])').replace('fence_registers(scores[1])','fence_registers(integers[1])')
b=b.replace('''    if (kMasked) mask<0>(scores, j, key.stage);
''','''    float scores[2][32];
    to_floats(integers[0], scores[0]);
    if (kMasked) mask<0>(scores, j, key.stage);
''').replace('''    if (kMasked) mask<1>(scores, j, key.stage);
    if (!kLast) multiply_next_keys(integers, key);
    hopper::keep_order<1>(zero_);
''','''    if (!kLast) multiply_next_keys(integers, key);
    hopper::keep_order<1>(zero_);
    to_floats(integers[1], scores[1]);
    if (kMasked) mask<1>(scores, j, key.stage);
''')
s=s[:i]+'''  // Sums as floats that are too large by kOffset.
  static __device__ __forceinline__ void to_floats(const int (&sums)[32], float (&scores)[32]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) scores[i] = __int_as_float(sums[i] + 0x4B400000);
  }

'''+b+s[j:]
i=s.index('  __device__ __forceinline__ void renew('); j=s.index('  // The same for sums of products that were not done then.')
b=s[i:j]
b=b.replace('float (&scores)[2][32]','int (&integers)[2][32]').replace('multiply_keys<0>(scores','multiply_keys<0>(integers').replace('multiply_keys<1>(scores','multiply_keys<1>(integers').replace('fence_registers(scores[0])','fence_registers(integers[0])').replace('''    hopper::fence_registers(scores[1]);
''','''    hopper::fence_registers(integers[1]);
    float scores[2][32];
    to_floats(integers[0], scores[0]);
    to_floats(integers[1], scores[1]);
''')
s=s[:i]+b+s[j:]
i=s.index('  // Issues a half of S = Q K^T'); j=s.index('  template <int kHalf, typename Behind>')
b=s[i:j].replace('float (&scores)[2][32]','int (&scores)[2][32]').replace('__nv_fp8_e4m3','int8_t')
s=s[:i]+b+s[j:]
# query in int8
sub('const float inverse = kLargestByte / largest;','const float inverse = 127.f / largest;')
sub('''        words[w] = hopper::join(hopper::round_to_e4m3(four[0] * inverse, four[1] * inverse),
                                hopper::round_to_e4m3(four[2] * inverse, four[3] * inverse));''','''        words[w] = hopper::round_to_int8(four[0] * inverse, four[1] * inverse, four[2] * inverse,
                                         four[3] * inverse);''')
sub('(0.08838834764831845f / kLargestByte)','(0.08838834764831845f / 127.f)')
# offset only while runs are read
sub('    if (stages > 0) attend(stages);\n','    softmax_.offset = 12582912.f;\n    if (stages > 0) attend(stages);\n    softmax_.offset = 0.f;\n')
p.write_text(s)
p=root/'attention/fp8/softmax.cuh'; s=p.read_text()
sub('''  float sum[2] = {0.f, 0.f};  // of this thread's columns only
''','''  float sum[2] = {0.f, 0.f};  // of this thread's columns only
  float offset = 0.f;         // by which scores are too large
''')
sub('''          fmaxf(maximum[r], quad_max(fmaxf(largest(scores[0], r, -INFINITY),
                                           largest(scores[1], r, -INFINITY))) * scale[r]);''','''          fmaxf(maximum[r], (quad_max(fmaxf(largest(scores[0], r, -INFINITY),
                                            largest(scores[1], r, -INFINITY))) - offset) * scale[r]);''')
sub('''    const float down[2] = {shift(0), shift(1)};''','''    const float down[2] = {fmaf(offset, scale[0], shift(0)), fmaf(offset, scale[1], shift(1))};''')
p.write_text(s)
