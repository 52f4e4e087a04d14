// The vectors that conv works on: Wide, as wide as the ISA level's, and Half, for channels that come in eights.
#pragma once

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

using Wide = Vec<float>;

#if defined(FEDKERN_ISA_avx512)

// Eight floats, with the names of Vec<float> as far as conv needs them.
struct Half {
  static constexpr int lanes = 8;
  __m256 v;
  struct Mask {
    __mmask8 bits;
    friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits & b.bits)}; }
    friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits | b.bits)}; }
    friend FEDKERN_INLINE Mask operator!(Mask a) { return {static_cast<__mmask8>(~a.bits)}; }
  };

  static FEDKERN_INLINE Half set(float x) { return {_mm256_set1_ps(x)}; }
  static FEDKERN_INLINE Half load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FEDKERN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend FEDKERN_INLINE Half operator+(Half a, Half b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Half operator-(Half a, Half b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Half operator*(Half a, Half b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Mask operator>(Half a, Half b) { return {_mm256_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend FEDKERN_INLINE Mask operator==(Half a, Half b) { return {_mm256_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
};
FEDKERN_INLINE Half max(Half a, Half b) { return {_mm256_max_ps(a.v, b.v)}; }
FEDKERN_INLINE Half fma(Half a, Half b, Half c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FEDKERN_INLINE Half select(Half::Mask m, Half yes, Half no) { return {_mm256_mask_mov_ps(no.v, m.bits, yes.v)}; }

#else

using Half = Wide;

#endif

// Whole numbers below 256 as bytes.
FEDKERN_INLINE void store_bytes(Wide x, std::uint8_t* to) {
#if defined(FEDKERN_ISA_avx512)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x.v)));
}
FEDKERN_INLINE void store_bytes(Half x, std::uint8_t* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_cvtepi32_epi8(_mm256_cvttps_epi32(x.v)));
#else
  const __m256i whole = _mm256_cvttps_epi32(x.v);
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
#endif
}

// body(V{}), V's lanes dividing the channels, which come in eights.
template <typename Body>
FEDKERN_INLINE void by_lanes(std::int64_t channels, Body&& body) {
  if (channels % Wide::lanes)
    body(Half{});
  else
    body(Wide{});
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
