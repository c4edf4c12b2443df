// Loads, stores and conversions. The dtype is a run-time value: the branch is the same for a whole
// grid and free beside the memory traffic, and one kernel serves every pair of dtypes.
#pragma once
#include "ffi/arguments.h"
#include "ops/ptx.cuh"

namespace svg {

constexpr int kVec = 8;  // elements a thread moves at once
constexpr unsigned kAll = 0xffffffffu;

struct Raw {
  uint4 lo, hi;  // 16-bit types use lo alone
};

__host__ __device__ inline int size_of(int dtype) { return dtype == kFloat32 ? 4 : 2; }

__device__ __forceinline__ void store_quad(void* p, uint4 v) { *reinterpret_cast<uint4*>(p) = v; }

__device__ __forceinline__ const char* at(const void* base, int64_t element, int dtype) {
  return static_cast<const char*>(base) + element * size_of(dtype);
}

__device__ __forceinline__ Raw load_raw(const void* base, int64_t element, int dtype) {
  const char* p = at(base, element, dtype);
  Raw r;
  r.lo = load_quad(p);
  if (dtype == kFloat32) r.hi = load_quad(p + 16);
  return r;
}

__device__ __forceinline__ void unpack_words(const uint4& r, int dtype, float (&v)[kVec]) {
  const unsigned w[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == kBFloat16) {
      v[2 * i] = __uint_as_float(w[i] << 16);
      v[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
    } else {
      v[2 * i] = half_bits(static_cast<unsigned short>(w[i] & 0xffffu));
      v[2 * i + 1] = half_bits(static_cast<unsigned short>(w[i] >> 16));
    }
  }
}

__device__ __forceinline__ void unpack(const Raw& r, int dtype, float (&v)[kVec]) {
  if (dtype == kFloat32) {
    const unsigned w[8] = {r.lo.x, r.lo.y, r.lo.z, r.lo.w, r.hi.x, r.hi.y, r.hi.z, r.hi.w};
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = __uint_as_float(w[i]);
  } else if (dtype == kBFloat16) {
    unpack_words(r.lo, kBFloat16, v);
  } else {
    unpack_words(r.lo, kFloat16, v);
  }
}

__device__ __forceinline__ void store_vec(void* base, int64_t element, int dtype,
                                          const float (&v)[kVec]) {
  char* p = static_cast<char*>(base) + element * size_of(dtype);
  if (dtype == kFloat32) {
    store_quad(p, make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                             __float_as_uint(v[3])));
    store_quad(p + 16, make_uint4(__float_as_uint(v[4]), __float_as_uint(v[5]),
                                  __float_as_uint(v[6]), __float_as_uint(v[7])));
  } else if (dtype == kBFloat16) {
    store_quad(p, make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                             pack_bf16(v[6], v[7])));
  } else {
    store_quad(p, make_uint4(pack_f16(v[0], v[1]), pack_f16(v[2], v[3]), pack_f16(v[4], v[5]),
                             pack_f16(v[6], v[7])));
  }
}

// Weights, modulation and tables: small and read by many blocks, so they may stay in L1.
__device__ __forceinline__ void load_cached(const void* base, int64_t element, int dtype,
                                            float (&v)[kVec]) {
  const uint4* p = reinterpret_cast<const uint4*>(at(base, element, dtype));
  Raw r;
  r.lo = __ldg(p);
  if (dtype == kFloat32) r.hi = __ldg(p + 1);
  unpack(r, dtype, v);
}

__device__ __forceinline__ float load_one(const void* base, int64_t element, int dtype) {
  const char* p = at(base, element, dtype);
  if (dtype == kFloat32) return *reinterpret_cast<const float*>(p);
  const unsigned short bits = *reinterpret_cast<const unsigned short*>(p);
  return dtype == kBFloat16 ? __uint_as_float(static_cast<unsigned>(bits) << 16) : half_bits(bits);
}

__device__ __forceinline__ void store_one(void* base, int64_t element, int dtype, float value) {
  char* p = static_cast<char*>(base) + element * size_of(dtype);
  if (dtype == kFloat32) {
    *reinterpret_cast<float*>(p) = value;
  } else {
    const unsigned w = dtype == kBFloat16 ? pack_bf16(value, 0.f) : pack_f16(value, 0.f);
    *reinterpret_cast<unsigned short*>(p) = static_cast<unsigned short>(w & 0xffffu);
  }
}

// Sum over groups of `lanes` neighbouring lanes, a power of two; every lane gets the sum.
__device__ __forceinline__ float lane_sum(float v, int lanes) {
  for (int o = lanes >> 1; o > 0; o >>= 1) v += __shfl_xor_sync(kAll, v, o);
  return v;
}

inline bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// True when rows of `r` can be read as 16-byte vectors of kVec elements.
inline bool vector_rows(const Rows& r) {
  return r.data == nullptr ||
         (aligned(r.data) && r.outer_stride % kVec == 0 && r.inner_stride % kVec == 0);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMaxGrid = 0x7fffffff;

}  // namespace svg
