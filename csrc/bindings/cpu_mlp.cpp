// fedkern._cpu.mlp_pass, mlp_train: loss and gradients of linear layers with ReLU between them, alone and with steps of SGD.
#include <vector>

#include "exchange.h"
#include "fedkern/mlp.h"
#include "fedkern/optimise.h"
#include "optimise_call.h"

namespace fedkern {
namespace {

// Whether a tensor is contiguous and on the CPU, of `size` elements. code: 0 for integers, 2 for floating numbers.
bool fits(const TensorView& seen, int code, int bits, std::int64_t size) {
  std::int64_t elements = 1;
  for (int d = 0; d < seen.dims; ++d) elements *= seen.shape[d];
  return seen.code == code && seen.bits == bits && elements == size && seen.device_type == TensorView::kCpu && seen.contiguous();
}

float* numbers(PyObject* object, std::int64_t rows, std::int64_t columns) {
  const TensorView seen = checked_view(object);
  require(fits(seen, 2, 32, rows * columns), "mlp_pass takes contiguous float32 tensors on the CPU, of its layers' sizes");
  return static_cast<float*>(seen.data);
}

// weight, bias or None, and the gradients of both, one layer after another.
std::vector<MlpLayer> read_layers(const py::tuple& layers) {
  const Py_ssize_t count = PyTuple_GET_SIZE(layers.ptr()) / 4;
  require(count > 0 && PyTuple_GET_SIZE(layers.ptr()) == 4 * count, "mlp_pass takes four tensors a layer");
  const auto part = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(layers.ptr(), i); };
  std::vector<MlpLayer> all;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const TensorView weight = checked_view(part(4 * i));
    require(weight.dims == 2 && weight.shape[0] > 0 && weight.shape[1] > 0 && (i == 0 || weight.shape[1] == all.back().out), "mlp_pass's layers do not follow each other");
    const std::int64_t in = weight.shape[1], out = weight.shape[0];
    const bool biased = part(4 * i + 1) != Py_None;
    all.push_back({in, out, numbers(part(4 * i), out, in), biased ? numbers(part(4 * i + 1), out, 1) : nullptr, numbers(part(4 * i + 2), out, in),
                   biased ? numbers(part(4 * i + 3), out, 1) : nullptr});
  }
  return all;
}

// Whether all of a batch's targets that count are classes, and some count.
bool targets_fit(const std::int64_t* targets, std::int64_t rows, std::int64_t classes) {
  bool counts = false;
  for (std::int64_t b = 0; b < rows; ++b) {
    if (targets[b] == kMlpIgnored) continue;
    if (targets[b] < 0 || targets[b] >= classes) return false;
    counts = true;
  }
  return counts;
}

// The pass of all rows, whose number is 0 where x is not fp32 [B, in] or the targets not int64 [B].
MlpPass read_batch(const std::vector<MlpLayer>& layers, const py::object& x, const py::object& targets, int threads) {
  const TensorView classes = checked_view(targets.ptr()), inputs = checked_view(x.ptr());
  const std::int64_t rows = classes.dims == 1 ? classes.shape[0] : 0;
  const bool taken = fits(classes, 0, 64, rows) && fits(inputs, 2, 32, rows * layers.front().in);
  return {layers.data(), static_cast<std::int64_t>(layers.size()), taken ? rows : 0, static_cast<const float*>(inputs.data), static_cast<const std::int64_t*>(classes.data), threads};
}

// Returns None, with nothing written, where the batch does not fit, one of its targets is no class, or none counts.
py::object mlp_pass(const py::tuple& layers, const py::object& x, const py::object& targets, int threads) {
  const std::vector<MlpLayer> all = read_layers(layers);
  const MlpPass pass = read_batch(all, x, targets, threads);
  if (!targets_fit(pass.targets, pass.rows, all.back().out)) return py::none();
  std::int64_t work = 0;
  for (const MlpLayer& layer : all) work += layer.in * layer.out * pass.rows;
  float loss;
  {
    ReleaseGil release(work >= 16 * kReleaseGilElements);
    loss = mlp_kernels().pass(pass);
  }
  return py::float_(loss);
}

// Trains on batches that lie one behind the other in x and targets, sizes: int64 [N], with a step of `call`, whose parameters and
// gradients hold those of the layers, after every pass. losses and squared norms of gradients: fp64 [N]. Returns false, with nothing
// written, where a batch does not fit or mlp_pass would not take it.
bool mlp_train(const py::tuple& layers, const py::object& x, const py::object& targets, const py::object& sizes, const py::tuple& call, const py::object& losses,
               const py::object& squares, int threads) {
  const std::vector<MlpLayer> all = read_layers(layers);
  MlpPass pass = read_batch(all, x, targets, threads);
  const TensorView parts = checked_view(sizes.ptr());
  const std::int64_t count = parts.dims == 1 ? parts.shape[0] : 0;
  require(fits(parts, 0, 64, count), "mlp_train takes a number of rows for every batch");
  const auto* const rows = static_cast<const std::int64_t*>(parts.data);
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < count; total += rows[i++])
    if (rows[i] < 1 || rows[i] > pass.rows - total || !targets_fit(pass.targets + total, rows[i], all.back().out)) return false;
  OptimiserStep step{};
  const OptimiseSettings settings = parse_optimise(call, step);
  require(step.rows == 1 && !settings.adamw, "mlp_train takes steps of SGD on one vector");
  step.rule = OptimiserRule::sgd, step.threads = threads;
  const double rate = PyFloat_AsDouble(field(call, kRate));
  if (PyErr_Occurred()) throw py::error_already_set();
  auto *const loss = optimise_memory<double>(losses, count), *const squared = optimise_memory<double>(squares, count);
  std::vector<double> rates(1);
  bool finite;  // the loop looks at losses and norms
  ReleaseGil release(true);
  for (std::int64_t i = 0; i < count; ++i) {
    pass.rows = rows[i], rates[0] = rate;
    loss[i] = static_cast<double>(mlp_kernels().pass(pass));
    take_step(step, settings, rates, squared + i, &finite);
    pass.x += rows[i] * all.front().in, pass.targets += rows[i];
  }
  return true;
}

}  // namespace

void bind_mlp(py::module_& module) {
  module.def("mlp_pass", mlp_pass);
  module.def("mlp_train", mlp_train);
}

}  // namespace fedkern
