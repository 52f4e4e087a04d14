// Element types on the device: what they are computed in, how they are rounded, and how several move at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "fedkern/types.h"

namespace fedkern::cuda {

// fp32, bf16 and f16 are computed in fp32, fp64 in fp64.
template <typename T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

template <typename C, typename T>
__device__ __forceinline__ C widen(T x) {
  if constexpr (sizeof(T) == 8)
    return static_cast<C>(x);
  else
    return static_cast<C>(static_cast<float>(x));
}

// a - b, with equal infinities at no distance: a mask of -inf that every model holds keeps none of them apart.
__device__ __forceinline__ double difference(double a, double b) { return a == b ? 0.0 : a - b; }

// Rounded to odd on the way from fp64, so that the second rounding is exact.
__device__ __forceinline__ float round_to_odd(double x) {
  const float toward_zero = __double2float_rz(x);
  if (static_cast<double>(toward_zero) == x || x != x) return toward_zero;
  return __int_as_float(__float_as_int(toward_zero) | 1);
}

template <typename T>
__device__ __forceinline__ T narrow(float x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ __forceinline__ T narrow(double x) {
  if constexpr (sizeof(T) > 2)
    return static_cast<T>(x);
  else
    return static_cast<T>(round_to_odd(x));
}

// N elements that move together; 16 bytes are one load or store.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};
template <typename T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

// An integer, or a vector of them, of so many bytes.
template <int Bytes>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = std::uint32_t;
};
template <>
struct Word<2> {
  using type = std::uint16_t;
};
template <>
struct Word<1> {
  using type = std::uint8_t;
};

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const void* data, std::int64_t at) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(data) + at);
}
// One store: the compiler would write the lanes one by one, and parts of a sector cost as much as sectors.
template <typename T, int N>
__device__ __forceinline__ void store_pack(void* data, std::int64_t at, const Pack<T, N>& pack) {
  typename Word<sizeof(T) * N>::type word;
  std::memcpy(&word, &pack, sizeof(pack));
  __stwb(reinterpret_cast<decltype(word)*>(static_cast<T*>(data) + at), word);
}

// Types are known at run time only: one kernel serves every mixture of them. C = float never meets fp64.
template <typename C>
__device__ __forceinline__ C load_value(const void* data, DType dtype, std::int64_t at) {
  switch (dtype) {
    case DType::bf16: return widen<C>(static_cast<const __nv_bfloat16*>(data)[at]);
    case DType::f16: return widen<C>(static_cast<const __half*>(data)[at]);
    case DType::f64:
      if constexpr (sizeof(C) == 8) return static_cast<const double*>(data)[at];
      [[fallthrough]];
    default: return widen<C>(static_cast<const float*>(data)[at]);
  }
}
template <typename C>
__device__ __forceinline__ void store_value(void* data, DType dtype, std::int64_t at, C value) {
  switch (dtype) {
    case DType::bf16: static_cast<__nv_bfloat16*>(data)[at] = narrow<__nv_bfloat16>(value); break;
    case DType::f16: static_cast<__half*>(data)[at] = narrow<__half>(value); break;
    case DType::f64:
      if constexpr (sizeof(C) == 8) {
        static_cast<double*>(data)[at] = value;
        break;
      }
      [[fallthrough]];
    default: static_cast<float*>(data)[at] = static_cast<float>(value);
  }
}

// Eight elements: 16 bytes of bf16 or f16, twice 16 of fp32, from a multiple of 16 bytes on.
inline constexpr int kPack = 8;
template <typename C, typename T>
__device__ __forceinline__ void load_eight(const void* data, std::int64_t at, C (&x)[kPack]) {
  constexpr int N = kLanes<T>;
#pragma unroll
  for (int part = 0; part < kPack / N; ++part) {
    const auto pack = load_pack<T, N>(data, at + part * N);
#pragma unroll
    for (int i = 0; i < N; ++i) x[part * N + i] = widen<C>(pack.lane[i]);
  }
}
template <typename C, typename T>
__device__ __forceinline__ void store_eight(void* data, std::int64_t at, const C (&x)[kPack]) {
  constexpr int N = kLanes<T>;
#pragma unroll
  for (int part = 0; part < kPack / N; ++part) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(x[part * N + i]);
    store_pack<T, N>(data, at + part * N, pack);
  }
}

// The largest power of two, at most 16, that divides an address (or every one that was or-ed into it).
inline int alignment(std::uintptr_t address) { return static_cast<int>((address | 16) & -(address | 16)); }
inline int alignment(const void* data) { return alignment(reinterpret_cast<std::uintptr_t>(data)); }
inline bool aligned16(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % 16 == 0; }

// Calls body with a value of the type.
template <typename Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(__nv_bfloat16{});
    case DType::f16: return body(__half{});
  }
}

}  // namespace fedkern::cuda
