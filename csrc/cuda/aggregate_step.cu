// aggregate on CUDA: the server optimisers, with norms of the vectors' deltas and their cosines to the mean delta.
#include <type_traits>

#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Step {
  Table<> x;
  Weights<> weight;
  Total total;
  ServerStep call;
};

// Where a thread's sums for norms and cosines are: in registers for up to kHeld vectors, else added up over warps and in shared memory.
enum class Sums { none, held, shared };

// Elements of a thread: more, which are all computed in fp64, would fill its registers.
template <typename T>
inline constexpr int kEach = sizeof(T) == 8 ? 2 : 4;
template <typename T>
inline constexpr int kStepTile = kBlock * kEach<T>;
constexpr int kHeld = 10, kLoaded = 5;  // of these vectors so many are on their way at once

// x - from, and 0 between equal infinities where `from` may be one. Compared as they are: fp64 has fewer units.
template <bool Finite, typename T>
__device__ __forceinline__ double apart(T x, T from, double wide) {
  using C = typename Computed<T>::type;
  if (!Finite && widen<C>(x) == widen<C>(from)) return 0.0;
  return widen<double>(x) - wide;
}

template <bool Full, int N, int E>
__device__ __forceinline__ void load_state(const Tile<N, E>& tile, const Optional<void>& state, DType dtype, double (&x)[E]) {
  if (!state.present) return;
  if (dtype == DType::f64) return tile.template load<double, Full>(state.data, 1, x);
  float narrow[E];
  tile.template load<float, Full>(state.data, 1, narrow);
#pragma unroll
  for (int i = 0; i < E; ++i) x[i] = narrow[i];
}

template <bool Full, int N, int E>
__device__ __forceinline__ void store_any(const Tile<N, E>& tile, void* data, DType dtype, const double (&x)[E]) {
  switch (dtype) {
    case DType::bf16: return tile.template store<__nv_bfloat16, Full>(data, x);
    case DType::f16: return tile.template store<__half, Full>(data, x);
    case DType::f64: return tile.template store<double, Full>(data, x);
    default: return tile.template store<float, Full>(data, x);
  }
}

// model += the update; `one` and `two` are the optimiser's state.
template <int E>
__device__ __forceinline__ void update(const ServerStep& a, const double (&mean)[E], double (&one)[E], double (&two)[E], double (&model)[E]) {
  if (a.rule == ServerRule::mean || a.rule == ServerRule::momentum) {
    const bool momentum = a.rule == ServerRule::momentum;
#pragma unroll
    for (int i = 0; i < E; ++i) {
      if (momentum) one[i] = fma(a.beta1, one[i], mean[i]);
      model[i] = fma(a.learning_rate, momentum ? one[i] : mean[i], model[i]);
    }
    return;
  }
  double square[E];
#pragma unroll
  for (int i = 0; i < E; ++i) one[i] = fma(a.beta1, one[i], (1 - a.beta1) * mean[i]), square[i] = mean[i] * mean[i];
  if (a.rule == ServerRule::adam) {
#pragma unroll
    for (int i = 0; i < E; ++i) two[i] = fma(a.beta2, two[i], (1 - a.beta2) * square[i]);
  } else if (a.rule == ServerRule::yogi) {
#pragma unroll
    for (int i = 0; i < E; ++i) two[i] -= (1 - a.beta2) * square[i] * (two[i] > square[i] ? 1.0 : two[i] < square[i] ? -1.0 : two[i] - square[i]);
  } else {
#pragma unroll
    for (int i = 0; i < E; ++i) two[i] += square[i];
  }
#pragma unroll
  for (int i = 0; i < E; ++i) model[i] += a.learning_rate * one[i] / (sqrt(two[i]) + a.tau);
}

// Sums of squares and products of up to kHeld vectors in a thread's registers.
struct HeldSums {
  double sum[2][kHeld / kLoaded][kLoaded];

  // to[m * 2 + value], of the block
  __device__ __forceinline__ void leave(double* to, int count) const {
    double all[2 * kHeld];
#pragma unroll
    for (int i = 0; i < 2 * kHeld; ++i) all[i] = sum[i % 2][i / 2 / kLoaded][i / 2 % kLoaded];
    Group<kBlock>::sum_all(all);
    if (threadIdx.x) return;
#pragma unroll
    for (int i = 0; i < 2 * kHeld; ++i)
      if (i < 2 * count) to[i] = all[i];
  }
};

// The thread's elements of a tile. Fast: the tile is full, and all elements of the global model in the warp are finite. Vectors are
// read twice where there are sums, for the mean delta and for the products with it; the second time from the caches.
template <typename T, int N, Sums S, bool Fast>
__device__ __forceinline__ void step_tile(const Step& a, const Tile<N, kEach<T>>& tile, const T (&before)[kEach<T>], const double* weight,
                                          double total, Tallies<2>& tally, HeldSums& held, double& square) {
  constexpr int E = kEach<T>;
  double old[E], mean[E] = {};
#pragma unroll
  for (int i = 0; i < E; ++i) old[i] = widen<double>(before[i]);

  // Of the vectors from `begin` on: sums of squared deltas, or of products with the mean.
  const auto walk = [&](auto products, int begin, auto& sum) {
    constexpr bool second = decltype(products)::value;
    constexpr int G = std::extent_v<std::remove_reference_t<decltype(sum)>>;
    T x[G][E];
    const auto wanted = [&](int k) { return S == Sums::none ? weight[begin + k] != 0 : begin + k < a.x.count; };
#pragma unroll
    for (int k = 0; k < G; ++k)
      if (wanted(k)) tile.template load<T, Fast>(a.x[begin + k], a.x.stride, x[k]);
#pragma unroll
    for (int k = 0; k < G; ++k) {
      if (!wanted(k)) continue;
      double delta[E];
#pragma unroll
      for (int i = 0; i < E; ++i) {
        delta[i] = apart<Fast>(x[k][i], before[i], old[i]);
        if constexpr (S != Sums::none) sum[k] = fma(delta[i], second ? mean[i] : delta[i], sum[k]);
      }
      if constexpr (!second) {
        if (weight[begin + k] == 0) continue;
#pragma unroll
        for (int i = 0; i < E; ++i) mean[i] = fma(weight[begin + k], delta[i], mean[i]);
      }
    }
  };
  const auto pass = [&](auto products) {
    [[maybe_unused]] constexpr int value = decltype(products)::value;
    if constexpr (S == Sums::held) {
#pragma unroll
      for (int group = 0; group < kHeld / kLoaded; ++group)
        if (group * kLoaded < a.x.count) walk(products, group * kLoaded, held.sum[value][group]);
    } else {
      for (int begin = 0; begin < a.x.count; begin += kTogether) {
        double sum[kTogether] = {};
        walk(products, begin, sum);
        if constexpr (S == Sums::shared) tally.add(begin, value, sum);
      }
    }
  };
  pass(std::false_type{});
#pragma unroll
  for (int i = 0; i < E; ++i) mean[i] /= total;
  if constexpr (S != Sums::none) {
#pragma unroll
    for (int i = 0; i < E; ++i) square = fma(mean[i], mean[i], square);
    pass(std::true_type{});
  }
  double one[E] = {}, two[E] = {};
  load_state<Fast>(tile, a.call.first, a.call.first_dtype, one);
  load_state<Fast>(tile, a.call.second, a.call.second_dtype, two);
  update(a.call, mean, one, two, old);
  if (a.call.first.present) store_any<Fast>(tile, a.call.first.data, a.call.first_dtype, one);
  if (a.call.second.present) store_any<Fast>(tile, a.call.second.data, a.call.second_dtype, two);
  store_any<Fast>(tile, a.call.out, a.call.out_dtype, old);
}

// Leaves, where it takes sums, [block][M][squares of the deltas, products with the mean], then [block] the squares of the mean.
template <typename T, int N, Sums S>
__global__ void __launch_bounds__(kBlock, S == Sums::none ? 3 : 2) step_kernel(const __grid_constant__ Step a) {
  __shared__ double weight[kTable], tallies[S == Sums::shared ? kTable * 2 * kWarps : 1];
  for (int m = static_cast<int>(threadIdx.x); m < kTable; m += kBlock) weight[m] = m < a.x.count ? a.weight[m] : 0.0;
  __syncthreads();
  Tallies<2> tally(tallies, a.x.count);
  if constexpr (S == Sums::shared) tally.clear();
  HeldSums held = {};
  const double total = a.total();
  double square = 0;
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kStepTile<T>; begin < a.x.size; begin += gridDim.x * kStepTile<T>) {
    const Tile<N, kEach<T>> tile{begin, a.x.size};
    T before[kEach<T>];
    bool fast = begin + kStepTile<T> <= a.x.size;
    if (fast) {
      tile.template load<T, true>(a.call.global, 1, before);
      typename Computed<T>::type odd = 0;  // NaN where one of them is not finite
#pragma unroll
      for (int i = 0; i < kEach<T>; ++i) odd += widen<decltype(odd)>(before[i]) - widen<decltype(odd)>(before[i]);
      fast = !__any_sync(kEveryLane, odd != 0);
    } else {
      tile.template load<T, false>(a.call.global, 1, before);
    }
    fast ? step_tile<T, N, S, true>(a, tile, before, weight, total, tally, held, square)
         : step_tile<T, N, S, false>(a, tile, before, weight, total, tally, held, square);
  }
  if constexpr (S == Sums::none) return;
  double* const to = a.call.workspace + static_cast<std::int64_t>(blockIdx.x) * 2 * a.x.count;
  if constexpr (S == Sums::shared) tally.leave(to);
  if constexpr (S == Sums::held) held.leave(to, a.x.count);
  square = Group<kBlock>::sum(square);
  if (threadIdx.x == 0) a.call.workspace[static_cast<std::int64_t>(gridDim.x) * 2 * a.x.count + blockIdx.x] = square;
}

// A block per vector.
__global__ void __launch_bounds__(kBlock, 2) finish_step(ServerStep a, std::int64_t blocks, int count) {
  double squares = 0, products = 0, square = 0;
  for (std::int64_t block = threadIdx.x; block < blocks; block += kBlock) {
    squares += a.workspace[(block * count + blockIdx.x) * 2];
    products += a.workspace[(block * count + blockIdx.x) * 2 + 1];
    square += a.workspace[blocks * 2 * count + block];
  }
  squares = Group<kBlock>::sum(squares), products = Group<kBlock>::sum(products), square = Group<kBlock>::sum(square);
  if (threadIdx.x) return;
  const double scale = sqrt(squares * square);
  a.norms[blockIdx.x] = sqrt(squares);
  a.cosines[blockIdx.x] = scale == 0 ? 0.0 : products / scale;
}

}  // namespace

void server_step(const Uploads& x, const UploadWeights& weights, const ServerStep& call, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const Step a{table(x, 0, x.count), weights_of(weights, 0, x.count), total_of(x, weights), call};
  std::int64_t blocks = 0;
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kEach<T>;
    blocks = blocks_for((x.size + kStepTile<T> - 1) / kStepTile<T>, 2 * x.count + 1, queue, 6);
    const auto fits = [](int aligned, DType dtype) { return aligned >= std::min(16, N * static_cast<int>(item_size(dtype))); };
    const bool packed = fits(a.x.aligned, x.dtype) && fits(alignment(call.global), x.dtype) && fits(alignment(call.out), call.out_dtype) &&
                        fits(alignment(call.first.data), call.first_dtype) && fits(alignment(call.second.data), call.second_dtype);
    const auto pick = [&](auto packs) {
      constexpr int n = decltype(packs)::value;
      return !call.norms ? step_kernel<T, n, Sums::none> : x.count <= kHeld ? step_kernel<T, n, Sums::held> : step_kernel<T, n, Sums::shared>;
    };
    launch("server_step", packed ? pick(std::integral_constant<int, N>{}) : pick(std::integral_constant<int, 1>{}), blocks, kBlock, queue, a);
  });
  if (call.norms) launch("server_step_norms", finish_step, x.count, kBlock, queue, call, blocks, static_cast<int>(x.count));
}

}  // namespace fedkern::cuda
