// Philox4x32-10 in vector registers, and normal numbers from it; aggregate_privacy.h says which.
#pragma once

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Places that share a group of 16 counters.
inline constexpr int kNoiseGroup = 64;

struct PhiloxKey {
  std::uint32_t low[10], high[10];
  explicit PhiloxKey(std::uint64_t seed) {
    auto one = static_cast<std::uint32_t>(seed), two = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round, one += 0x9e3779b9u, two += 0xbb67ae85u) low[round] = one, high[round] = two;
  }
};
inline constexpr std::uint32_t kPhilox0 = 0xd2511f53u, kPhilox1 = 0xcd9e8d57u;

// words[k][i]: word k of counter 16 group + i, whose upper 64 of 128 bits are `upper`.
#if defined(FEDKERN_ISA_avx512)
FEDKERN_INLINE void philox16(std::uint64_t group, std::uint32_t upper, const PhiloxKey& key, std::uint32_t (*words)[16]) {
  // 64-bit lanes: a multiplication reads the lower halves only, so what the upper ones hold does not matter.
  const __m512i m0 = _mm512_set1_epi64(kPhilox0), m1 = _mm512_set1_epi64(kPhilox1);
  const std::uint64_t counter = group << 4;
  __m512i c[2][4];
  for (int h = 0; h < 2; ++h) {
    const __m512i first = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
    c[h][0] = _mm512_add_epi64(first, _mm512_set1_epi64(static_cast<long long>((counter & 0xffffffffu) + 8 * h)));
    c[h][1] = _mm512_set1_epi64(static_cast<long long>(counter >> 32));
    c[h][2] = _mm512_set1_epi64(upper);
    c[h][3] = _mm512_setzero_si512();
  }
  for (int round = 0; round < 10; ++round) {
    const __m512i low = _mm512_set1_epi64(key.low[round]), high = _mm512_set1_epi64(key.high[round]);
    for (int h = 0; h < 2; ++h) {
      const __m512i one = _mm512_mul_epu32(c[h][0], m0), two = _mm512_mul_epu32(c[h][2], m1);
      c[h][0] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(two, 32), c[h][1], low, 0x96);
      c[h][2] = _mm512_ternarylogic_epi64(_mm512_srli_epi64(one, 32), c[h][3], high, 0x96);
      c[h][1] = two;
      c[h][3] = one;
    }
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  for (int k = 0; k < 4; ++k) _mm512_storeu_si512(words[k], _mm512_permutex2var_epi32(c[0][k], even, c[1][k]));
}
#elif defined(FEDKERN_ISA_avx2)
FEDKERN_INLINE void philox16(std::uint64_t group, std::uint32_t upper, const PhiloxKey& key, std::uint32_t (*words)[16]) {
  const __m256i m0 = _mm256_set1_epi64x(kPhilox0), m1 = _mm256_set1_epi64x(kPhilox1);
  const std::uint64_t counter = group << 4;
  for (int half = 0; half < 16; half += 8) {
    __m256i c[2][4];
    for (int h = 0; h < 2; ++h) {
      // Even counters in one register and odd ones in the other, to be put together by a shift.
      const __m256i first = _mm256_set_epi64x(6 + h, 4 + h, 2 + h, h);
      c[h][0] = _mm256_add_epi64(first, _mm256_set1_epi64x(static_cast<long long>((counter & 0xffffffffu) + half)));
      c[h][1] = _mm256_set1_epi64x(static_cast<long long>(counter >> 32));
      c[h][2] = _mm256_set1_epi64x(upper);
      c[h][3] = _mm256_setzero_si256();
    }
    for (int round = 0; round < 10; ++round) {
      const __m256i low = _mm256_set1_epi64x(key.low[round]), high = _mm256_set1_epi64x(key.high[round]);
      for (int h = 0; h < 2; ++h) {
        const __m256i one = _mm256_mul_epu32(c[h][0], m0), two = _mm256_mul_epu32(c[h][2], m1);
        c[h][0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(two, 32), c[h][1]), low);
        c[h][2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(one, 32), c[h][3]), high);
        c[h][1] = two;
        c[h][3] = one;
      }
    }
    for (int k = 0; k < 4; ++k) {
      const __m256i both = _mm256_blend_epi32(c[0][k], _mm256_slli_epi64(c[1][k], 32), 0xaa);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(words[k] + half), both);
    }
  }
}
#else
inline void philox16(std::uint64_t group, std::uint32_t upper, const PhiloxKey& key, std::uint32_t (*words)[16]) {
  const std::uint64_t counter = group << 4;
  std::uint32_t *c0 = words[0], *c1 = words[1], *c2 = words[2], *c3 = words[3];
  for (int i = 0; i < 16; ++i) {
    c0[i] = static_cast<std::uint32_t>(counter) + static_cast<std::uint32_t>(i);
    c1[i] = static_cast<std::uint32_t>(counter >> 32);
    c2[i] = upper;
    c3[i] = 0;
  }
  for (int round = 0; round < 10; ++round)
    for (int i = 0; i < 16; ++i) {
      const std::uint64_t one = static_cast<std::uint64_t>(c0[i]) * kPhilox0, two = static_cast<std::uint64_t>(c2[i]) * kPhilox1;
      c0[i] = static_cast<std::uint32_t>(two >> 32) ^ c1[i] ^ key.low[round];
      c2[i] = static_cast<std::uint32_t>(one >> 32) ^ c3[i] ^ key.high[round];
      c1[i] = static_cast<std::uint32_t>(two);
      c3[i] = static_cast<std::uint32_t>(one);
    }
}
#endif

// Integers as floats, each rounded once.
FEDKERN_INLINE Vec<float> from_unsigned(const std::uint32_t* x) {
#if defined(FEDKERN_ISA_avx512)
  return {_mm512_cvtepu32_ps(_mm512_loadu_si512(x))};
#elif defined(FEDKERN_ISA_avx2)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(bits, 16));
  return {_mm256_fmadd_ps(high, _mm256_set1_ps(65536.0f), _mm256_cvtepi32_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff))))};
#else
  float lane[Vec<float>::lanes];
  for (int i = 0; i < Vec<float>::lanes; ++i) lane[i] = static_cast<float>(x[i]);
  return Vec<float>::load(lane);
#endif
}
FEDKERN_INLINE Vec<float> from_signed(const std::uint32_t* x) {
#if defined(FEDKERN_ISA_avx512)
  return {_mm512_cvtepi32_ps(_mm512_loadu_si512(x))};
#elif defined(FEDKERN_ISA_avx2)
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
#else
  float lane[Vec<float>::lanes];
  for (int i = 0; i < Vec<float>::lanes; ++i) lane[i] = static_cast<float>(static_cast<std::int32_t>(x[i]));
  return Vec<float>::load(lane);
#endif
}

// Products and sums, each rounded, highest power first.
template <typename... Rest>
FEDKERN_INLINE Vec<float> unfused(Vec<float> x, float highest, Rest... rest) {
  Vec<float> sum = Vec<float>::set(highest);
  ((sum = sum * x + Vec<float>::set(rest)), ...);
  return sum;
}

// sqrt(-2 ln u) for normal u in (0, 1].
FEDKERN_INLINE Vec<float> radius(Vec<float> u) {
  using F = Vec<float>;
  F n;
  const F f = split_power(u, n) - F::set(1.0f), square = f * f;
  const F tail = unfused(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                         2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  const F low = n * F::set(-2.12194440e-4f) + f * square * tail - square * F::set(0.5f);
  const F log = n * F::set(0.693359375f) + (f + low);
  return sqrt(log * F::set(-2.0f));
}

// cos(pi t) and sin(pi t) for |t| <= 1.
FEDKERN_INLINE void turn(Vec<float> t, Vec<float>& cosine, Vec<float>& sine) {
  using F = Vec<float>;
  const F quarter = round(t + t), r = t - quarter * F::set(0.5f), z = r * r;
  const F s = r * unfused(z, -0.0073704309f, 0.0821458866f, -0.5992645293f, 2.5501640399f, -5.1677127800f, 3.1415926536f);
  const F c = unfused(z, -0.0258068913f, 0.2353306304f, -1.3352627689f, 4.0587121264f, -4.9348022005f, 1.0f);
  const F zero = F::set(0), one = F::set(1.0f);
  const auto half = F::set(1.5f) < abs(quarter), right = quarter == one, left = quarter == F::set(-1.0f), odd = right | left;
  const F x = select(odd, s, c), y = select(odd, c, s);
  cosine = select(right | half, zero - x, x);
  sine = select(left | half, zero - y, y);
}

// Radius words below this, the lowest 2^-20, are refined.
inline constexpr std::uint32_t kRefined = 1u << 12;

// Whether a radius word of the group is to be refined: one group in 32,768.
FEDKERN_INLINE bool any_refined(const std::uint32_t (*words)[16]) {
#if defined(FEDKERN_ISA_avx512)
  const __m512i least = _mm512_min_epu32(_mm512_loadu_si512(words[0]), _mm512_loadu_si512(words[2]));
  return _mm512_cmplt_epu32_mask(least, _mm512_set1_epi32(kRefined)) != 0;
#else
  std::uint32_t least = words[0][0];
  for (int pair = 0; pair < 4; pair += 2)
    for (int i = 0; i < 16; ++i) least = words[pair][i] < least ? words[pair][i] : least;
  return least < kRefined;
#endif
}

// Makes the numbers of refined radius words anew, each by the same operations on vectors of one value.
__attribute__((noinline)) void refine(std::uint64_t group, const PhiloxKey& key, const std::uint32_t (*words)[16], float* out) {
  using F = Vec<float>;
  alignas(64) std::uint32_t more[4][16];
  philox16(group, 1, key, more);
  float number[F::lanes];
  for (int pair = 0; pair < 4; pair += 2)
    for (int i = 0; i < 16; ++i) {
      if (words[pair][i] >= kRefined) continue;
      // 44 bits, rounded once.
      const auto wide = static_cast<float>(static_cast<std::int64_t>(words[pair][i]) << 32 | more[pair][i]);
      F cosine, sine;
      turn(F::set(static_cast<float>(static_cast<std::int32_t>(words[pair + 1][i]))) * F::set(0x1p-31f), cosine, sine);
      const F length = radius((F::set(wide) + F::set(0.5f)) * F::set(0x1p-64f));
      (length * cosine).store(number);
      out[pair * 16 + i] = number[0];
      (length * sine).store(number);
      out[pair * 16 + 16 + i] = number[0];
    }
}

// The 64 numbers of one group.
FEDKERN_INLINE void normal_group(std::uint64_t group, const PhiloxKey& key, float* out) {
  using F = Vec<float>;
  alignas(64) std::uint32_t words[4][16];
  philox16(group, 0, key, words);
  for (int pair = 0; pair < 4; pair += 2)
    for (int i = 0; i < 16; i += F::lanes) {
      const F u = (from_unsigned(words[pair] + i) + F::set(0.5f)) * F::set(0x1p-32f);
      F cosine, sine;
      turn(from_signed(words[pair + 1] + i) * F::set(0x1p-31f), cosine, sine);
      const F length = radius(u);
      (length * cosine).store(out + pair * 16 + i);
      (length * sine).store(out + pair * 16 + 16 + i);
    }
  if (__builtin_expect(any_refined(words), 0)) refine(group, key, words, out);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
