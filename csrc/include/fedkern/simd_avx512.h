// AVX-512 (F, BW, DQ, VL): 16 floats or 8 doubles. Included by simd.h.
#pragma once

namespace fedkern::FEDKERN_ISA {
namespace {

template <>
struct Mask<float> {
  __mmask16 bits;
  friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits & b.bits)}; }
  friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.bits | b.bits)}; }
  friend FEDKERN_INLINE Mask operator!(Mask a) { return {static_cast<__mmask16>(~a.bits)}; }
  FEDKERN_INLINE bool any() const { return bits != 0; }
};
template <>
struct Mask<double> {
  __mmask8 bits;
  friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits & b.bits)}; }
  friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {static_cast<__mmask8>(a.bits | b.bits)}; }
  friend FEDKERN_INLINE Mask operator!(Mask a) { return {static_cast<__mmask8>(~a.bits)}; }
  FEDKERN_INLINE bool any() const { return bits != 0; }
};

FEDKERN_INLINE __mmask16 first_lanes(std::ptrdiff_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

FEDKERN_INLINE __m512 widen_bf16(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
FEDKERN_INLINE __m256i narrow_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i bias = _mm512_add_epi32(_mm512_and_si512(high, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7fff));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
  rounded = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high, _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(rounded);
}

template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;

  static FEDKERN_INLINE Vec set(float x) { return {_mm512_set1_ps(x)}; }
  static FEDKERN_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static FEDKERN_INLINE Vec load(const bf16* p) {
    return {widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static FEDKERN_INLINE Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static FEDKERN_INLINE Vec load_partial(const float* p, std::ptrdiff_t n, float fill = 0) {
    return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p)};
  }
  static FEDKERN_INLINE Vec load_partial(const bf16* p, std::ptrdiff_t n, float fill = 0) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n),
                               widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p)))};
  }
  static FEDKERN_INLINE Vec load_partial(const f16* p, std::ptrdiff_t n, float fill = 0) {
    return {_mm512_mask_mov_ps(_mm512_set1_ps(fill), first_lanes(n),
                               _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)))};
  }
  FEDKERN_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  FEDKERN_INLINE void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  FEDKERN_INLINE void store(f16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  FEDKERN_INLINE void store_partial(float* p, std::ptrdiff_t n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  FEDKERN_INLINE void store_partial(bf16* p, std::ptrdiff_t n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), narrow_bf16(v));
  }
  FEDKERN_INLINE void store_partial(f16* p, std::ptrdiff_t n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  friend FEDKERN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Mask<float> operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend FEDKERN_INLINE Mask<float> operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend FEDKERN_INLINE Mask<float> operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
};

FEDKERN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
FEDKERN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
FEDKERN_INLINE Vec<float> abs(Vec<float> a) { return {_mm512_abs_ps(a.v)}; }
FEDKERN_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm512_sqrt_ps(a.v)}; }
FEDKERN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<float> fms(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<float> select(Mask<float> m, Vec<float> yes, Vec<float> no) {
  return {_mm512_mask_mov_ps(no.v, m.bits, yes.v)};
}
FEDKERN_INLINE float first(Vec<float> a) { return _mm512_cvtss_f32(a.v); }
FEDKERN_INLINE float reduce_add(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
FEDKERN_INLINE float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
FEDKERN_INLINE Vec<float> round(Vec<float> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n where x is above the bound (or NaN), else 0. Lanes left out cost nothing, whatever they hold; a product that
// underflows costs some processors a hundred cycles, and masked classes are many.
FEDKERN_INLINE Vec<float> scale_above(Vec<float> bound, Vec<float> x, Vec<float> a, Vec<float> n) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_NLE_UQ), a.v, n.v)};
}
FEDKERN_INLINE Vec<float> split_power(Vec<float> a, Vec<float>& n) {
  const __m512i offset = _mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_set1_epi32(0x3f3504f3));
  const __m512i power = _mm512_srai_epi32(offset, 23);
  n.v = _mm512_cvtepi32_ps(power);
  return {_mm512_castsi512_ps(_mm512_sub_epi32(_mm512_castps_si512(a.v), _mm512_slli_epi32(power, 23)))};
}

// Those of four vectors, in fewer steps: the sums are added to `out`.
FEDKERN_INLINE void add_reduced(const Vec<float> (&a)[4], float* out) {
  const __m512 p = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 q = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
FEDKERN_INLINE void reduce_max(const Vec<float> (&a)[4], float* out) {
  const __m512 p = _mm512_max_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 q = _mm512_max_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 all = _mm512_max_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// 2^(i / 32), i the low five bits of every lane.
struct Powers32 {
  __m512 low, high;

  Powers32() {
    alignas(64) static constexpr float values[32] = {
        0x1p+0f, 0x1.059b0ep+0f, 0x1.0b5586p+0f, 0x1.11301ep+0f, 0x1.172b84p+0f, 0x1.1d4874p+0f, 0x1.2387a6p+0f,
        0x1.29e9ep+0f, 0x1.306fep+0f, 0x1.371a74p+0f, 0x1.3dea64p+0f, 0x1.44e086p+0f, 0x1.4bfdaep+0f, 0x1.5342b6p+0f,
        0x1.5ab07ep+0f, 0x1.6247ecp+0f, 0x1.6a09e6p+0f, 0x1.71f75ep+0f, 0x1.7a1148p+0f, 0x1.82589ap+0f, 0x1.8ace54p+0f,
        0x1.93737cp+0f, 0x1.9c4918p+0f, 0x1.a5503cp+0f, 0x1.ae89fap+0f, 0x1.b7f77p+0f, 0x1.c199bep+0f, 0x1.cb720ep+0f,
        0x1.d5818ep+0f, 0x1.dfc974p+0f, 0x1.ea4afap+0f, 0x1.f50766p+0f};
    low = _mm512_load_ps(values), high = _mm512_load_ps(values + 16);
  }
  FEDKERN_INLINE Vec<float> at(Vec<float> bits) const {
    return {_mm512_permutex2var_ps(low, _mm512_castps_si512(bits.v), high)};
  }
};

template <>
struct Vec<double> {
  static constexpr int lanes = 8;
  __m512d v;

  static FEDKERN_INLINE Vec set(double x) { return {_mm512_set1_pd(x)}; }
  static FEDKERN_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static FEDKERN_INLINE Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static FEDKERN_INLINE Vec load(const bf16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)))};
  }
  static FEDKERN_INLINE Vec load(const f16* p) {
    return {_mm512_cvtps_pd(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static FEDKERN_INLINE Vec load_partial(const double* p, std::ptrdiff_t n, double fill = 0) {
    return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(first_lanes(n)), p)};
  }
  template <typename S>
  static FEDKERN_INLINE Vec load_partial(const S* p, std::ptrdiff_t n, double fill = 0) {
    double x[lanes];
    for (std::ptrdiff_t i = 0; i < lanes; ++i) x[i] = i < n ? static_cast<double>(widen(p[i])) : fill;
    return load(x);
  }
  FEDKERN_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  FEDKERN_INLINE void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  template <typename S>
  FEDKERN_INLINE void store(S* p) const {
    store_partial(p, lanes);
  }
  FEDKERN_INLINE void store_partial(double* p, std::ptrdiff_t n) const {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), v);
  }
  template <typename S>
  FEDKERN_INLINE void store_partial(S* p, std::ptrdiff_t n) const {
    double x[lanes];
    store(x);
    for (std::ptrdiff_t i = 0; i < n; ++i) narrow(x[i], p[i]);
  }

  friend FEDKERN_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Mask<double> operator<(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
  friend FEDKERN_INLINE Mask<double> operator>(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
  friend FEDKERN_INLINE Mask<double> operator==(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
};

FEDKERN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
FEDKERN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
FEDKERN_INLINE Vec<double> abs(Vec<double> a) { return {_mm512_abs_pd(a.v)}; }
FEDKERN_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm512_sqrt_pd(a.v)}; }
FEDKERN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<double> select(Mask<double> m, Vec<double> yes, Vec<double> no) {
  return {_mm512_mask_mov_pd(no.v, m.bits, yes.v)};
}
FEDKERN_INLINE __m256 round_to_odd(__m512d x) {
  const __m256 cut = _mm512_cvt_roundpd_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC);
  const __m256i bits = _mm256_castps_si256(cut);
  const __mmask8 lost = _mm512_cmp_pd_mask(_mm512_cvtps_pd(cut), x, _CMP_NEQ_OQ);
  return _mm256_castsi256_ps(_mm256_mask_or_epi32(bits, lost, bits, _mm256_set1_epi32(1)));
}
FEDKERN_INLINE Vec<float> round_to_odd(Vec<double> low, Vec<double> high) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(round_to_odd(low.v)), round_to_odd(high.v), 1)};
}
FEDKERN_INLINE double first(Vec<double> a) { return _mm512_cvtsd_f64(a.v); }
FEDKERN_INLINE double reduce_add(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
FEDKERN_INLINE double reduce_max(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }
FEDKERN_INLINE Vec<double> round(Vec<double> a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEDKERN_INLINE Vec<double> scale_above(Vec<double> bound, Vec<double> x, Vec<double> a, Vec<double> n) {
  return {_mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x.v, bound.v, _CMP_NLE_UQ), a.v, n.v)};
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
