#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_cuda.h"

namespace fedkern {
namespace {

using Address = std::uintptr_t;

// (dtype, size, count, first or None, row_stride, stride, addresses)
using UploadsArgument = std::tuple<int, std::int64_t, std::int64_t, OptionalAddress, std::int64_t, std::int64_t, std::vector<Address>>;
// (numbers, their sum, address on the device or None)
using WeightsArgument = std::tuple<std::vector<double>, double, OptionalAddress>;
// (device, stream)
using PlaceArgument = std::tuple<int, Address>;

cuda::Uploads uploads(const UploadsArgument& a) {
  const auto& [dtype, size, count, first, row_stride, stride, addresses] = a;
  if (!first && static_cast<std::int64_t>(addresses.size()) != count) throw std::invalid_argument("vectors and their number differ");
  cuda::Uploads result{static_cast<DType>(dtype), size, count, optional_pointer<const void>(first), row_stride, stride, {}};
  for (Address address : addresses) result.each.push_back(pointer<const void>(address));
  return result;
}

cuda::UploadWeights weights(const WeightsArgument& a, std::int64_t count) {
  const auto& [numbers, total, device] = a;
  if (!device && static_cast<std::int64_t>(numbers.size()) != count) throw std::invalid_argument("weights and vectors differ in number");
  return {numbers, optional_pointer<const double>(device), total};
}

cuda::Place place(const PlaceArgument& a) { return {std::get<0>(a), pointer<void>(std::get<1>(a))}; }

void at_most(const cuda::Uploads& x, std::int64_t most) {
  if (x.count > most) throw std::invalid_argument("too many vectors for one launch");
}

// sums: a workspace, or what is asked for without `out`.
void weighted_mean(const UploadsArgument& x, const WeightsArgument& w, const OptionalAddress& start, const OptionalAddress& sums,
                   const OptionalAddress& out, int out_dtype, const PlaceArgument& at) {
  const cuda::Uploads vectors = uploads(x);
  if (vectors.count > cuda::kTable && !sums) throw std::invalid_argument("more vectors than one launch takes need a workspace");
  cuda::weighted_mean(vectors, weights(w, vectors.count),
                      {optional_pointer<const double>(start), pointer<double>(sums.value_or(0)), optional_pointer<void>(out), static_cast<DType>(out_dtype)},
                      place(at));
}

// digits: int64 [3, size], high first.
ExactState state(Address digits, Address top, std::int64_t size) {
  auto* first = pointer<std::int64_t>(digits);
  return {first, first + size, first + 2 * size, pointer<std::int8_t>(top)};
}

void exact_add(int dtype, std::int64_t size, Address x, std::int64_t stride, double weight, Address digits, Address top, const PlaceArgument& at) {
  cuda::exact_add(static_cast<DType>(dtype), size, pointer<const void>(x), stride, weight, state(digits, top, size), place(at));
}

void exact_mean(int out_dtype, std::int64_t size, Address digits, Address top, double total, Address out, const PlaceArgument& at) {
  cuda::exact_mean(static_cast<DType>(out_dtype), size, state(digits, top, size), total, pointer<void>(out), place(at));
}

// tensors: global, first, second, out; dtypes: of the last three
void server_step(const UploadsArgument& x, const WeightsArgument& w, int rule, const std::vector<double>& numbers, const std::vector<OptionalAddress>& tensors,
                 const std::vector<int>& dtypes, Address norms, Address cosines, Address workspace, const PlaceArgument& at) {
  const cuda::Uploads vectors = uploads(x);
  at_most(vectors, cuda::kTable);
  const cuda::ServerStep call{static_cast<cuda::ServerRule>(rule), numbers.at(0), numbers.at(1), numbers.at(2), numbers.at(3),
                              pointer<const void>(tensors.at(0).value()), optional_pointer<void>(tensors.at(1)), optional_pointer<void>(tensors.at(2)),
                              static_cast<DType>(dtypes.at(0)), static_cast<DType>(dtypes.at(1)), pointer<void>(tensors.at(3).value()),
                              static_cast<DType>(dtypes.at(2)), pointer<double>(norms), pointer<double>(cosines), pointer<double>(workspace)};
  cuda::server_step(vectors, weights(w, vectors.count), call, place(at));
}

void squared_distances_to(const UploadsArgument& x, const OptionalAddress& point, Address out, Address workspace, const PlaceArgument& at) {
  cuda::squared_distances_to(uploads(x), optional_pointer<const double>(point), pointer<double>(out), pointer<double>(workspace), place(at));
}

void squared_distances(const UploadsArgument& x, Address out, Address workspace, const PlaceArgument& at) {
  const cuda::Uploads vectors = uploads(x);
  at_most(vectors, cuda::kMostSorted);
  cuda::squared_distances(vectors, pointer<double>(out), pointer<double>(workspace), place(at));
}

void sorted_mean(const UploadsArgument& x, const std::optional<WeightsArgument>& w, int low, int high, bool median, Address out, const PlaceArgument& at) {
  const cuda::Uploads vectors = uploads(x);
  at_most(vectors, cuda::kMostSorted);
  if (!w) return cuda::sorted_mean(vectors, nullptr, low, high, median, pointer<void>(out), place(at));
  const cuda::UploadWeights given = weights(*w, vectors.count);
  cuda::sorted_mean(vectors, &given, low, high, median, pointer<void>(out), place(at));
}

void scale_and_noise(const UploadsArgument& x, Address factors, double deviation, std::uint64_t seed, std::uint64_t offset, Address out,
                     const PlaceArgument& at) {
  cuda::scale_and_noise(uploads(x), pointer<const double>(factors), deviation, seed, offset, pointer<void>(out), place(at));
}

}  // namespace

void bind_cuda_aggregate(py::module_& module) {
  module.attr("aggregate_table") = cuda::kTable;
  module.attr("aggregate_sorted") = cuda::kMostSorted;
  module.attr("aggregate_workspace") = cuda::kAggregateWorkspace;
  module.def("weighted_mean", weighted_mean);
  module.def("exact_add", exact_add);
  module.def("exact_mean", exact_mean);
  module.def("server_step", server_step);
  module.def("squared_distances_to", squared_distances_to);
  module.def("squared_distances", squared_distances);
  module.def("sorted_mean", sorted_mean);
  module.def("scale_and_noise", scale_and_noise);
}

}  // namespace fedkern
