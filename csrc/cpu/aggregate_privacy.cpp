#include "fedkern/aggregate_privacy.h"

#include <limits>

#include "aggregate_store.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "philox.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// out = factor * x (+ deviation * noise) for elements [j, n).
template <bool noisy, typename T, typename C>
FEDKERN_INLINE void scale_each(const T* x, C factor, C deviation, const float* noise, std::int64_t j, std::int64_t n, T* out) {
  for (; j < n; ++j) {
    C value = factor * static_cast<C>(widen(x[j]));
    if constexpr (noisy) value = value + deviation * static_cast<C>(noise[j]);
    narrow(value, out[j]);
  }
}

template <bool noisy, typename T, typename C>
FEDKERN_INLINE void scale(const T* x, C factor, C deviation, const float* noise, std::int64_t n, T* out) {
  using V = Vec<C>;
  const V f = V::set(factor), d = V::set(deviation);
  std::int64_t j = 0;
  for (; j + V::lanes <= n; j += V::lanes) {
    V value = f * V::load(x + j);
    if constexpr (noisy) value = value + d * V::load(noise + j);
    value.store(out + j);
  }
  scale_each<noisy>(x, factor, deviation, noise, j, n, out);
}

template <typename T>
void scale_and_noise(const ScaleAndNoise& a) {
  using C = computed_t<T>;
  const PhiloxKey key(a.seed);
  const C deviation = static_cast<C>(a.deviation);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    alignas(64) float noise[kNoiseGroup];
    while (begin < end) {
      const std::int64_t m = begin / a.size, j = begin % a.size, n = std::min(end - begin, a.size - j);
      const T* x = static_cast<const T*>(a.vectors[m]) + j;
      T* out = static_cast<T*>(a.out) + begin;
      const C factor = static_cast<C>(a.factors[m]);
      // A float below its normal range has too few digits: rounded up, it would lift the norm above the bound.
      const bool tiny = sizeof(C) == sizeof(float) && a.factors[m] < std::numeric_limits<float>::min();
      if (a.deviation == 0) {
        if (tiny)
          scale_each<false>(x, a.factors[m], a.deviation, nullptr, 0, n, out);
        else
          scale<false>(x, factor, deviation, nullptr, n, out);
      } else {
        for (std::int64_t i = 0; i < n;) {
          const std::uint64_t place = a.offset + static_cast<std::uint64_t>(begin + i), within = place % kNoiseGroup;
          normal_group(place / kNoiseGroup, key, noise);
          const std::int64_t part = std::min<std::int64_t>(kNoiseGroup - static_cast<std::int64_t>(within), n - i);
          if (tiny)
            scale_each<true>(x + i, a.factors[m], a.deviation, noise + within, 0, part, out + i);
          else if (part == kNoiseGroup)
            scale<true>(x + i, factor, deviation, noise, kNoiseGroup, out + i);
          else
            scale<true>(x + i, factor, deviation, noise + within, part, out + i);
          i += part;
        }
      }
      begin += n;
    }
  };
  const double each = 2 * sizeof(T) * 0.6e-10 + (a.deviation == 0 ? 0 : 1e-9);
  const std::int64_t all = a.count * a.size;
  parallel_for(all, kChunk / 4, a.threads, each * static_cast<double>(all), chunks);
}

void scale_and_noise_any(const ScaleAndNoise& a) {
  with_type(a.dtype, [&](auto in) { scale_and_noise<decltype(in)>(a); });
}

}  // namespace

const AggregatePrivacyTable aggregate_privacy_table = {scale_and_noise_any};

}  // namespace fedkern::FEDKERN_ISA
