// A step's elements as vectors of fp64, in whichever order takes the fewest instructions: what is summed in registers is put
// in order once for all clients.
#pragma once

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// In their own order. `held` vectors of sums are as many as registers hold beside what they need to be added to: of fp32,
// four cache lines on AVX-512 and two on AVX2.
template <typename T>
struct Lanes {
  using V = Vec<double>;
  static constexpr int held = sizeof(T) == 2 && V::lanes == 8 ? 16 : 8;

  // body(u, x) with x the elements [u * lanes, (u + 1) * lanes) of `from`.
  template <typename Body>
  static FEDKERN_INLINE void each(const T* from, Body&& body) {
    for (int u = 0; u < held; ++u) body(u, V::load(from + u * V::lanes));
  }
  static FEDKERN_INLINE void to_order(V*) {}
  static FEDKERN_INLINE void from_order(V*) {}
};

#if defined(FEDKERN_ISA_avx512) || defined(FEDKERN_ISA_avx2)
// bf16 is the upper half of fp32: of two neighbours in one word, a shift widens one and a mask the other. So vectors 2u and
// 2u + 1 have the even and the odd ones of their elements.
template <>
struct Lanes<bf16> {
  using V = Vec<double>;
  static constexpr int held = V::lanes == 8 ? 16 : 8;

#if defined(FEDKERN_ISA_avx512)
  template <typename Body>
  static FEDKERN_INLINE void each(const bf16* from, Body&& body) {
    for (int u = 0; u < held; u += 2) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + u * V::lanes));
      body(u, V{_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)))});
      body(u + 1, V{_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(~0xffff))))});
    }
  }
  static FEDKERN_INLINE void to_order(V* x) {
    const __m512i low = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), high = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    permute(x, low, high);
  }
  static FEDKERN_INLINE void from_order(V* x) {
    const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), odd = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    permute(x, even, odd);
  }

 private:
  static FEDKERN_INLINE void permute(V* x, __m512i first, __m512i second) {
    for (int u = 0; u < held; u += 2) {
      const __m512d a = x[u].v, b = x[u + 1].v;
      x[u].v = _mm512_permutex2var_pd(a, first, b);
      x[u + 1].v = _mm512_permutex2var_pd(a, second, b);
    }
  }
#else
  template <typename Body>
  static FEDKERN_INLINE void each(const bf16* from, Body&& body) {
    for (int u = 0; u < held; u += 2) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + u * V::lanes));
      body(u, V{_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(words, 16)))});
      body(u + 1, V{_mm256_cvtps_pd(_mm_castsi128_ps(_mm_and_si128(words, _mm_set1_epi32(~0xffff))))});
    }
  }
  static FEDKERN_INLINE void to_order(V* x) {
    for (int u = 0; u < held; u += 2) {
      const __m256d low = _mm256_unpacklo_pd(x[u].v, x[u + 1].v), high = _mm256_unpackhi_pd(x[u].v, x[u + 1].v);
      x[u].v = _mm256_permute2f128_pd(low, high, 0x20);
      x[u + 1].v = _mm256_permute2f128_pd(low, high, 0x31);
    }
  }
  static FEDKERN_INLINE void from_order(V* x) {
    for (int u = 0; u < held; u += 2) {
      const __m256d outer = _mm256_permute2f128_pd(x[u].v, x[u + 1].v, 0x20);
      const __m256d inner = _mm256_permute2f128_pd(x[u].v, x[u + 1].v, 0x31);
      x[u].v = _mm256_unpacklo_pd(outer, inner);
      x[u + 1].v = _mm256_unpackhi_pd(outer, inner);
    }
  }
#endif
};
#endif

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
