// fedkern._cpu.fuse_*: as fedkern._cuda has them.
#include <algorithm>
#include <array>
#include <memory>
#include <type_traits>
#include <vector>

#include "fedkern/fuse.h"
#include "fuse_call.h"

namespace fedkern {
namespace {

// Maps of one position are interleaved: their channels lie side by side.
bool interleaved(const MapView& x, bool last) { return last || x.positions == 1; }

// Whether the kernels read a map as it is: what is inside in its order is dense.
bool reads(const MapView& x, bool last) {
  if (x.tensor.empty()) return true;
  return x.even && (interleaved(x, last) ? x.channel_stride() == 1 || x.channels() == 1 : x.step == 1);
}

FuseMap map_of(const MapView& x, bool last) {
  if (!interleaved(x, last)) return {x.tensor.data, x.channels(), x.batch_stride(), x.channel_stride(), 1, true};
  // Samples of one position each are the positions of one sample.
  return {x.tensor.data, x.channels(), x.batch_stride(), 1, x.positions == 1 ? x.batch_stride() : x.step, true};
}

// False where a map cannot be read as it is.
bool read_maps(const py::sequence& given, const MapView& beside, bool last, std::vector<FuseMap>& maps) {
  maps.reserve(given.size());
  for (const py::handle x : given) {
    const MapView view(x);
    view.beside(beside);
    if (!reads(view, last)) return false;
    maps.push_back(map_of(view, last));
  }
  return true;
}

// Scale and shift come together: the one that is missing is made of ones or zeros.
class Both {
 public:
  Both(FuseCall& call, std::int64_t channels) {
    const bool scale = call.scale.present;
    if (scale == call.shift.present) return;
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
  auto all = [&](const auto& given) {
    if constexpr (std::is_same_v<decltype(given), const FuseMap&>)
      return follows(given);
    else
      return std::all_of(given.begin(), given.end(), follows);
  };
  if (!(all(maps) && ...)) return;
  call.positions *= call.batch;
  call.batch = 1;
}

// The channels of all maps, which `result` is made of.
std::int64_t channels_of(const std::vector<FuseMap>& maps, const MapView& result, bool mean) {
  std::vector<std::int64_t> each;
  std::int64_t sum = 0;
  for (const FuseMap& map : maps) each.push_back(map.channels), sum += map.channels;
  check_channels(each, result.channels(), mean);
  return sum;
}

// A call for maps like `one`, which writes `channels` channels in all.
FuseCall call_of(const MapView& one, std::int64_t channels, std::size_t maps, bool last, bool relu, bool mean, int threads) {
  const bool stream = past_cache(one.batch() * one.positions * channels, static_cast<int>(one.dtype));
  return {one.dtype, static_cast<std::int64_t>(maps), one.batch(), one.positions, interleaved(one, last), relu, mean, {}, {}, stream, threads};
}

// False, and nothing is done, where a map or a vector cannot be read as it is. `last`: maps are worked on channels-last.
bool fuse_forward(const py::sequence& features, py::handle out, py::handle scale, py::handle shift, bool last, bool relu, bool mean, int threads) {
  const MapView to(out);
  std::vector<FuseMap> maps;
  const FuseMap result = map_of(to, last);
  if (!read_maps(features, to, last, maps)) return false;
  FuseForward a{call_of(to, to.channels(), maps.size(), last, relu, mean, threads), maps.data(), result};
  const std::int64_t channels = channels_of(maps, to, mean);
  if (!read_vector(scale, to, channels, a.call.scale) || !read_vector(shift, to, channels, a.call.shift)) return false;
  const std::int64_t elements = to.batch() * to.positions * channels;
  const Both both(a.call, channels);
  join_samples(a.call, maps, result);
  ReleaseGil release(elements >= kReleaseGilElements);
  fuse_kernels().forward(a);
  return true;
}

// As fuse_forward. `features` and `out` may be None, and targets, which have `channels`; `partial` is for fedkern._cuda.
bool fuse_backward(py::handle grad, const py::object& features, py::handle out, const py::sequence& targets, const py::sequence& channels,
              py::handle scale, py::handle shift, py::handle grad_scale, py::handle grad_shift, py::handle /*partial*/, bool last, bool relu,
              bool mean, int threads) {
  const MapView from(grad);
  if (!reads(from, last)) return false;
  std::vector<FuseMap> maps, to;
  FuseMap result{};
  const FuseMap arriving = map_of(from, last);
  if (!features.is_none() && !read_maps(py::reinterpret_borrow<py::sequence>(features), from, last, maps)) return false;
  if (!out.is_none()) {
    const MapView view(out);
    require(view.beside(from).channels() == from.channels(), "the result differs from its gradient in channels");
    if (!reads(view, last)) return false;
    result = map_of(view, last);
  }
  require(targets.size() == channels.size(), "maps and channels differ in number");
  to.reserve(targets.size());
  for (const py::handle target : targets) {
    if (target.is_none())
      to.push_back({nullptr, channels[to.size()].cast<std::int64_t>(), 0, 0, 0, false});
    else
      to.push_back(map_of(MapView(target).beside(from), last));
    require(to.back().channels == channels[to.size() - 1].cast<std::int64_t>(), "a gradient has other channels than its map");
  }
  require(maps.empty() || maps.size() == to.size(), "maps and channels differ in number");
  for (std::size_t m = 0; m < maps.size(); ++m) require(maps[m].channels == to[m].channels, "maps differ from channels");
  const std::int64_t all = channels_of(to, from, mean), elements = from.batch() * from.positions * all;
  FuseBackward a{call_of(from, all, to.size(), last, relu, mean, threads),
                 arriving,
                 maps.empty() ? nullptr : maps.data(),
                 result,
                 to.data(),
                 read_doubles(grad_scale, all),
                 read_doubles(grad_shift, all),
                 nullptr};
  if (!read_vector(scale, from, all, a.call.scale) || !read_vector(shift, from, all, a.call.shift)) return false;
  check_reads(!maps.empty(), !out.is_none(), !grad_scale.is_none(), relu, mean);
  const Both both(a.call, all);
  join_samples(a.call, arriving, maps, result, to);
  ReleaseGil release(elements >= kReleaseGilElements);
  std::unique_ptr<double[]> partial;
  if (a.grad_scale.present || a.grad_shift.present) {
    partial.reset(new double[2 * fuse_blocks(a.call) * all]);
    a.partial = partial.get();
  }
  fuse_kernels().backward(a);
  return true;
}

}  // namespace

void bind_fuse(py::module_& module) {
  module.def("fuse_reads", [](py::handle map, bool last) { return reads(MapView(map), last); });
  module.def("fuse_forward", fuse_forward);
  module.def("fuse_backward", fuse_backward);
}

}  // namespace fedkern
