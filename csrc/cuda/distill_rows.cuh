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
// bf16 or f16, each tensor one of them.
struct Half {};
// Classes that lie together in a thread's hands: two of 16 bits are one access where they are aligned.
template <typename T>
inline constexpr int kWidth = std::is_same_v<T, Half> ? 2 : 1;

// a / b of numbers >= 0. That of 64 bits takes some hundred instructions.
__device__ __forceinline__ std::int64_t quotient(std::int64_t a, std::int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<std::int64_t>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b));
}

// N classes of a row, `Width` of them side by side, `Step` times that apart.
template <int N, int Step, int Width = 1>
struct Classes {
  static_assert(N % Width == 0);
  std::int64_t first;
  int left;  // classes of the row from the first on, N * Step at most; 0 or less: none

  __device__ __forceinline__ Classes(std::int64_t first, std::int64_t end)
      : first(first), left(end - first < N * Step ? static_cast<int>(end - first) : N * Step) {}
  __device__ __forceinline__ static int offset(int i) { return i / Width * (Width * Step) + i % Width; }
  __device__ __forceinline__ bool holds(int i) const { return offset(i) < left; }
};

// f(type, stride) of a tensor's values and classes.
template <typename T, typename C, typename F>
__device__ __forceinline__ void as_stored(const Logits& x, F&& f) {
  if constexpr (std::is_same_v<T, Half>) {
    x.dtype == DType::f16 ? f(__half{}, 1) : f(__nv_bfloat16{}, 1);
  } else if constexpr (kKnown<T>) {
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

// Classes as they are loaded: those of 16 bits two to a word, which is taken apart when they are used.
template <typename T, typename C, int N>
using Loaded = std::conditional_t<std::is_same_v<T, Half>, std::uint32_t[(N + 1) / 2], C[N]>;

// Whether all of a row's pairs are words: but for the end of odd rows, the same for all threads of a warp.
template <int N, int Step>
__device__ __forceinline__ bool in_words(const std::uint16_t* data, const Classes<N, Step, 2>& at) {
  return (reinterpret_cast<std::uintptr_t>(data) & 2) == 0 && (at.left & 1) == 0;
}

// The classes of the row that starts at `base`, -infinity where there are none: those have no part in any sum.
template <typename T, typename C, int N, int Step, int Width>
__device__ __forceinline__ void load_raw(const Logits& from, std::int64_t base, const Classes<N, Step, Width>& at, Loaded<T, C, N>& x) {
  if constexpr (Width == 2) {
    const auto* const data = static_cast<const std::uint16_t*>(from.data) + base + at.first;
    const std::uint32_t none = from.dtype == DType::f16 ? 0xfc00fc00 : 0xff80ff80;
    if (in_words(data, at)) {
#pragma unroll
      for (int i = 0; i < N; i += 2) x[i / 2] = at.holds(i) ? *reinterpret_cast<const std::uint32_t*>(data + at.offset(i)) : none;
    } else {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        x[i / 2] = at.holds(i) ? (none & 0xffff0000) | data[at.offset(i)] : none;
        if (at.holds(i + 1)) x[i / 2] = (x[i / 2] & 0xffff) | static_cast<std::uint32_t>(data[at.offset(i + 1)]) << 16;
      }
    }
  } else {
    as_stored<T, C>(from, [&](auto type, std::int64_t stride) {
      const auto* const data = static_cast<const decltype(type)*>(from.data) + base + at.first * stride;
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = at.holds(i) ? widen<C>(data[at.offset(i) * stride]) : -infinity<C>();
    });
  }
}
template <typename T, typename C, int N>
__device__ __forceinline__ void widen_raw(const Logits& from, const Loaded<T, C, N>& raw, C (&x)[N]) {
  if constexpr (!std::is_same_v<T, Half>) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = raw[i];
  } else if (from.dtype == DType::f16) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = widen<C>(__ushort_as_half(static_cast<std::uint16_t>(raw[i / 2] >> i % 2 * 16)));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __uint_as_float(i % 2 ? raw[i / 2] & 0xffff0000 : raw[i / 2] << 16);
  }
}
template <typename T, typename C, int N, int Step, int Width>
__device__ __forceinline__ void load_classes(const Logits& from, std::int64_t base, const Classes<N, Step, Width>& at, C (&x)[N]) {
  Loaded<T, C, N> raw;
  load_raw<T, C>(from, base, at, raw);
  widen_raw<T>(from, raw, x);
}
template <typename T, typename C, int N, int Step, int Width>
__device__ __forceinline__ void store_classes(const Logits& to, std::int64_t base, const Classes<N, Step, Width>& at, const C (&x)[N]) {
  if constexpr (Width == 2) {
    std::uint32_t word[N / 2];
    as_stored<T, C>(to, [&](auto type, std::int64_t) {
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const Pack<decltype(type), 2> pair{{narrow<decltype(type)>(x[i]), narrow<decltype(type)>(x[i + 1])}};
        std::memcpy(&word[i / 2], &pair, sizeof(pair));
      }
    });
    auto* const data = static_cast<std::uint16_t*>(to.data) + base + at.first;
    const bool words = in_words(data, at);
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      if (words) {
        if (at.holds(i)) *reinterpret_cast<std::uint32_t*>(data + at.offset(i)) = word[i / 2];
      } else {
        if (at.holds(i)) data[at.offset(i)] = static_cast<std::uint16_t>(word[i / 2]);
        if (at.holds(i + 1)) data[at.offset(i + 1)] = static_cast<std::uint16_t>(word[i / 2] >> 16);
      }
    }
  } else {
    as_stored<T, C>(to, [&](auto type, std::int64_t stride) {
      auto* const data = static_cast<decltype(type)*>(to.data) + base + at.first * stride;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (at.holds(i)) data[at.offset(i) * stride] = narrow<decltype(type)>(x[i]);
    });
  }
}

// f(classes) for this thread's share of [begin, end), N at a time. All threads of the group come along. The way back finds in
// the caches what the way there read last.
template <typename G, int N, bool Back = false, int Width = 1, typename F>
__device__ __forceinline__ void each_classes(std::int64_t begin, std::int64_t end, F&& f) {
  constexpr std::int64_t span = N * G::lanes;
  std::int64_t c = begin + (Back && end > begin ? (end - begin - 1) / span * span : 0);
#pragma unroll 1
  for (; Back ? c >= begin && c < end : c < end; c += Back ? -span : span) f(Classes<N, G::lanes, Width>(c + Width * G::lane(), end));
}

// f(classes, values) for this thread's share, as above, where load(classes, values) has begun before the arithmetic of the turn
// before.
template <typename G, int N, bool Back, int Width, typename Values, typename Load, typename F>
__device__ __forceinline__ void each_loaded(std::int64_t begin, std::int64_t end, Load&& load, F&& f) {
  constexpr std::int64_t span = N * G::lanes;
  if (end <= begin) return;
  std::int64_t c = begin + (Back ? (end - begin - 1) / span * span : 0);
  const auto classes = [&](bool there) { return Classes<N, G::lanes, Width>(c + Width * G::lane(), there ? end : c); };
  Values next;
  load(classes(true), next);
  bool more = true;
#pragma unroll 2
  while (more) {
    const auto at = classes(true);
    const Values values = next;
    c += Back ? -span : span, more = Back ? c >= begin : c < end;
    load(classes(more), next);
    f(at, values);
  }
}

// True where x holds values of T whose classes lie together.
template <typename T>
bool holds(const Logits& x) {
  const bool fits = std::is_same_v<T, float> ? x.dtype == DType::f32 : x.dtype == DType::bf16 || (std::is_same_v<T, Half> && x.dtype == DType::f16);
  return !x.present || (fits && x.class_stride == 1);
}

}  // namespace fedkern::cuda
