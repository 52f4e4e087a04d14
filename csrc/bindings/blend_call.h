// Calls of blend as Python makes them, from checked tensors; None for an absent one.
#pragma once

#include "exchange.h"
#include "fedkern/blend.h"

namespace fedkern {

// The maps of one call as rows, each the samples of one map. Kernels walk a sample in the order of memory, so samples must be
// dense, in any order of axes that all maps share. `fits` says whether they are, and whether an index has no gaps.
class Maps {
 public:
  explicit Maps(py::handle first) : first_(checked_view(first.ptr())) {
    if (!first_.floating(dtype)) throw py::type_error("fedkern's kernels take floating tensors");
    for (int d = 1; d < first_.dims; ++d) size *= first_.shape[d];
    std::int64_t dense = 1;  // elements of the axes that follow each other, from the innermost one on
    for (int d = 1; size && d < first_.dims; ++d)
      if (first_.shape[d] != 1 && first_.strides[d] == dense) dense *= first_.shape[d], d = 0;
    fits = !size || dense == size;
  }

  Rows first() const { return rows_of(first_); }

  // `count`, where given, receives the number of rows.
  Rows rows(py::handle given, std::int64_t* count = nullptr) {
    if (given.is_none()) return {nullptr, 0, false};
    const TensorView map = checked_view(given.ptr());
    if (count) *count = map.shape[0];
    for (int d = 1; d < first_.dims; ++d)
      if (size && map.shape[d] != 1 && map.strides[d] != first_.strides[d]) fits = false;
    return rows_of(map);
  }

  Optional<const std::int64_t> index(py::handle given) {
    if (given.is_none()) return {};
    const TensorView index = checked_view(given.ptr());
    if (!index.contiguous()) fits = false;
    return {static_cast<const std::int64_t*>(index.data), true};
  }

  DType dtype = DType::f32;
  std::int64_t size = 1;  // elements of a sample
  bool fits;
  std::int64_t count() const { return first_.shape[0]; }
  int gpu() const { return first_.gpu(); }

 private:
  // The stride of a single row may be anything.
  Rows rows_of(const TensorView& map) const { return {map.data, map.shape[0] > 1 ? map.strides[0] : size, true}; }

  TensorView first_;
};

// Contiguous values.
template <typename T>
Optional<T> optional_values(py::handle given) {
  if (given.is_none()) return {};
  return {static_cast<T*>(checked_view(given.ptr()).data), true};
}

// `maps` are of foreground. What is left open is alpha, and who works.
inline BlendForward parse_forward(Maps& maps, py::handle background, py::handle index, py::handle out, std::int64_t& background_rows) {
  BlendForward call{};
  call.dtype = maps.dtype, call.rows = maps.count(), call.size = maps.size;
  call.foreground = maps.first(), call.background = maps.rows(background, &background_rows), call.out = maps.rows(out);
  call.index = maps.index(index);
  return call;
}

// `maps` are of grad. What is left open are workspaces too.
inline BlendBackward parse_backward(Maps& maps, py::handle foreground, py::handle background, py::handle index,
                                    std::int64_t background_rows, py::handle grad_foreground, py::handle grad_background,
                                    py::handle grad_alpha) {
  BlendBackward call{};
  call.dtype = maps.dtype, call.rows = maps.count(), call.background_rows = background_rows, call.size = maps.size;
  call.grad = maps.first(), call.foreground = maps.rows(foreground), call.background = maps.rows(background);
  call.grad_foreground = maps.rows(grad_foreground), call.grad_background = maps.rows(grad_background);
  call.grad_alpha = optional_values<double>(grad_alpha);
  call.index = maps.index(index);
  return call;
}

}  // namespace fedkern
