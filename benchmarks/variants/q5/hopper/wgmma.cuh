// Warpgroup matrix products (wgmma): 128 threads, the second operand in shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "hopper/address.cuh"

namespace svg::hopper {

// The matrix descriptor of an operand in shared memory, in 128-byte swizzled rows of 64 elements.
// Eight rows make a swizzle atom of 1,024 bytes; `stride` is the distance between atoms, `leading`
// the distance between 64-element columns where the reduced axis is not the contiguous one (ignored
// otherwise). Both in bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* pointer, uint32_t stride,
                                                      uint32_t leading) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return static_cast<uint64_t>((shared_address(pointer) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         kSwizzle128;
}

// The same matrix `count` times `bytes` further on; addresses in shared memory never carry out of
// their field.
__device__ __forceinline__ uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes,
                                                       uint32_t count = 1) {
  return descriptor + count * (bytes >> 4);
}

// Orders this warpgroup's writes to registers and shared memory before the products to come.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `kInFlight` groups are unfinished.
template <int kInFlight>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kInFlight) : "memory");
}

// Tells the compiler that registers are live across an asynchronous product.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// d[64, N] += a[64, 16] b[N, 16]^T, both in shared memory, the reduced axis contiguous in both.
template <typename T, int kColumns>
struct WgmmaSS;

// d[64, N] += a[64, 16] b[16, N], a in registers, b in shared memory with N contiguous.
template <typename T, int kColumns>
struct WgmmaRS;

// Operand names %0 .. %31 and %32 .. %63, and the accumulator registers bound to them.
#define SVG_NAMES_32                                                                           \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SVG_NAMES_64                                                                             \
  SVG_NAMES_32                                                                                   \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SVG_BIND_8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SVG_BIND_32 SVG_BIND_8(0), SVG_BIND_8(8), SVG_BIND_8(16), SVG_BIND_8(24)
#define SVG_BIND_64 SVG_BIND_32, SVG_BIND_8(32), SVG_BIND_8(40), SVG_BIND_8(48), SVG_BIND_8(56)

#define SVG_WGMMA_SS(TYPE, NAME, COLUMNS, COUNT, A, B, ACCUMULATE)                                \
  template <>                                                                                   \
  struct WgmmaSS<TYPE, COLUMNS> {                                                               \
    static __device__ __forceinline__ void run(float (&d)[COUNT], uint64_t a, uint64_t b,       \
                                               int accumulate) {                                \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                                \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME  \
                   " {" SVG_NAMES_##COUNT "}, " A ", " B ", p, 1, 1, 0, 0;\n}"                  \
                   : SVG_BIND_##COUNT                                                           \
                   : "l"(a), "l"(b), "r"(accumulate));                                          \
    }                                                                                           \
  };

#define SVG_WGMMA_RS(TYPE, NAME, COLUMNS, COUNT, A0, A1, A2, A3, B)                                \
  template <>                                                                                      \
  struct WgmmaRS<TYPE, COLUMNS> {                                                                  \
    static __device__ __forceinline__ void run(float (&d)[COUNT], const uint32_t* a, uint64_t b) { \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME           \
                   " {" SVG_NAMES_##COUNT "}, {" A0 ", " A1 ", " A2 ", " A3 "}, " B                \
                                          ", 1, 1, 1, 1;"                                          \
                   : SVG_BIND_##COUNT                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    }                                                                                              \
  };

#define SVG_WGMMA(TYPE, NAME)                                          \
  SVG_WGMMA_SS(TYPE, NAME, 128, 64, "%64", "%65", "%66")               \
  SVG_WGMMA_SS(TYPE, NAME, 64, 32, "%32", "%33", "%34")                \
  SVG_WGMMA_RS(TYPE, NAME, 128, 64, "%64", "%65", "%66", "%67", "%68") \
  SVG_WGMMA_RS(TYPE, NAME, 64, 32, "%32", "%33", "%34", "%35", "%36")

SVG_WGMMA(__nv_bfloat16, "bf16")
SVG_WGMMA(__half, "f16")

// The same for e4m3, 32 elements of the reduced axis at a time, contiguous in both operands. The
// tensor cores keep such a sum to some 14 bits.
template <>
struct WgmmaSS<__nv_fp8_e4m3, 128> {
  static __device__ __forceinline__ void run(float (&d)[64], uint64_t a, uint64_t b,
                                             int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SVG_NAMES_64
        "}, %64, %65, p, 1, 1;\n}"
        : SVG_BIND_64
        : "l"(a), "l"(b), "r"(accumulate));
  }
};

template <>
struct WgmmaRS<__nv_fp8_e4m3, 128> {
  static __device__ __forceinline__ void run(float (&d)[64], const uint32_t* a, uint64_t b,
                                             int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" SVG_NAMES_64
        "}, {%64, %65, %66, %67}, %68, p, 1, 1;\n}"
        : SVG_BIND_64
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
  }
};

#undef SVG_WGMMA
#undef SVG_WGMMA_RS
#undef SVG_WGMMA_SS
#undef SVG_BIND_64
#undef SVG_BIND_32
#undef SVG_BIND_8
#undef SVG_NAMES_64
#undef SVG_NAMES_32

}  // namespace svg::hopper
