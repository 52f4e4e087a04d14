#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "bindings.h"
#include "fedkern/blend_cuda.h"

namespace fedkern {
namespace {

void forward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t foreground,
             std::int64_t foreground_stride, std::uintptr_t background, std::int64_t background_stride, std::uintptr_t index,
             std::uintptr_t alpha, std::int64_t alpha_stride, double alpha_value, std::uintptr_t out, int device, std::uintptr_t stream) {
  const BlendForward call{static_cast<DType>(dtype), rows, size, {pointer<void>(foreground), foreground_stride},
                          {pointer<void>(background), background_stride}, {pointer<void>(out), size},
                          pointer<const std::int64_t>(index), {pointer<const double>(alpha), alpha_stride, alpha_value}, 1};
  cuda::blend_forward(call, background_rows, device, pointer<void>(stream));
}

void backward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t grad, std::int64_t grad_stride,
              std::uintptr_t foreground, std::int64_t foreground_stride, std::uintptr_t background, std::int64_t background_stride,
              std::uintptr_t index, std::uintptr_t alpha, std::int64_t alpha_stride, double alpha_value, std::uintptr_t grad_foreground,
              std::uintptr_t grad_background, std::uintptr_t grad_alpha, std::uintptr_t start, std::uintptr_t order, int device,
              std::uintptr_t stream) {
  const BlendBackward call{static_cast<DType>(dtype), rows, background_rows, size, {pointer<void>(grad), grad_stride},
                           {pointer<void>(foreground), foreground_stride}, {pointer<void>(background), background_stride},
                           pointer<const std::int64_t>(index), {pointer<const double>(alpha), alpha_stride, alpha_value},
                           {pointer<void>(grad_foreground), size}, {pointer<void>(grad_background), size}, pointer<double>(grad_alpha),
                           nullptr, pointer<const std::int64_t>(start), pointer<const std::int64_t>(order), 1};
  cuda::blend_backward(call, device, pointer<void>(stream));
}

void fill_boxes(std::int64_t item, const std::array<std::int64_t, 5>& sizes, const std::array<std::int64_t, 4>& stride,
                const std::array<std::int64_t, 4>& out_stride, std::uintptr_t images, std::uintptr_t box, std::uintptr_t fill,
                std::int64_t fill_stride, bool keep, std::uintptr_t out, int device, std::uintptr_t stream) {
  const auto [batch, boxes, channels, height, width] = sizes;
  cuda::FillBoxes call{item, batch, boxes, channels, height, width, {}, {}, pointer<const void>(images), pointer<const double>(box),
                       pointer<const void>(fill), fill_stride, keep, pointer<void>(out)};
  std::copy(stride.begin(), stride.end(), call.stride);
  std::copy(out_stride.begin(), out_stride.end(), call.out_stride);
  cuda::fill_boxes(call, device, pointer<void>(stream));
}

}  // namespace

void bind_cuda_blend(py::module_& module) {
  module.def("blend_forward", forward);
  module.def("blend_backward", backward);
  module.def("fill_boxes", fill_boxes);
}

}  // namespace fedkern
