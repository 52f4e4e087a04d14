#include "contrast_call.h"
#include "fedkern/contrast_cuda.h"

namespace fedkern {
namespace {

// temperature: a number, or a tensor of one element.
void set_temperature(cuda::ContrastTile& tile, py::handle temperature) {
  if (PyFloat_Check(temperature.ptr()))
    tile.value = PyFloat_AS_DOUBLE(temperature.ptr());
  else
    tile.temperature = {contiguous(temperature, tile.dtype, 1), true};
}

// Elements of pieces [2, blocks, 2 B].
std::int64_t pieces_of(std::int64_t count) { return 4 * count * ((count + cuda::kContrastBlock - 1) / cuda::kContrastBlock); }

cuda::ContrastTile tile_of(const Matrix& tile, std::int64_t first, py::handle temperature) {
  cuda::ContrastTile result{tile.dtype, tile.rows, tile.columns, tile.data, tile.stride, first, {}, 0};
  set_temperature(result, temperature);
  return result;
}

void look(py::handle tile, std::int64_t first, py::handle temperature, py::handle pieces, py::handle own, std::uintptr_t stream) {
  const Matrix seen(tile);
  seen.check_tile(first, seen.columns);
  cuda::contrast_look(tile_of(seen, first, temperature), contiguous(pieces, seen.dtype, pieces_of(seen.columns)), contiguous(own, seen.dtype, seen.columns), seen.gpu, pointer<void>(stream));
}

// own: [count]; losses: fp64 [2 count] of workspace.
void join(py::handle temperature, py::handle pieces, py::handle own, py::handle sums, py::handle losses, py::handle loss, std::uintptr_t stream) {
  cuda::ContrastTile tile{};
  const TensorView partners = computed(own, tile.dtype), result = checked_view(loss.ptr());
  DType loss_dtype;
  if (partners.dims != 1 || !result.floating(loss_dtype)) throw py::type_error("contrast_join takes own [B] and a floating loss");
  tile.rows = tile.count = partners.shape[0];
  set_temperature(tile, temperature);
  require(!result.dims, "the loss has no axis");
  cuda::contrast_join(tile, contiguous(pieces, tile.dtype, pieces_of(tile.count)), contiguous(own, tile.dtype, tile.count), contiguous(sums, tile.dtype, 4 * tile.count),
                      static_cast<double*>(contiguous(losses, DType::f64, 2 * tile.count)), loss_dtype, result.data,
                      partners.gpu(), pointer<void>(stream));
}

void gradient(py::handle tile, std::int64_t first, py::handle temperature, py::handle sums, std::uintptr_t stream) {
  const Matrix seen(tile);
  seen.check_tile(first, seen.columns);
  cuda::contrast_gradient(tile_of(seen, first, temperature), contiguous(sums, seen.dtype, 4 * seen.columns), seen.gpu, pointer<void>(stream));
}

}  // namespace

void bind_cuda_contrast(py::module_& module) {
  module.attr("contrast_block") = cuda::kContrastBlock;
  module.def("contrast_look", look);
  module.def("contrast_join", join);
  module.def("contrast_gradient", gradient);
}

}  // namespace fedkern
