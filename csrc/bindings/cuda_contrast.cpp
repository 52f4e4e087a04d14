#include <tuple>

#include "bindings.h"
#include "fedkern/contrast_cuda.h"

namespace fedkern {
namespace {

// (dtype, rows, pairs, address, stride, first row, address of the temperature or None, its value)
using TileArgument = std::tuple<int, std::int64_t, std::int64_t, std::uintptr_t, std::int64_t, std::int64_t, OptionalAddress, double>;

cuda::ContrastTile tile_of(const TileArgument& a) {
  const auto& [dtype, rows, count, data, stride, first, temperature, value] = a;
  return {static_cast<DType>(dtype), rows, count, pointer<void>(data), stride, first, optional_pointer<const void>(temperature), value};
}

void look(const TileArgument& tile, std::uintptr_t pieces, std::uintptr_t own, int device, std::uintptr_t stream) {
  cuda::contrast_look(tile_of(tile), pointer<void>(pieces), pointer<void>(own), device, pointer<void>(stream));
}

void join(const TileArgument& tile, std::uintptr_t pieces, std::uintptr_t own, std::uintptr_t sums, std::uintptr_t losses, int loss_dtype,
          std::uintptr_t loss, int device, std::uintptr_t stream) {
  cuda::contrast_join(tile_of(tile), pointer<const void>(pieces), pointer<const void>(own), pointer<void>(sums), pointer<double>(losses),
                      static_cast<DType>(loss_dtype), pointer<void>(loss), device, pointer<void>(stream));
}

void gradient(const TileArgument& tile, std::uintptr_t sums, int device, std::uintptr_t stream) {
  cuda::contrast_gradient(tile_of(tile), pointer<const void>(sums), device, pointer<void>(stream));
}

}  // namespace

void bind_cuda_contrast(py::module_& module) {
  module.attr("contrast_block") = cuda::kContrastBlock;
  module.def("contrast_look", look);
  module.def("contrast_join", join);
  module.def("contrast_gradient", gradient);
}

}  // namespace fedkern
