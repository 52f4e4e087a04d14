// How a block of logits reaches the kernels and how gradients leave them: in place where element type and strides allow
// vector loads, through a small buffer otherwise.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cstdlib>
#include <type_traits>

#include "fedkern/distill.h"
#include "fedkern/simd_math.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements of the buffers: rows up to this long are read from memory once.
template <typename T>
inline constexpr std::int64_t kTile = 16384 / sizeof(T);

// Rows shorter than this leave too many lanes empty: they go one row per lane.
template <typename T>
inline constexpr std::int64_t kShortRow = Vec<T>::lanes + Vec<T>::lanes / 2;

template <typename T>
inline constexpr DType kDType = sizeof(T) == 8 ? DType::f64 : DType::f32;

// Which part of a Logits a block works on: `classes` classes of `rows` neighbouring rows.
struct Window {
  std::int64_t classes;
  int rows;
  std::int64_t inner_stride;  // between the rows
  std::int64_t buffer_line;   // between the rows in the buffer, where lanes are classes
};

// Calls f with a pointer of the right type to the window's first element. f64 logits are computed in f64 alone, and
// weights have a way of their own: an f64 tensor that comes here with T = float would be left unread.
template <typename T, typename F>
FEDKERN_INLINE void with_type(const Logits& logits, std::int64_t offset, F f) {
  switch (logits.dtype) {
    case DType::f32: f(static_cast<float*>(logits.data) + offset); break;
    case DType::bf16: f(static_cast<bf16*>(logits.data) + offset); break;
    case DType::f16: f(static_cast<f16*>(logits.data) + offset); break;
    case DType::f64:
      if constexpr (sizeof(T) == 8)
        f(static_cast<double*>(logits.data) + offset);
      else
        std::abort();
      break;
  }
}

// out[c * out_stride + r] = in[r * in_stride + c] for r < rows and c < columns, four by four in registers where there
// are so many. The last fours overlap the ones before.
inline void transpose(const float* in, std::int64_t in_stride, float* out, std::int64_t out_stride, std::int64_t rows,
                      std::int64_t columns) {
#if defined(__SSE__)
  if (rows >= 4 && columns >= 4) {
    for (std::int64_t i = 0; i < rows; i += 4) {
      const std::int64_t r = i + 4 <= rows ? i : rows - 4;
      for (std::int64_t j = 0; j < columns; j += 4) {
        const std::int64_t c = j + 4 <= columns ? j : columns - 4;
        const float* const from = in + r * in_stride + c;
        float* const to = out + c * out_stride + r;
        __m128 x0 = _mm_loadu_ps(from), x1 = _mm_loadu_ps(from + in_stride);
        __m128 x2 = _mm_loadu_ps(from + 2 * in_stride), x3 = _mm_loadu_ps(from + 3 * in_stride);
        _MM_TRANSPOSE4_PS(x0, x1, x2, x3);
        _mm_storeu_ps(to, x0), _mm_storeu_ps(to + out_stride, x1);
        _mm_storeu_ps(to + 2 * out_stride, x2), _mm_storeu_ps(to + 3 * out_stride, x3);
      }
    }
    return;
  }
#endif
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c) out[c * out_stride + r] = in[r * in_stride + c];
}

// Copies a window into `out`: [rows][buffer_line], or [classes][lanes] with copies of the first row for missing ones.
template <typename T, bool LanesAreRows>
__attribute__((noinline)) void pack(const Logits& logits, std::int64_t offset, const Window& w, T* out) {
  constexpr int lanes = Vec<T>::lanes;
  with_type<T>(logits, offset, [&](const auto* p) {
    const std::int64_t stride = logits.class_stride;
    if constexpr (!LanesAreRows) {
      for (int r = 0; r < w.rows; ++r) {
        const auto* row = p + r * w.inner_stride;
        T* line = out + r * w.buffer_line;
        std::int64_t c = 0;
        if (stride == 1)
          for (; c + lanes <= w.classes; c += lanes) Vec<T>::load(row + c).store(line + c);
        for (; c < w.classes; ++c) line[c] = static_cast<T>(widen(row[c * stride]));
      }
    } else {
      if (w.inner_stride == 1 && w.rows == lanes) {
        for (std::int64_t c = 0; c < w.classes; ++c) Vec<T>::load(p + c * stride).store(out + c * lanes);
        return;
      }
      if constexpr (std::is_same_v<decltype(p), const float*> && sizeof(T) == 4) {
        if (stride == 1 && w.rows == lanes) return transpose(p, w.inner_stride, out, lanes, lanes, w.classes);
      }
      for (int r = 0; r < lanes; ++r) {
        const auto* row = p + (r < w.rows ? r : 0) * w.inner_stride;
        for (std::int64_t c = 0; c < w.classes; ++c) out[c * lanes + r] = static_cast<T>(widen(row[c * stride]));
      }
    }
  });
}

// The way back.
template <typename T, bool LanesAreRows>
__attribute__((noinline)) void unpack(const Logits& logits, std::int64_t offset, const Window& w, const T* in) {
  constexpr int lanes = Vec<T>::lanes;
  with_type<T>(logits, offset, [&](auto* p) {
    const std::int64_t stride = logits.class_stride;
    if constexpr (!LanesAreRows) {
      for (int r = 0; r < w.rows; ++r) {
        auto* row = p + r * w.inner_stride;
        const T* line = in + r * w.buffer_line;
        std::int64_t c = 0;
        if (stride == 1)
          for (; c + lanes <= w.classes; c += lanes) Vec<T>::load(line + c).store(row + c);
        for (; c < w.classes; ++c) narrow(line[c], row[c * stride]);
      }
    } else {
      if (w.inner_stride == 1 && w.rows == lanes) {
        for (std::int64_t c = 0; c < w.classes; ++c) Vec<T>::load(in + c * lanes).store(p + c * stride);
        return;
      }
      if constexpr (std::is_same_v<decltype(p), float*> && sizeof(T) == 4) {
        if (stride == 1) return transpose(in, lanes, p, w.inner_stride, w.classes, w.rows);
      }
      for (int r = 0; r < w.rows; ++r) {
        auto* row = p + r * w.inner_stride;
        for (std::int64_t c = 0; c < w.classes; ++c) narrow(in[c * lanes + r], row[c * stride]);
      }
    }
  });
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
