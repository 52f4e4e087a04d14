// Functions of both cores take the same arguments (aggregate_call.h). Those that take vectors answer false, with nothing done, where
// the kernel cannot walk the vectors' strides; the caller then copies them.
#include "aggregate_call.h"

namespace fedkern {
namespace {

// workspace: not needed here. A vector of weight zero is not read.
bool weighted_mean(py::handle vectors, py::handle weights, py::handle out, py::handle, int threads) {
  const VectorList x = vectors_of(vectors);
  WeightList w = numbers_of(weights, x.count);
  const Values to = values_of(out, x.size);
  std::vector<Vector> read;
  read.reserve(x.data.size());
  for (std::size_t m = 0; m < x.data.size(); ++m)
    if (w.numbers[m] != 0) {
      w.numbers[read.size()] = w.numbers[m];
      read.push_back({x.data[m], x.strides[m]});
    }
  const WeightedMean call{x.dtype, to.dtype, static_cast<std::int64_t>(read.size()), x.size, read.data(), w.numbers.data(), w.total, to.data,
                          aggregate_past_cache(x.size, static_cast<int>(to.dtype)), threads};
  ReleaseGil release(x.size * call.count >= kReleaseGilElements);
  aggregate_kernels().weighted_mean(call);
  return true;
}

void accumulator_add(py::handle vector, double weight, py::handle sum, int threads) {
  DType dtype;
  const TensorView x = vector_view(vector.ptr(), dtype);
  const std::int64_t size = x.shape[0];
  const AccumulatorAdd call{dtype, size, {x.data, x.strides[0]}, weight, doubles_of(sum, size), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().accumulator_add(call);
}

void accumulator_mean(py::handle sum, double total, py::handle out, int threads) {
  DType dtype;
  const std::int64_t size = vector_view(sum.ptr(), dtype).shape[0];
  const Values to = values_of(out, size);
  const AccumulatorMean call{to.dtype, size, doubles_of(sum, size), total, to.data, aggregate_past_cache(size, static_cast<int>(to.dtype)), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().accumulator_mean(call);
}

void exact_add(py::handle vector, double weight, py::handle digits, py::handle top, int threads) {
  DType dtype;
  const TensorView x = vector_view(vector.ptr(), dtype);
  const std::int64_t size = x.shape[0];
  const ExactAdd call{dtype, size, {x.data, x.strides[0]}, weight, exact_state(digits, top, size), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().exact_add(call);
}

void exact_mean(py::handle digits, py::handle top, double total, py::handle out, int threads) {
  DType dtype;
  const std::int64_t size = vector_view(out.ptr(), dtype).shape[0];
  const Values to = values_of(out, size);
  const ExactMean call{to.dtype, size, exact_state(digits, top, size), total, to.data, aggregate_past_cache(size, static_cast<int>(to.dtype)), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().exact_mean(call);
}

}  // namespace

void bind_aggregate(py::module_& module) {
  module.def("plain_weights", plain_weights);
  module.def("writable", writable);
  module.def("weighted_mean", weighted_mean);
  module.def("accumulator_add", accumulator_add);
  module.def("accumulator_mean", accumulator_mean);
  module.def("exact_add", exact_add);
  module.def("exact_mean", exact_mean);
}

}  // namespace fedkern
