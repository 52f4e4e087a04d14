// Calls of blend as Python makes them; None for an absent tensor.
#pragma once

#include <type_traits>

#include "exchange.h"
#include "fedkern/blend.h"

namespace fedkern {

// The maps of one call as rows, each the samples of one map. Kernels walk a sample in the order of memory, so samples must be
// dense, in any order of axes that all maps share. `fits` says whether they are, and whether an index has no gaps.
class Maps {
 public:
  explicit Maps(py::handle first) : first_(checked_view(first.ptr())) {
    if (!first_.floating(dtype)) throw py::type_error("fedkern's kernels take floating tensors");
    require(first_.dims > 0, "maps have a batch axis");
    for (int d = 1; d < first_.dims; ++d) size *= first_.shape[d];
    std::int64_t dense = 1;  // elements of the axes that follow each other, from the innermost one on
    for (int d = 1; size && d < first_.dims; ++d)
      if (first_.shape[d] != 1 && first_.strides[d] == dense) dense *= first_.shape[d], d = 0;
    fits = !size || dense == size;
  }

  Rows first() const { return rows_of(first_); }

  // Maps of the first one's samples, `count` of them.
  Rows rows(py::handle given, std::int64_t count) {
    if (given.is_none()) return {nullptr, 0, false};
    const TensorView map = checked_view(given.ptr());
    DType other;
    require(map.same_shape(first_, 1) && map.shape[0] == count, "maps of blend differ in shape");
    require(map.floating(other) && other == dtype && map.same_device(first_), "maps of blend differ in dtype or device");
    for (int d = 1; d < first_.dims; ++d)
      if (size && map.shape[d] != 1 && map.strides[d] != first_.strides[d]) fits = false;
    return rows_of(map);
  }

  Optional<const std::int64_t> index(py::handle given) {
    if (given.is_none()) return {};
    const TensorView index = checked_view(given.ptr());
    require(index.code == 0 && index.bits == 64 && index.dims == 1 && index.shape[0] == count() && index.same_device(first_), "index must be int64 [B]");
    if (!index.contiguous()) fits = false;
    return {static_cast<const std::int64_t*>(index.data), true};
  }

  // Numbers [elements] of `bits` bits, integers or floating.
  TensorView numbers(py::handle given, std::int64_t elements, bool integers, bool any_stride = false) const {
    const TensorView values = checked_view(given.ptr());
    require(values.code == (integers ? 0 : 2) && values.dims == 1 && values.shape[0] == elements && values.same_device(first_),
            "a vector of blend has another length, dtype or device than its maps need");
    require(any_stride || values.contiguous(), "a vector of blend has gaps");
    return values;
  }
  // Contiguous values of 64 bits, or None.
  template <typename T>
  Optional<T> optional_values(py::handle given, std::int64_t elements) const {
    if (given.is_none()) return {};
    const TensorView values = numbers(given, elements, std::is_integral_v<T>);
    require(values.bits == 64, "a vector of blend must be int64 or float64");
    return {static_cast<T*>(values.data), true};
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

// `maps` are of foreground. What is left open is alpha, and who works.
inline BlendForward parse_forward(Maps& maps, py::handle background, py::handle index, py::handle out, std::int64_t& background_rows) {
  BlendForward call{};
  const TensorView behind = checked_view(background.ptr());
  background_rows = behind.dims ? behind.shape[0] : 0;
  require(!index.is_none() || background_rows == maps.count(), "without an index, background has as many rows as foreground");
  call.dtype = maps.dtype, call.rows = maps.count(), call.size = maps.size;
  call.foreground = maps.first(), call.background = maps.rows(background, background_rows), call.out = maps.rows(out, call.rows);
  call.index = maps.index(index);
  return call;
}

// `maps` are of grad. What is left open are workspaces too.
inline BlendBackward parse_backward(Maps& maps, py::handle foreground, py::handle background, py::handle index,
                                    std::int64_t background_rows, py::handle grad_foreground, py::handle grad_background,
                                    py::handle grad_alpha) {
  BlendBackward call{};
  require(background_rows >= 0 && (!index.is_none() || background_rows == maps.count()), "without an index, background has as many rows as the gradient");
  call.dtype = maps.dtype, call.rows = maps.count(), call.background_rows = background_rows, call.size = maps.size;
  call.grad = maps.first(), call.foreground = maps.rows(foreground, call.rows), call.background = maps.rows(background, background_rows);
  call.grad_foreground = maps.rows(grad_foreground, call.rows), call.grad_background = maps.rows(grad_background, background_rows);
  call.grad_alpha = maps.optional_values<double>(grad_alpha, call.rows);
  require(!call.grad_alpha.present || (call.foreground.present && call.background.present), "the gradient of alpha reads both maps");
  call.index = maps.index(index);
  return call;
}

// Tensors of fill_boxes: images and out [B, C, H, W], boxes [B, n, 4] of at least `bits` bits, fill [1 or B, C].
struct BoxTensors {
  TensorView images, boxes, fill, out;

  BoxTensors(py::handle images_, py::handle boxes_, py::handle fill_, py::handle out_, int bits)
      : images(checked_view(images_.ptr())), boxes(checked_view(boxes_.ptr())), fill(checked_view(fill_.ptr())), out(checked_view(out_.ptr())) {
    const auto alike = [&](const TensorView& x) { return x.code == images.code && x.bits == images.bits && x.same_device(images); };
    require(images.dims == 4 && out.same_shape(images) && alike(out), "images and results must be [B, C, H, W] of one dtype and device");
    require(boxes.dims == 3 && boxes.shape[0] == images.shape[0] && boxes.shape[2] == 4, "boxes must be [B, n, 4]");
    require(boxes.code == 2 && boxes.bits >= bits && boxes.bits >= 32 && boxes.contiguous() && boxes.same_device(images), "boxes must be contiguous numbers");
    require(fill.dims == 2 && (fill.shape[0] == 1 || fill.shape[0] == images.shape[0]) && fill.shape[1] == images.shape[1] && fill.contiguous() && alike(fill),
            "fill must be [1 or B, C], contiguous and of the images' dtype");
  }
};

}  // namespace fedkern
