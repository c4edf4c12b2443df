// csrc/hopper/arithmetic.cuh without its instructions.
#pragma once
#include <cuda_runtime.h>

namespace svg::hopper {

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }

inline float from_e4m3(unsigned char byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  if ((byte & 127) == 127) return NAN;
  const float size = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return byte & 128 ? -size : size;
}

inline unsigned char to_e4m3(float x) {
  if (std::isnan(x)) return 127;
  const float size = std::fabs(x);
  unsigned code = 126;
  if (size < 448.f) {
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    // Ties to even by the default rounding; a carry into the exponent is what it should be.
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
    code = exponent == -6 && steps < 8 ? steps : (exponent + 7) * 8 + steps - 8;
  }
  return static_cast<unsigned char>(std::min(code, 126u) | (std::signbit(x) ? 128 : 0));
}

inline uint16_t round_to_e4m3(float low, float high) {
  return static_cast<uint16_t>(to_e4m3(low) | to_e4m3(high) << 8);
}

inline uint32_t join(uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; }

}  // namespace svg::hopper
