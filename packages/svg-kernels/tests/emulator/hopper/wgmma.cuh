// csrc/hopper/wgmma.cuh: products are done when they are issued, each thread its own elements.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "hopper/arithmetic.cuh"
#include "hopper/matrix.cuh"

namespace svg::hopper {

inline uint64_t matrix_descriptor(const void* pointer, uint32_t stride, uint32_t leading) {
  return static_cast<uint64_t>((shared_address(pointer) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         uint64_t{1} << 62;
}

inline uint64_t advance_descriptor(uint64_t descriptor, uint32_t bytes, uint32_t count = 1) {
  return descriptor + count * (bytes >> 4);
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int kInFlight>
void wgmma_wait() {}
template <typename T, int kCount>
void fence_registers(T (&)[kCount]) {}

// What an element is made of, and the number that it stands for.
template <typename T>
struct Element {
  static constexpr int kBytes = 2;
  static float read(const unsigned char* at) {
    T element;
    std::memcpy(&element, at, 2);
    return __emulated_float(element);
  }
};
template <>
struct Element<__nv_fp8_e4m3> {
  static constexpr int kBytes = 1;
  static float read(const unsigned char* at) { return from_e4m3(*at); }
};
template <>
struct Element<int8_t> {
  static constexpr int kBytes = 1;
  static float read(const unsigned char* at) { return static_cast<int8_t>(*at); }
};

// A matrix in shared memory as its descriptor says; 32 bytes of the reduced axis.
class Operand {
 public:
  explicit Operand(uint64_t descriptor)
      : start_(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        leading_(static_cast<uint32_t>(descriptor >> 16 & 0x3FFF) << 4),
        stride_(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4) {}

  // Element k of row i, the reduced axis contiguous.
  template <typename T>
  float row(int i, int k) const {
    return Element<T>::read(
        swizzled(start_ + i / 8 * stride_ + i % 8 * 128 + k * Element<T>::kBytes));
  }

  // Element i of row k of the reduced axis, i contiguous.
  template <typename T>
  float column(int i, int k) const {
    return Element<T>::read(
        swizzled(start_ + k / 8 * stride_ + i / 64 * leading_ + k % 8 * 128 + i % 64 * 2));
  }

 private:
  uint32_t start_, leading_, stride_;
};

// Calls add(element, row of the thread's two, column) for every element of a thread's accumulator.
template <int kColumns, typename Add>
void each_element(Add add) {
  for (int i = 0; i < kColumns / 8; ++i) {
    for (int r = 0; r < 2; ++r) {
      for (int e = 0; e < 2; ++e) add(4 * i + 2 * r + e, r, 8 * i + 2 * (threadIdx.x % 4) + e);
    }
  }
}

template <typename T, int kColumns>
struct WgmmaSS {
  template <typename Accumulator>
  static void run(Accumulator (&d)[kColumns / 2], uint64_t a, uint64_t b, int accumulate) {
    const Operand left(a), right(b);
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    each_element<kColumns>([&](int i, int r, int column) {
      Accumulator sum = accumulate ? d[i] : Accumulator{0};
      for (int k = 0; k < 32 / Element<T>::kBytes; ++k)
        sum += static_cast<Accumulator>(left.row<T>(row + 8 * r, k) * right.row<T>(column, k));
      d[i] = sum;
    });
  }
};

template <typename T, int kColumns>
struct WgmmaRS {
  static void run(float (&d)[kColumns / 2], const uint32_t* a, uint64_t b, int accumulate = 1) {
    constexpr int kBytes = Element<T>::kBytes;
    const Operand right(b);
    // Lane j of a quad holds bytes 4 j .. 4 j + 3 of both halves of both rows.
    unsigned char rows[2][32];
    for (int j = 0; j < 4; ++j) {
      for (int word = 0; word < 4; ++word) {
        const uint32_t found = __shfl_sync(~0u, a[word], threadIdx.x % 32 / 4 * 4 + j);
        std::memcpy(rows[word % 2] + word / 2 * 16 + 4 * j, &found, 4);
      }
    }
    each_element<kColumns>([&](int i, int r, int column) {
      float sum = accumulate ? d[i] : 0.f;
      for (int k = 0; k < 32 / kBytes; ++k)
        sum += Element<T>::read(rows[r] + k * kBytes) *
               (kBytes == 1 ? right.row<T>(column, k) : right.column<T>(column, k));
      d[i] = sum;
    });
  }
};

}  // namespace svg::hopper
