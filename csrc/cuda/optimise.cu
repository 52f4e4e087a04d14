// optimise on CUDA. Sums and products are fused or rounded apart as torch's CPU kernels do it (csrc/cpu/optimise.cpp).
#include "fedkern/optimise_cuda.h"

#include <algorithm>

#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double times(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ double plus(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ float root_of(float x) { return sqrtf(x); }
__device__ __forceinline__ double root_of(double x) { return sqrt(x); }

struct Launch {
  OptimiserStep call;
  std::int64_t blocks;  // of each row
  bool packed;          // every row of every tensor starts at a multiple of 16 bytes
};

// The elements that a thread holds of each vector, and what it finds out about them.
template <typename T>
struct Elements {
  using C = typename Computed<T>::type;
  const Launch& a;
  std::int64_t row, at;
  bool whole;

  __device__ Elements(const Launch& a, std::int64_t row, std::int64_t at) : a(a), row(row), at(at), whole(a.packed && at + kPack <= a.call.size) {}

  __device__ __forceinline__ T* of(const RowsOf& x) const { return static_cast<T*>(x.data) + row * x.step; }
  __device__ __forceinline__ void load(const RowsOf& x, C (&value)[kPack]) const {
    const T* from = of(x);
    if (whole) return load_eight<C, T>(from, at, value);
#pragma unroll
    for (int i = 0; i < kPack; ++i) value[i] = at + i < a.call.size ? widen<C>(from[at + i]) : C(0);
  }
  // Returns whether all that was written is finite once it is rounded.
  __device__ __forceinline__ bool store(const RowsOf& x, const C (&value)[kPack]) const {
    T* to = of(x);
    bool finite = true;
    if (whole) {
      store_eight<C, T>(to, at, value);
    } else {
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (at + i < a.call.size) to[at + i] = narrow<T>(value[i]);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const C rounded = widen<C>(narrow<T>(value[i]));
      finite = finite && (at + i >= a.call.size || rounded - rounded == C(0));
    }
    return finite;
  }
  // The method's terms.
  __device__ __forceinline__ void add_terms(const C (&theta)[kPack], C (&g)[kPack]) const {
    C other[kPack];
    if (a.call.correction.present) {
      load(a.call.correction, other);
#pragma unroll
      for (int i = 0; i < kPack; ++i) g[i] = plus(g[i], other[i]);
    }
    if (a.call.proximal != 0) {
      load(a.call.anchor, other);
#pragma unroll
      for (int i = 0; i < kPack; ++i) g[i] = fused(plus(theta[i], -other[i]), static_cast<C>(a.call.proximal), g[i]);
    }
  }
  __device__ __forceinline__ double squares(const C (&g)[kPack]) const {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += static_cast<double>(g[i]) * static_cast<double>(g[i]);
    return sum;
  }
};

inline constexpr std::int64_t kTileElements = kBlock * kPack;

// workspace[row, block] = squares of the block's part of the row's gradient.
template <typename T>
__global__ void __launch_bounds__(kBlock) squares_kernel(const __grid_constant__ Launch a) {
  using C = typename Computed<T>::type;
  const std::int64_t row = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks;
  double sum = 0;
  for (std::int64_t tile = block * kTileElements; tile < a.call.size; tile += a.blocks * kTileElements) {
    const Elements<T> x(a, row, tile + static_cast<std::int64_t>(threadIdx.x) * kPack);
    C theta[kPack] = {}, g[kPack];
    x.load(a.call.gradients, g);
    if (a.call.proximal != 0) x.load(a.call.parameters, theta);
    x.add_terms(theta, g);
    sum += x.squares(g);
  }
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) a.call.workspace[blockIdx.x] = sum;
}

template <typename T, bool adamw>
__global__ void __launch_bounds__(kBlock) step_kernel(const __grid_constant__ Launch a) {
  using C = typename Computed<T>::type;
  const OptimiserStep& call = a.call;
  const std::int64_t row = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks;
  const double lr = call.lr_each.present ? call.lr_each.data[row] : call.lr;
  const C rate = static_cast<C>(adamw ? -lr / call.bias : -lr), decay = static_cast<C>(__dadd_rn(1, -__dmul_rn(lr, call.weight_decay)));
  const C momentum = static_cast<C>(call.momentum), weight_decay = static_cast<C>(call.weight_decay);
  const C way = static_cast<C>(1 - call.beta1), beta2 = static_cast<C>(call.beta2), rest2 = static_cast<C>(1 - call.beta2);
  const C root = static_cast<C>(call.root), eps = static_cast<C>(call.eps);
  C scale = 1;
  if (call.max_norm > 0) {
    const double norm = sqrt(call.squared[row]);
    scale = norm <= call.max_norm ? C(1) : static_cast<C>(call.max_norm / norm);  // NaN where the norm is
  }
  double squares = 0;
  bool finite = true;
  for (std::int64_t tile = block * kTileElements; tile < call.size; tile += a.blocks * kTileElements) {
    const Elements<T> x(a, row, tile + static_cast<std::int64_t>(threadIdx.x) * kPack);
    C theta[kPack], g[kPack], other[kPack];
    x.load(call.gradients, g);
    x.load(call.parameters, theta);
    if (call.gradient_sum.present) {
      x.load(call.gradient_sum, other);
#pragma unroll
      for (int i = 0; i < kPack; ++i) other[i] = plus(other[i], g[i]);
      finite = x.store(call.gradient_sum, other) && finite;
    }
    if (call.zero) {
      const C nothing[kPack] = {};
      x.store(call.gradients, nothing);
    }
    x.add_terms(theta, g);
    squares += x.squares(g);
#pragma unroll
    for (int i = 0; i < kPack; ++i) g[i] = times(g[i], scale);
    if constexpr (adamw) {
      C two[kPack];
      x.load(call.first, other);
      x.load(call.second, two);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const C difference = plus(g[i], -other[i]);
        other[i] = way < C(0.5) ? fused(way, difference, other[i]) : fused(way - C(1), difference, g[i]);
        two[i] = fused(times(rest2, g[i]), g[i], times(two[i], beta2));
        const C below = plus(root_of(two[i]) / root, eps);
        theta[i] = plus(times(rate, other[i]) / below, times(theta[i], decay));
      }
      finite = x.store(call.first, other) && finite;
      finite = x.store(call.second, two) && finite;
    } else {
      if (call.weight_decay != 0) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[i] = fused(theta[i], weight_decay, g[i]);
      }
      if (call.first.present) {
        x.load(call.first, other);
#pragma unroll
        for (int i = 0; i < kPack; ++i) g[i] = plus(times(other[i], momentum), g[i]);
        finite = x.store(call.first, g) && finite;
      }
#pragma unroll
      for (int i = 0; i < kPack; ++i) theta[i] = fused(g[i], rate, theta[i]);
    }
    finite = x.store(call.parameters, theta) && finite;
  }
  squares = Group<kBlock>::sum(squares);
  const double odd = Group<kBlock>::sum(finite ? 0.0 : 1.0);
  if (threadIdx.x) return;
  call.workspace[blockIdx.x] = squares;
  call.workspace[call.rows * a.blocks + blockIdx.x] = odd;
}

// A block per row: the sums over its blocks; `look` also at whether all was finite.
__global__ void __launch_bounds__(kBlock) finish_kernel(const __grid_constant__ Launch a, bool look) {
  const std::int64_t row = blockIdx.x;
  double squares = 0, odd = 0;
  for (std::int64_t block = threadIdx.x; block < a.blocks; block += kBlock) {
    squares += a.call.workspace[row * a.blocks + block];
    if (look) odd += a.call.workspace[(a.call.rows + row) * a.blocks + block];
  }
  squares = Group<kBlock>::sum(squares);
  odd = Group<kBlock>::sum(odd);
  if (threadIdx.x) return;
  a.call.squared[row] = squares;
  if (look) a.call.finite[row] = odd == 0 && squares - squares == 0;
}

bool packed(const RowsOf& x, const OptimiserStep& call) {
  const auto bytes = x.step * static_cast<std::int64_t>(item_size(call.dtype));
  return !x.present || (aligned16(x.data) && (call.rows == 1 || bytes % 16 == 0));
}

template <typename T>
void run(const Launch& a, const Queue& queue) {
  const std::int64_t blocks = a.call.rows * a.blocks;
  if (a.call.max_norm > 0) {
    launch("optimise_squares", squares_kernel<T>, blocks, kBlock, queue, a);
    launch("optimise_norms", finish_kernel, a.call.rows, kBlock, queue, a, false);
  }
  if (a.call.adamw)
    launch("adamw_step", step_kernel<T, true>, blocks, kBlock, queue, a);
  else
    launch("sgd_step", step_kernel<T, false>, blocks, kBlock, queue, a);
  launch("optimise_finish", finish_kernel, a.call.rows, kBlock, queue, a, true);
}

}  // namespace

std::int64_t optimise_blocks(std::int64_t rows, std::int64_t size) {
  const std::int64_t tiles = (size + kTileElements - 1) / kTileElements, most = std::max<std::int64_t>(1, kOptimiseBlocks / std::max<std::int64_t>(1, rows));
  return std::max<std::int64_t>(1, std::min(tiles, most));
}

void optimise_step(const OptimiserStep& call, int device, void* stream) {
  if (!call.rows) return;
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  Launch a{call, optimise_blocks(call.rows, call.size), true};
  for (const RowsOf* x : {&call.parameters, &call.gradients, &call.first, &call.second, &call.anchor, &call.correction, &call.gradient_sum})
    a.packed = a.packed && packed(*x, call);
  with_type(call.dtype, [&](auto in) { run<decltype(in)>(a, queue); });
}

}  // namespace fedkern::cuda
