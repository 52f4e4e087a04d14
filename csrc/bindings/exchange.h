// Tensors as Python passes them, read through the table of functions that torch.Tensor shows to C extensions (DLPack's
// exchange API): pointer, dtype, shape and strides in one call that takes a tenth of the time of asking in Python, and no
// torch header, so that one build serves every torch.
#pragma once

#include "bindings.h"

namespace fedkern {

// DLPack's, as far as it is needed here.
struct TensorView {
  void* data;
  std::int32_t device_type, device_index, dims;
  std::uint8_t code, bits;
  std::uint16_t vector;
  std::int64_t *shape, *strides;
  std::uint64_t byte_offset;

  // As numbered by DLPack.
  static constexpr int kCpu = 1, kCuda = 2;
  bool same_device(const TensorView& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
  // For a CUDA core's device guard; 0 where the core runs emulated, on the CPU.
  int gpu() const { return device_type == kCuda ? device_index : 0; }
  bool empty() const {
    for (int d = 0; d < dims; ++d)
      if (!shape[d]) return true;
    return false;
  }
  bool same_shape(const TensorView& other, int from = 0) const {
    if (dims != other.dims) return false;
    for (int d = from; d < dims; ++d)
      if (shape[d] != other.shape[d]) return false;
    return true;
  }
  bool contiguous() const {
    if (empty()) return true;
    std::int64_t expected = 1;
    for (int d = dims - 1; d >= 0; --d) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  bool channels_last() const {
    std::int64_t expected = 1;
    if (dims != 4) return false;
    for (const int d : {1, 3, 2, 0}) {
      if (shape[d] != 1 && strides[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }
  // Whether it holds elements of a dtype that kernels know; which one.
  bool floating(DType& dtype) const {
    if (code == 4 && bits == 16) return dtype = DType::bf16, true;
    if (code != 2) return false;
    if (bits == 32) return dtype = DType::f32, true;
    if (bits == 64) return dtype = DType::f64, true;
    if (bits == 16) return dtype = DType::f16, true;
    return false;
  }
};
static_assert(sizeof(TensorView) == 48);

struct ExchangeTable {
  std::uint32_t major, minor;
  void *older, *allocate, *from_object, *to_object;
  int (*view)(void* object, TensorView* out);
  void* stream;
};

// What take_tensors() was given.
struct Exchange {
  int (*view)(void* object, TensorView* out) = nullptr;
  PyObject *tensor = nullptr, *parameter = nullptr;
};
inline Exchange& exchange() {
  static Exchange known;
  return known;
}

inline void take_tensors(const py::object& table, const py::object& tensor, const py::object& parameter) {
  const auto* found = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api"));
  if (!found) throw py::error_already_set();
  if (found->major != 1 || !found->view) throw py::type_error("torch.Tensor's exchange table is not that of DLPack 1");
  exchange() = {found->view, tensor.inc_ref().ptr(), parameter.inc_ref().ptr()};
}

// What kernels rely on is asked here, whoever calls: exported programs reach the operators without the checks of fedkern.ops.
inline void require(bool fits, const char* what) {
  if (!fits) throw py::value_error(what);
}

// Exactly a tensor or a parameter: what a subclass holds, its own code knows.
inline bool is_tensor(PyObject* object) {
  const PyObject* const type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == exchange().tensor || type == exchange().parameter;
}

// False with a Python error where `object`, a tensor, has no memory of its own.
inline bool view(PyObject* object, TensorView& out) { return exchange().view && exchange().view(object, &out) == 0; }

// A tensor that must have been checked, of whatever class.
inline TensorView checked_view(PyObject* object) {
  TensorView result;
  auto* const tensor = reinterpret_cast<PyTypeObject*>(exchange().tensor);
  if (!tensor || !PyObject_TypeCheck(object, tensor)) throw py::type_error("fedkern's cores take tensors; call them through fedkern.ops");
  if (!view(object, result)) throw py::error_already_set();
  if (!result.data && !result.empty())
    throw py::type_error(
        "fedkern's cores take tensors that have memory: a tensor's storage was freed (resize_(0)), or it never had one; keep it until "
        "the last backward pass that reads it, or clone() it");
  return result;
}

}  // namespace fedkern
