// aggregate on CUDA: medians and trimmed means. A thread sorts the M values of one coordinate (of two in 16 bits) in registers, as
// integers in the order of the numbers.
#include <type_traits>

#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kThreads = 128;
// Counts with kernels of their own. For all others the next power of two is filled up.
template <int N>
inline constexpr bool kExact = N % 5 == 0;

struct Sorted {
  DType dtype;
  int count;
  bool words;  // two neighbours in 16 bits can be read and written as one word
  int low, high;
  double share;  // one by how many values a mean is taken of, where that is exact; else 0
  std::int64_t size, stride;
  void* out;
  const void* vector[kMostSorted];
};

// Integers that are ordered as the numbers are, -inf being 0, and NaN last: those of negative sign, which would be first, wrap around.
template <typename Key>
inline constexpr Key kTop = Key{1} << (8 * sizeof(Key) - 1);
template <typename Key>
inline constexpr Key kNegativeNaNs = (Key{1} << (sizeof(Key) == 8 ? 52 : 23)) - 1;
// All bits as the first one.
template <typename Key>
__device__ __forceinline__ Key spread(Key bits) {
  return static_cast<Key>(static_cast<std::make_signed_t<Key>>(bits) >> (8 * sizeof(Key) - 1));
}
template <typename Key>
__device__ __forceinline__ Key key_of_bits(Key bits) {
  return (bits ^ (spread(bits) | kTop<Key>)) - kNegativeNaNs<Key>;
}
template <typename Key>
__device__ __forceinline__ Key bits_of_key(Key key) {
  key += kNegativeNaNs<Key>;
  return key ^ (~spread(key) | kTop<Key>);
}
__device__ __forceinline__ unsigned key_of(float x) { return key_of_bits(__float_as_uint(x)); }
__device__ __forceinline__ std::uint64_t key_of(double x) { return key_of_bits(static_cast<std::uint64_t>(__double_as_longlong(x))); }
__device__ __forceinline__ float value_of(unsigned key) { return __uint_as_float(bits_of_key(key)); }
__device__ __forceinline__ double value_of(std::uint64_t key) { return __longlong_as_double(static_cast<long long>(bits_of_key(key))); }

// One coordinate of fp32 or fp64. All values are on their way before the first is used.
template <typename T>
struct One {
  using Key = decltype(key_of(T()));
  static constexpr int wide = 1;

  template <int N>
  __device__ __forceinline__ static void load(const Sorted& a, int count, std::int64_t at, Key (&key)[N]) {
    T value[N];
#pragma unroll
    for (int m = 0; m < N; ++m) value[m] = m < count ? static_cast<const T*>(a.vector[m])[at * a.stride] : T(0);
#pragma unroll
    for (int m = 0; m < N; ++m) key[m] = key_of(value[m]);
  }
  template <typename Body>
  __device__ __forceinline__ static void with_type(const Sorted&, Body&& body) { body(T{}); }
  template <typename>
  __device__ __forceinline__ static void values(Key key, double (&x)[1]) { x[0] = static_cast<double>(value_of(key)); }
  template <typename>
  __device__ __forceinline__ static void store(const Sorted& a, std::int64_t at, const double (&x)[1]) { static_cast<T*>(a.out)[at] = static_cast<T>(x[0]); }
  __device__ __forceinline__ static Key least(Key one, Key other) { return one < other ? one : other; }
  __device__ __forceinline__ static Key most(Key one, Key other) { return one < other ? other : one; }
};

// kNegativeNaNs of both halves of a word.
template <typename T>
inline constexpr unsigned kHalves = std::is_same_v<T, __half> ? 0x03ff03ffu : 0x007f007fu;

// Two neighbouring coordinates in 16 bits as the halves of a word, which an instruction compares both of.
struct Two {
  using Key = unsigned;
  static constexpr int wide = 2;

  template <typename Body>
  __device__ __forceinline__ static void with_type(const Sorted& a, Body&& body) { a.dtype == DType::f16 ? body(__half{}) : body(__nv_bfloat16{}); }
  template <int N>
  __device__ __forceinline__ static void load(const Sorted& a, int count, std::int64_t at, Key (&key)[N]) {
    const bool second = at + 1 < a.size;
    if (a.words && second) {
#pragma unroll
      for (int m = 0; m < N; ++m) key[m] = m < count ? *reinterpret_cast<const unsigned*>(static_cast<const std::uint16_t*>(a.vector[m]) + at) : 0;
    } else {
      const std::int64_t low = at * a.stride, high = second ? low + a.stride : low;
      std::uint16_t half[2][N];
#pragma unroll
      for (int m = 0; m < N; ++m)
        for (int i = 0; i < 2; ++i) half[i][m] = m < count ? static_cast<const std::uint16_t*>(a.vector[m])[i ? high : low] : 0;
#pragma unroll
      for (int m = 0; m < N; ++m) key[m] = static_cast<unsigned>(half[1][m]) << 16 | half[0][m];
    }
    // As key_of_bits; a half's upper bit keeps the subtraction from borrowing of the other.
    const unsigned below = a.dtype == DType::f16 ? kHalves<__half> : kHalves<__nv_bfloat16>;
#pragma unroll
    for (int m = 0; m < N; ++m) {
      const unsigned sign = key[m] & 0x80008000u;
      key[m] = (((key[m] ^ (sign - (sign >> 15))) | 0x80008000u) - below) ^ sign;
    }
  }
  template <typename T>
  __device__ __forceinline__ static void values(Key key, double (&x)[2]) {
    const unsigned moved = ((key & 0x7fff7fffu) + kHalves<T>) ^ (key & 0x80008000u), sign = ~moved & 0x80008000u;
    const unsigned bits = moved ^ ((sign - (sign >> 15)) | 0x80008000u);
    if constexpr (std::is_same_v<T, __half>) {
      x[0] = widen<double>(__ushort_as_half(static_cast<std::uint16_t>(bits))), x[1] = widen<double>(__ushort_as_half(static_cast<std::uint16_t>(bits >> 16)));
    } else {
      x[0] = static_cast<double>(__uint_as_float(bits << 16)), x[1] = static_cast<double>(__uint_as_float(bits & 0xffff0000u));
    }
  }
  template <typename T>
  __device__ __forceinline__ static void store(const Sorted& a, std::int64_t at, const double (&x)[2]) {
    const Pack<T, 2> both{{narrow<T>(x[0]), narrow<T>(x[1])}};
    if (a.words && at + 1 < a.size) return store_pack<T, 2>(a.out, at, both);
    static_cast<T*>(a.out)[at] = both.lane[0];
    if (at + 1 < a.size) static_cast<T*>(a.out)[at + 1] = both.lane[1];
  }
  __device__ __forceinline__ static Key least(Key one, Key other) { return __vminu2(one, other); }
  __device__ __forceinline__ static Key most(Key one, Key other) { return __vmaxu2(one, other); }
};

// Batcher's odd-even merge sort. Every index is known at compile time (loops of this shape are not unrolled whatever the pragma
// says), so that the keys stay in registers.
template <typename Column, int P, int K, int I, typename Key, int N>
__device__ __forceinline__ void exchange(Key (&key)[N]) {
  if constexpr (I >= K % P && (I - K % P) / K % 2 == 0 && I / (2 * P) == (I + K) / (2 * P)) {
    const Key one = key[I], other = key[I + K];
    key[I] = Column::least(one, other);
    key[I + K] = Column::most(one, other);
  }
}
template <typename Column, int P, int K, typename Key, int N, int... I>
__device__ __forceinline__ void exchange_all(Key (&key)[N], std::integer_sequence<int, I...>) {
  (exchange<Column, P, K, I>(key), ...);
}
template <typename Column, int P, int K, typename Key, int N>
__device__ __forceinline__ void merge(Key (&key)[N]) {
  exchange_all<Column, P, K>(key, std::make_integer_sequence<int, N - K>());
  if constexpr (K > 1) merge<Column, P, K / 2>(key);
}
template <typename Column, int P = 1, typename Key, int N>
__device__ __forceinline__ void sort(Key (&key)[N]) {
  merge<Column, P, P>(key);
  if constexpr (2 * P < N) sort<Column, 2 * P>(key);
}

// Without weights. A median's places are known at compile time, and comparisons that lead to others alone are left out: what fills up
// lies on both sides of it.
template <typename Column, int N, bool Median>
__global__ void __launch_bounds__(kThreads, sizeof(typename Column::Key) * N <= 40 ? 8 : 3) sorted_mean_kernel(const __grid_constant__ Sorted a) {
  using Key = typename Column::Key;
  constexpr int W = Column::wide;
  const int count = kExact<N> ? N : a.count, before = Median ? (N - count) / 2 : 0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads * W;
  for (std::int64_t at = (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W; at < a.size; at += step) {
    Key key[N];
    Column::load(a, count, at, key);
#pragma unroll
    for (int m = 0; m < N; ++m)
      if (m >= count) key[m] = m - count < before ? Key{0} : ~Key{0};
    sort<Column>(key);
    Column::with_type(a, [&](auto type) {
      using T = decltype(type);
      double result[W] = {}, x[W];  // 0 and -0 is 0
      const auto add = [&](Key one) {
        Column::template values<T>(one, x);
#pragma unroll
        for (int i = 0; i < W; ++i) result[i] += x[i];
      };
      if constexpr (Median) {
        add(key[(N - 1) / 2]);
        if (count % 2 == 0) {
          add(key[N / 2]);
#pragma unroll
          for (int i = 0; i < W; ++i) result[i] /= 2;
        }
      } else {
#pragma unroll
        for (int m = 0; m < N; ++m)
          if (m >= a.low && m < a.high) add(key[m]);
#pragma unroll
        for (int i = 0; i < W; ++i) result[i] = a.share != 0 ? result[i] * a.share : result[i] / (a.high - a.low);
      }
      Column::template store<T>(a, at, result);
    });
  }
}

// Shares of the weights' sum closer to one half than this count as one half, however their sum was rounded.
constexpr double kHalf = 0x1p-40;

struct Weighing {
  Weights<kMostSorted> weight;
  Total total;
  bool median;
};

template <typename T, int N>
__device__ __forceinline__ void load_column(const Sorted& a, std::int64_t at, float (&value)[N]) {
  T raw[N];
#pragma unroll
  for (int m = 0; m < N; ++m) raw[m] = static_cast<const T*>(a.vector[std::min(m, a.count - 1)])[at * a.stride];
#pragma unroll
  for (int m = 0; m < N; ++m) value[m] = widen<float>(raw[m]);
}

// With weights: the vector's number is the lower half of the key, which also keeps equal values in the vectors' order.
template <int N>
__global__ void __launch_bounds__(kThreads, 3) weighted_kernel(const __grid_constant__ Sorted a, const __grid_constant__ Weighing w) {
  __shared__ double weight[N];
  if (threadIdx.x < N) weight[threadIdx.x] = static_cast<int>(threadIdx.x) < a.count ? w.weight[static_cast<int>(threadIdx.x)] : 0.0;
  __syncthreads();
  const double half = w.median ? w.total() / 2 : 0.0;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < a.size; at += step) {
    float loaded[N];
    std::uint64_t key[N];
    switch (a.dtype) {
      case DType::bf16: load_column<__nv_bfloat16>(a, at, loaded); break;
      case DType::f16: load_column<__half>(a, at, loaded); break;
      default: load_column<float>(a, at, loaded);
    }
#pragma unroll
    for (int m = 0; m < N; ++m) {
      const float value = loaded[m] != loaded[m] ? NAN : loaded[m] + 0.0f;  // one NaN and one zero: all of them are equal
      key[m] = static_cast<std::uint64_t>(m < a.count ? key_of(value) : ~0u) << 32 | static_cast<unsigned>(m);
    }
    sort<One<double>>(key);
    double result;
    if (w.median) {
      // The values up to which lies half of the weight, and more than half of it.
      double below = 0, lower = 0, upper = 0;
      bool lower_found = false, upper_found = false;
#pragma unroll
      for (int m = 0; m < N; ++m) {
        if (m >= a.count) break;
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
    store_value<double>(a.out, a.dtype, at, result);
  }
}

template <typename Column, int N>
void launch_sorted(const Sorted& a, const Queue& queue) {
  constexpr bool kMedian = N <= 32 && sizeof(typename Column::Key) == 4;  // others are rare, and slow to compile
  const bool median = kMedian && a.low == (a.count - 1) / 2 && a.high == a.count / 2 + 1;
  launch("sorted_mean", median ? sorted_mean_kernel<Column, N, kMedian> : sorted_mean_kernel<Column, N, false>,
         grid(a.size, kThreads * Column::wide, queue), kThreads, queue, a);
}

template <typename Column>
void launch_sorted(const Sorted& a, const Queue& queue) {
  if constexpr (sizeof(typename Column::Key) == 4) switch (a.count) {
      case 5: return launch_sorted<Column, 5>(a, queue);
      case 10: return launch_sorted<Column, 10>(a, queue);
      case 20: return launch_sorted<Column, 20>(a, queue);
    }
  if (a.count <= 8) return launch_sorted<Column, 8>(a, queue);
  if (a.count <= 16) return launch_sorted<Column, 16>(a, queue);
  if (a.count <= 32) return launch_sorted<Column, 32>(a, queue);
  launch_sorted<Column, kMostSorted>(a, queue);
}

template <int N>
void launch_weighted(const Sorted& a, const Weighing& w, const Queue& queue) {
  launch("weighted_sorted_mean", weighted_kernel<N>, grid(a.size, kThreads, queue), kThreads, queue, a, w);
}

}  // namespace

void sorted_mean(const Uploads& x, const UploadWeights* weights, int low, int high, bool median, void* out, const Place& place) {
  if (!x.size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const auto from = table<kMostSorted>(x, 0, x.count);
  const bool words = from.aligned >= 4 && alignment(out) >= 4;
  const int kept = high - low;
  Sorted a{x.dtype, from.count, words, low, high, (kept & (kept - 1)) == 0 ? 1.0 / kept : 0.0, x.size, x.stride, out, {}};
  std::copy_n(from.each, kMostSorted, a.vector);
  if (!weights) {
    if (x.dtype == DType::f64) return launch_sorted<One<double>>(a, queue);
    if (x.dtype == DType::f32) return launch_sorted<One<float>>(a, queue);
    return launch_sorted<Two>(a, queue);
  }
  const Weighing w{weights_of<kMostSorted>(*weights, 0, x.count), total_of(x, *weights), median};
  if (x.count <= 8) return launch_weighted<8>(a, w, queue);
  if (x.count <= 10) return launch_weighted<10>(a, w, queue);
  if (x.count <= 16) return launch_weighted<16>(a, w, queue);
  if (x.count <= 32) return launch_weighted<32>(a, w, queue);
  launch_weighted<kMostSorted>(a, w, queue);
}

}  // namespace fedkern::cuda
