// AVX2 with FMA and F16C: 8 floats or 4 doubles. Included by simd.h.
#pragma once

namespace fedkern::FEDKERN_ISA {
namespace {

template <>
struct Mask<float> {
  __m256 bits;
  friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
  friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
  friend FEDKERN_INLINE Mask operator!(Mask a) {
    return {_mm256_xor_ps(a.bits, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
  }
  FEDKERN_INLINE bool any() const { return _mm256_movemask_ps(bits) != 0; }
};
template <>
struct Mask<double> {
  __m256d bits;
  friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_pd(a.bits, b.bits)}; }
  friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_pd(a.bits, b.bits)}; }
  friend FEDKERN_INLINE Mask operator!(Mask a) {
    return {_mm256_xor_pd(a.bits, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))};
  }
  FEDKERN_INLINE bool any() const { return _mm256_movemask_pd(bits) != 0; }
};

FEDKERN_INLINE __m256i first_lanes_ps(std::ptrdiff_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FEDKERN_INLINE __m256i first_lanes_pd(std::ptrdiff_t n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
FEDKERN_INLINE __m128i narrow_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), high = _mm256_srli_epi32(bits, 16);
  const __m256i bias = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i words = _mm256_blendv_epi8(rounded, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08));
}

template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  static FEDKERN_INLINE Vec set(float x) { return {_mm256_set1_ps(x)}; }
  static FEDKERN_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static FEDKERN_INLINE Vec load(const bf16* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))};
  }
  static FEDKERN_INLINE Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static FEDKERN_INLINE Vec load_partial(const float* p, std::ptrdiff_t n, float fill = 0) {
    const __m256i mask = first_lanes_ps(n);
    return {_mm256_blendv_ps(_mm256_set1_ps(fill), _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask))};
  }
  template <typename S>
  static FEDKERN_INLINE Vec load_partial(const S* p, std::ptrdiff_t n, float fill = 0) {
    float x[lanes];
    for (std::ptrdiff_t i = 0; i < lanes; ++i) x[i] = i < n ? widen(p[i]) : fill;
    return load(x);
  }
  FEDKERN_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  FEDKERN_INLINE void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  FEDKERN_INLINE void store(f16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  // In halves: masked stores are slow on AMD.
  FEDKERN_INLINE void store_partial(float* p, std::ptrdiff_t n) const {
    __m128 x = _mm256_castps256_ps128(v);
    if (n & 8) return store(p);
    if (n & 4) {
      _mm_storeu_ps(p, x);
      x = _mm256_extractf128_ps(v, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), x);
      x = _mm_movehl_ps(x, x);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, x);
  }
  template <typename S>
  FEDKERN_INLINE void store_partial(S* p, std::ptrdiff_t n) const {
    S x[lanes];
    store(x);
    for (std::ptrdiff_t i = 0; i < n; ++i) p[i] = x[i];
  }

  friend FEDKERN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend FEDKERN_INLINE Mask<float> operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  friend FEDKERN_INLINE Mask<float> operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
  friend FEDKERN_INLINE Mask<float> operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
};

FEDKERN_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
FEDKERN_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
FEDKERN_INLINE Vec<float> abs(Vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
FEDKERN_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm256_sqrt_ps(a.v)}; }
FEDKERN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<float> fms(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmsub_ps(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<float> select(Mask<float> m, Vec<float> yes, Vec<float> no) {
  return {_mm256_blendv_ps(no.v, yes.v, m.bits)};
}
FEDKERN_INLINE float first(Vec<float> a) { return _mm256_cvtss_f32(a.v); }
FEDKERN_INLINE float reduce_add(Vec<float> a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FEDKERN_INLINE float reduce_max(Vec<float> a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
FEDKERN_INLINE Vec<float> round(Vec<float> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// In two factors, so that results down to the smallest subnormal come out right; |n| < 252.
FEDKERN_INLINE Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  const __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
  const __m256 x = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(half, bias), 23));
  const __m256 y = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(whole, half), bias), 23));
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, x), y)};
}
FEDKERN_INLINE Vec<float> split_power(Vec<float> a, Vec<float>& n) {
  const __m256i offset = _mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_set1_epi32(0x3f3504f3));
  const __m256i power = _mm256_srai_epi32(offset, 23);
  n.v = _mm256_cvtepi32_ps(power);
  return {_mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(power, 23)))};
}

// Those of four vectors, in fewer steps: the sums are added to `out`.
FEDKERN_INLINE void add_reduced(const Vec<float> (&a)[4], float* out) {
  const __m256 p = _mm256_add_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 q = _mm256_add_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  const __m256 all = _mm256_add_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}
FEDKERN_INLINE void reduce_max(const Vec<float> (&a)[4], float* out) {
  const __m256 p = _mm256_max_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
  const __m256 q = _mm256_max_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
  const __m256 all = _mm256_max_ps(_mm256_shuffle_ps(p, q, 0x44), _mm256_shuffle_ps(p, q, 0xee));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

template <>
struct Vec<double> {
  static constexpr int lanes = 4;
  __m256d v;

  static FEDKERN_INLINE Vec set(double x) { return {_mm256_set1_pd(x)}; }
  static FEDKERN_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static FEDKERN_INLINE Vec load(const float* p) { return {_mm256_cvtps_pd(_mm_loadu_ps(p))}; }
  static FEDKERN_INLINE Vec load(const bf16* p) {
    const __m128i x = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(x, 16)))};
  }
  static FEDKERN_INLINE Vec load(const f16* p) {
    return {_mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static FEDKERN_INLINE Vec load_partial(const double* p, std::ptrdiff_t n, double fill = 0) {
    const __m256i mask = first_lanes_pd(n);
    return {_mm256_blendv_pd(_mm256_set1_pd(fill), _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask))};
  }
  template <typename S>
  static FEDKERN_INLINE Vec load_partial(const S* p, std::ptrdiff_t n, double fill = 0) {
    double x[lanes];
    for (std::ptrdiff_t i = 0; i < lanes; ++i) x[i] = i < n ? static_cast<double>(widen(p[i])) : fill;
    return load(x);
  }
  FEDKERN_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  FEDKERN_INLINE void store(float* p) const { _mm_storeu_ps(p, _mm256_cvtpd_ps(v)); }
  template <typename S>
  FEDKERN_INLINE void store(S* p) const {
    store_partial(p, lanes);
  }
  FEDKERN_INLINE void store_partial(double* p, std::ptrdiff_t n) const {
    __m128d x = _mm256_castpd256_pd128(v);
    if (n & 4) return store(p);
    if (n & 2) {
      _mm_storeu_pd(p, x);
      x = _mm256_extractf128_pd(v, 1);
      p += 2;
    }
    if (n & 1) _mm_store_sd(p, x);
  }
  template <typename S>
  FEDKERN_INLINE void store_partial(S* p, std::ptrdiff_t n) const {
    double x[lanes];
    store(x);
    for (std::ptrdiff_t i = 0; i < n; ++i) narrow(x[i], p[i]);
  }

  friend FEDKERN_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_pd(a.v, b.v)}; }
  friend FEDKERN_INLINE Mask<double> operator<(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
  friend FEDKERN_INLINE Mask<double> operator>(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
  friend FEDKERN_INLINE Mask<double> operator==(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
};

FEDKERN_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
FEDKERN_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
FEDKERN_INLINE Vec<double> abs(Vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
FEDKERN_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm256_sqrt_pd(a.v)}; }
FEDKERN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
FEDKERN_INLINE Vec<double> select(Mask<double> m, Vec<double> yes, Vec<double> no) {
  return {_mm256_blendv_pd(no.v, yes.v, m.bits)};
}
// The lower halves of the words of a mask of doubles.
FEDKERN_INLINE __m128i narrow_mask(__m256d mask) {
  const __m256 halves = _mm256_castpd_ps(mask);
  return _mm_castps_si128(_mm_shuffle_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1), 0x88));
}
FEDKERN_INLINE __m128 round_to_odd(__m256d x) {
  const __m128 nearest = _mm256_cvtpd_ps(x);
  const __m256d back = _mm256_cvtps_pd(nearest), sign = _mm256_set1_pd(-0.0);
  const __m128i away = narrow_mask(_mm256_cmp_pd(_mm256_andnot_pd(sign, back), _mm256_andnot_pd(sign, x), _CMP_GT_OQ));
  const __m128i lost = narrow_mask(_mm256_cmp_pd(back, x, _CMP_NEQ_OQ));
  return _mm_castsi128_ps(_mm_or_si128(_mm_add_epi32(_mm_castps_si128(nearest), away), _mm_srli_epi32(lost, 31)));
}
FEDKERN_INLINE Vec<float> round_to_odd(Vec<double> low, Vec<double> high) {
  return {_mm256_set_m128(round_to_odd(high.v), round_to_odd(low.v))};
}
FEDKERN_INLINE double first(Vec<double> a) { return _mm256_cvtsd_f64(a.v); }
FEDKERN_INLINE double reduce_add(Vec<double> a) {
  const __m128d x = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
FEDKERN_INLINE double reduce_max(Vec<double> a) {
  const __m128d x = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
FEDKERN_INLINE Vec<double> round(Vec<double> a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
FEDKERN_INLINE Vec<double> scale_by_power(Vec<double> a, Vec<double> n) {
  const __m128i whole = _mm256_cvtpd_epi32(n.v), half = _mm_srai_epi32(whole, 1), bias = _mm_set1_epi32(1023);
  const __m256i x = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(half, bias)), 52);
  const __m256i y = _mm256_slli_epi64(_mm256_cvtepi32_epi64(_mm_add_epi32(_mm_sub_epi32(whole, half), bias)), 52);
  return {_mm256_mul_pd(_mm256_mul_pd(a.v, _mm256_castsi256_pd(x)), _mm256_castsi256_pd(y))};
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
