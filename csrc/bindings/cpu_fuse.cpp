#include <algorithm>
#include <memory>
#include <vector>

#include "bindings.h"
#include "fedkern/fuse.h"

namespace fedkern {
namespace {

// (address, channels, batch stride, channel stride, position stride); address 0 for what is not there.
FuseMap map_of(const py::handle& given) {
  const py::tuple t = py::reinterpret_borrow<py::tuple>(given);
  return {pointer<void>(t[0].cast<std::uintptr_t>()), t[1].cast<std::int64_t>(), t[2].cast<std::int64_t>(),
          t[3].cast<std::int64_t>(), t[4].cast<std::int64_t>()};
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
  Both(FuseCall& call, std::uintptr_t scale, std::uintptr_t shift, std::int64_t channels) {
    call.scale = pointer<const void>(scale);
    call.shift = pointer<const void>(shift);
    if (!scale == !shift) return;
    const bool wide = call.dtype == DType::f64;
    memory_.reset(new char[channels * (wide ? sizeof(double) : sizeof(float))]);
    if (wide)
      std::fill_n(reinterpret_cast<double*>(memory_.get()), channels, scale ? 0.0 : 1.0);
    else
      std::fill_n(reinterpret_cast<float*>(memory_.get()), channels, scale ? 0.0f : 1.0f);
    (scale ? call.shift : call.scale) = memory_.get();
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Samples that follow each other as positions do are one long sample.
template <typename... Maps>
void join_samples(FuseCall& call, const Maps&... maps) {
  if (!call.interleaved || call.batch <= 1) return;
  auto follows = [&](const FuseMap& map) { return !map.data || map.batch_stride == call.positions * map.position_stride; };
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
             const py::tuple& out, std::uintptr_t scale, std::uintptr_t shift, bool stream, int threads) {
  const std::vector<FuseMap> maps = maps_of(features), result{map_of(out)};
  FuseForward a{{static_cast<DType>(dtype), static_cast<std::int64_t>(maps.size()), batch, positions, interleaved, relu, mean,
                 nullptr, nullptr, stream, threads},
                maps.data(), result[0]};
  const std::int64_t channels = channels_of(maps);
  const Both both(a.call, scale, shift, channels);
  join_samples(a.call, maps, result);
  ReleaseGil release(batch * positions * channels >= kReleaseGilElements);
  fuse_kernels().forward(a);
}

void backward(int dtype, std::int64_t batch, std::int64_t positions, bool interleaved, bool relu, bool mean, const py::tuple& grad,
              const py::object& features, const py::object& out, const py::list& grad_features, std::uintptr_t scale,
              std::uintptr_t shift, std::uintptr_t grad_scale, std::uintptr_t grad_shift, bool stream, int threads) {
  const std::vector<FuseMap> targets = maps_of(grad_features), arriving{map_of(grad)};
  const std::vector<FuseMap> maps = features.is_none() ? std::vector<FuseMap>{} : maps_of(features.cast<py::list>());
  const std::vector<FuseMap> result{out.is_none() ? FuseMap{} : map_of(out)};
  FuseBackward a{{static_cast<DType>(dtype), static_cast<std::int64_t>(targets.size()), batch, positions, interleaved, relu, mean,
                  nullptr, nullptr, stream, threads},
                 arriving[0],
                 maps.empty() ? nullptr : maps.data(),
                 result[0],
                 targets.data(),
                 pointer<double>(grad_scale),
                 pointer<double>(grad_shift),
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

}  // namespace

void bind_fuse(py::module_& module) {
  module.def("fuse_forward", forward);
  module.def("fuse_backward", backward);
}

}  // namespace fedkern
