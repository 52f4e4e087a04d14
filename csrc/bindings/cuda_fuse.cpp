// fedkern._cuda.fuse_*: the functions and arguments of fedkern._cpu, with the stream at the end.
#include <numeric>
#include <stdexcept>
#include <vector>

#include "fedkern/fuse_cuda.h"
#include "fuse_call.h"

namespace fedkern {
namespace {

cuda::FeatureMap map_of(const MapView& x) { return {x.tensor.data, x.batch_stride(), x.channel_stride(), x.step}; }

cuda::FuseCall call_of(const MapView& one, bool relu, bool mean, std::size_t maps) {
  if (mean && maps > cuda::kMostMaps) throw std::invalid_argument("a mean of more maps than one launch takes");
  return {one.dtype, one.batch(), one.positions, relu, mean, {}, {}, {}, {}, {}};
}

// False where a vector has gaps, or another dtype than kernels read beside such maps.
bool read_numbers(py::handle given, const MapView& map, std::int64_t channels, cuda::ChannelNumbers& to) {
  if (given.is_none()) return true;
  const TensorView vector = checked_view(given.ptr());
  require(vector.dims == 1 && vector.shape[0] == channels && vector.same_device(map.tensor), "scale and shift have a number for each channel of all maps");
  to.data = vector.data, to.present = true;
  return vector.floating(to.dtype) && vector.contiguous() && (to.dtype != DType::f64 || map.dtype == DType::f64);
}

// False where no single step leads through a map's positions.
bool read_maps(const py::sequence& given, const MapView& beside, cuda::FuseCall& call, std::vector<std::int64_t>& channels) {
  for (const py::handle x : given) {
    const MapView view(x);
    view.beside(beside);
    if (!view.even) return false;
    call.features.push_back(map_of(view));
    channels.push_back(view.channels());
  }
  return true;
}

// False, and nothing is done, where a map or a vector cannot be read as it is. Maps of any layout are: `last` is for fedkern._cpu.
bool forward(const py::sequence& features, py::handle out, py::handle scale, py::handle shift, bool /*last*/, bool relu, bool mean,
             std::uintptr_t stream) {
  const MapView to(out);
  cuda::FuseCall call = call_of(to, relu, mean, features.size());
  call.out = map_of(to);
  if (!read_maps(features, to, call, call.channels)) return false;
  check_channels(call.channels, to.channels(), mean);
  const std::int64_t all = std::accumulate(call.channels.begin(), call.channels.end(), std::int64_t{0});
  if (!read_numbers(scale, to, all, call.scale) || !read_numbers(shift, to, all, call.shift)) return false;
  cuda::fuse_forward(call, to.tensor.gpu(), pointer<void>(stream));
  return true;
}

// As forward. `features` and `out` may be None, and targets, which have `channels`; `partial` is given where a sum is asked for.
bool backward(py::handle grad, const py::object& features, py::handle out, const py::sequence& targets, const std::vector<std::int64_t>& channels,
              py::handle scale, py::handle shift, py::handle grad_scale, py::handle grad_shift, py::handle partial, bool /*last*/, bool relu,
              bool mean, std::uintptr_t stream) {
  const MapView from(grad);
  if (!from.even) return false;
  cuda::FuseCall call = call_of(from, relu, mean, channels.size());
  call.channels = channels;
  check_channels(channels, from.channels(), mean);
  const std::int64_t all = std::accumulate(channels.begin(), channels.end(), std::int64_t{0});
  std::vector<std::int64_t> read;
  if (!features.is_none() && !read_maps(py::reinterpret_borrow<py::sequence>(features), from, call, read)) return false;
  require(read.empty() || read == channels, "maps differ from channels");
  require(targets.size() == channels.size(), "maps and channels differ in number");
  if (!out.is_none()) {
    const MapView view(out);
    require(view.beside(from).channels() == from.channels(), "the result differs from its gradient in channels");
    if (!view.even) return false;
    call.out = map_of(view);
  }
  if (!read_numbers(scale, from, all, call.scale) || !read_numbers(shift, from, all, call.shift)) return false;
  cuda::FuseBackward to{map_of(from), {}, read_doubles(grad_scale, all), read_doubles(grad_shift, all), read_doubles(partial, cuda::fuse_partials(all)).data};
  check_reads(!call.features.empty(), !out.is_none(), !grad_scale.is_none(), relu, mean);
  bool any = false;
  for (const py::handle target : targets) {
    const std::int64_t width = channels[to.to_features.size()];
    if (!target.is_none()) require(MapView(target).beside(from).channels() == width, "a gradient has other channels than its map");
    to.to_features.push_back(target.is_none() ? cuda::FeatureMap{} : map_of(MapView(target)));
    any = any || !target.is_none();
  }
  if (!any) to.to_features.clear();
  cuda::fuse_backward(call, to, from.tensor.gpu(), pointer<void>(stream));
  return true;
}

}  // namespace

void bind_cuda_fuse(py::module_& module) {
  module.attr("fuse_maps") = cuda::kMostMaps;
  module.def("fuse_partials", cuda::fuse_partials);
  module.def("fuse_reads", [](py::handle map, bool /*last*/) { return MapView(map).even; });
  module.def("fuse_forward", forward);
  module.def("fuse_backward", backward);
}

}  // namespace fedkern
