// exp, log and relatives over Vec<float> and Vec<double>.
#pragma once

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Horner's rule, highest coefficient first.
template <typename T, typename... Rest>
FEDKERN_INLINE Vec<T> polynomial(Vec<T> x, T first, Rest... rest) {
  Vec<T> sum = Vec<T>::set(first);
  ((sum = fma(sum, x, Vec<T>::set(static_cast<T>(rest)))), ...);
  return sum;
}

// Beyond these exp is 0 and infinite.
template <typename T>
inline constexpr T exp_lowest = sizeof(T) == 4 ? T(-104) : T(-746);
template <typename T>
inline constexpr T exp_highest = sizeof(T) == 4 ? T(89) : T(710);

// a * 2^n where x is above the bound (or NaN), else 0: products that underflow cost a hundred cycles, and masked classes
// are many, so they skip the multiplication.
#if !defined(FEDKERN_ISA_avx512)
template <typename T>
FEDKERN_INLINE Vec<T> scale_above(Vec<T> bound, Vec<T> x, Vec<T> a, Vec<T> n) {
  const Mask<T> vanishes = x == bound;  // x was clamped
  return select(vanishes, Vec<T>::set(0), scale_by_power(a, select(vanishes, Vec<T>::set(0), n)));
}

// a * 2^n where neither a nor the result is subnormal or infinite; NaN stays NaN.
FEDKERN_INLINE Vec<float> raise_exponent(Vec<float> a, Vec<float> n) {
#if defined(FEDKERN_ISA_avx2)
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a.v), _mm256_slli_epi32(_mm256_cvtps_epi32(n.v), 23)))};
#else
  using Bits = Native<float>::bits;
  return {(Native<float>::type)((Bits)a.v + (__builtin_convertvector(n.v, Bits) << 23))};
#endif
}
#endif

FEDKERN_INLINE Vec<float> exp_clamped(Vec<float> x) {
  using V = Vec<float>;
  const V n = round(x * V::set(0x1.715476p+0f));
  const V r = fma(n, V::set(-0x1.7f7d1cp-20f), fma(n, V::set(-0x1.62e4p-1f), x));
  const V tail = polynomial(r, 0x1.6a2430p-10f, 0x1.1239e4p-7f, 0x1.5558f2p-5f, 0x1.555492p-3f, 0x1.fffffcp-2f);
  return scale_above(V::set(exp_lowest<float>), x, fma(r * r, tail, r) + V::set(1.0f), n);
}
FEDKERN_INLINE Vec<double> exp_clamped(Vec<double> x) {
  using V = Vec<double>;
  const V n = round(x * V::set(0x1.71547652b82fep+0));
  const V r = fma(n, V::set(-0x1.cf79abc9e3b3ap-40), fma(n, V::set(-0x1.62e42fefap-1), x));
  const V tail = polynomial(r, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880,
                            1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5);
  return scale_above(V::set(exp_lowest<double>), x, fma(r * r, tail, r) + V::set(1.0), n);
}

// Lanes: float, double.
// Error: at most 2 ULP (1 with fused multiply-add), subnormal results included.
// Range: all; exp(-inf) = 0, overflow gives inf, NaN stays NaN.
// Method: x = n ln 2 + r with a two-part ln 2, a polynomial in r, scaled by 2^n.
template <typename T>
FEDKERN_INLINE Vec<T> exp(Vec<T> x) {
  // The bounds come first: min and max return their second operand where one is NaN.
  return exp_clamped(min(Vec<T>::set(exp_highest<T>), max(Vec<T>::set(exp_lowest<T>), x)));
}

// exp(x / temperature) for x <= 65 temperature (or NaN).
// Lanes: float, double.
// Error: at most 2 ULP and 2^-24 |x / temperature|, the rounding of 1 / temperature.
template <typename T>
class ScaledExp {
  using V = Vec<T>;

 public:
  explicit ScaledExp(double temperature) : inverse_(V::set(static_cast<T>(1.0 / temperature))) {}
  FEDKERN_INLINE V operator()(V x) const { return exp_of_nonpositive(x * inverse_); }

 private:
  V inverse_;
};
// In float the temperature goes into the base: 2^(x rate) = 2^n 2^r, what float cannot hold of the rate added to r.
// Where 32 powers of two fit two registers n is a multiple of 1/32, which leaves r to two coefficients.
template <>
class ScaledExp<float> {
  using V = Vec<float>;

 public:
  explicit ScaledExp(double temperature) {
    const double rate = 1.4426950408889634 / temperature, held = static_cast<float>(rate);
    const double lowest = static_cast<double>(exp_lowest<float>) * temperature;
    rate_ = V::set(static_cast<float>(held));
    rest_ = V::set(static_cast<float>(rate - held));
    lowest_ = V::set(static_cast<float>(lowest < -3e38 ? -3e38 : lowest));
  }
#if defined(FEDKERN_ISA_avx512)
  FEDKERN_INLINE V operator()(V x) const {
    // The sum's last bit is 1/32: its low bits are n modulo 1, and n is what the sum holds more than the constant.
    const V magic = V::set(0x1.8p18f), sum = fma(x, rate_, magic), n = sum - magic;
    const V r = fma(x, rest_, fms(x, rate_, n)), power = powers_.at(sum);
    return scale_above(lowest_, x, fma(power * r, polynomial(r, 0x1.ebfbecp-3f, 0x1.62e584p-1f), power), n);
  }
#else
  FEDKERN_INLINE V operator()(V x) const {
    x = max(lowest_, x);
    const V n = round(x * rate_), r = fma(x, rest_, fms(x, rate_, n));
    // 2^(r + 32): n, from -151 to 94, fits its exponent, and one product then rounds what is subnormal.
    const V power = polynomial(r, 0x1.41fbb8p19f, 0x1.5f3e54p22f, 0x1.3b2d4cp25f, 0x1.c6aee8p27f, 0x1.ebfbdcp29f,
                               0x1.62e430p31f, 0x1p32f);
    return select(x == lowest_, V::set(0), raise_exponent(power, n)) * V::set(0x1p-32f);
  }
#endif

 private:
#if defined(FEDKERN_ISA_avx512)
  Powers32 powers_;
#endif
  V rate_, rest_, lowest_;
};

// exp(x) for x <= 0 (or NaN).
template <typename T>
FEDKERN_INLINE Vec<T> exp_of_nonpositive(Vec<T> x) {
  return exp_clamped(max(Vec<T>::set(exp_lowest<T>), x));
}

// Lanes: float, double.
// Error: at most 2 ULP.
// Range: positive normal numbers; NaN stays NaN. Nothing else.
FEDKERN_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  V n;
  const V f = split_power(x, n) - V::set(1.0f), square = f * f;
  const V tail = polynomial(f, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                            1.4249322787e-1f, -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  V low = fma(n, V::set(-2.12194440e-4f), f * square * tail);
  low = fma(square, V::set(-0.5f), low);
  return select(x == x, fma(n, V::set(0.693359375f), f + low), x);
}
FEDKERN_INLINE Vec<double> log(Vec<double> x) {
  double lane[Vec<double>::lanes];
  x.store(lane);
  for (double& value : lane) value = __builtin_log(value);
  return Vec<double>::load(lane);
}

// (e^x - 1 - x) / x^2 without cancellation.
// Lanes: float, double.
// Error: at most 4 ULP (relative).
// Range: |x| <= small_exponent<T>.
template <typename T>
inline constexpr T small_exponent = sizeof(T) == 4 ? T(1) : T(0.5);

FEDKERN_INLINE Vec<float> exp_remainder(Vec<float> x) {
  return polynomial(x, 2.496077649993822e-05f, 0.00020325483637861907f, 0.001389133627526462f, 0.008330930024385452f,
                    0.04166651517152786f, 0.16666695475578308f, 0.5f);
}
FEDKERN_INLINE Vec<double> exp_remainder(Vec<double> x) {
  return polynomial(x, 1.0 / 1307674368000, 1.0 / 87178291200, 1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800,
                    1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
