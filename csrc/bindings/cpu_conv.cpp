// fedkern._cpu.conv_*: a convolution with batch or group norm, and pool_*: one with bias and pooling; forward and backward.
#include "conv_call.h"

namespace fedkern {
namespace {

float* conv_vector(py::handle given, std::int64_t size) {
  if (given.is_none()) return nullptr;
  const TensorView seen = checked_view(given.ptr());
  require(is_vector(seen, size), "conv's vectors are float32 and contiguous, one number for each channel");
  return static_cast<float*>(seen.data);
}

// Memory of so many floats, in any dense shape.
float* conv_memory(py::handle given, std::int64_t size) {
  if (given.is_none()) return nullptr;
  const TensorView seen = checked_view(given.ptr());
  std::int64_t all = 1;
  for (int d = 0; d < seen.dims; ++d) all *= seen.shape[d];
  require(is_f32(seen) && (seen.contiguous() || seen.channels_last()) && all == size, "what conv keeps has another size than its call");
  return static_cast<float*>(seen.data);
}

float* like(py::handle given, const TensorView& other) {
  if (given.is_none()) return nullptr;
  const TensorView seen = checked_view(given.ptr());
  require(is_f32(seen) && seen.same_shape(other) && (other.channels_last() ? seen.channels_last() : seen.contiguous()), "a gradient has another layout");
  return static_cast<float*>(seen.data);
}

float* conv_map(py::handle given, const ConvShape& s, std::int64_t channels, bool pool) {
  if (given.is_none()) return nullptr;
  const TensorView seen = checked_view(given.ptr());
  require(is_map(seen, s, channels, pool) && seen.channels_last(), "conv's maps are float32 and channels-last, of its call's shape");
  return static_cast<float*>(seen.data);
}

std::int64_t conv_channels(py::handle x, py::handle weight, int stride) { return kept_channels(conv_shape(checked_view(x.ptr()), checked_view(weight.ptr()), stride), 0); }

ConvNorm conv_call_of(py::handle x, py::handle weight, double eps, int stride, bool relu, int pool, bool training, int groups, int threads) {
  const TensorView from = checked_view(x.ptr()), taps = checked_view(weight.ptr());
  const ConvShape s = conv_shape(from, taps, stride);
  require((pool == 1 || pool == 2) && kept_channels(s, groups), "conv's kernel does not take a call of this shape");
  const bool last = taps.channels_last();
  return {s, conv_map(x, s, s.in, false), static_cast<const float*>(taps.data), s.taps() * s.in, last ? 1 : s.taps(), last ? s.in : 1, eps, relu, pool == 2, training && !groups,
          threads, groups};
}

// What a forward pass leaves to the backward pass.
template <typename Pass>
void keep(Pass& a, py::handle y, py::handle raw, py::handle saved) {
  const std::int64_t channels = kept_channels(a.call.shape, a.call.groups);
  a.y = conv_memory(y, a.call.shape.result().positions() * channels), a.raw = conv_memory(raw, a.call.positions_of_out() * channels);
  a.saved = conv_memory(saved, (a.call.groups ? 5 * a.call.shape.batch : 4) * channels);
}

bool conv_forward(py::handle x, py::handle weight, py::handle scale, py::handle shift, py::handle bias, py::handle mean, py::handle variance, py::handle residual,
             py::handle out, py::handle y, py::handle raw, py::handle saved, double momentum, double eps, int stride, bool relu, int pool, bool update, bool training,
             int groups, int threads) {
  ConvForward a{};
  a.call = conv_call_of(x, weight, eps, stride, relu, pool, training, groups, threads);
  const ConvShape &s = a.call.shape, r = s.result();
  a.scale = conv_vector(scale, s.out), a.shift = conv_vector(shift, s.out), a.bias = conv_vector(bias, s.out);
  a.mean = conv_vector(mean, s.out), a.variance = conv_vector(variance, s.out);
  a.residual = conv_map(residual, r, s.out, false), a.out = conv_map(out, r, s.out, a.call.pool);
  keep(a, y, raw, saved);
  a.momentum = momentum, a.update = update && a.call.training;
  require(a.scale && a.shift && a.out && a.saved, "conv needs scale, shift, and where its results go");
  require((a.mean && a.variance) || groups || (training && !update), "conv's running statistics are missing");
  require(groups || !a.bias, "conv has a bias beside a group norm only");
  require(!a.call.pool || (!a.residual && !a.raw == !a.y), "conv pools no residual, and keeps what it pools with its convolution");
  require(!a.call.training || r.positions() > 1, "conv's statistics need more than one value for each channel");
  py::gil_scoped_release release;
  return conv_kernels().forward(a);
}

bool conv_backward(py::handle grad, py::handle x, py::handle weight, py::handle y, py::handle raw, py::handle saved, py::handle out, py::handle to_x,
              py::handle to_weight, py::handle to_scale, py::handle to_shift, py::handle to_bias, py::handle to_residual, int stride, bool relu, int pool, bool training,
              int groups, int threads) {
  ConvBackward a{};
  a.call = conv_call_of(x, weight, 0, stride, relu, pool, training, groups, threads);
  const ConvShape &s = a.call.shape, r = s.result();
  a.grad = conv_map(grad, r, s.out, a.call.pool), keep(a, y, raw, saved);
  a.out = conv_map(out, r, s.out, false), a.to_x = conv_map(to_x, s, s.in, false);
  a.to_scale = conv_vector(to_scale, s.out), a.to_shift = conv_vector(to_shift, s.out), a.to_bias = conv_vector(to_bias, s.out);
  a.to_residual = conv_map(to_residual, r, s.out, false);
  a.to_weight = like(to_weight, checked_view(weight.ptr()));
  require(a.grad && a.y && a.saved && (!a.call.pool || (a.raw && !a.out && !a.to_residual)), "conv's backward pass lacks what its forward pass kept");
  py::gil_scoped_release release;
  return conv_kernels().backward(a);
}

ConvPool pool_call_of(const TensorView& x, const TensorView& weight, int padding, bool planar, bool relu, int threads) {
  const PoolShape s = pool_shape(x, weight, padding);
  require(conv_kernels().pool_fits && conv_kernels().pool_fits(s), "conv_pool's kernel does not take a call of this shape");
  const bool last = weight.channels_last();
  return {s, static_cast<const float*>(x.data), static_cast<const float*>(weight.data), s.taps() * s.in, last ? 1 : s.taps(), last ? s.in : 1, !x.channels_last(),
          planar, relu, threads};
}

// The pooled map of a call, in either layout.
TensorView pooled_map(py::handle given, const TensorView& x, const TensorView& weight, int padding) {
  const TensorView seen = checked_view(given.ptr());
  const PoolShape s = pool_shape(x, weight, padding);
  require(is_map(seen, {s.batch, s.high() / 2, s.wide() / 2, s.out, s.out}, s.out, false) && (seen.contiguous() || seen.channels_last()),
          "conv_pool's maps are float32 and contiguous or channels-last, of its call's shape");
  return seen;
}

std::uint8_t* chosen_of(py::handle given, const PoolShape& s) {
  const TensorView seen = checked_view(given.ptr());
  require(seen.code == 1 && seen.bits == 8 && seen.dims == 3 && seen.contiguous() && seen.shape[0] == s.batch && seen.shape[1] == s.windows() &&
              seen.shape[2] == (s.out + 7) / 8 * 8,
          "what conv_pool keeps has another size than its call");
  return static_cast<std::uint8_t*>(seen.data);
}

bool pool_forward(py::handle x, py::handle weight, py::handle bias, py::handle out, py::handle chosen, int padding, bool relu, int threads) {
  const TensorView map = checked_view(x.ptr()), taps = checked_view(weight.ptr()), to = pooled_map(out, map, taps, padding);
  PoolForward a{pool_call_of(map, taps, padding, !to.channels_last(), relu, threads), nullptr, static_cast<float*>(to.data), nullptr};
  a.bias = conv_vector(bias, a.call.shape.out), a.chosen = chosen_of(chosen, a.call.shape);
  py::gil_scoped_release release;
  return conv_kernels().pool_forward(a);
}

bool pool_backward(py::handle grad, py::handle x, py::handle weight, py::handle chosen, py::handle to_x, py::handle to_weight, py::handle to_bias, int padding, bool relu,
                   int threads) {
  const TensorView map = checked_view(x.ptr()), taps = checked_view(weight.ptr()), from = pooled_map(grad, map, taps, padding);
  PoolBackward a{pool_call_of(map, taps, padding, !from.channels_last(), relu, threads), static_cast<const float*>(from.data), nullptr, nullptr, nullptr, nullptr};
  a.chosen = chosen_of(chosen, a.call.shape), a.to_x = like(to_x, map), a.to_weight = like(to_weight, taps), a.to_bias = conv_vector(to_bias, a.call.shape.out);
  py::gil_scoped_release release;
  return conv_kernels().pool_backward(a);
}

}  // namespace

void bind_conv(py::module_& module) {
  module.def("conv_channels", conv_channels);
  module.def("conv_forward", conv_forward);
  module.def("conv_backward", conv_backward);
  module.def("pool_forward", pool_forward);
  module.def("pool_backward", pool_backward);
}

}  // namespace fedkern
