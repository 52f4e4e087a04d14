// aggregate on CUDA: clipping and noise. The numbers are those of fedkern/ops/_aggregate/reference.py, where they are specified: a
// thread takes one counter of Philox4x32-10, whose four numbers lie sixteen places apart.
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Words {
  unsigned w[4];
};

// The counter's upper 64 bits are `upper`.
__device__ __forceinline__ Words philox(std::uint64_t counter, unsigned upper, std::uint64_t seed) {
  Words c{{static_cast<unsigned>(counter), static_cast<unsigned>(counter >> 32), upper, 0}};
  unsigned k0 = static_cast<unsigned>(seed), k1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const unsigned high0 = __umulhi(0xD2511F53u, c.w[0]), low0 = 0xD2511F53u * c.w[0];
    const unsigned high1 = __umulhi(0xCD9E8D57u, c.w[2]), low1 = 0xCD9E8D57u * c.w[2];
    c = {{high1 ^ c.w[1] ^ k0, low1, high0 ^ c.w[3] ^ k1, low0}};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// Radius words below this, the lowest 2^-20, are refined.
constexpr unsigned kRefined = 1u << 12;

__device__ __forceinline__ float uniform(unsigned word) { return (static_cast<float>(word) + 0.5f) * 0x1p-32f; }

// A refined word: 44 bits, rounded once.
__device__ __forceinline__ float uniform(unsigned word, unsigned more) {
  return (static_cast<float>(static_cast<std::int64_t>(word) << 32 | more) + 0.5f) * 0x1p-64f;
}

// Two normal numbers from a uniform one and a word.
__device__ __forceinline__ void box_muller(float uniform, unsigned two, float& x, float& y) {
  const float radius = sqrtf(-2.0f * logf(uniform));
  const float turn = static_cast<float>(static_cast<int>(two)) * 0x1p-31f;
  x = radius * cospif(turn);
  y = radius * sinpif(turn);
}

// Blocks take the vectors in turn; a group is 64 places of the stream, 16 threads.
template <typename T>
__global__ void __launch_bounds__(kBlock) noise_kernel(const __grid_constant__ Table<> x, const __grid_constant__ Table<> out, std::int64_t begin,
                                                       const double* factors, double deviation, std::uint64_t seed, std::uint64_t offset,
                                                       std::int64_t threads_each) {
  const int m = static_cast<int>(blockIdx.x % static_cast<unsigned>(x.count));
  const std::int64_t row = begin + m, step = static_cast<std::int64_t>(gridDim.x / static_cast<unsigned>(x.count)) * kBlock;
  const T* const from = static_cast<const T*>(x[m]);
  T* const to = static_cast<T*>(const_cast<void*>(out[m]));
  const double factor = factors[row];
  // The place of the vector's first element, and how far into a group that is.
  const std::uint64_t first = offset + static_cast<std::uint64_t>(row) * static_cast<std::uint64_t>(x.size);
  const std::int64_t skipped = static_cast<std::int64_t>(first & 63);
  for (std::int64_t thread = static_cast<std::int64_t>(blockIdx.x / static_cast<unsigned>(x.count)) * kBlock + threadIdx.x; thread < threads_each;
       thread += step) {
    const std::int64_t start = (thread >> 4) * 64 + (thread & 15) - skipped;
    T value[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = start + k * 16;
      value[k] = at < 0 || at >= x.size ? T(0.0f) : from[at * x.stride];
    }
    const std::uint64_t group = (first >> 6) + static_cast<std::uint64_t>(thread >> 4);
    const std::uint64_t counter = (group << 4 | static_cast<std::uint64_t>(thread & 15)) & ((std::uint64_t{1} << 62) - 1);
    const Words words = philox(counter, 0, seed);
    float one = uniform(words.w[0]), two = uniform(words.w[2]), noise[4];
    if (words.w[0] < kRefined || words.w[2] < kRefined) {
      const Words more = philox(counter, 1, seed);
      if (words.w[0] < kRefined) one = uniform(words.w[0], more.w[0]);
      if (words.w[2] < kRefined) two = uniform(words.w[2], more.w[2]);
    }
    box_muller(one, words.w[1], noise[0], noise[1]);
    box_muller(two, words.w[3], noise[2], noise[3]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = start + k * 16;
      if (at < 0 || at >= x.size) continue;
      double result = widen<double>(value[k]) * factor;
      result += deviation * static_cast<double>(noise[k]);
      to[at] = narrow<T>(result);
    }
  }
}

// Packs of N elements on their way at once.
template <int N>
inline constexpr int kInFlight = N > 1 ? 2 : 8;

// factors[m] x_m, and nothing else; a vector has `blocks`.
template <typename T, int N>
__global__ void __launch_bounds__(kBlock) clip_kernel(const __grid_constant__ Table<> x, const __grid_constant__ Table<> out, const double* factors,
                                                      unsigned blocks) {
  constexpr int K = kInFlight<N>;
  const int m = static_cast<int>(blockIdx.x / blocks);
  const void* const from = x[m];
  void* const to = const_cast<void*>(out[m]);
  const double factor = factors[m];
  const auto scaled = [&](T value) { return narrow<T>(widen<double>(value) * factor); };
  const auto scale = [&](std::int64_t first, auto many) {
    Pack<T, N> pack[many];
#pragma unroll
    for (int k = 0; k < many; ++k) pack[k] = load_pack<T, N>(from, (first + k * kBlock) * (N > 1 ? N : x.stride));
#pragma unroll
    for (int k = 0; k < many; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) pack[k].lane[i] = scaled(pack[k].lane[i]);
      store_pack<T, N>(to, (first + k * kBlock) * N, pack[k]);
    }
  };
  const std::int64_t packs = x.size / N, block = blockIdx.x % blocks, step = static_cast<std::int64_t>(blocks) * kBlock * K;
  for (std::int64_t first = block * kBlock * K + threadIdx.x; first < packs; first += step)
    if (first + (K - 1) * kBlock < packs)
      scale(first, std::integral_constant<int, K>());
    else
      for (std::int64_t last = first; last < packs; last += kBlock) scale(last, std::integral_constant<int, 1>());
  const std::int64_t rest = packs * N + threadIdx.x;
  if (N > 1 && block == 0 && rest < x.size) static_cast<T*>(to)[rest] = scaled(static_cast<const T*>(from)[rest]);
}

template <typename T, int N>
void launch_clip(const Table<>& x, const Table<>& out, const double* factors, const Queue& queue) {
  const std::int64_t blocks = std::max<std::int64_t>(1, grid(x.size / N * x.count, kBlock * kInFlight<N>, queue, 64) / x.count);
  launch("clip", clip_kernel<T, N>, blocks * x.count, kBlock, queue, x, out, factors, static_cast<unsigned>(blocks));
}

}  // namespace

void scale_and_noise(const Uploads& x, const double* factors, double deviation, std::uint64_t seed, std::uint64_t offset, const Uploads& out,
                     const Place& place) {
  if (!x.size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  // One group more than the size says: a vector may begin and end within one.
  const std::int64_t threads_each = ((x.size + 63) / 64 + 1) * 16;
  for (std::int64_t begin = 0; begin < x.count; begin += kTable) {
    const std::int64_t count = std::min<std::int64_t>(x.count - begin, kTable);
    const auto from = table(x, begin, count), to = table(out, begin, count);
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      if (deviation == 0)
        return from.aligned == 16 && to.aligned == 16 ? launch_clip<T, kLanes<T>>(from, to, factors + begin, queue)
                                                      : launch_clip<T, 1>(from, to, factors + begin, queue);
      const std::int64_t blocks = std::max<std::int64_t>(1, grid(threads_each * count, kBlock, queue, 64) / count) * count;
      launch("clip_and_noise", noise_kernel<T>, blocks, kBlock, queue, from, to, begin, factors, deviation, seed, offset, threads_each);
    });
  }
}

}  // namespace fedkern::cuda
