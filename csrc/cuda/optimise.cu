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
};

// N elements of a row from `at` on, of every vector.
template <typename T, int N>
struct Elements {
  using C = typename Computed<T>::type;
  using Values = Pack<T, N>;
  const OptimiserStep& call;
  std::int64_t row, at;

  __device__ __forceinline__ Values load(const RowsOf& x) const { return x.present ? load_pack<T, N>(x.data, row * x.step + at) : Values{}; }
  // Rounds; `odd` is 0 as long as all that was written is finite, else NaN.
  __device__ __forceinline__ void store(const RowsOf& x, const C (&value)[N], C& odd) const {
    Values rounded;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      rounded.lane[i] = narrow<T>(value[i]);
      odd = fused(widen<C>(rounded.lane[i]), C(0), odd);
    }
    store_pack<T, N>(x.data, row * x.step + at, rounded);
  }
  // The gradient with the method's terms, and its squares.
  __device__ __forceinline__ void gradient(const Values& raw, const Values& theta, const Values& correction, const Values& anchor, C (&g)[N],
                                           double& squares) const {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = widen<C>(raw.lane[i]);
    if (call.correction.present) {
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = plus(g[i], widen<C>(correction.lane[i]));
    }
    if (call.anchor.present) {
      const C proximal = static_cast<C>(call.proximal);
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = fused(plus(widen<C>(theta.lane[i]), -widen<C>(anchor.lane[i])), proximal, g[i]);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) squares = fused(static_cast<double>(g[i]), static_cast<double>(g[i]), squares);
  }
  __device__ __forceinline__ void add_squares(double& squares) const {
    const Values raw = load(call.gradients), theta = call.anchor.present ? load(call.parameters) : Values{};
    const Values correction = load(call.correction), anchor = load(call.anchor);
    C g[N];
    gradient(raw, theta, correction, anchor, g, squares);
  }
};

// A row's numbers, in the type that it is computed in.
template <typename C>
struct Numbers {
  C rate, decay, scale, momentum, weight_decay, way, beta2, rest2, root, eps;

  __device__ Numbers(const OptimiserStep& call, std::int64_t row) {
    const double lr = call.lr_each.present ? call.lr_each.data[row] : call.lr;
    rate = static_cast<C>(call.adamw ? -lr / call.bias : -lr), decay = static_cast<C>(__dadd_rn(1, -__dmul_rn(lr, call.weight_decay)));
    momentum = static_cast<C>(call.momentum), weight_decay = static_cast<C>(call.weight_decay);
    way = static_cast<C>(1 - call.beta1), beta2 = static_cast<C>(call.beta2), rest2 = static_cast<C>(1 - call.beta2);
    root = static_cast<C>(call.root), eps = static_cast<C>(call.eps);
    scale = 1;
    if (call.max_norm > 0) {
      const double norm = sqrt(call.squared[row]);
      scale = norm <= call.max_norm ? C(1) : static_cast<C>(call.max_norm / norm);  // NaN where the norm is
    }
  }
};

// All that is read is on its way before any of it is used, and all that is written is written in whole packs: parts of a
// sector cost as much as sectors.
template <bool adamw, typename T, int N, typename C = typename Computed<T>::type>
__device__ __forceinline__ void step(const Elements<T, N>& x, const Numbers<C>& n, double& squares, C& odd) {
  const OptimiserStep& call = x.call;
  const auto raw = x.load(call.gradients), before = x.load(call.parameters), one = x.load(call.first), two = x.load(call.second);
  const auto correction = x.load(call.correction), anchor = x.load(call.anchor), sum = x.load(call.gradient_sum);
  C g[N], theta[N], first[N];
  x.gradient(raw, before, correction, anchor, g, squares);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] = times(g[i], n.scale), theta[i] = widen<C>(before.lane[i]), first[i] = widen<C>(one.lane[i]);
  if constexpr (adamw) {
    C second[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const C difference = plus(g[i], -first[i]);
      first[i] = n.way < C(0.5) ? fused(n.way, difference, first[i]) : fused(n.way - C(1), difference, g[i]);
      second[i] = fused(times(n.rest2, g[i]), g[i], times(widen<C>(two.lane[i]), n.beta2));
      const C below = plus(root_of(second[i]) / n.root, n.eps);
      theta[i] = plus(times(n.rate, first[i]) / below, times(theta[i], n.decay));
    }
    x.store(call.first, first, odd);
    x.store(call.second, second, odd);
  } else {
    if (call.weight_decay != 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = fused(theta[i], n.weight_decay, g[i]);
    }
    if (call.first.present) {
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] = plus(times(first[i], n.momentum), g[i]);
      x.store(call.first, g, odd);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) theta[i] = fused(g[i], n.rate, theta[i]);
  }
  x.store(call.parameters, theta, odd);
  if (call.gradient_sum.present) {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] = plus(widen<C>(sum.lane[i]), widen<C>(raw.lane[i]));
    x.store(call.gradient_sum, g, odd);
  }
  if (call.zero) store_pack<T, N>(call.gradients.data, x.row * call.gradients.step + x.at, Pack<T, N>{});
}

// Calls `body` with this thread's elements of the block's part of a row: N at a time, and those left over one by one.
template <typename T, int N, typename Body>
__device__ __forceinline__ void walk(const Launch& a, Body&& body) {
  const std::int64_t row = blockIdx.x / a.blocks, block = blockIdx.x % a.blocks, packs = a.call.size / N;
  for (std::int64_t pack = block * kBlock + threadIdx.x; pack < packs; pack += a.blocks * kBlock) body(Elements<T, N>{a.call, row, pack * N});
  if (N > 1 && block == 0 && threadIdx.x < a.call.size % N) body(Elements<T, 1>{a.call, row, packs * N + threadIdx.x});
}

// A row's results, by one thread.
__device__ __forceinline__ void leave(const OptimiserStep& call, std::int64_t row, double squares, double odd) {
  call.squared[row] = squares;
  call.finite[row] = odd == 0 && squares - squares == 0;
}

// workspace[row, block] = squares of the block's part of the row's gradient; of the whole row at once where it has one block.
template <typename T, int N>
__global__ void __launch_bounds__(kBlock) squares_kernel(const __grid_constant__ Launch a) {
  double squares = 0;
  walk<T, N>(a, [&](const auto& x) { x.add_squares(squares); });
  squares = Group<kBlock>::sum(squares);
  if (threadIdx.x == 0) (a.blocks == 1 ? a.call.squared : a.call.workspace)[blockIdx.x] = squares;
}

template <typename T, int N, bool adamw>
__global__ void __launch_bounds__(kBlock) step_kernel(const __grid_constant__ Launch a) {
  using C = typename Computed<T>::type;
  const Numbers<C> numbers(a.call, blockIdx.x / a.blocks);
  double squares = 0;
  C odd = 0;
  walk<T, N>(a, [&](const auto& x) { step<adamw>(x, numbers, squares, odd); });
  squares = Group<kBlock>::sum(squares);
  odd = Group<kBlock>::sum(odd);
  if (threadIdx.x) return;
  if (a.blocks == 1) return leave(a.call, blockIdx.x, squares, odd);
  a.call.workspace[blockIdx.x] = squares;
  a.call.workspace[a.call.rows * a.blocks + blockIdx.x] = odd;
}

// A block per row: the sums over its blocks; `look` also at whether all was finite.
__global__ void __launch_bounds__(kBlock) finish_kernel(const __grid_constant__ Launch a, bool look) {
  const std::int64_t row = blockIdx.x;
  double squares = 0, odd = 0;
#pragma unroll 8
  for (std::int64_t block = threadIdx.x; block < a.blocks; block += kBlock) {
    squares += a.call.workspace[row * a.blocks + block];
    if (look) odd += a.call.workspace[(a.call.rows + row) * a.blocks + block];
  }
  squares = Group<kBlock>::sum(squares);
  odd = Group<kBlock>::sum(odd);
  if (threadIdx.x) return;
  if (look) return leave(a.call, row, squares, odd);
  a.call.squared[row] = squares;
}

// Elements of a row that are worth a block.
constexpr std::int64_t kTile = 4 * kBlock;

// Whether every row starts at a multiple of 16 bytes.
bool packed(const RowsOf& x, const OptimiserStep& call) {
  const auto bytes = x.step * static_cast<std::int64_t>(item_size(call.dtype));
  return !x.present || (aligned16(x.data) && (call.rows == 1 || bytes % 16 == 0));
}

template <typename T, int N>
void run(const Launch& a, const Queue& queue) {
  const std::int64_t blocks = a.call.rows * a.blocks;
  if (a.call.max_norm > 0) {
    launch("optimise_squares", squares_kernel<T, N>, blocks, kBlock, queue, a);
    if (a.blocks > 1) launch("optimise_norms", finish_kernel, a.call.rows, kBlock, queue, a, false);
  }
  if (a.call.adamw)
    launch("adamw_step", step_kernel<T, N, true>, blocks, kBlock, queue, a);
  else
    launch("sgd_step", step_kernel<T, N, false>, blocks, kBlock, queue, a);
  if (a.blocks > 1) launch("optimise_finish", finish_kernel, a.call.rows, kBlock, queue, a, true);
}

}  // namespace

std::int64_t optimise_blocks(std::int64_t rows, std::int64_t size) {
  const std::int64_t tiles = (size + kTile - 1) / kTile, most = std::max<std::int64_t>(1, kOptimiseBlocks / std::max<std::int64_t>(1, rows));
  return std::max<std::int64_t>(1, std::min(tiles, most));
}

void optimise_step(const OptimiserStep& call, int device, void* stream) {
  if (!call.rows) return;
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  Launch a{call, optimise_blocks(call.rows, call.size)};
  if (call.proximal == 0) a.call.anchor = {};
  bool whole = true;
  for (const RowsOf* x : {&call.parameters, &call.gradients, &call.first, &call.second, &call.anchor, &call.correction, &call.gradient_sum})
    whole = whole && packed(*x, call);
  with_type(call.dtype, [&](auto in) {
    using T = decltype(in);
    whole ? run<T, kLanes<T>>(a, queue) : run<T, 1>(a, queue);
  });
}

}  // namespace fedkern::cuda
