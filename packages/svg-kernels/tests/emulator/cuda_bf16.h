#pragma once
#include <cuda_runtime_api.h>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat16 __emulated_bfloat16(float x) {
  const unsigned w = __float_as_uint(x);
  return {static_cast<uint16_t>(std::isnan(x) ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__emulated_bfloat16(x), __emulated_bfloat16(y)};
}
inline float __emulated_float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
