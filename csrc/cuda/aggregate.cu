// aggregate on CUDA: weighted means and the accumulators. Memory-bound: every vector is read once, in 128-bit accesses where
// all of them allow it, several vectors at a time on their way.
#include "aggregate_exact.cuh"
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Mean {
  Table<> x;
  Weights<> weight;
  Total total;
  MeanCall call;
};

template <typename T, int N>
__device__ __forceinline__ void store_as(void* data, std::int64_t at, const double (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(x[i]);
  store_pack<T, N>(data, at, pack);
}

// N elements of unit stride from `at` on, or one of any; more than two only without `start`, into an `out` of their dtype. Products and sums are rounded one by one: the bits of every other way
// to add up the same vectors in the same order.
template <typename T, int N>
__device__ __forceinline__ void mean_of(const Mean& a, double total, std::int64_t at) {
  double sum[N] = {};
  if constexpr (N <= 2) {
    if (a.call.start.present) {
      const auto start = load_pack<double, N>(a.call.start.data, at);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = start.lane[i];
    }
  }
  const std::int64_t from = N > 1 ? at : at * a.x.stride;
  for (int begin = 0; begin < a.x.count; begin += kTogether) {
    double weight[kTogether];
    Pack<T, N> x[kTogether];
    bool all = true;
    const auto weigh = [&](const double* weights) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        weight[k] = begin + k < a.x.count ? weights[begin + k] : 0.0;
        all = all && weight[k] != 0;
      }
    };
    a.weight.device.present ? weigh(a.weight.device.data) : weigh(a.weight.host);
    // Branches that meet before the arithmetic: the compiler otherwise puts off half of the loads until others have arrived.
    if (all) {
#pragma unroll
      for (int k = 0; k < kTogether; ++k) x[k] = load_pack<T, N>(a.x[begin + k], from);
    } else {
      // A vector of weight zero is not read (Krum keeps few of many) and adds nothing: a sum is never -0.
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        if (weight[k] != 0)
          x[k] = load_pack<T, N>(a.x[begin + k], from);
        else
          x[k] = {};
      }
    }
#pragma unroll
    for (int k = 0; k < kTogether; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = __dadd_rn(sum[i], __dmul_rn(weight[k], widen<double>(x[k].lane[i])));
  }
  if constexpr (N <= 2) {
    if (!a.call.out.present) return store_as<double>(a.call.sums, at, sum);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] /= total;
  if constexpr (N > 2)
    store_as<T>(a.call.out.data, at, sum);
  else
    switch (a.call.out_dtype) {
      case DType::bf16: return store_as<__nv_bfloat16>(a.call.out.data, at, sum);
      case DType::f16: return store_as<__half>(a.call.out.data, at, sum);
      case DType::f64: return store_as<double>(a.call.out.data, at, sum);
      default: return store_as<float>(a.call.out.data, at, sum);
    }
}

template <typename T, int N>
__global__ void __launch_bounds__(kBlock) mean_kernel(const __grid_constant__ Mean a) {
  const double total = a.call.out.present ? a.total() : 1.0;
  const std::int64_t packs = a.x.size / N, step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t pack = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; pack < packs; pack += step) mean_of<T, N>(a, total, pack * N);
  if (N > 1 && blockIdx.x == 0 && threadIdx.x < a.x.size % N) mean_of<T, 1>(a, total, packs * N + threadIdx.x);
}

template <typename T, int N>
void launch_mean(const Mean& a, const Queue& queue) {
  launch("weighted_mean", mean_kernel<T, N>, grid(a.x.size / N, kBlock, queue, 256), kBlock, queue, a);
}

}  // namespace

void weighted_mean(const Uploads& x, const UploadWeights& weights, const MeanCall& call, const Place& place) {
  if (!x.size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  Optional<const double> start = call.start;
  std::int64_t begin = 0;
  do {
    const std::int64_t count = std::min<std::int64_t>(x.count - begin, kTable);
    const bool last = begin + count == x.count;
    Mean a{table(x, begin, count), weights_of(weights, begin, count), total_of(x, weights), call};
    a.call.start = start;
    if (!last) a.call.out = {};
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      // Two numbers in fp64 are a store of 16 bytes.
      const bool plain = a.call.out.present && a.call.out_dtype == x.dtype;
      const auto fits = [&](int n) {
        return a.x.aligned >= n * static_cast<int>(sizeof(T)) && (!start.present || alignment(start.data) >= 8 * n) &&
               (a.call.out.present ? alignment(a.call.out.data) >= n * static_cast<int>(item_size(call.out_dtype)) : alignment(call.sums) >= 8 * n);
      };
      if (plain && !start.present && fits(kLanes<T>))
        launch_mean<T, kLanes<T>>(a, queue);
      else
        fits(2) ? launch_mean<T, 2>(a, queue) : launch_mean<T, 1>(a, queue);
    });
    start = {call.sums, true};
    begin += count;
  } while (begin < x.count);
}

void exact_add(DType dtype, std::int64_t size, const void* x, std::int64_t stride, double weight, const ExactState& state, const Place& place) {
  if (!size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  launch("exact_add", exact_add_kernel, grid(size, kBlock, queue), kBlock, queue, dtype, size, x, stride, weight, state);
}

void exact_mean(DType out_dtype, std::int64_t size, const ExactState& state, double total, void* out, const Place& place) {
  if (!size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  launch("exact_mean", exact_mean_kernel, grid(size, kBlock, queue), kBlock, queue, out_dtype, size, state, total, out);
}

}  // namespace fedkern::cuda
