#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_privacy.h"

namespace fedkern {
namespace {

// factors: [count]; out: [count, size].
void scale_and_noise(int dtype, std::int64_t size, const std::vector<std::uintptr_t>& data, std::uintptr_t factors, double deviation,
                     std::uint64_t seed, std::uint64_t offset, std::uintptr_t out, int threads) {
  std::vector<const void*> vectors(data.size());
  for (std::size_t m = 0; m < data.size(); ++m) vectors[m] = pointer<const void>(data[m]);
  const auto count = static_cast<std::int64_t>(data.size());
  ReleaseGil release(size * count >= kReleaseGilElements);
  aggregate_privacy_kernels().scale_and_noise({static_cast<DType>(dtype), count, size, vectors.data(), pointer<const double>(factors), deviation,
                                               seed, offset, pointer<void>(out), threads});
}

}  // namespace

void bind_aggregate_privacy(py::module_& module) { module.def("scale_and_noise", scale_and_noise); }

}  // namespace fedkern
