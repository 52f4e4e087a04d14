// fedkern._cpu.mlp_pass: loss and gradients of linear layers with ReLU between them.
#include <vector>

#include "exchange.h"
#include "fedkern/mlp.h"

namespace fedkern {
namespace {

float* numbers(PyObject* object, std::int64_t rows, std::int64_t columns) {
  const TensorView seen = checked_view(object);
  std::int64_t size = 1;
  for (int d = 0; d < seen.dims; ++d) size *= seen.shape[d];
  require(seen.code == 2 && seen.bits == 32 && seen.device_type == TensorView::kCpu && seen.contiguous() && size == rows * columns,
          "mlp_pass takes contiguous float32 tensors on the CPU, of its layers' sizes");
  return static_cast<float*>(seen.data);
}

// layers: weight, bias or None, and the gradients of both, one layer after another. Returns None, with nothing written, where no
// target counts, one is no class, or they are not [B].
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
  const TensorView classes = checked_view(targets.ptr());
  if (classes.dims != 1) return py::none();
  require(classes.code == 0 && classes.bits == 64 && classes.device_type == TensorView::kCpu && classes.contiguous() && classes.shape[0] > 0,
          "mlp_pass takes int64 targets [B]");
  const std::int64_t rows = classes.shape[0];
  const auto* const wanted = static_cast<const std::int64_t*>(classes.data);
  bool counts = false;
  for (std::int64_t b = 0; b < rows; ++b) {
    if (wanted[b] == kMlpIgnored) continue;
    if (wanted[b] < 0 || wanted[b] >= all.back().out) return py::none();
    counts = true;
  }
  if (!counts) return py::none();
  const MlpPass pass{all.data(), count, rows, numbers(x.ptr(), rows, all.front().in), wanted, threads};
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
