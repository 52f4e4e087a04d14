// Aligned memory whose size depends on the number of vectors, or that a small stack cannot hold: one piece for each worker of
// a parallel_for, allocated before it.
#pragma once

#include <cstdint>
#include <new>

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename C>
class Scratch {
 public:
  explicit Scratch(std::int64_t count, int workers = 1)
      : each_((count + kLine - 1) / kLine * kLine),
        data_(static_cast<C*>(::operator new(static_cast<std::size_t>(each_ * workers) * sizeof(C), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* get(int worker = 0) const { return data_ + worker * each_; }

 private:
  static constexpr std::int64_t kLine = 64 / static_cast<std::int64_t>(sizeof(C));
  std::int64_t each_;
  C* data_;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
