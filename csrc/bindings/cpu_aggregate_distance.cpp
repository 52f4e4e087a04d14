#include <algorithm>
#include <cmath>

#include "aggregate_call.h"
#include "fedkern/aggregate_distance.h"

namespace fedkern {
namespace {

// Elements of one partial sum: at most 64 of them, fewer where there are many sums, in chunks that are worth a thread.
std::int64_t chunk_size(std::int64_t size, std::int64_t sums) {
  const std::int64_t most = std::clamp<std::int64_t>((std::int64_t{1} << 22) / std::max<std::int64_t>(sums, 1), 4, 64);
  const std::int64_t even = (size + most - 1) / most;
  return std::max<std::int64_t>(16384, (even + 4095) / 4096 * 4096);
}

// out: [count, count]; root: of distances, not of their squares; workspace: not needed here.
bool squared_distances(py::handle vectors, bool root, py::handle out, py::handle, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  const std::int64_t pairs = x.count * x.count, chunk = chunk_size(x.size, pairs), chunks = (x.size + chunk - 1) / chunk;
  double* const sums = doubles_of(out, pairs);
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * pairs), 0.0);
  aggregate_distance_kernels().pairs({x.dtype, x.count, x.size, x.data.data(), chunk, partial.data(), threads});
  std::fill_n(sums, pairs, 0.0);
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t i = 0; i < pairs; ++i) sums[i] += partial[static_cast<std::size_t>(c * pairs + i)];
  for (std::int64_t i = 0; i < x.count; ++i)
    for (std::int64_t k = 0; k < i; ++k) {
      double& sum = sums[i * x.count + k];
      if (root) sum = std::sqrt(sum);
      sums[k * x.count + i] = sum;
    }
  return true;
}

// point: [size] or None; out: [count]; workspace: not needed here.
bool squared_distances_to(py::handle vectors, py::handle point, py::handle out, py::handle, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  const Optional<double> to = optional_doubles(point, x.size);
  double* const sums = doubles_of(out, x.count);
  const std::int64_t chunk = chunk_size(x.size, 1), chunks = (x.size + chunk - 1) / chunk;
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * x.count), 0.0);
  aggregate_distance_kernels().to_point({x.dtype, x.count, x.size, x.data.data(), {to.data, to.present}, chunk, partial.data(), threads});
  std::fill_n(sums, x.count, 0.0);
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t m = 0; m < x.count; ++m) sums[m] += partial[static_cast<std::size_t>(c * x.count + m)];
  return true;
}

}  // namespace

void bind_aggregate_distance(py::module_& module) {
  module.def("squared_distances", squared_distances);
  module.def("squared_distances_to", squared_distances_to);
}

}  // namespace fedkern
