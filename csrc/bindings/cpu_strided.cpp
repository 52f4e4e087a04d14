// fedkern._cpu.strided_*: grouped 4x4 convolution of stride 2, forward and backward.
#include "strided_call.h"

namespace fedkern {
namespace {

StridedConv strided_call_of(py::handle x, py::handle weight, int groups, int threads) {
  const TensorView map = checked_view(x.ptr()), taps = checked_view(weight.ptr());
  const StridedShape s = strided_shape(map, taps, groups);
  require(map.channels_last() && strided_kernels().fits && strided_kernels().fits(s), "strided_conv's kernel does not take a call of this shape");
  return {s, static_cast<const float*>(map.data), static_cast<const float*>(taps.data), threads};
}

float* strided_memory(py::handle given, std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, bool last) {
  if (given.is_none()) return nullptr;
  const TensorView seen = checked_view(given.ptr());
  require(seen.dims == 4 && seen.code == 2 && seen.bits == 32 && seen.device_type == TensorView::kCpu && seen.shape[0] == batch && seen.shape[1] == channels &&
              seen.shape[2] == height && seen.shape[3] == width && (last ? seen.channels_last() : seen.contiguous()),
          "strided_conv's results and gradients are float32, of its call's shapes, maps channels-last");
  return static_cast<float*>(seen.data);
}

float* strided_result(py::handle y, const StridedShape& s) { return strided_memory(y, s.batch, s.groups * s.out, s.high(), s.wide(), true); }

bool strided_forward(py::handle x, py::handle weight, py::handle y, int groups, int threads) {
  const StridedConv a = strided_call_of(x, weight, groups, threads);
  float* const to = strided_result(y, a.shape);
  require(to, "strided_conv needs where its result goes");
  py::gil_scoped_release release;
  return strided_kernels().forward(a, to);
}

bool strided_backward(py::handle grad, py::handle x, py::handle weight, py::handle to_x, py::handle to_weight, int groups, int threads) {
  const StridedConv a = strided_call_of(x, weight, groups, threads);
  const StridedShape& s = a.shape;
  const float* const from = strided_result(grad, s);
  float* const map = strided_memory(to_x, s.batch, s.groups * s.in, s.height, s.width, true);
  float* const taps = strided_memory(to_weight, s.groups * s.out, s.in, 4, 4, false);
  require(from, "strided_conv's backward pass needs a gradient");
  py::gil_scoped_release release;
  return strided_kernels().backward(a, from, map, taps);
}

}  // namespace

void bind_strided(py::module_& module) {
  module.def("strided_forward", strided_forward);
  module.def("strided_backward", strided_backward);
}

}  // namespace fedkern
