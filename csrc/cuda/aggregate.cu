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

// N elements of unit stride at a time, or one of any. Products and sums are rounded one by one: the bits of every other way to
// add up the same vectors in the same order.
template <typename T, int N>
__global__ void __launch_bounds__(kBlock) mean_kernel(const __grid_constant__ Mean a) {
  const double total = a.call.out.present ? a.total() : 1.0;
  const std::int64_t units = a.x.size / N, step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  const std::int64_t stride = N > 1 ? 1 : a.x.stride;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; unit < units; unit += step) {
    const std::int64_t at = unit * N;
    double sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = a.call.start.present ? a.call.start.data[at + i] : 0.0;
#pragma unroll 4
    for (int m = 0; m < a.x.count; ++m) {
      const double weight = a.weight[m];
      const auto x = load_pack<T, N>(a.x[m], at * stride);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const double next = __dadd_rn(sum[i], __dmul_rn(weight, widen<double>(x.lane[i])));
        sum[i] = weight == 0 ? sum[i] : next;
      }
    }
    if (!a.call.out.present) {
#pragma unroll
      for (int i = 0; i < N; ++i) a.call.sums[at + i] = sum[i];
    } else if (N > 1 && a.call.out_dtype == a.x.dtype) {
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.lane[i] = narrow<T>(sum[i] / total);
      store_pack<T, N>(a.call.out.data, at, out);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) store_value<double>(a.call.out.data, a.call.out_dtype, at + i, sum[i] / total);
    }
  }
}

template <typename T, int N>
void launch_mean(const Mean& a, const Queue& queue) {
  launch("weighted_mean", mean_kernel<T, N>, grid(a.x.size / N, kBlock, queue), kBlock, queue, a);
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
      const bool packed = a.x.packed && x.size % kLanes<T> == 0 && aligned16(a.call.out.data);
      packed ? launch_mean<T, kLanes<T>>(a, queue) : launch_mean<T, 1>(a, queue);
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
