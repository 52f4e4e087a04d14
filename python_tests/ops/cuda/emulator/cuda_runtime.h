// The part of the CUDA runtime that fedkern's kernels use, on the CPU: g++ compiles csrc/cuda/*.cu with this folder first
// on the include path, so that tests can run the kernels themselves where there is no GPU.
//
// A launch runs block after block. The threads of a block are fibers that take turns: each runs until it ends, or waits
// for its warp (shuffles, votes) or its block (__syncthreads). What this cannot show: races between threads, memory
// ordering, speed. What it shows besides results: divergent barriers (nobody can go on: an error), accesses out of range
// (compile with -fsanitize=address) and device assertions (an exception).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
};
using uint2 = struct {
  unsigned x, y;
};

namespace emulator {

// One set per process, whichever translation unit runs a kernel.
inline uint3 thread_index, block_index;
inline dim3 block_size, grid_size;
inline std::string failure;

enum class State { ready, warp, block, done };

struct Fiber {
  void* stack_pointer = nullptr;
  std::vector<char> stack;
  State state = State::ready;
  int parity = 0;
};

inline constexpr std::size_t kStack = 96 * 1024;
inline constexpr int kWarp = 32;

inline std::vector<Fiber> fibers(1024);
inline int count = 0, current = 0;
inline void* scheduler_stack = nullptr;
// What the lanes of each warp hand to one another; two sets, so that one barrier per exchange is enough.
inline std::uint64_t slots[2][1024];

extern "C" void fedkern_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak fedkern_emulator_switch
.type fedkern_emulator_switch, @function
fedkern_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fedkern_emulator_switch, .-fedkern_emulator_switch
)");

struct Body {
  void (*run)(void*);
  void* data;
};
inline Body body;

inline void leave(State state) {
  Fiber& fiber = fibers[static_cast<std::size_t>(current)];
  fiber.state = state;
  fedkern_emulator_switch(&fiber.stack_pointer, scheduler_stack);
}

inline void enter() {
  body.run(body.data);
  leave(State::done);
  std::abort();
}

// A device assertion failed: this thread stops here, and the launch fails.
inline void fail(const char* what) {
  if (failure.empty()) failure = what;
  leave(State::done);
}

inline void start(Fiber& fiber) {
  if (fiber.stack.empty()) fiber.stack.resize(kStack);
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack.data() + kStack) & ~std::uintptr_t{15};
  void** pointer = reinterpret_cast<void**>(top);
  *--pointer = nullptr;  // keeps the stack aligned as a call would
  *--pointer = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--pointer = nullptr;
  fiber.stack_pointer = pointer;
  fiber.state = State::ready;
  fiber.parity = 0;
}

// Threads that were stopped never return from their frames, whose guards AddressSanitizer would find in the next launch.
inline void abandon() {
#ifdef __SANITIZE_ADDRESS__
  for (int i = 0; i < count; ++i) {
    const auto& stack = fibers[static_cast<std::size_t>(i)].stack;
    __asan_unpoison_memory_region(stack.data(), stack.size());
  }
#endif
}

inline void run_block() {
  for (int i = 0; i < count; ++i) start(fibers[static_cast<std::size_t>(i)]);
  for (int alive = count; alive > 0;) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      Fiber& fiber = fibers[static_cast<std::size_t>(i)];
      if (fiber.state != State::ready) continue;
      moved = true;
      current = i;
      thread_index = {static_cast<unsigned>(i) % block_size.x, static_cast<unsigned>(i) / block_size.x, 0};
      fedkern_emulator_switch(&scheduler_stack, fiber.stack_pointer);
      alive -= fiber.state == State::done;
    }
    const auto release = [&](int begin, int end, State state) {
      int waiting = 0, done = 0;
      for (int i = begin; i < end; ++i) {
        waiting += fibers[static_cast<std::size_t>(i)].state == state;
        done += fibers[static_cast<std::size_t>(i)].state == State::done;
      }
      // A warp's exchange needs every lane; a block's barrier, as on the device, those that have not returned.
      if (!waiting || waiting + (state == State::block ? done : 0) != end - begin) return;
      for (int i = begin; i < end; ++i)
        if (fibers[static_cast<std::size_t>(i)].state == state) fibers[static_cast<std::size_t>(i)].state = State::ready;
      moved = true;
    };
    for (int warp = 0; warp < count; warp += kWarp) release(warp, warp + kWarp, State::warp);
    release(0, count, State::block);
    if (!moved && alive && failure.empty()) failure = "divergent barrier";
    if (!failure.empty()) {
      abandon();
      return;
    }
  }
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 8);
  Fiber& fiber = fibers[static_cast<std::size_t>(current)];
  const int parity = fiber.parity ^= 1, base = current / kWarp * kWarp;
  std::memcpy(&slots[parity][current], &value, sizeof(T));
  leave(State::warp);
  std::memcpy(&value, &slots[parity][base + source], sizeof(T));
  return value;
}

inline int lane() { return current % kWarp; }

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::leave(emulator::State::block); }
inline void __syncwarp(unsigned = ~0u) { emulator::leave(emulator::State::warp); }
template <typename T>
T __shfl_sync(unsigned, T value, int source, int width = 32) {
  return emulator::exchange(value, emulator::lane() / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int = 32) {
  return emulator::exchange(value, emulator::lane() ^ mask);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta, int width = 32) {
  const int lane = emulator::lane();
  return emulator::exchange(value, lane % width + delta < width ? lane + delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned result = 0;
  const int parity = emulator::fibers[static_cast<std::size_t>(emulator::current)].parity ^ 1;
  const int base = emulator::current / 32 * 32;
  emulator::exchange<unsigned>(predicate != 0, 0);
  for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(emulator::slots[parity][base + i] & 1) << i;
  return result;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
inline double __longlong_as_double(long long bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}
inline float cospif(float x) { return static_cast<float>(std::cos(3.14159265358979323846 * static_cast<double>(x))); }
inline float sinpif(float x) { return static_cast<float>(std::sin(3.14159265358979323846 * static_cast<double>(x))); }
inline float __double2float_rz(double x) {
  const float nearest = static_cast<float>(x);
  if (!(std::fabs(static_cast<double>(nearest)) > std::fabs(x))) return nearest;
  return std::nextafterf(nearest, 0.0f);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32); }
// Of both halves of a word.
inline unsigned __vminu2(unsigned a, unsigned b) { return (a >> 16 < b >> 16 ? a : b) & 0xffff0000u | ((a & 0xffff) < (b & 0xffff) ? a : b) & 0xffff; }
inline unsigned __vmaxu2(unsigned a, unsigned b) { return (a >> 16 < b >> 16 ? b : a) & 0xffff0000u | ((a & 0xffff) < (b & 0xffff) ? b : a) & 0xffff; }
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }

// Blocks run one after another, and a thread without a break between its barriers.
inline void __threadfence() {}
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) { return std::exchange(*to, *to + value); }
inline unsigned long long atomicCAS(unsigned long long* to, unsigned long long expected, unsigned long long value) {
  return std::exchange(*to, *to == expected ? value : *to);
}

using cudaError_t = int;
using cudaStream_t = void*;
inline constexpr cudaError_t cudaSuccess = 0, cudaErrorInsufficientDriver = 35, cudaErrorNoDevice = 100, cudaErrorAssert = 710;
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };
// What a core from nvcc 13.0 says, beside a driver for 13.0.
#define __CUDA_ARCH_LIST__ 800, 900, 1000
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return emulator::failure.c_str(); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 2, cudaSuccess; }

template <typename... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, std::size_t, cudaStream_t) {
  emulator::failure.clear();
  const unsigned threads = block.x * block.y;
  if (!grid.x || !threads || threads > 1024 || threads % 32) {
    emulator::failure = "invalid configuration";
    return 9;
  }
  struct Call {
    void (*kernel)(P...);
    void** arguments;
  } call{kernel, arguments};
  emulator::body = {[](void* data) {
                      const auto* const c = static_cast<Call*>(data);
                      [&]<std::size_t... I>(std::index_sequence<I...>) {
                        c->kernel(*static_cast<std::remove_reference_t<P>*>(c->arguments[I])...);
                      }(std::index_sequence_for<P...>{});
                    },
                    &call};
  emulator::block_size = block;
  emulator::grid_size = grid;
  emulator::count = static_cast<int>(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      emulator::block_index = {x, y, 0};
      emulator::run_block();
      if (!emulator::failure.empty()) return cudaErrorAssert;
    }
  return cudaSuccess;
}
