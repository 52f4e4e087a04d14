#include <tuple>
#include <vector>

#include "bindings.h"
#include "fedkern/optimise_cuda.h"

namespace fedkern {
namespace {

// (address or None, elements from row to row)
using RowsArgument = std::tuple<OptionalAddress, std::int64_t>;

cuda::OptimiserRows rows_of(const RowsArgument& a) {
  const auto& [data, step] = a;
  return {pointer<void>(data.value_or(0)), step, data.has_value()};
}

// tensors: parameters, gradients, first, second, anchor, correction, gradient_sum.
// numbers: lr, momentum, weight_decay, proximal, max_norm (0: none), and for AdamW beta1, beta2, bias, root, eps.
// results: workspace, squared, finite.
void optimise_step(int dtype, std::int64_t rows, std::int64_t size, const std::vector<RowsArgument>& tensors, const std::vector<double>& numbers,
                   const OptionalAddress& lr_each, bool zero, const std::vector<std::uintptr_t>& results, int device, std::uintptr_t stream) {
  cuda::OptimiserStep a{};
  a.dtype = static_cast<DType>(dtype), a.rows = rows, a.size = size, a.zero = zero;
  cuda::OptimiserRows* const places[] = {&a.parameters, &a.gradients, &a.first, &a.second, &a.anchor, &a.correction, &a.gradient_sum};
  for (std::size_t i = 0; i < 7; ++i) *places[i] = rows_of(tensors.at(i));
  a.lr = numbers.at(0), a.momentum = numbers.at(1), a.weight_decay = numbers.at(2), a.proximal = numbers.at(3), a.max_norm = numbers.at(4);
  a.adamw = numbers.size() > 5;
  if (a.adamw) a.beta1 = numbers.at(5), a.beta2 = numbers.at(6), a.bias = numbers.at(7), a.root = numbers.at(8), a.eps = numbers.at(9);
  a.lr_each = optional_pointer<const double>(lr_each);
  a.workspace = pointer<double>(results.at(0)), a.squared = pointer<double>(results.at(1)), a.finite = pointer<bool>(results.at(2));
  cuda::optimise_step(a, device, pointer<void>(stream));
}

}  // namespace

void bind_cuda_optimise(py::module_& module) {
  module.def("optimise_blocks", cuda::optimise_blocks);
  module.def("optimise_step", optimise_step);
}

}  // namespace fedkern
