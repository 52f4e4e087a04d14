#include <algorithm>
#include <memory>
#include <vector>

#include "exchange.h"
#include "fedkern/fuse.h"

namespace fedkern {
namespace {

// (address, channels, batch stride, channel stride, position stride); None for the address of what is not there.
FuseMap map_of(const py::handle& given) {
  const py::tuple t = py::reinterpret_borrow<py::tuple>(given);
  const auto place = optional_pointer<void>(t[0].cast<OptionalAddress>());
  return {place.data, t[1].cast<std::int64_t>(), t[2].cast<std::int64_t>(), t[3].cast<std::int64_t>(), t[4].cast<std::int64_t>(), place.present};
}

// A bare address stands for a map like the one before.
std::vector<FuseMap> maps_of(const py::list& given) {
  std::vector<FuseMap> maps;
  maps.reserve(given.size());
  for (const py::handle& map : given) {
    if (PyLong_Check(map.ptr())) {
      maps.push_back(maps.back());
      maps.back().data = pointer<void>(map.cast<std::uintptr_t>());
    } else {
      maps.push_back(map_of(map));
    }
  }
  return maps;
}

// Scale and shift come together: the one that is missing is made of ones or zeros.
class Both {
 public:
  Both(FuseCall& call, const OptionalAddress& scale, const OptionalAddress& shift, std::int64_t channels) {
    call.scale = optional_pointer<const void>(scale);
    call.shift = optional_pointer<const void>(shift);
    if (scale.has_value() == shift.has_value()) return;
    const bool wide = call.dtype == DType::f64;
    memory_.reset(new char[channels * (wide ? sizeof(double) : sizeof(float))]);
    if (wide)
      std::fill_n(reinterpret_cast<double*>(memory_.get()), channels, scale ? 0.0 : 1.0);
    else
      std::fill_n(reinterpret_cast<float*>(memory_.get()), channels, scale ? 0.0f : 1.0f);
    (scale ? call.shift : call.scale) = {memory_.get(), true};
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Samples that follow each other as positions do are one long sample.
template <typename... Maps>
void join_samples(FuseCall& call, const Maps&... maps) {
  if (!call.interleaved || call.batch <= 1) return;
  auto follows = [&](const FuseMap& map) { return !map.present || map.batch_stride == call.positions * map.position_stride; };
  auto all = [&](const std::vector<FuseMap>& list) { return std::all_of(list.begin(), list.end(), follows); };
  if (!(all(maps) && ...)) return;
  call.positions *= call.batch;
  call.batch = 1;
}

std::int64_t channels_of(const std::vector<FuseMap>& maps) {
  std::int64_t sum = 0;
  for (const FuseMap& map : maps) sum += map.channels;
  return sum;
}

void forward(int dtype, std::int64_t batch, std::int64_t positions, bool interleaved, bool relu, bool mean, const py::list& features,
             const py::tuple& out, const OptionalAddress& scale, const OptionalAddress& shift, int threads) {
  const std::vector<FuseMap> maps = maps_of(features), result{map_of(out)};
  const bool stream = past_cache(batch * positions * result[0].channels, dtype);
  FuseForward a{{static_cast<DType>(dtype), static_cast<std::int64_t>(maps.size()), batch, positions, interleaved, relu, mean,
                 {}, {}, stream, threads},
                maps.data(), result[0]};
  const std::int64_t channels = channels_of(maps);
  const Both both(a.call, scale, shift, channels);
  join_samples(a.call, maps, result);
  ReleaseGil release(batch * positions * channels >= kReleaseGilElements);
  fuse_kernels().forward(a);
}

void backward(int dtype, std::int64_t batch, std::int64_t positions, bool interleaved, bool relu, bool mean, const py::tuple& grad,
              const py::object& features, const py::object& out, const py::list& grad_features, const OptionalAddress& scale,
              const OptionalAddress& shift, const OptionalAddress& grad_scale, const OptionalAddress& grad_shift, int threads) {
  const std::vector<FuseMap> targets = maps_of(grad_features), arriving{map_of(grad)};
  const bool stream = past_cache(batch * positions * channels_of(targets), dtype);
  const std::vector<FuseMap> maps = features.is_none() ? std::vector<FuseMap>{} : maps_of(features.cast<py::list>());
  const std::vector<FuseMap> result{out.is_none() ? FuseMap{} : map_of(out)};
  FuseBackward a{{static_cast<DType>(dtype), static_cast<std::int64_t>(targets.size()), batch, positions, interleaved, relu, mean,
                  {}, {}, stream, threads},
                 arriving[0],
                 maps.empty() ? nullptr : maps.data(),
                 result[0],
                 targets.data(),
                 optional_pointer<double>(grad_scale),
                 optional_pointer<double>(grad_shift),
                 nullptr};
  const std::int64_t channels = channels_of(targets);
  const Both both(a.call, scale, shift, channels);
  join_samples(a.call, arriving, maps, result, targets);
  ReleaseGil release(batch * positions * channels >= kReleaseGilElements);
  std::unique_ptr<double[]> partial;
  if (grad_scale || grad_shift) {
    partial.reset(new double[2 * fuse_blocks(a.call) * channels]);
    a.partial = partial.get();
  }
  fuse_kernels().backward(a);
}

// Checked maps of one shape, all contiguous or (`last`) channels-last, and results alike: one dense layout for all.
struct Alike {
  DType dtype = DType::f32;
  std::int64_t batch, positions = 1;
  bool interleaved;

  Alike(const TensorView& one, bool last) : batch(one.shape[0]) {
    one.floating(dtype);
    for (int d = 2; d < one.dims; ++d) positions *= one.shape[d];
    interleaved = last || positions == 1;
  }
  FuseMap map(void* data, std::int64_t channels) const {
    return {data, channels, channels * positions, interleaved ? 1 : positions, interleaved ? channels : 1, true};
  }
  FuseMap map(py::handle given, std::int64_t channels) const {
    FuseMap map = this->map(given.is_none() ? nullptr : checked_view(given.ptr()).data, channels);
    map.present = !given.is_none();
    return map;
  }
  FuseCall call(std::int64_t maps, std::int64_t channels, bool relu, bool mean, int threads) const {
    return {dtype, maps, batch, positions, interleaved, relu, mean, {}, {},
            past_cache(batch * positions * channels, static_cast<int>(dtype)), threads};
  }
};

OptionalAddress address_of(py::handle given) {
  if (given.is_none()) return std::nullopt;
  return reinterpret_cast<std::uintptr_t>(checked_view(given.ptr()).data);
}

void forward_alike(const py::sequence& features, py::handle out, py::handle scale, py::handle shift, bool last, bool relu, bool mean,
                   int threads) {
  const std::int64_t count = static_cast<std::int64_t>(features.size());
  std::vector<FuseMap> maps, result;
  TensorView one = checked_view(out.ptr());
  const Alike alike(one, last);
  const std::int64_t wide = one.shape[1], channels = mean ? wide : wide / count, all = count * channels;
  result.push_back(alike.map(one.data, wide));
  for (const py::handle x : features) maps.push_back(alike.map(x, channels));
  FuseForward a{alike.call(count, wide, relu, mean, threads), maps.data(), result[0]};
  const Both both(a.call, address_of(scale), address_of(shift), all);
  join_samples(a.call, maps, result);
  ReleaseGil release(alike.batch * alike.positions * all >= kReleaseGilElements);
  fuse_kernels().forward(a);
}

// For what needs neither the maps nor sums: the result, or None, says where gradient passes.
void backward_alike(py::handle grad, py::handle out, const py::sequence& grad_features, py::handle scale, bool last, bool mean,
                    int threads) {
  const std::int64_t count = static_cast<std::int64_t>(grad_features.size());
  const TensorView one = checked_view(grad.ptr());
  const Alike alike(one, last);
  const std::int64_t wide = one.shape[1], channels = mean ? wide : wide / count, all = count * channels;
  std::vector<FuseMap> targets;
  for (const py::handle x : grad_features) targets.push_back(alike.map(x, channels));
  const std::vector<FuseMap> arriving{alike.map(one.data, wide)}, result{alike.map(out, wide)};
  FuseBackward a{alike.call(count, all, !out.is_none(), mean, threads),
                 arriving[0], nullptr, result[0], targets.data(), {}, {}, nullptr};
  const Both both(a.call, address_of(scale), std::nullopt, all);
  join_samples(a.call, arriving, result, targets);
  ReleaseGil release(alike.batch * alike.positions * all >= kReleaseGilElements);
  fuse_kernels().backward(a);
}

// (address, stride between samples, stride between branches); `other` may have None for the address, as bias may be.
void conv(std::int64_t batch, std::int64_t branches, const py::tuple& in_shape, const py::tuple& out_shape, const py::tuple& kernel,
          const py::tuple& x, const py::tuple& other, const py::tuple& out, std::uintptr_t weight, std::int64_t block,
          const OptionalAddress& bias, bool relu, int threads) {
  auto number = [](const py::tuple& from, int i) { return from[i].cast<std::int64_t>(); };
  auto address = [](const py::tuple& from) { return pointer<float>(from[0].cast<std::uintptr_t>()); };
  if (block < 1 || block > fuse_kernels().conv_block) throw py::value_error("block must fit this ISA level's registers");
  const FuseConv a{batch, branches,
                   number(in_shape, 0), number(in_shape, 1), number(in_shape, 2),
                   number(out_shape, 0), number(out_shape, 1), number(out_shape, 2),
                   number(kernel, 0), number(kernel, 1), number(kernel, 2), number(kernel, 3), number(kernel, 4), number(kernel, 5),
                   address(x), number(x, 1), number(x, 2),
                   optional_pointer<const float>(other[0].cast<OptionalAddress>()), number(other, 1), number(other, 2),
                   address(out), number(out, 1), number(out, 2),
                   pointer<const float>(weight), block, optional_pointer<const float>(bias), relu, threads};
  if (a.out_width + (a.kernel_width - 1) * a.dilation / a.stride > kFuseConvColumns) throw py::value_error("maps too wide");
  py::gil_scoped_release release;
  fuse_kernels().conv(a);
}

}  // namespace

void bind_fuse(py::module_& module) {
  module.def("fuse_forward", forward);
  module.def("fuse_backward", backward);
  module.def("fuse_forward_alike", forward_alike);
  module.def("fuse_backward_alike", backward_alike);
  module.def("fuse_conv", conv);
  module.def("fuse_conv_block", [] { return fuse_kernels().conv_block; });
}

}  // namespace fedkern
