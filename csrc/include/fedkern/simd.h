// Thin SIMD wrappers: one vector type per compute type, as wide as the ISA level that includes this file.
//
//   Vec<float>, Vec<double>   lanes; load, store, set, arithmetic, comparisons to Mask, select, fma, reductions
//   bf16, f16                 16-bit storage types; Vec::load widens them, Vec::store rounds to nearest even
//   *_partial(p, n)           the first n lanes (0 <= n <= lanes) without touching memory past them
//   round_to_odd(low, high)   two vectors of doubles as one of floats that rounds once more to what the doubles would round to
//   exp, log, ...             in simd_math.h
//
// Only for files compiled once per ISA level: everything lives in an anonymous namespace of that level, so that nothing
// compiled for a newer CPU can be linked in place of the same function for an older one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fedkern/types.h"

#if defined(FEDKERN_ISA_avx512) || defined(FEDKERN_ISA_avx2)
// GCC 12 takes the deliberately undefined operands inside its own AVX-512 intrinsics for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FEDKERN_INLINE inline __attribute__((always_inline))

namespace fedkern::FEDKERN_ISA {
namespace {

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

template <typename To, typename From>
FEDKERN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FEDKERN_INLINE float widen(bf16 x) { return bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16); }
FEDKERN_INLINE float widen(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = static_cast<std::uint32_t>(x.bits & 0x7fffu) << 13;
  // Exponents are rebiased by a multiplication, which also makes subnormal halves normal floats.
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u | magnitude : bit_cast<std::uint32_t>(scaled);
  return bit_cast<float>(sign | special);
}
FEDKERN_INLINE float widen(float x) { return x; }
FEDKERN_INLINE double widen(double x) { return x; }

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
FEDKERN_INLINE void narrow(float x, bf16& out) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  out.bits = x != x ? static_cast<std::uint16_t>((bits >> 16) | 0x40u)
                    : static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
FEDKERN_INLINE void narrow(float x, f16& out) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lines its last bit up with the float's.
    half = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<std::uint16_t>(sign | half);
}
FEDKERN_INLINE void narrow(float x, float& out) { out = x; }
FEDKERN_INLINE void narrow(double x, double& out) { out = x; }
FEDKERN_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
// Toward zero, the last bit set where digits were lost: the second rounding sees on which side of a tie the value was.
FEDKERN_INLINE float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = nearest;
  if (back == x || x != x) return nearest;
  std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
  if (bits & 1u) return nearest;
  const bool away = (back > x) == (x > 0);  // |nearest| > |x|
  return bit_cast<float>(away ? bits - 1 : bits + 1);
}
FEDKERN_INLINE void narrow(double x, bf16& out) { narrow(round_to_odd(x), out); }
FEDKERN_INLINE void narrow(double x, f16& out) { narrow(round_to_odd(x), out); }

// One element of any dtype, for what is read or written once per row.
FEDKERN_INLINE double load_scalar(DType dtype, const void* base, std::int64_t offset) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(base)[offset];
    case DType::f64: return static_cast<const double*>(base)[offset];
    case DType::bf16: return widen(static_cast<const bf16*>(base)[offset]);
    default: return widen(static_cast<const f16*>(base)[offset]);
  }
}
FEDKERN_INLINE void store_scalar(DType dtype, void* base, std::int64_t offset, double value) {
  switch (dtype) {
    case DType::f32: static_cast<float*>(base)[offset] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(base)[offset] = value; break;
    case DType::bf16: narrow(value, static_cast<bf16*>(base)[offset]); break;
    default: narrow(value, static_cast<f16*>(base)[offset]); break;
  }
}

template <typename T>
struct Vec;
template <typename T>
struct Mask;

}  // namespace
}  // namespace fedkern::FEDKERN_ISA

#if defined(FEDKERN_ISA_avx512)
#include "fedkern/simd_avx512.h"
#elif defined(FEDKERN_ISA_avx2)
#include "fedkern/simd_avx2.h"
#else
#include "fedkern/simd_portable.h"
#endif

namespace fedkern::FEDKERN_ISA {
namespace {

// Where there is no shorter way.
template <typename T>
FEDKERN_INLINE void add_reduced(const Vec<T> (&a)[4], T* out) {
  for (int i = 0; i < 4; ++i) out[i] += reduce_add(a[i]);
}
template <typename T>
FEDKERN_INLINE void reduce_max(const Vec<T> (&a)[4], T* out) {
  for (int i = 0; i < 4; ++i) out[i] = reduce_max(a[i]);
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
