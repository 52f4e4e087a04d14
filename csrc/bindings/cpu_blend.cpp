#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "blend_call.h"

namespace fedkern {
namespace {

void check_index(const Optional<const std::int64_t>& index, std::int64_t rows, std::int64_t background_rows) {
  for (std::int64_t b = 0; index.present && b < rows; ++b)
    if (index.data[b] < 0 || index.data[b] >= background_rows)
      throw py::value_error("index must be in [0, " + std::to_string(background_rows) + "), the rows of background; index[" +
                            std::to_string(b) + "] is " + std::to_string(index.data[b]));
}

// Which samples use background row n, in ascending order: order[start[n]] ... order[start[n + 1] - 1].
struct Users {
  std::vector<std::int64_t> start, order;
  Users(const std::int64_t* index, std::int64_t rows, std::int64_t background_rows) : start(background_rows + 1), order(rows) {
    for (std::int64_t b = 0; b < rows; ++b) ++start[index[b] + 1];
    for (std::int64_t n = 0; n < background_rows; ++n) start[n + 1] += start[n];
    std::vector<std::int64_t> next(start.begin(), start.end() - 1);
    for (std::int64_t b = 0; b < rows; ++b) order[next[index[b]]++] = b;
  }
};

void check_alpha(const Alpha& alpha, std::int64_t rows) {
  for (std::int64_t b = 0; alpha.each.present && b < rows; ++b) {
    const double value = alpha.each.data[b * alpha.stride];
    if (!(value >= 0 && value <= 1))
      throw py::value_error("alpha must be in [0, 1]; alpha[" + std::to_string(b) + "] is " + std::to_string(value));
  }
}

// One weight per sample, fp64 or fp32, as the kernels take them: doubles.
class Weights {
 public:
  Weights(const Maps& maps, py::handle alpha, double value) : alpha_{{}, 0, value} {
    if (alpha.is_none()) return;
    const TensorView given = maps.numbers(alpha, maps.count(), false, true);
    require(given.bits >= 32, "alpha must be float32 or float64");
    alpha_ = {{static_cast<const double*>(given.data), true}, given.strides[0], value};
    if (given.bits == 64) return;
    wide_.resize(given.shape[0]);
    for (std::size_t b = 0; b < wide_.size(); ++b) wide_[b] = static_cast<const float*>(given.data)[b * given.strides[0]];
    alpha_.each.data = wide_.data();
    alpha_.stride = 1;
  }
  const Alpha& alpha() const { return alpha_; }

 private:
  std::vector<double> wide_;
  Alpha alpha_;
};

// False, and nothing done, where the maps or the index do not lie as kernels read them.
bool forward(py::handle foreground, py::handle background, py::handle index, py::handle alpha, double value, py::handle out, int threads) {
  Maps maps(foreground);
  std::int64_t background_rows = 0;
  BlendForward call = parse_forward(maps, background, index, out, background_rows);
  if (!maps.fits) return false;
  const Weights weights(maps, alpha, value);
  const std::int64_t elements = call.rows * call.size;
  call.alpha = weights.alpha(), call.threads = threads, call.stream = past_cache(3 * elements, static_cast<int>(call.dtype));
  check_index(call.index, call.rows, background_rows);
  check_alpha(call.alpha, call.rows);
  ReleaseGil release(elements >= kReleaseGilElements);
  blend_kernels().forward(call);
  return true;
}

// foreground and background are read for grad_alpha alone. The last two tensors are workspaces of the CUDA core.
bool backward(py::handle grad, py::handle foreground, py::handle background, py::handle index, py::handle alpha, double value,
              std::int64_t background_rows, py::handle grad_foreground, py::handle grad_background, py::handle grad_alpha, py::handle,
              py::handle, int threads) {
  Maps maps(grad);
  BlendBackward call = parse_backward(maps, foreground, background, index, background_rows, grad_foreground, grad_background, grad_alpha);
  if (!maps.fits) return false;
  const Weights weights(maps, alpha, value);
  const std::int64_t elements = call.rows * call.size;
  call.alpha = weights.alpha(), call.threads = threads, call.stream = past_cache(3 * elements, static_cast<int>(call.dtype));
  check_index(call.index, call.rows, background_rows);
  ReleaseGil release(elements >= kReleaseGilElements);
  std::optional<Users> users;
  if (call.index.present && call.grad_background.present) {
    users.emplace(call.index.data, call.rows, background_rows);
    call.start = {users->start.data(), true};
    call.order = users->order.data();
  }
  std::vector<double> partial;
  if (call.grad_alpha.present) {
    partial.resize(call.rows * blend_chunks(call.size));
    call.partial = partial.data();
  }
  blend_kernels().backward(call);
  return true;
}

// boxes [B, n, 4], contiguous fp64 or fp32, as doubles.
std::vector<double> corners_of(const TensorView& boxes) {
  std::vector<double> wide(boxes.shape[0] * boxes.shape[1] * 4);
  if (boxes.bits == 64)
    std::copy_n(static_cast<const double*>(boxes.data), wide.size(), wide.begin());
  else
    std::copy_n(static_cast<const float*>(boxes.data), wide.size(), wide.begin());
  return wide;
}

// Whether one stride, which it returns too, leads from pixel to pixel through all rows, as in contiguous and channels-last images.
bool pixels_in_step(const TensorView& images, std::int64_t& step) {
  const std::int64_t height = images.shape[2], width = images.shape[3];
  step = width > 1 ? images.strides[3] : images.strides[2];
  return width <= 1 || height <= 1 || images.strides[2] == width * images.strides[3];
}

// images and out [B, C, H, W], fill [1 or B, C]; boxes and fill are contiguous. False, and nothing done, where pixels are not in step.
bool fill_boxes(py::handle images, py::handle boxes, py::handle fill, bool keep, py::handle out, int threads) {
  const BoxTensors tensors(images, boxes, fill, out, 32);
  const TensorView &from = tensors.images, &box = tensors.boxes, &colour = tensors.fill, &to = tensors.out;
  const std::int64_t batch = from.shape[0], channels = from.shape[1], pixels = from.shape[2] * from.shape[3], count = box.shape[1];
  std::int64_t step = 0, out_step = 0;
  if (!from.empty() && !(pixels_in_step(from, step) && pixels_in_step(to, out_step))) return false;
  const std::vector<double> corners = corners_of(box);
  for (std::size_t i = 0; i < corners.size(); ++i)
    if (corners[i] != corners[i])
      throw py::value_error("boxes must not hold NaN; box " + std::to_string(i / 4 % count) + " of image " + std::to_string(i / 4 / count) +
                            " does");
  if (from.empty()) return true;
  const std::unique_ptr<std::uint8_t[]> mask(new std::uint8_t[batch * pixels]);
  const BoxMask inside{batch, count, from.shape[2], from.shape[3], corners.data(), mask.get(), threads};
  const BoxFill call{from.bits / 8, batch, channels, pixels, from.strides[0], from.strides[1], step, to.strides[0], to.strides[1], out_step,
                     from.data, mask.get(), static_cast<std::uint8_t>(keep ? 0 : 1), colour.data, colour.shape[0] > 1 ? channels : 0,
                     to.data, threads};
  ReleaseGil release(batch * channels * pixels >= kReleaseGilElements);
  blend_kernels().box_mask(inside);
  blend_kernels().box_fill(call);
  return true;
}

// The mask of fill_boxes alone, for tests: uint8 [B, H, W], contiguous.
void box_mask(py::handle boxes, py::handle mask, int threads) {
  const TensorView box = checked_view(boxes.ptr()), to = checked_view(mask.ptr());
  const std::vector<double> corners = corners_of(box);
  blend_kernels().box_mask({to.shape[0], box.shape[1], to.shape[1], to.shape[2], corners.data(), static_cast<std::uint8_t*>(to.data), threads});
}

// Asks for huge pages behind fresh memory that is about to be written: a tenth of the page faults. Advice, so failure is fine.
void advise_huge_pages(py::handle fresh) {
#ifdef MADV_HUGEPAGE
  const TensorView tensor = checked_view(fresh.ptr());
  std::size_t bytes = tensor.bits / 8;
  for (int d = 0; d < tensor.dims; ++d) bytes *= static_cast<std::size_t>(tensor.shape[d]);
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE)), start = reinterpret_cast<std::uintptr_t>(tensor.data);
  const std::uintptr_t begin = (start + page - 1) & ~(page - 1), end = (start + bytes) & ~(page - 1);
  if (end > begin) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

void bind_blend(py::module_& module) {
  module.def("blend_forward", forward);
  module.def("blend_backward", backward);
  module.def("fill_boxes", fill_boxes);
  module.def("box_mask", box_mask);
  module.def("advise_huge_pages", advise_huge_pages);
}

}  // namespace fedkern
