// Any CPU: 4 floats or 2 doubles in the compiler's own vector types. Included by simd.h.
#pragma once

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T>
struct Native;
template <>
struct Native<float> {
  typedef float type __attribute__((vector_size(16)));
  typedef std::int32_t bits __attribute__((vector_size(16)));
};
template <>
struct Native<double> {
  typedef double type __attribute__((vector_size(16)));
  typedef std::int64_t bits __attribute__((vector_size(16)));
};

template <typename T>
struct Mask {
  typename Native<T>::bits bits;
  friend FEDKERN_INLINE Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
  friend FEDKERN_INLINE Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
  friend FEDKERN_INLINE Mask operator!(Mask a) { return {~a.bits}; }
  FEDKERN_INLINE bool any() const {
    bool result = false;
    for (std::size_t i = 0; i < 16 / sizeof(T); ++i) result |= bits[i] != 0;
    return result;
  }
};

template <typename T>
struct Vec {
  static constexpr int lanes = 16 / sizeof(T);
  typename Native<T>::type v;

  static FEDKERN_INLINE Vec set(T x) { return {x - typename Native<T>::type{}}; }
  template <typename S>
  static FEDKERN_INLINE Vec load(const S* p) {
    Vec out;
    for (int i = 0; i < lanes; ++i) out.v[i] = static_cast<T>(widen(p[i]));
    return out;
  }
  template <typename S>
  static FEDKERN_INLINE Vec load_partial(const S* p, std::ptrdiff_t n, T fill = 0) {
    Vec out;
    for (int i = 0; i < lanes; ++i) out.v[i] = i < n ? static_cast<T>(widen(p[i])) : fill;
    return out;
  }
  template <typename S>
  FEDKERN_INLINE void store(S* p) const {
    for (int i = 0; i < lanes; ++i) narrow(v[i], p[i]);
  }
  template <typename S>
  FEDKERN_INLINE void store_partial(S* p, std::ptrdiff_t n) const {
    for (int i = 0; i < lanes; ++i)
      if (i < n) narrow(v[i], p[i]);
  }

  friend FEDKERN_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
  friend FEDKERN_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
  friend FEDKERN_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
  friend FEDKERN_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
  friend FEDKERN_INLINE Mask<T> operator<(Vec a, Vec b) { return {a.v < b.v}; }
  friend FEDKERN_INLINE Mask<T> operator>(Vec a, Vec b) { return {a.v > b.v}; }
  friend FEDKERN_INLINE Mask<T> operator==(Vec a, Vec b) { return {a.v == b.v}; }
};

template <typename T>
FEDKERN_INLINE Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) {
  return {m.bits ? yes.v : no.v};
}
// As the x86 instructions do: the second operand where either is NaN.
template <typename T>
FEDKERN_INLINE Vec<T> max(Vec<T> a, Vec<T> b) {
  return {a.v > b.v ? a.v : b.v};
}
template <typename T>
FEDKERN_INLINE Vec<T> min(Vec<T> a, Vec<T> b) {
  return {a.v < b.v ? a.v : b.v};
}
template <typename T>
FEDKERN_INLINE Vec<T> abs(Vec<T> a) {
  using Bits = typename Native<T>::bits;
  return {(typename Native<T>::type)((Bits)a.v & ~(Bits)(Vec<T>::set(T(-0.0)).v))};
}
template <typename T>
FEDKERN_INLINE Vec<T> sqrt(Vec<T> a) {
  for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = static_cast<T>(__builtin_sqrt(a.v[i]));
  return a;
}
// Not fused here: a product and a sum, each rounded.
template <typename T>
FEDKERN_INLINE Vec<T> fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v + c.v};
}
template <typename T>
FEDKERN_INLINE Vec<T> fms(Vec<T> a, Vec<T> b, Vec<T> c) {
  return {a.v * b.v - c.v};
}
FEDKERN_INLINE Vec<float> round_to_odd(Vec<double> low, Vec<double> high) {
  return {Native<float>::type{round_to_odd(low.v[0]), round_to_odd(low.v[1]), round_to_odd(high.v[0]), round_to_odd(high.v[1])}};
}
template <typename T>
FEDKERN_INLINE T first(Vec<T> a) {
  return a.v[0];
}
template <typename T>
FEDKERN_INLINE T reduce_add(Vec<T> a) {
  T sum = a.v[0];
  for (int i = 1; i < Vec<T>::lanes; ++i) sum += a.v[i];
  return sum;
}
template <typename T>
FEDKERN_INLINE T reduce_max(Vec<T> a) {
  T most = a.v[0];
  for (int i = 1; i < Vec<T>::lanes; ++i) most = most > a.v[i] ? most : a.v[i];
  return most;
}
// Adding and subtracting 1.5 * 2^(mantissa bits) rounds |a| < 2^21 to the nearest integer.
FEDKERN_INLINE Vec<float> round(Vec<float> a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
FEDKERN_INLINE Vec<double> round(Vec<double> a) { return {(a.v + 0x1.8p52) - 0x1.8p52}; }
// In two factors, so that results down to the smallest subnormal come out right; |n| < 252 (2044 for doubles).
FEDKERN_INLINE Vec<float> scale_by_power(Vec<float> a, Vec<float> n) {
  using Bits = Native<float>::bits;
  const Bits whole = __builtin_convertvector(n.v, Bits), half = whole >> 1;
  return {a.v * (Native<float>::type)((half + 127) << 23) * (Native<float>::type)((whole - half + 127) << 23)};
}
FEDKERN_INLINE Vec<double> scale_by_power(Vec<double> a, Vec<double> n) {
  using Bits = Native<double>::bits;
  const Bits whole = __builtin_convertvector(n.v, Bits), half = whole >> 1;
  return {a.v * (Native<double>::type)((half + 1023) << 52) * (Native<double>::type)((whole - half + 1023) << 52)};
}
FEDKERN_INLINE Vec<float> split_power(Vec<float> a, Vec<float>& n) {
  using Bits = Native<float>::bits;
  const Bits power = ((Bits)a.v - 0x3f3504f3) >> 23;
  n.v = __builtin_convertvector(power, Native<float>::type);
  return {(Native<float>::type)((Bits)a.v - (power << 23))};
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
