#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "fedkern/aggregate.h"

namespace fedkern {
namespace {

// strides: in elements; none where all are one.
void weighted_mean(int dtype, int out_dtype, std::int64_t size, const std::vector<std::uintptr_t>& data,
                   const std::vector<std::int64_t>& strides, const std::vector<double>& weights, double total, std::uintptr_t out, int threads) {
  if ((!strides.empty() && data.size() != strides.size()) || data.size() != weights.size()) throw std::invalid_argument("vectors, strides and weights differ in number");
  std::vector<Vector> vectors(data.size());
  for (std::size_t m = 0; m < data.size(); ++m) vectors[m] = {pointer<const void>(data[m]), strides.empty() ? 1 : strides[m]};
  const WeightedMean call{static_cast<DType>(dtype), static_cast<DType>(out_dtype), static_cast<std::int64_t>(data.size()), size, vectors.data(),
                          weights.data(), total, pointer<void>(out), aggregate_past_cache(size, out_dtype), threads};
  ReleaseGil release(size * call.count >= kReleaseGilElements);
  aggregate_kernels().weighted_mean(call);
}

void accumulator_add(int dtype, std::int64_t size, std::uintptr_t data, std::int64_t stride, double weight, std::uintptr_t sum, int threads) {
  const AccumulatorAdd call{static_cast<DType>(dtype), size, {pointer<const void>(data), stride}, weight, pointer<double>(sum), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().accumulator_add(call);
}

void accumulator_mean(int out_dtype, std::int64_t size, std::uintptr_t sum, double total, std::uintptr_t out, int threads) {
  const AccumulatorMean call{static_cast<DType>(out_dtype), size, pointer<const double>(sum), total, pointer<void>(out),
                             aggregate_past_cache(size, out_dtype), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().accumulator_mean(call);
}

// digits: int64 [3, size], high first.
ExactState state(std::uintptr_t digits, std::uintptr_t top, std::int64_t size) {
  auto* first = pointer<std::int64_t>(digits);
  return {first, first + size, first + 2 * size, pointer<std::int8_t>(top)};
}

void exact_add(int dtype, std::int64_t size, std::uintptr_t data, std::int64_t stride, double weight, std::uintptr_t digits, std::uintptr_t top,
               int threads) {
  const ExactAdd call{static_cast<DType>(dtype), size, {pointer<const void>(data), stride}, weight, state(digits, top, size), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().exact_add(call);
}

void exact_mean(int out_dtype, std::int64_t size, std::uintptr_t digits, std::uintptr_t top, double total, std::uintptr_t out, int threads) {
  const ExactMean call{static_cast<DType>(out_dtype), size, state(digits, top, size), total, pointer<void>(out), aggregate_past_cache(size, out_dtype), threads};
  ReleaseGil release(size >= kReleaseGilElements);
  aggregate_kernels().exact_mean(call);
}

}  // namespace

void bind_aggregate(py::module_& module) {
  module.def("weighted_mean", weighted_mean);
  module.def("accumulator_add", accumulator_add);
  module.def("accumulator_mean", accumulator_mean);
  module.def("exact_add", exact_add);
  module.def("exact_mean", exact_mean);
}

}  // namespace fedkern
