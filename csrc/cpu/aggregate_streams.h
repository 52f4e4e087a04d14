// How many vectors are read side by side.
//
// Loops over them are unrolled (#pragma GCC unroll 10) so that every vector has load instructions of its own: prefetchers
// tell streams apart by the instruction that loads. Where all come through the same loads, whether they are followed
// depends on how far apart the vectors lie, and where they are not it takes three to four times as long.
#pragma once

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Memory delivers up to this many at the speed of a copy; more of them at once come at two thirds of it.
constexpr int kStreams = 10;

// Keeps the compiler from loading a step's last lines first, which prefetchers do not take for an ascending stream.
FEDKERN_INLINE void keep_order() {
#if defined(__GNUC__)
  asm volatile("" ::: "memory");
#endif
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
