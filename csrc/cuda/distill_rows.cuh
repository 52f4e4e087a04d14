// How the distill kernels read rows: any strides and mixed types, eight classes at once where they lie together.
#pragma once

#include <type_traits>

#include "fedkern/distill.h"
#include "group.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {

inline constexpr int kPack = 8;  // classes: 16 bytes of bf16 or f16, twice 16 of fp32

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

// N classes from `c` on of the row that starts at `base`: N > 1 needs unit stride and 16-byte alignment.
template <typename C, int N>
__device__ __forceinline__ void load_classes(const Logits& from, std::int64_t base, std::int64_t c, C (&x)[N]) {
  if constexpr (N == 1) {
    x[0] = load_value<C>(from.data, from.dtype, base + c * from.class_stride);
  } else {
    switch (from.dtype) {
      case DType::bf16: return load_eight<C, __nv_bfloat16>(from.data, base + c, x);
      case DType::f16: return load_eight<C, __half>(from.data, base + c, x);
      default: return load_eight<C, float>(from.data, base + c, x);
    }
  }
}
template <typename C, int N>
__device__ __forceinline__ void store_classes(const Logits& to, std::int64_t base, std::int64_t c, const C (&x)[N]) {
  if constexpr (N == 1) {
    store_value<C>(to.data, to.dtype, base + c * to.class_stride, x[0]);
  } else {
    switch (to.dtype) {
      case DType::bf16: return store_eight<C, __nv_bfloat16>(to.data, base + c, x);
      case DType::f16: return store_eight<C, __half>(to.data, base + c, x);
      default: return store_eight<C, float>(to.data, base + c, x);
    }
  }
}

// f(width, c) for this thread's share of the classes [begin, end): eight at a time (Packed; begin a multiple of eight), then
// one at a time. `width` is an integral_constant.
template <typename G, bool Packed, typename F>
__device__ __forceinline__ void each_class(std::int64_t begin, std::int64_t end, F&& f) {
  if constexpr (Packed) {
    const std::int64_t packed = begin + (end - begin) / kPack * kPack;
    for (std::int64_t c = begin + G::lane() * kPack; c < packed; c += G::lanes * kPack) f(std::integral_constant<int, kPack>{}, c);
    begin = packed;
  }
  for (std::int64_t c = begin + G::lane(); c < end; c += G::lanes) f(std::integral_constant<int, 1>{}, c);
}

// True where eight classes at once may be moved in `x`: unit stride, and every row starts at a multiple of 16 bytes.
inline bool packs(const Logits& x, const std::int64_t* size, int dims) {
  if (!x.data) return true;
  if (x.class_stride != 1 || !aligned16(x.data) || x.dtype == DType::f64) return false;
  for (int d = 0; d < dims; ++d)
    if (size[d] > 1 && x.row_stride[d] % kPack) return false;
  return true;
}

// Sums `total` over the block's threads and leaves it in partial[blockIdx.x], or, scaled, in `out` where it is alone.
__device__ __forceinline__ void leave_total(double total, double* partial, const RowValues& out, double scale) {
  total = Group<kBlock>::sum(total);
  if (threadIdx.x) return;
  if (gridDim.x > 1)
    partial[blockIdx.x] = total;
  else
    store_value<double>(out.data, out.dtype, 0, total * scale);
}

// One block: out = scale * sum of partial[0, count).
static __global__ void __launch_bounds__(kBlock) sum_partials(const double* partial, std::int64_t count, RowValues out, double scale) {
  double total = 0;
  for (std::int64_t i = threadIdx.x; i < count; i += kBlock) total += partial[i];
  total = Group<kBlock>::sum(total);
  if (threadIdx.x == 0) store_value<double>(out.data, out.dtype, 0, total * scale);
}

}  // namespace fedkern::cuda
