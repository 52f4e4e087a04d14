#include "bindings.h"
#include "fedkern/blend.h"

namespace fedkern {

void bind_blend(py::module_& module) {
  module.def("blend_forward", [](int dtype, std::int64_t rows, std::int64_t size, std::uintptr_t foreground,
                                 std::int64_t foreground_stride, std::uintptr_t background, std::int64_t background_stride,
                                 std::uintptr_t index, std::uintptr_t alpha, double alpha_value, std::uintptr_t out, int threads) {
    const BlendForward call{static_cast<DType>(dtype), rows, size, pointer<const void>(foreground), foreground_stride,
                            pointer<const void>(background), background_stride, pointer<const std::int64_t>(index),
                            pointer<const double>(alpha), alpha_value, pointer<void>(out), threads};
    ReleaseGil release(rows * size >= kReleaseGilElements);
    blend_kernels().forward(call);
  });
}

}  // namespace fedkern
