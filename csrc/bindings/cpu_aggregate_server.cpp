#include <cmath>
#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_server.h"
#include "fedkern/parallel.h"

namespace fedkern {
namespace {

// norms, cosines: [count].
void server_step(int dtype, int state_dtype, int out_dtype, std::int64_t size, std::uintptr_t global, const std::vector<std::uintptr_t>& data,
                 const std::vector<double>& weights, double total, int rule, double learning_rate, double beta1, double beta2, double tau,
                 const OptionalAddress& first, const OptionalAddress& second, std::uintptr_t out, std::uintptr_t norms, std::uintptr_t cosines, int threads) {
  std::vector<const void*> vectors(data.size());
  for (std::size_t m = 0; m < data.size(); ++m) vectors[m] = pointer<const void>(data[m]);
  const auto count = static_cast<std::int64_t>(data.size());
  const std::int64_t chunk = vector_chunk(size), chunks = (size + chunk - 1) / chunk, row = 2 * count + 1;
  ReleaseGil release(size * count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * row)), sums(static_cast<std::size_t>(row));
  aggregate_server_kernels().server_step({static_cast<DType>(dtype), static_cast<DType>(state_dtype), static_cast<DType>(out_dtype), count, size,
                                          pointer<const void>(global), vectors.data(), weights.data(), total, static_cast<ServerRule>(rule),
                                          learning_rate, beta1, beta2, tau, optional_pointer<void>(first), optional_pointer<void>(second), pointer<void>(out),
                                          aggregate_past_cache(size, out_dtype), chunk, partial.data(), threads});
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t i = 0; i < row; ++i) sums[static_cast<std::size_t>(i)] += partial[static_cast<std::size_t>(c * row + i)];
  const double square = sums[static_cast<std::size_t>(2 * count)];
  for (std::int64_t m = 0; m < count; ++m) {
    const double own = sums[static_cast<std::size_t>(m)], product = sums[static_cast<std::size_t>(count + m)];
    const double scale = std::sqrt(own * square);
    pointer<double>(norms)[m] = std::sqrt(own);
    pointer<double>(cosines)[m] = scale == 0 ? 0.0 : product / scale;
  }
}

}  // namespace

void bind_aggregate_server(py::module_& module) { module.def("server_step", server_step); }

}  // namespace fedkern
