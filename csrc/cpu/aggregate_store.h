// Sums divided and written out in the result's type.
#pragma once

#include "fedkern/aggregate.h"
#include "fedkern/tiles.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements of one unit of parallel work.
inline constexpr std::int64_t kChunk = 65536;

// Seconds that moving `bytes` takes on one thread, roughly.
inline double seconds(double bytes) { return bytes * 0.6e-10; }

// One tile past the caches: results larger than the last level would only push out what is still to be read.
template <typename T>
FEDKERN_INLINE void store_past_cache(const T* tile, T* out) {
#if defined(FEDKERN_ISA_avx512)
  for (std::int64_t i = 0; i < kTile; i += 64 / sizeof(T)) _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_load_si512(tile + i));
#elif defined(__SSE2__)
  for (std::int64_t i = 0; i < kTile; i += 16 / sizeof(T))
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_load_si128(reinterpret_cast<const __m128i*>(tile + i)));
#else
  std::memcpy(out, tile, kTile * sizeof(T));
#endif
}

FEDKERN_INLINE void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// out[begin + i] = sum[i] / total for i < n; overwrites sum.
template <typename T>
inline void write_mean(double* sum, std::int64_t n, double total, T* out, bool stream) {
  stream = stream && reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
  const double inverse = 1.0 / total;
  for (std::int64_t begin = 0; begin < n; begin += kTile) {
    const std::int64_t m = std::min(kTile, n - begin);
    double* tile = sum + begin;
    // Shorter types hide the reciprocal's last bit; fp64 would show it.
    if (std::is_same_v<T, double> || !(inverse < 0x1p1000))
      for (std::int64_t i = 0; i < m; ++i) tile[i] /= total;
    else
      for (std::int64_t i = 0; i < m; ++i) tile[i] *= inverse;
    if (stream && m == kTile) {
      alignas(64) T narrowed[kTile];
      narrow_tile(tile, m, narrowed);
      store_past_cache(narrowed, out + begin);
    } else {
      narrow_tile(tile, m, out + begin);
    }
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
