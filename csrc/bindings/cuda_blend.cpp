#include <algorithm>

#include "blend_call.h"
#include "fedkern/blend_cuda.h"

namespace fedkern {
namespace {

// alpha: fp64.
Alpha weights(const Maps& maps, py::handle alpha, double value) {
  if (alpha.is_none()) return {{}, 0, value};
  const TensorView given = maps.numbers(alpha, maps.count(), false, true);
  require(given.bits == 64, "alpha must be float64");
  return {{static_cast<const double*>(given.data), true}, given.strides[0], value};
}

// False, and nothing done, where the maps or the index do not lie as kernels read them.
bool forward(py::handle foreground, py::handle background, py::handle index, py::handle alpha, double value, py::handle out,
             std::uintptr_t stream) {
  Maps maps(foreground);
  std::int64_t background_rows = 0;
  BlendForward call = parse_forward(maps, background, index, out, background_rows);
  if (!maps.fits) return false;
  call.alpha = weights(maps, alpha, value);
  cuda::blend_forward(call, background_rows, maps.gpu(), pointer<void>(stream));
  return true;
}

// foreground and background are read for grad_alpha alone: blend_chunks(elements of a sample) sums for each sample. start and order:
// which samples use each background row (blend.h), for grad_background where there is an index.
bool backward(py::handle grad, py::handle foreground, py::handle background, py::handle index, py::handle alpha, double value,
              std::int64_t background_rows, py::handle grad_foreground, py::handle grad_background, py::handle grad_alpha,
              py::handle start, py::handle order, std::uintptr_t stream) {
  Maps maps(grad);
  BlendBackward call = parse_backward(maps, foreground, background, index, background_rows, grad_foreground, grad_background, py::none());
  call.grad_alpha = maps.optional_values<double>(grad_alpha, call.rows * blend_chunks(maps.size));
  require(!call.grad_alpha.present || (call.foreground.present && call.background.present), "the gradient of alpha reads both maps");
  if (!maps.fits) return false;
  call.alpha = weights(maps, alpha, value);
  call.start = maps.optional_values<const std::int64_t>(start, background_rows + 1);
  const auto users = maps.optional_values<const std::int64_t>(order, call.rows);
  call.order = users.data;
  require(!call.index.present || !call.grad_background.present || (call.start.present && users.present), "the gradient of background needs its rows' users");
  cuda::blend_backward(call, maps.gpu(), pointer<void>(stream));
  return true;
}

// index [B], start [N + 1] and order [B], int64 and contiguous.
void users(py::handle index, py::handle start, py::handle order, std::uintptr_t stream) {
  const TensorView from = checked_view(index.ptr()), starts = checked_view(start.ptr()), to = checked_view(order.ptr());
  for (const TensorView& x : {from, starts, to})
    require(x.code == 0 && x.bits == 64 && x.dims == 1 && x.contiguous() && x.same_device(from), "index, start and order must be int64 without gaps");
  require(to.shape[0] == from.shape[0] && starts.shape[0] > 0, "start and order do not fit the index");
  cuda::blend_users(static_cast<const std::int64_t*>(from.data), from.shape[0], static_cast<std::int64_t*>(starts.data), starts.shape[0] - 1,
                    static_cast<std::int64_t*>(to.data), from.gpu(), pointer<void>(stream));
}

// images and out [B, C, H, W], boxes [B, n, 4] in fp64, fill [1 or B, C]; boxes and fill are contiguous. Serves every layout: true.
bool fill_boxes(py::handle images, py::handle boxes, py::handle fill, bool keep, py::handle out, std::uintptr_t stream) {
  const BoxTensors tensors(images, boxes, fill, out, 64);
  const TensorView &from = tensors.images, &box = tensors.boxes, &colour = tensors.fill, &to = tensors.out;
  cuda::FillBoxes call{from.bits / 8, from.shape[0], box.shape[1], from.shape[1], from.shape[2], from.shape[3], {}, {}, from.data,
                       static_cast<const double*>(box.data), colour.data, colour.shape[0] > 1 ? from.shape[1] : 0, keep, to.data};
  std::copy_n(from.strides, 4, call.stride);
  std::copy_n(to.strides, 4, call.out_stride);
  cuda::fill_boxes(call, from.gpu(), pointer<void>(stream));
  return true;
}

}  // namespace

void bind_cuda_blend(py::module_& module) {
  module.def("blend_forward", forward);
  module.def("blend_backward", backward);
  module.attr("blend_few") = cuda::kBlendFew;
  module.def("blend_chunks", blend_chunks);
  module.def("blend_users", users);
  module.def("fill_boxes", fill_boxes);
}

}  // namespace fedkern
