// Functions of both cores take the same arguments (aggregate_call.h). Those that take vectors answer false, with nothing done, where
// the kernel cannot walk the vectors' strides; the caller then copies them.
#include <algorithm>
#include <mutex>
#include <utility>

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

using Notes = std::vector<std::pair<std::int64_t, double>>;

// Adds vectors (a tuple of [P] of one dtype and unit stride; none: only the mean is asked for) to an error-free sum, and writes
// its mean where `out` is no None. sum: fp64 [P], or None; slots: int32, and rests: fp64 [.., block], one of each for every block
// of elements; used: int64 [1]. Returns what no rest could hold, as (element, value) pairs, and the places of vectors with products
// that are not finite.
std::pair<Notes, std::vector<std::int64_t>> error_free_sum(py::handle vectors, py::handle weights, bool fresh, py::handle sum, py::handle out, double total,
                                                           py::handle slots, py::handle rests, py::handle used, int threads) {
  struct Noted {
    std::mutex mutex;
    Notes pairs;
  } noted;
  VectorList x;
  WeightList w;
  DType dtype;
  if (PyTuple_CheckExact(vectors.ptr()) && !PyTuple_GET_SIZE(vectors.ptr())) {
    x.size = vector_view(sum.ptr(), dtype).shape[0];
  } else {
    x = vectors_of(vectors);
    w = numbers_of(weights, x.count);
    if (!x.unit()) throw py::type_error("an error-free sum takes vectors of unit stride");
  }
  std::vector<Vector> read;
  read.reserve(x.data.size());
  for (const void* const data : x.data) read.push_back({data, 1});
  const std::int64_t blocks = (x.size + kErrorFreeBlock - 1) / kErrorFreeBlock;
  const TensorView places = dense(slots, blocks), taken = dense(used, 1);
  if (places.code || places.bits != 32 || taken.code || taken.bits != 64)
    throw py::type_error("slots must be int32 and used int64");
  const Optional<double> sums = optional_doubles(sum, x.size);
  if (!sums.present && (!fresh || out.is_none())) throw std::invalid_argument("an error-free sum that is not fresh, or has no result, needs its memory");
  Optional<void> to;
  DType to_dtype = DType::f32;
  if (!out.is_none()) {
    const Values result = values_of(out, x.size);
    to = {result.data, true}, to_dtype = result.dtype;
  }
  std::vector<std::int8_t> odd(x.data.size(), 0);
  const ErrorFreeSum call{x.dtype,
                          to_dtype,
                          x.count,
                          x.size,
                          read.data(),
                          w.numbers.data(),
                          fresh,
                          sums,
                          to,
                          total,
                          to.present && aggregate_past_cache(x.size, static_cast<int>(to_dtype)),
                          static_cast<std::int32_t*>(places.data),
                          doubles_of(rests, blocks * kErrorFreeBlock),
                          static_cast<std::int64_t*>(taken.data),
                          odd.data(),
                          [](void* context, std::int64_t element, double value) {
                            auto& all = *static_cast<Noted*>(context);
                            const std::lock_guard<std::mutex> lock(all.mutex);
                            all.pairs.emplace_back(element, value);
                          },
                          &noted,
                          threads};
  {
    ReleaseGil release(x.size * std::max<std::int64_t>(x.count, 1) >= kReleaseGilElements);
    aggregate_kernels().error_free_sum(call);
  }
  std::vector<std::int64_t> places_of_odd;
  for (std::size_t m = 0; m < odd.size(); ++m)
    if (odd[m]) places_of_odd.push_back(static_cast<std::int64_t>(m));
  return {std::move(noted.pairs), std::move(places_of_odd)};
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
  module.attr("error_free_block") = kErrorFreeBlock;
  module.def("error_free_sum", error_free_sum);
}

}  // namespace fedkern
