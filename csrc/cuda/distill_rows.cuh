// How the distill kernels read rows: any strides and mixed types, eight classes at once where they lie together.
#pragma once

#include <type_traits>

#include "fedkern/distill.h"
#include "group.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {

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
  if (!x.present) return true;
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
