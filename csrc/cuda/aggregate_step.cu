// aggregate on CUDA: the server optimisers, with norms of the vectors' deltas and their cosines to the mean delta.
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Step {
  Table<> x;
  Weights<> weight;
  Total total;
  ServerStep call;
};

// What is added to the global model; `one` and `two` are the optimiser's state.
__device__ __forceinline__ double update(const ServerStep& a, double mean, double& one, double& two) {
  if (a.rule == ServerRule::mean) return a.learning_rate * mean;
  if (a.rule == ServerRule::momentum) {
    one = a.beta1 * one + mean;
    return a.learning_rate * one;
  }
  one = a.beta1 * one + (1 - a.beta1) * mean;
  const double square = mean * mean;
  if (a.rule == ServerRule::adam)
    two = a.beta2 * two + (1 - a.beta2) * square;
  else if (a.rule == ServerRule::yogi)
    two -= (1 - a.beta2) * square * (two > square ? 1.0 : two < square ? -1.0 : two - square);
  else
    two += square;
  return a.learning_rate * one / (sqrt(two) + a.tau);
}

// x - from, with equal infinities at no distance; `wide` is `from`. Compared as they are: fp64 has fewer units.
template <typename C>
__device__ __forceinline__ double apart(C x, C from, double wide) {
  return x == from ? 0.0 : static_cast<double>(x) - wide;
}

template <bool Full, int N>
__device__ __forceinline__ void load_state(const Tile<N>& tile, const Optional<void>& state, DType dtype, double (&x)[kPack]) {
  if (!state.present) return;
  if (dtype == DType::f64) return tile.template load<double, Full>(state.data, 1, x);
  float narrow[kPack];
  tile.template load<float, Full>(state.data, 1, narrow);
#pragma unroll
  for (int i = 0; i < kPack; ++i) x[i] = narrow[i];
}

template <bool Full, int N>
__device__ __forceinline__ void store_any(const Tile<N>& tile, void* data, DType dtype, const double (&x)[kPack]) {
  switch (dtype) {
    case DType::bf16: return tile.template store<__nv_bfloat16, Full>(data, x);
    case DType::f16: return tile.template store<__half, Full>(data, x);
    case DType::f64: return tile.template store<double, Full>(data, x);
    default: return tile.template store<float, Full>(data, x);
  }
}

// A tile is read twice, for the mean delta and for the products with it; the second time from the caches.
template <typename T, int N, bool Full>
__device__ __forceinline__ void step_tile(const Step& a, const Tile<N>& tile, double total, Tallies<2>& tally, double& square) {
  using C = typename Computed<T>::type;
  T raw[kPack], x[kTogether][kPack];
  C before[kPack];
  double old[kPack], mean[kPack] = {}, sum[kTogether];
  tile.template load<T, Full>(a.call.global, 1, raw);
#pragma unroll
  for (int i = 0; i < kPack; ++i) old[i] = before[i] = widen<C>(raw[i]);
  const auto load = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) tile.template load<T, Full>(a.x[std::min(begin + k, a.x.count - 1)], a.x.stride, x[k]);
  };
  for (int begin = 0; begin < a.x.count; begin += kTogether) {
    load(begin);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const double weight = begin + k < a.x.count ? a.weight[begin + k] : 0.0;
      double delta[kPack];
      sum[k] = 0;
#pragma unroll
      for (int i = 0; i < kPack; ++i) delta[i] = apart(widen<C>(x[k][i]), before[i], old[i]), sum[k] += delta[i] * delta[i];
      if (weight != 0) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) mean[i] += weight * delta[i];
      }
    }
    tally.add(begin, 0, sum);
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    mean[i] = Full || tile.at(i / N) + i % N < tile.size ? mean[i] / total : 0.0;
    square += mean[i] * mean[i];
  }
  for (int begin = 0; begin < a.x.count; begin += kTogether) {
    load(begin);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      sum[k] = 0;
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[k] += apart(widen<C>(x[k][i]), before[i], old[i]) * mean[i];
    }
    tally.add(begin, 1, sum);
  }
  double one[kPack] = {}, two[kPack] = {};
  load_state<Full>(tile, a.call.first, a.call.first_dtype, one);
  load_state<Full>(tile, a.call.second, a.call.second_dtype, two);
#pragma unroll
  for (int i = 0; i < kPack; ++i) old[i] += update(a.call, mean[i], one[i], two[i]);
  if (a.call.first.present) store_any<Full>(tile, a.call.first.data, a.call.first_dtype, one);
  if (a.call.second.present) store_any<Full>(tile, a.call.second.data, a.call.second_dtype, two);
  store_any<Full>(tile, a.call.out, a.call.out_dtype, old);
}

// Leaves [block][M][squares of the deltas, products with the mean], then [block] the squares of the mean.
template <typename T, int N>
__global__ void __launch_bounds__(kBlock, 2) step_kernel(const __grid_constant__ Step a) {
  __shared__ double tallies[kTable * 2 * kWarps];
  Tallies<2> tally(tallies, a.x.count);
  const double total = a.total();
  double square = 0;
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTileElements; begin < a.x.size; begin += gridDim.x * kTileElements) {
    const Tile<N> tile{begin, a.x.size};
    begin + kTileElements <= a.x.size ? step_tile<T, N, true>(a, tile, total, tally, square) : step_tile<T, N, false>(a, tile, total, tally, square);
  }
  tally.leave(a.call.workspace + static_cast<std::int64_t>(blockIdx.x) * 2 * a.x.count);
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
  const bool packed = a.x.aligned == 16 && aligned16(call.global) && aligned16(call.out) && aligned16(call.first.data) && aligned16(call.second.data);
  const std::int64_t tiles = (x.size + kTileElements - 1) / kTileElements, blocks = blocks_for(tiles, 2 * x.count + 1, queue);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    launch("server_step", packed ? step_kernel<T, kLanes<T>> : step_kernel<T, 1>, blocks, kBlock, queue, a);
  });
  launch("server_step_norms", finish_step, x.count, kBlock, queue, call, blocks, static_cast<int>(x.count));
}

}  // namespace fedkern::cuda
