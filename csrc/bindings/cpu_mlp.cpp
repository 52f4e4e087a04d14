// fedkern._cpu.mlp_pass: loss and gradients of linear layers with ReLU between them.
#include <vector>

#include "exchange.h"
#include "fedkern/mlp.h"

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

// layers: weight, bias or None, and the gradients of both, one layer after another. Returns None, with nothing written, where x is
// not fp32 [B, in], the targets not int64 [B], one is no class, or none counts.
py::object mlp_pass(const py::tuple& layers, const py::object& x, const py::object& targets, int threads) {
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
  const TensorView classes = checked_view(targets.ptr()), inputs = checked_view(x.ptr());
  const std::int64_t rows = classes.dims == 1 ? classes.shape[0] : 0;
  if (rows == 0 || !fits(classes, 0, 64, rows) || !fits(inputs, 2, 32, rows * all.front().in)) return py::none();
  const auto* const wanted = static_cast<const std::int64_t*>(classes.data);
  bool counts = false;
  for (std::int64_t b = 0; b < rows; ++b) {
    if (wanted[b] == kMlpIgnored) continue;
    if (wanted[b] < 0 || wanted[b] >= all.back().out) return py::none();
    counts = true;
  }
  if (!counts) return py::none();
  const MlpPass pass{all.data(), count, rows, static_cast<const float*>(inputs.data), wanted, threads};
  std::int64_t work = 0;
  for (const MlpLayer& layer : all) work += layer.in * layer.out * rows;
  float loss;
  {
    ReleaseGil release(work >= 16 * kReleaseGilElements);
    loss = mlp_kernels().pass(pass);
  }
  return py::float_(loss);
}

}  // namespace

void bind_mlp(py::module_& module) { module.def("mlp_pass", mlp_pass); }

}  // namespace fedkern
