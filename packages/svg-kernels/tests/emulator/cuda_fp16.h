#pragma once
#include <cuda_runtime_api.h>

using __half = _Float16;
struct __half2 {
  __half x, y;
};
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<__half>(x), static_cast<__half>(y)};
}
inline float2 __half22float2(__half2 both) {
  return {static_cast<float>(both.x), static_cast<float>(both.y)};
}
inline float __emulated_float(__half x) { return static_cast<float>(x); }
