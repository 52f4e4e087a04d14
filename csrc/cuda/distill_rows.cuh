// How the distill kernels read rows: any strides and mixed types. Threads take several classes at a time that lie as far apart
// as there are threads: neighbours read together and many loads are under way whatever a row is aligned to.
#pragma once

#include <type_traits>

#include "distill_math.cuh"
#include "fedkern/distill.h"
#include "group.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {

// T: the type of tensors whose classes lie together, or void where that is known at run time only.
template <typename T>
inline constexpr bool kKnown = !std::is_void_v<T>;

// a / b of numbers >= 0. That of 64 bits takes some hundred instructions.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<std::int64_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b));
}

// N classes of a row, `Step` apart.
template <int N, int Step>
struct Classes {
  std::int64_t first;
  int left;  // classes of the row from the first on, N * Step at most; 0 or less: none

  __device__ __forceinline__ Classes(std::int64_t first, std::int64_t end)
      : first(first), left(end - first < N * Step ? static_cast<int>(end - first) : N * Step) {}
  __device__ __forceinline__ bool holds(int i) const { return i * Step < left; }
};

// f(type, stride) of a tensor's values and classes.
template <typename T, typename C, typename F>
__device__ __forceinline__ void as_stored(const Logits& x, F&& f) {
  if constexpr (kKnown<T>) {
    f(T{}, 1);
  } else {
    switch (x.dtype) {
      case DType::bf16: return f(__nv_bfloat16{}, x.class_stride);
      case DType::f16: return f(__half{}, x.class_stride);
      case DType::f64:
        if constexpr (sizeof(C) == 8) return f(double{}, x.class_stride);
        [[fallthrough]];
      default: return f(float{}, x.class_stride);
    }
  }
}

// The classes of the row that starts at `base`, -infinity where there are none: those have no part in any sum.
template <typename T, typename C, int N, int Step>
__device__ __forceinline__ void load_classes(const Logits& from, std::int64_t base, const Classes<N, Step>& at, C (&x)[N]) {
  as_stored<T, C>(from, [&](auto type, std::int64_t stride) {
    const auto* const data = static_cast<const decltype(type)*>(from.data) + base + at.first * stride;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = at.holds(i) ? widen<C>(data[i * Step * stride]) : -infinity<C>();
  });
}
template <typename T, typename C, int N, int Step>
__device__ __forceinline__ void store_classes(const Logits& to, std::int64_t base, const Classes<N, Step>& at, const C (&x)[N]) {
  as_stored<T, C>(to, [&](auto type, std::int64_t stride) {
    auto* const data = static_cast<decltype(type)*>(to.data) + base + at.first * stride;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (at.holds(i)) data[i * Step * stride] = narrow<decltype(type)>(x[i]);
  });
}

// f(classes) for this thread's share of [begin, end), N at a time. All threads of the group come along. The way back finds in
// the caches what the way there read last.
template <typename G, int N, bool Back = false, typename F>
__device__ __forceinline__ void each_classes(std::int64_t begin, std::int64_t end, F&& f) {
  constexpr std::int64_t span = N * G::lanes;
  std::int64_t c = begin + (Back && end > begin ? (end - begin - 1) / span * span : 0);
#pragma unroll 1
  for (; Back ? c >= begin && c < end : c < end; c += Back ? -span : span) f(Classes<N, G::lanes>(c + G::lane(), end));
}

// True where x holds values of T whose classes lie together.
template <typename T>
bool holds(const Logits& x) {
  constexpr DType dtype = sizeof(T) == 4 ? DType::f32 : DType::bf16;
  return !x.present || (x.dtype == dtype && x.class_stride == 1);
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
