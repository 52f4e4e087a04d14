// aggregate on CUDA: clipping and noise. The numbers are those of fedkern/ops/_aggregate/philox.py, where they are specified: a
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
template <typename T, bool Noise>
__global__ void __launch_bounds__(kBlock) noise_kernel(const __grid_constant__ Table<> x, std::int64_t begin, const double* factors, double deviation,
                                                       std::uint64_t seed, std::uint64_t offset, void* out, std::int64_t threads_each) {
  const int m = static_cast<int>(blockIdx.x % static_cast<unsigned>(x.count));
  const std::int64_t row = begin + m, step = static_cast<std::int64_t>(gridDim.x / static_cast<unsigned>(x.count)) * kBlock;
  const T* const from = static_cast<const T*>(x[m]);
  T* const to = static_cast<T*>(out) + row * x.size;
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
    float noise[4] = {};
    if constexpr (Noise) {
      const std::uint64_t group = (first >> 6) + static_cast<std::uint64_t>(thread >> 4);
      const std::uint64_t counter = (group << 4 | static_cast<std::uint64_t>(thread & 15)) & ((std::uint64_t{1} << 62) - 1);
      const Words words = philox(counter, 0, seed);
      float one = uniform(words.w[0]), two = uniform(words.w[2]);
      if (words.w[0] < kRefined || words.w[2] < kRefined) {
        const Words more = philox(counter, 1, seed);
        if (words.w[0] < kRefined) one = uniform(words.w[0], more.w[0]);
        if (words.w[2] < kRefined) two = uniform(words.w[2], more.w[2]);
      }
      box_muller(one, words.w[1], noise[0], noise[1]);
      box_muller(two, words.w[3], noise[2], noise[3]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const std::int64_t at = start + k * 16;
      if (at < 0 || at >= x.size) continue;
      double result = widen<double>(value[k]) * factor;
      if constexpr (Noise) result += deviation * static_cast<double>(noise[k]);
      to[at] = narrow<T>(result);
    }
  }
}

}  // namespace

void scale_and_noise(const Uploads& x, const double* factors, double deviation, std::uint64_t seed, std::uint64_t offset, void* out,
                     const Place& place) {
  if (!x.size) return;
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  // One group more than the size says: a vector may begin and end within one.
  const std::int64_t threads_each = ((x.size + 63) / 64 + 1) * 16;
  for (std::int64_t begin = 0; begin < x.count; begin += kTable) {
    const std::int64_t count = std::min<std::int64_t>(x.count - begin, kTable);
    const std::int64_t blocks = std::max<std::int64_t>(1, grid(threads_each * count, kBlock, queue, 64) / count) * count;
    const auto part = table(x, begin, count);
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      launch(deviation != 0 ? "clip_and_noise" : "clip", deviation != 0 ? noise_kernel<T, true> : noise_kernel<T, false>, blocks, kBlock, queue, part,
             begin, factors, deviation, seed, offset, out, threads_each);
    });
  }
}

}  // namespace fedkern::cuda
