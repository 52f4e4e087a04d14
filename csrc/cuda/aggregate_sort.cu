// aggregate on CUDA: medians and trimmed means. A thread sorts the M values of one coordinate in registers, as integers in the
// order of the numbers.
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kThreads = 128;

// Integers that are ordered as the numbers are; NaN comes last, and -0 is 0.
__device__ __forceinline__ unsigned key_of(float x) {
  const unsigned bits = __float_as_uint(x + 0.0f);
  return x != x ? ~0u : bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float value_of(unsigned key) { return key == ~0u ? NAN : __uint_as_float(key ^ (key >> 31 ? 0x80000000u : ~0u)); }

__device__ __forceinline__ std::uint64_t key_of(double x) {
  const std::uint64_t bits = static_cast<std::uint64_t>(__double_as_longlong(x + 0.0)), sign = std::uint64_t{1} << 63;
  return x != x ? ~std::uint64_t{0} : bits ^ (bits >> 63 ? ~std::uint64_t{0} : sign);
}
__device__ __forceinline__ double value_of(std::uint64_t key) {
  const std::uint64_t sign = std::uint64_t{1} << 63;
  return key == ~std::uint64_t{0} ? static_cast<double>(NAN)
                                  : __longlong_as_double(static_cast<long long>(key ^ (key >> 63 ? sign : ~std::uint64_t{0})));
}

// Batcher's odd-even merge sort. Every index is known at compile time (loops of this shape are not unrolled whatever the pragma
// says), so that the keys stay in registers.
template <int P, int K, int I, typename Key, int N>
__device__ __forceinline__ void exchange(Key (&key)[N]) {
  if constexpr (I >= K % P && (I - K % P) / K % 2 == 0 && I / (2 * P) == (I + K) / (2 * P)) {
    const Key one = key[I], other = key[I + K];
    key[I] = one < other ? one : other;
    key[I + K] = one < other ? other : one;
  }
}
template <int P, int K, typename Key, int N, int... I>
__device__ __forceinline__ void exchange_all(Key (&key)[N], std::integer_sequence<int, I...>) {
  (exchange<P, K, I>(key), ...);
}
template <int P, int K, typename Key, int N>
__device__ __forceinline__ void merge(Key (&key)[N]) {
  exchange_all<P, K>(key, std::make_integer_sequence<int, N - K>());
  if constexpr (K > 1) merge<P, K / 2>(key);
}
template <int P = 1, typename Key, int N>
__device__ __forceinline__ void sort(Key (&key)[N]) {
  merge<P, P>(key);
  if constexpr (2 * P < N) sort<2 * P>(key);
}

struct Sorted {
  Table<kMostSorted> x;
  Weights<kMostSorted> weight;
  Total total;
  int low, high;
  bool median;
  void* out;
};

// The values of one coordinate, all on their way at once; beyond the last vector its own again.
template <typename T, typename C, int N>
__device__ __forceinline__ void load_column(const Table<kMostSorted>& x, std::int64_t at, C (&value)[N]) {
  T raw[N];
#pragma unroll
  for (int m = 0; m < N; ++m) raw[m] = static_cast<const T*>(x[std::min(m, x.count - 1)])[at * x.stride];
#pragma unroll
  for (int m = 0; m < N; ++m) value[m] = widen<C>(raw[m]);
}
template <int N>
__device__ __forceinline__ void load_column(const Table<kMostSorted>& x, std::int64_t at, float (&value)[N]) {
  switch (x.dtype) {
    case DType::bf16: return load_column<__nv_bfloat16>(x, at, value);
    case DType::f16: return load_column<__half>(x, at, value);
    default: return load_column<float>(x, at, value);
  }
}
template <int N>
__device__ __forceinline__ void load_column(const Table<kMostSorted>& x, std::int64_t at, double (&value)[N]) {
  load_column<double>(x, at, value);
}

// Shares of the weights' sum closer to one half than this count as one half, however their sum was rounded.
constexpr double kHalf = 0x1p-40;

// Without weights.
template <typename C, typename Key, int N>
__global__ void __launch_bounds__(kThreads, sizeof(Key) * N <= 40 ? 8 : 3) sorted_mean_kernel(const __grid_constant__ Sorted a) {
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.x.size; at += step) {
    C value[N];
    Key key[N];
    load_column(a.x, at, value);
#pragma unroll
    for (int m = 0; m < N; ++m) key[m] = m < a.x.count ? key_of(value[m]) : ~Key{0};
    sort(key);
    double sum = 0;
#pragma unroll
    for (int m = 0; m < N; ++m)
      if (m >= a.low && m < a.high) sum += static_cast<double>(value_of(key[m]));
    store_value<double>(a.out, a.x.dtype, at, sum / (a.high - a.low));
  }
}

// With weights: the vector's number is the lower half of the key, which also keeps equal values in the vectors' order.
template <int N>
__global__ void __launch_bounds__(kThreads, 3) weighted_kernel(const __grid_constant__ Sorted a) {
  __shared__ double weight[N];
  if (threadIdx.x < N) weight[threadIdx.x] = static_cast<int>(threadIdx.x) < a.x.count ? a.weight[static_cast<int>(threadIdx.x)] : 0.0;
  __syncthreads();
  const double half = a.median ? a.total() / 2 : 0.0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.x.size; at += step) {
    float loaded[N];
    std::uint64_t key[N];
    load_column(a.x, at, loaded);
#pragma unroll
    for (int m = 0; m < N; ++m)
      key[m] = static_cast<std::uint64_t>(m < a.x.count ? key_of(loaded[m]) : 0xffffffffu) << 32 | static_cast<unsigned>(m);
    sort(key);
    double result;
    if (a.median) {
      // The values up to which lies half of the weight, and more than half of it.
      double below = 0, lower = 0, upper = 0;
      bool lower_found = false, upper_found = false;
#pragma unroll
      for (int m = 0; m < N; ++m) {
        if (m >= a.x.count) break;
        const double value = static_cast<double>(value_of(static_cast<unsigned>(key[m] >> 32)));
        below += weight[static_cast<unsigned>(key[m])];
        if (!lower_found) lower = value, lower_found = below >= half * (1 - kHalf);
        if (!upper_found) upper = value, upper_found = below > half * (1 + kHalf);
      }
      result = half > 0 ? (lower + upper) / 2 : static_cast<double>(NAN);
    } else {
      double sum = 0, shares = 0;
#pragma unroll
      for (int m = 0; m < N; ++m) {
        if (m < a.low || m >= a.high) continue;
        const double share = weight[static_cast<unsigned>(key[m])], value = static_cast<double>(value_of(static_cast<unsigned>(key[m] >> 32)));
        sum += share == 0 ? 0.0 : share * value;
        shares += share;
      }
      result = sum / shares;
    }
    store_value<double>(a.out, a.x.dtype, at, result);
  }
}

template <int N>
void launch_sorted(const Sorted& a, bool weighted, const Queue& queue) {
  const std::int64_t blocks = grid(a.x.size, kThreads, queue);
  if (weighted)
    launch("weighted_sorted_mean", weighted_kernel<N>, blocks, kThreads, queue, a);
  else if (a.x.dtype == DType::f64)
    launch("sorted_mean", sorted_mean_kernel<double, std::uint64_t, N>, blocks, kThreads, queue, a);
  else
    launch("sorted_mean", sorted_mean_kernel<float, unsigned, N>, blocks, kThreads, queue, a);
}

}  // namespace

void sorted_mean(const Uploads& x, const UploadWeights* weights, int low, int high, bool median, void* out, const Place& place) {
  if (!x.size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  Sorted a{table<kMostSorted>(x, 0, x.count), {}, {}, low, high, median, out};
  if (weights) a.weight = weights_of<kMostSorted>(*weights, 0, x.count), a.total = total_of(x, *weights);
  if (x.count <= 8) return launch_sorted<8>(a, weights, queue);
  if (x.count <= 10) return launch_sorted<10>(a, weights, queue);
  if (x.count <= 16) return launch_sorted<16>(a, weights, queue);
  if (x.count <= 32) return launch_sorted<32>(a, weights, queue);
  launch_sorted<kMostSorted>(a, weights, queue);
}

}  // namespace fedkern::cuda
