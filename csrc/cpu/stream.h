// Writing past the caches: results that do not fit there would only push out what is still to be read.
#pragma once

#include <algorithm>
#include <cstring>

#include "fedkern/tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Writes `n` elements past the caches, whole lines of them.
template <typename T>
FEDKERN_INLINE void stream_row(const T* from, std::int64_t n, T* to) {
#if defined(FEDKERN_ISA_avx512) || defined(FEDKERN_ISA_avx2)
  constexpr std::int64_t line = 64 / sizeof(T);
  const std::int64_t offset = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(to) % 64 / sizeof(T));
  const std::int64_t head = std::min(n, offset ? line - offset : 0);
  std::memcpy(to, from, head * sizeof(T));
  std::int64_t i = head;
  for (; i + line <= n; i += line) {
#if defined(FEDKERN_ISA_avx512)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    const __m256i* source = reinterpret_cast<const __m256i*>(from + i);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i), _mm256_loadu_si256(source));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i) + 1, _mm256_loadu_si256(source + 1));
#endif
  }
  std::memcpy(to + i, from + i, (n - i) * sizeof(T));
#else
  std::memcpy(to, from, n * sizeof(T));
#endif
}
FEDKERN_INLINE void finish_streams() {
#if defined(FEDKERN_ISA_avx512) || defined(FEDKERN_ISA_avx2)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
