// Element types and the conventions every kernel shares.
//
// Kernels take plain pointers, sizes and strides (in elements, 64 bits) that the Python side has checked; they allocate
// nothing that Python could not see and know nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fedkern {

// The numbers are shared with fedkern/ops/_core/backend.py.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

inline constexpr std::size_t item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// A pointer that may be absent. `present` alone says so: a tensor without elements has the address 0. What else a call may
// lack (Logits, FuseMap, Rows) has a `present` of its own.
template <typename T>
struct Optional {
  T* data = nullptr;
  bool present = false;
};

}  // namespace fedkern
