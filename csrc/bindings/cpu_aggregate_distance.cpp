#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_distance.h"

namespace fedkern {
namespace {

std::vector<const void*> pointers(const std::vector<std::uintptr_t>& data) {
  std::vector<const void*> vectors(data.size());
  for (std::size_t m = 0; m < data.size(); ++m) vectors[m] = pointer<const void>(data[m]);
  return vectors;
}

// Elements of one partial sum: at most 64 of them, fewer where there are many sums, in chunks that are worth a thread.
std::int64_t chunk_size(std::int64_t size, std::int64_t sums) {
  const std::int64_t most = std::clamp<std::int64_t>((std::int64_t{1} << 22) / std::max<std::int64_t>(sums, 1), 4, 64);
  const std::int64_t even = (size + most - 1) / most;
  return std::max<std::int64_t>(16384, (even + 4095) / 4096 * 4096);
}

// out: [count, count]; root: of distances, not of their squares.
void squared_distances(int dtype, std::int64_t size, const std::vector<std::uintptr_t>& data, bool root, std::uintptr_t out, int threads) {
  const std::vector<const void*> vectors = pointers(data);
  const auto count = static_cast<std::int64_t>(data.size());
  const std::int64_t pairs = count * count, chunk = chunk_size(size, pairs), chunks = (size + chunk - 1) / chunk;
  ReleaseGil release(size * count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * pairs), 0.0);
  aggregate_distance_kernels().pairs({static_cast<DType>(dtype), count, size, vectors.data(), chunk, partial.data(), threads});
  auto* sums = pointer<double>(out);
  std::fill_n(sums, pairs, 0.0);
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t i = 0; i < pairs; ++i) sums[i] += partial[static_cast<std::size_t>(c * pairs + i)];
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t k = 0; k < i; ++k) {
      double& sum = sums[i * count + k];
      if (root) sum = std::sqrt(sum);
      sums[k * count + i] = sum;
    }
}

// point: [size] or None; out: [count], zeros.
void squared_distances_to(int dtype, std::int64_t size, const std::vector<std::uintptr_t>& data, const OptionalAddress& point, std::uintptr_t out,
                          int threads) {
  const std::vector<const void*> vectors = pointers(data);
  const auto count = static_cast<std::int64_t>(data.size());
  const std::int64_t chunk = chunk_size(size, 1), chunks = (size + chunk - 1) / chunk;
  ReleaseGil release(size * count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * count), 0.0);
  aggregate_distance_kernels().to_point(
      {static_cast<DType>(dtype), count, size, vectors.data(), optional_pointer<const double>(point), chunk, partial.data(), threads});
  auto* sums = pointer<double>(out);
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t m = 0; m < count; ++m) sums[m] += partial[static_cast<std::size_t>(c * count + m)];
}

}  // namespace

void bind_aggregate_distance(py::module_& module) {
  module.def("squared_distances", squared_distances);
  module.def("squared_distances_to", squared_distances_to);
}

}  // namespace fedkern
