#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "fedkern/fuse_cuda.h"

namespace fedkern {
namespace {

// (address, channels, strides of batch, channel, position); None for the address where absent
using MapArgument = std::tuple<OptionalAddress, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
// (dtype, batch, positions, relu, mean)
using ShapeArgument = std::tuple<int, std::int64_t, std::int64_t, bool, bool>;

cuda::FeatureMap map_of(const MapArgument& a) {
  const auto& [data, channels, batch, channel, position] = a;
  return {pointer<void>(data.value_or(0)), batch, channel, position, data.has_value()};
}

cuda::FuseCall call_of(const ShapeArgument& shape, const std::vector<std::int64_t>& channels, const std::vector<MapArgument>& features,
                       const OptionalAddress& scale, const OptionalAddress& shift, const MapArgument& out) {
  const auto& [dtype, batch, positions, relu, mean] = shape;
  cuda::FuseCall call{static_cast<DType>(dtype), batch, positions, relu, mean, channels, {}, optional_pointer<const void>(scale),
                      optional_pointer<const void>(shift), map_of(out)};
  for (const MapArgument& map : features) call.features.push_back(map_of(map));
  if (!features.empty() && features.size() != channels.size()) throw std::invalid_argument("maps and channels differ in number");
  if (mean && channels.size() > cuda::kMostMaps) throw std::invalid_argument("a mean of more maps than one launch takes");
  return call;
}

void forward(const ShapeArgument& shape, const std::vector<std::int64_t>& channels, const std::vector<MapArgument>& features,
             const OptionalAddress& scale, const OptionalAddress& shift, const MapArgument& out, int device, std::uintptr_t stream) {
  cuda::fuse_forward(call_of(shape, channels, features, scale, shift, out), device, pointer<void>(stream));
}

// partial: given where to_scale or to_shift is.
void backward(const ShapeArgument& shape, const std::vector<std::int64_t>& channels, const std::vector<MapArgument>& features,
              const OptionalAddress& scale, const OptionalAddress& shift, const MapArgument& out, const MapArgument& grad,
              const std::vector<MapArgument>& targets, const OptionalAddress& to_scale, const OptionalAddress& to_shift,
              const OptionalAddress& partial, int device, std::uintptr_t stream) {
  cuda::FuseBackward to{map_of(grad), {}, optional_pointer<double>(to_scale), optional_pointer<double>(to_shift), pointer<double>(partial.value_or(0))};
  for (const MapArgument& map : targets) to.to_features.push_back(map_of(map));
  cuda::fuse_backward(call_of(shape, channels, features, scale, shift, out), to, device, pointer<void>(stream));
}

}  // namespace

void bind_cuda_fuse(py::module_& module) {
  module.attr("fuse_maps") = cuda::kMostMaps;
  module.attr("fuse_splits") = cuda::kFuseSplits;
  module.def("fuse_forward", forward);
  module.def("fuse_backward", backward);
}

}  // namespace fedkern
