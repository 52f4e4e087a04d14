// Element types on the device: what they are computed in, how they are rounded, and how several move at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
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

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const void* data, std::int64_t at) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(data) + at);
}
template <typename T, int N>
__device__ __forceinline__ void store_pack(void* data, std::int64_t at, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(data) + at) = pack;
}

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
