#include <cmath>

#include "aggregate_call.h"
#include "fedkern/aggregate_server.h"
#include "fedkern/parallel.h"

namespace fedkern {
namespace {

// norms, cosines: [count]; workspace: not needed here.
bool server_step(py::handle vectors, py::handle weights, py::handle global, int rule, double learning_rate, double beta1, double beta2, double tau,
                 py::handle first, py::handle second, py::handle out, py::handle norms, py::handle cosines, py::handle, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  const WeightList w = numbers_of(weights, x.count);
  const ServerTensors t(x, rule, global, first, second, out);
  double *const norm = doubles_of(norms, x.count), *const cosine = doubles_of(cosines, x.count);
  const std::int64_t chunk = vector_chunk(x.size), chunks = (x.size + chunk - 1) / chunk, row = 2 * x.count + 1;
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  std::vector<double> partial(static_cast<std::size_t>(chunks * row)), sums(static_cast<std::size_t>(row));
  aggregate_server_kernels().server_step({x.dtype, t.state, t.out.dtype, x.count, x.size, t.global, x.data.data(), w.numbers.data(), w.total,
                                          static_cast<ServerRule>(rule), learning_rate, beta1, beta2, tau, t.first, t.second, t.out.data,
                                          aggregate_past_cache(x.size, static_cast<int>(t.out.dtype)), chunk, partial.data(), threads});
  for (std::int64_t c = 0; c < chunks; ++c)
    for (std::int64_t i = 0; i < row; ++i) sums[static_cast<std::size_t>(i)] += partial[static_cast<std::size_t>(c * row + i)];
  const double square = sums[static_cast<std::size_t>(2 * x.count)];
  for (std::int64_t m = 0; m < x.count; ++m) {
    const double own = sums[static_cast<std::size_t>(m)], product = sums[static_cast<std::size_t>(x.count + m)];
    const double scale = std::sqrt(own * square);
    norm[m] = std::sqrt(own);
    cosine[m] = scale == 0 ? 0.0 : product / scale;
  }
  return true;
}

}  // namespace

void bind_aggregate_server(py::module_& module) { module.def("server_step", server_step); }

}  // namespace fedkern
