#include <algorithm>
#include <array>

#include "blend_rows.h"
#include "fedkern/blend_cuda.h"

namespace fedkern {
namespace {

void forward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t foreground,
             std::int64_t foreground_stride, std::uintptr_t background, std::int64_t background_stride, const OptionalAddress& index,
             const OptionalAddress& alpha, std::int64_t alpha_stride, double alpha_value, std::uintptr_t out, int device,
             std::uintptr_t stream) {
  const BlendForward call{static_cast<DType>(dtype), rows, size, {pointer<void>(foreground), foreground_stride},
                          {pointer<void>(background), background_stride}, {pointer<void>(out), size},
                          optional_pointer<const std::int64_t>(index), {optional_pointer<const double>(alpha), alpha_stride, alpha_value}, 1};
  cuda::blend_forward(call, background_rows, device, pointer<void>(stream));
}

// order: [rows], given with `start`.
void backward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t grad, std::int64_t grad_stride,
              const OptionalAddress& foreground, std::int64_t foreground_stride, const OptionalAddress& background,
              std::int64_t background_stride, const OptionalAddress& index, const OptionalAddress& alpha, std::int64_t alpha_stride,
              double alpha_value, const OptionalAddress& grad_foreground, const OptionalAddress& grad_background,
              const OptionalAddress& grad_alpha, const OptionalAddress& start, const OptionalAddress& order, int device,
              std::uintptr_t stream) {
  const BlendBackward call{static_cast<DType>(dtype), rows, background_rows, size, {pointer<void>(grad), grad_stride},
                           optional_rows(foreground, foreground_stride), optional_rows(background, background_stride),
                           optional_pointer<const std::int64_t>(index), {optional_pointer<const double>(alpha), alpha_stride, alpha_value},
                           optional_rows(grad_foreground, size), optional_rows(grad_background, size), optional_pointer<double>(grad_alpha),
                           nullptr, optional_pointer<const std::int64_t>(start), pointer<const std::int64_t>(order.value_or(0)), 1};
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
