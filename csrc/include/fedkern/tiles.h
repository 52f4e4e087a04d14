// Short rows of float, double, bf16 and f16 read into and written from the type they are computed in.
//
// Kernels that only scale and add are limited by memory, so they are plain loops over tiles that stay in L1, which the
// compiler vectorises for the unit's ISA level. Only for files compiled once per ISA level.
#pragma once

#include <algorithm>
#include <type_traits>

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements of a tile: four tiles of doubles fill a sixth of L1.
inline constexpr std::int64_t kTile = 256;

// The type that products of T are taken in.
template <typename T>
using computed_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename S, typename C>
FEDKERN_INLINE void widen_tile(const S* __restrict x, std::int64_t n, C* __restrict out) {
  if constexpr (sizeof(S) > 2) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<C>(x[i]);
  } else {
    constexpr int lanes = Vec<C>::lanes;
    const std::int64_t whole = n / lanes * lanes;
    for (std::int64_t i = 0; i < whole; i += lanes) Vec<C>::load(x + i).store(out + i);
    for (std::int64_t i = whole; i < n; ++i) out[i] = static_cast<C>(widen(x[i]));
  }
}

// Rounds once, to nearest even.
template <typename C, typename S>
FEDKERN_INLINE void narrow_tile(const C* __restrict x, std::int64_t n, S* __restrict out) {
  if constexpr (sizeof(S) > 2) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<S>(x[i]);
  } else if constexpr (std::is_same_v<C, double>) {
    constexpr int lanes = Vec<float>::lanes;
    std::int64_t i = 0;
    for (; i + lanes <= n; i += lanes)
      round_to_odd(Vec<double>::load(x + i), Vec<double>::load(x + i + lanes / 2)).store(out + i);
    for (; i < n; ++i) narrow(x[i], out[i]);
  } else {
    constexpr int lanes = Vec<float>::lanes;
    const std::int64_t whole = n / lanes * lanes;
    for (std::int64_t i = 0; i < whole; i += lanes) Vec<float>::load(x + i).store(out + i);
    for (std::int64_t i = whole; i < n; ++i) narrow(x[i], out[i]);
  }
}

// Calls body(T{}) with the element type that `dtype` names.
template <typename Body>
FEDKERN_INLINE void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
  }
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
