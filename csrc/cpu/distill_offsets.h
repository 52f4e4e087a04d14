// What two rows of logits are moved by before their difference is taken.
#pragma once

#include "fedkern/simd_math.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// log Q - log P of a class is a difference of logits, q - p, less that of their maxima. Between nearly equal rows the
// difference itself keeps all digits. Rows that lie far apart would leave it the digits of their distance: there the one
// with the larger maximum is moved by a multiple of 8, which is exact.
template <typename T>
struct Offsets {
  Vec<T> p, q, shift;  // log Q - log P = ((q - offset q) - (p - offset p) - shift) / T - the logarithms of the sums

  FEDKERN_INLINE Offsets(Vec<T> maximum_p, Vec<T> maximum_q) {
    using V = Vec<T>;
    const V zero = V::set(0), raw = maximum_q - maximum_p;
    const V distance = round(raw * V::set(T(0.125))) * V::set(8);
    const V move = select(abs(raw) < V::set(T(1e30)), distance, zero);  // a row of masked classes alone stays
    const Mask<T> moves_q = abs(maximum_p) < abs(maximum_q);
    q = select(moves_q, move, zero);
    p = select(moves_q, zero, zero - move);
    shift = (maximum_q - q) - (maximum_p - p);
  }
};

// What corrects the mean of such differences: nothing where that is past all bounds already.
template <typename T>
FEDKERN_INLINE Vec<T> bounded(Vec<T> x) {
  return select(abs(x) < Vec<T>::set(static_cast<T>(__builtin_inf())), x, Vec<T>::set(0));
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
