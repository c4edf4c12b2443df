// The functions of csrc/ptx.cuh without its instructions.
#pragma once
#include <cuda_runtime_api.h>

namespace svg {

inline uint4 load_quad(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// The copies arrive at once, which a correct kernel cannot tell from later.
inline void copy_async(void* shared, const void* global) {
  *static_cast<uint4*>(shared) = __ldg(static_cast<const uint4*>(global));
}
inline void commit_copies() {}
template <int PENDING>
void wait_copies() {}

inline float half_bits(unsigned short bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}

inline unsigned bf16_bits(float f) {
  const unsigned w = __float_as_uint(f);
  if (std::isnan(f)) return 0x7fff;
  return (w + 0x7fff + (w >> 16 & 1)) >> 16;
}

inline unsigned f16_bits(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  unsigned short bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}

inline unsigned pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline unsigned pack_f16(float low, float high) { return f16_bits(low) | f16_bits(high) << 16; }

}  // namespace svg
