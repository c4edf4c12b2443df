// Enough of CUDA, on a CPU, to run the kernels of csrc/: every thread of a block is a fiber, shuffles
// and barriers wait for each other, and the order of the fibers is shuffled so that a missing barrier
// shows. Slow, and honest about what it does not see: no memory model, no timing. What Hopper alone
// has is in hopper/.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaFuncAttributes {};
struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "the launch was refused"; }
// Few processors, so that persistent blocks have several rows to walk over.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 1, cudaSuccess;
}
template <typename F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, F*) {
  return cudaSuccess;
}

template <typename F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// Threads that meet: a warp at a shuffle, a block at a barrier.
struct Meeting {
  unsigned members = 0, arrived = 0, generation = 0;
  unsigned slots[2][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  dim3 index;
  bool done = true;
  static constexpr size_t kStack = 64 * 1024;
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Meeting> warps;
  Meeting barrier;
  Meeting named[16];
  Fiber* running = nullptr;
  unsigned progress = 0;  // counts meetings and finished fibers: standing still is a deadlock
  const char* error = nullptr;
  const std::function<void()>* kernel = nullptr;
};

inline thread_local Block block;
inline thread_local uint32_t noise = 12345;

// The shared memory whose size is given at the launch, at a multiple of 1,024 bytes.
inline unsigned char* dynamic_shared() {
  constexpr size_t kMost = 227 * 1024;
  static thread_local const std::unique_ptr<unsigned char[]> memory(new unsigned char[kMost + 1024]);
  return memory.get() + (1024 - reinterpret_cast<uintptr_t>(memory.get()) % 1024) % 1024;
}

inline void wait() { swapcontext(&block.running->context, &block.scheduler); }

inline unsigned meet(Meeting& m) {
  const unsigned generation = m.generation;
  if (++m.arrived == m.members) {
    m.arrived = 0;
    ++m.generation;
    ++block.progress;
  } else {
    while (m.generation == generation) wait();
  }
  return generation;
}

inline void enter() {
  (*block.kernel)();
  block.running->done = true;
  ++block.progress;
  wait();
}

inline void run_block(unsigned threads) {
  block.warps.assign((threads + 31) / 32, {});
  block.barrier = {};
  block.barrier.members = threads;
  for (Meeting& named : block.named) named = {};
  std::memset(dynamic_shared(), 0xff, 227 * 1024);  // what is read before it is written is not 0
  if (block.fibers.size() < threads) block.fibers = std::vector<Fiber>(threads);
  std::vector<Fiber*> order;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    ++block.warps[t / 32].members;
    fiber.index = dim3(t, 0, 0);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    order.push_back(&fiber);
  }
  while (!order.empty()) {
    const unsigned before = block.progress;
    for (size_t i = order.size(); i > 1; --i) {
      noise = noise * 1664525u + 1013904223u;
      std::swap(order[i - 1], order[(noise >> 8) % i]);
    }
    for (Fiber* fiber : order) {
      block.running = fiber;
      threadIdx = fiber->index;
      swapcontext(&block.scheduler, &fiber->context);
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](Fiber* f) { return f->done; }),
                order.end());
    if (block.progress == before) {
      throw std::runtime_error("deadlock: threads of a warp or block wait for some that never come");
    }
  }
}

inline void launch(dim3 grid, unsigned threads, const std::function<void()>& kernel) {
  block.kernel = &kernel;
  block.error = nullptr;
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y, 0);
      run_block(threads);
    }
  }
  if (block.error) throw std::runtime_error(block.error);
}

}  // namespace emulated

inline void __syncthreads() { emulated::meet(emulated::block.barrier); }

// Every lane of a warp gives a word; calls read(words) once all have.
template <typename T, typename Read>
auto exchange(T value, Read read) {
  static_assert(sizeof(T) == 4, "the emulator exchanges words");
  emulated::Meeting& warp = emulated::block.warps[threadIdx.x / 32];
  // Two sets of slots: a lane may be one exchange ahead of those that still read.
  std::memcpy(&warp.slots[warp.generation & 1][threadIdx.x % 32], &value, 4);
  const unsigned generation = emulated::meet(warp);
  T words[32];
  std::memcpy(words, warp.slots[generation & 1], sizeof(words));
  return read(words);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return exchange(value, [&](const T* words) { return words[lane & 31]; });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return exchange(value, [&](const T* words) { return words[(threadIdx.x % 32) ^ offset]; });
}

template <typename T>
T __shfl_up_sync(unsigned, T value, unsigned offset) {
  const unsigned lane = threadIdx.x % 32;
  return exchange(value, [&](const T* words) { return words[lane < offset ? lane : lane - offset]; });
}

inline unsigned __ballot_sync(unsigned, int predicate) {
  return exchange(predicate, [](const int* words) {
    unsigned mask = 0;
    for (int lane = 0; lane < 32; ++lane) mask |= unsigned{words[lane] != 0} << lane;
    return mask;
  });
}

inline int atomicAdd(int* place, int x) { return std::exchange(*place, *place + x); }
inline int atomicExch(int* place, int x) { return std::exchange(*place, x); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline void __syncwarp() { __ballot_sync(~0u, 0); }

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  return exchange(value, [](const unsigned* words) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= words[lane];
    return all;
  });
}

inline int __reduce_add_sync(unsigned, int value) {
  return exchange(value, [](const int* words) {
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += words[lane];
    return sum;
  });
}

inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = low | uint64_t{high} << 32;
  unsigned word = 0;
  for (int i = 0; i < 4; ++i)
    word |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 255) << 8 * i;
  return word;
}

template <typename T>
T __ldg(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulated::block.error = "misaligned load";
  return *p;
}

template <typename T>
void __stcs(T* p, T value) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) emulated::block.error = "misaligned store";
  *p = value;
}

inline float __uint_as_float(unsigned w) {
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}

inline unsigned __float_as_uint(float f) {
  unsigned w;
  std::memcpy(&w, &f, 4);
  return w;
}

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
using std::max;
using std::min;
