// Aligned memory for the length of a chunk, where its size depends on the number of vectors.
#pragma once

#include <cstdint>
#include <new>

#include "fedkern/simd.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename C>
class Scratch {
 public:
  explicit Scratch(std::int64_t count)
      : data_(static_cast<C*>(::operator new(static_cast<std::size_t>(count) * sizeof(C), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  C* get() const { return data_; }

 private:
  C* data_;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
