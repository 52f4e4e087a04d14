// Functions of both cores take the same arguments (aggregate_call.h); here the last one is a stream. Those that take vectors answer
// false, with nothing done, where they are not of one stride; the caller then copies them.
#include <algorithm>
#include <utility>

#include "aggregate_call.h"
#include "fedkern/aggregate_cuda.h"

namespace fedkern {
namespace {

cuda::Place place(int gpu, std::uintptr_t stream) { return {gpu, pointer<void>(stream)}; }

cuda::Uploads uploads(VectorList& x) {
  cuda::Uploads result{x.dtype, x.size, x.count, {}, 0, x.strides[0], {}};
  if (x.matrix)
    result.first = {x.data[0], true}, result.row_stride = x.row_stride;
  else
    result.each = std::move(x.data);
  return result;
}

// Numbers, or what a tensor on the device holds.
cuda::UploadWeights weights_of(py::handle weights, std::int64_t count) {
  if (!PyList_CheckExact(weights.ptr()) && !PyTuple_CheckExact(weights.ptr())) return {{}, {doubles_of(weights, count), true}, 0.0};
  WeightList given = numbers_of(weights, count);
  return {std::move(given.numbers), {}, given.total};
}

// Leaves out the vectors whose weight, a number, is zero: the kernel would read them.
void leave_out_unused(VectorList& x, cuda::UploadWeights& w) {
  if (w.device.present || std::find(w.host.begin(), w.host.end(), 0.0) == w.host.end()) return;
  std::size_t kept = 0;
  for (std::size_t m = 0; m < w.host.size(); ++m)
    if (w.host[m] != 0) x.data[kept] = x.data[m], w.host[kept++] = w.host[m];
  x.data.resize(kept), w.host.resize(kept);
  x.matrix = false, x.count = static_cast<std::int64_t>(kept);
}

void at_most(const VectorList& x, std::int64_t most) {
  if (x.count > most) throw std::invalid_argument("too many vectors for one launch");
}

// workspace: [P] where there are more vectors than one launch takes, else None.
bool weighted_mean(py::handle vectors, py::handle weights, py::handle out, py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  cuda::UploadWeights w = weights_of(weights, x.count);
  leave_out_unused(x, w);
  const Optional<double> sums = optional_doubles(workspace, x.size);
  if (x.count > cuda::kTable && !sums.present) throw std::invalid_argument("more vectors than one launch takes need a workspace");
  const Values to = values_of(out, x.size);
  cuda::weighted_mean(uploads(x), w, {{}, sums.data, {to.data, true}, to.dtype}, place(x.gpu, stream));
  return true;
}

void accumulator_add(py::handle vector, double weight, py::handle sum, std::uintptr_t stream) {
  DType dtype;
  const TensorView x = vector_view(vector.ptr(), dtype);
  double* const sums = doubles_of(sum, x.shape[0]);
  cuda::weighted_mean({dtype, x.shape[0], 1, {}, 0, stride_of(x), {x.data}}, {{weight}, {}, weight}, {{sums, true}, sums, {}, {}}, place(x.gpu(), stream));
}

void accumulator_mean(py::handle sum, double total, py::handle out, std::uintptr_t stream) {
  DType dtype;
  const TensorView x = vector_view(sum.ptr(), dtype);
  const Values to = values_of(out, x.shape[0]);
  // No vectors to add: the sum so far, over its weight.
  cuda::weighted_mean({DType::f64, x.shape[0], 0, {}, 0, 1, {}}, {{}, {}, total}, {{doubles_of(sum, x.shape[0]), true}, nullptr, {to.data, true}, to.dtype},
                      place(x.gpu(), stream));
}

void exact_add(py::handle vector, double weight, py::handle digits, py::handle top, std::uintptr_t stream) {
  DType dtype;
  const TensorView x = vector_view(vector.ptr(), dtype);
  cuda::exact_add(dtype, x.shape[0], x.data, x.strides[0], weight, exact_state(digits, top, x.shape[0]), place(x.gpu(), stream));
}

void exact_mean(py::handle digits, py::handle top, double total, py::handle out, std::uintptr_t stream) {
  DType dtype;
  const TensorView to = vector_view(out.ptr(), dtype);
  cuda::exact_mean(dtype, to.shape[0], exact_state(digits, top, to.shape[0]), total, dense(out, to.shape[0]).data, place(to.gpu(), stream));
}

// norms, cosines, workspace: None where nobody asks for them.
bool server_step(py::handle vectors, py::handle weights, py::handle global, int rule, double learning_rate, double beta1, double beta2, double tau,
                 py::handle first, py::handle second, py::handle out, py::handle norms, py::handle cosines, py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  at_most(x, cuda::kTable);
  const ServerTensors t(x, rule, global, first, second, out);
  const cuda::ServerStep call{static_cast<ServerRule>(rule), learning_rate, beta1, beta2, tau, t.global, t.first, t.second, t.state, t.state, t.out.data,
                              t.out.dtype, optional_doubles(norms, x.count).data, optional_doubles(cosines, x.count).data,
                              optional_doubles(workspace, cuda::kAggregateWorkspace).data};
  require(!call.norms == !call.cosines && !call.norms == !call.workspace, "norms, cosines and their workspace go together");
  cuda::server_step(uploads(x), weights_of(weights, x.count), call, place(x.gpu, stream));
  return true;
}

bool squared_distances_to(py::handle vectors, py::handle point, py::handle out, py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  const Optional<double> to = optional_doubles(point, x.size);
  double *const squares = doubles_of(out, x.count), *const space = doubles_of(workspace, cuda::kAggregateWorkspace);
  cuda::squared_distances_to(uploads(x), {to.data, to.present}, squares, space, place(x.gpu, stream));
  return true;
}

// root: of distances, not of their squares.
bool squared_distances(py::handle vectors, bool root, py::handle out, py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  at_most(x, cuda::kMostSorted);
  double *const squares = doubles_of(out, x.count * x.count), *const space = doubles_of(workspace, cuda::kAggregateWorkspace);
  cuda::squared_distances(uploads(x), root, squares, space, place(x.gpu, stream));
  return true;
}

bool krum_shares(py::handle vectors, int byzantine, int keep, py::handle shares, py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  at_most(x, cuda::kMostSorted);
  double *const to = doubles_of(shares, x.count), *const space = doubles_of(workspace, cuda::kAggregateWorkspace);
  cuda::krum_shares(uploads(x), byzantine, keep, to, space, place(x.gpu, stream));
  return true;
}

bool geometric_shares(py::handle vectors, py::handle weights, std::int64_t iterations, double tolerance, double smoothing, py::handle shares,
                      py::handle workspace, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  at_most(x, cuda::kMostSorted);
  const double* const given = doubles_of(weights, x.count);
  double *const to = doubles_of(shares, x.count), *const space = doubles_of(workspace, cuda::kAggregateWorkspace);
  cuda::geometric_shares(uploads(x), given, iterations, tolerance, smoothing, to, space, place(x.gpu, stream));
  return true;
}

// weights: None for the plain mean.
bool sorted_mean(py::handle vectors, int low, int high, py::handle weights, bool median, py::handle out, std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  at_most(x, cuda::kMostSorted);
  void* const to = alike_of(out, x, 1);
  const bool weighted = !weights.is_none();
  check_sorted(x, low, high, weighted, median);
  const cuda::UploadWeights w = weighted ? weights_of(weights, x.count) : cuda::UploadWeights{};
  cuda::sorted_mean(uploads(x), weighted ? &w : nullptr, low, high, median, to, place(x.gpu, stream));
  return true;
}

// out: [count, size], or `count` tensors.
bool scale_and_noise(py::handle vectors, py::handle factors, double deviation, std::uint64_t seed, std::uint64_t offset, py::handle out,
                     std::uintptr_t stream) {
  VectorList x = vectors_of(vectors);
  if (!x.alike) return false;
  const double* const each = doubles_of(factors, x.count);
  VectorList to = vectors_of(out);
  if (to.dtype != x.dtype || to.size != x.size || to.count != x.count || to.gpu != x.gpu || !to.unit())
    throw py::type_error("results of scale_and_noise are like the vectors, without gaps");
  cuda::scale_and_noise(uploads(x), each, deviation, seed, offset, uploads(to), place(x.gpu, stream));
  return true;
}

}  // namespace

void bind_cuda_aggregate(py::module_& module) {
  module.attr("aggregate_table") = cuda::kTable;
  module.attr("aggregate_sorted") = cuda::kMostSorted;
  module.attr("aggregate_workspace") = cuda::kAggregateWorkspace;
  module.def("plain_weights", plain_weights);
  module.def("writable", writable);
  module.def("weighted_mean", weighted_mean);
  module.def("accumulator_add", accumulator_add);
  module.def("accumulator_mean", accumulator_mean);
  module.def("exact_add", exact_add);
  module.def("exact_mean", exact_mean);
  module.def("server_step", server_step);
  module.def("squared_distances_to", squared_distances_to);
  module.def("squared_distances", squared_distances);
  module.def("krum_shares", krum_shares);
  module.def("geometric_shares", geometric_shares);
  module.def("sorted_mean", sorted_mean);
  module.def("scale_and_noise", scale_and_noise);
}

}  // namespace fedkern
