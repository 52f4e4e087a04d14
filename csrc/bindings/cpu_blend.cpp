#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "blend_rows.h"
#include "exchange.h"
#include "fedkern/blend.h"

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
  Weights(const OptionalAddress& alpha, int dtype, std::int64_t stride, std::int64_t rows, double value)
      : alpha_{optional_pointer<const double>(alpha), stride, value} {
    if (!alpha || static_cast<DType>(dtype) == DType::f64) return;
    wide_.resize(rows);
    for (std::int64_t b = 0; b < rows; ++b) wide_[b] = pointer<const float>(*alpha)[b * stride];
    alpha_.each.data = wide_.data();
    alpha_.stride = 1;
  }
  const Alpha& alpha() const { return alpha_; }

 private:
  std::vector<double> wide_;
  Alpha alpha_;
};

void forward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t foreground,
             std::int64_t foreground_stride, std::uintptr_t background, std::int64_t background_stride, const OptionalAddress& index,
             const OptionalAddress& alpha, int alpha_dtype, std::int64_t alpha_stride, double alpha_value, std::uintptr_t out, int threads) {
  const Weights weights(alpha, alpha_dtype, alpha_stride, rows, alpha_value);
  const BlendForward call{static_cast<DType>(dtype), rows, size, {pointer<void>(foreground), foreground_stride},
                          {pointer<void>(background), background_stride}, {pointer<void>(out), size},
                          optional_pointer<const std::int64_t>(index), weights.alpha(), threads, past_cache(3 * rows * size, dtype)};
  check_index(call.index, rows, background_rows);
  check_alpha(call.alpha, rows);
  ReleaseGil release(rows * size >= kReleaseGilElements);
  blend_kernels().forward(call);
}

// foreground and background are read for grad_alpha alone.
void backward(int dtype, std::int64_t rows, std::int64_t background_rows, std::int64_t size, std::uintptr_t grad, std::int64_t grad_stride,
              const OptionalAddress& foreground, std::int64_t foreground_stride, const OptionalAddress& background,
              std::int64_t background_stride, const OptionalAddress& index, const OptionalAddress& alpha, int alpha_dtype,
              std::int64_t alpha_stride, double alpha_value, const OptionalAddress& grad_foreground, const OptionalAddress& grad_background,
              const OptionalAddress& grad_alpha, int threads) {
  const Weights weights(alpha, alpha_dtype, alpha_stride, rows, alpha_value);
  BlendBackward call{static_cast<DType>(dtype), rows, background_rows, size, {pointer<void>(grad), grad_stride},
                     optional_rows(foreground, foreground_stride), optional_rows(background, background_stride), optional_pointer<const std::int64_t>(index),
                     weights.alpha(), optional_rows(grad_foreground, size), optional_rows(grad_background, size), optional_pointer<double>(grad_alpha),
                     nullptr, {}, nullptr, threads, past_cache(3 * rows * size, dtype)};
  check_index(call.index, rows, background_rows);
  ReleaseGil release(rows * size >= kReleaseGilElements);
  std::optional<Users> users;
  if (call.index.present && call.grad_background.present) {
    users.emplace(call.index.data, rows, background_rows);
    call.start = {users->start.data(), true};
    call.order = users->order.data();
  }
  std::vector<double> partial;
  if (call.grad_alpha.present) {
    partial.resize(rows * blend_chunks(size));
    call.partial = partial.data();
  }
  blend_kernels().backward(call);
}

// What of checked tensors `forward` and `backward` take as numbers; no address for None.
struct Part {
  OptionalAddress address;
  int dtype = 1;
  std::int64_t rows = 0, size = 0, stride = 0;  // of a sample; from one to the next
  bool dense = true;

  explicit Part(py::handle given) {
    if (given.is_none()) return;
    const TensorView tensor = checked_view(given.ptr());
    DType kind = DType::f64;
    tensor.floating(kind);
    address = reinterpret_cast<std::uintptr_t>(tensor.data), dtype = static_cast<int>(kind), dense = tensor.contiguous();
    rows = tensor.dims ? tensor.shape[0] : 0, stride = tensor.dims ? tensor.strides[0] : 0, size = 1;
    for (int d = 1; d < tensor.dims; ++d) size *= tensor.shape[d];
  }
};

// The same from tensors; false, and nothing done, where samples or an index are not side by side.
bool forward_of(py::handle foreground, py::handle background, py::handle alpha, double value, py::handle index, py::handle out,
                int threads) {
  const Part front(foreground), back(background), weights(alpha), chosen(index), result(out);
  if (!front.dense || !back.dense || !chosen.dense || !result.dense) return false;
  forward(front.dtype, front.rows, back.rows, front.size, *front.address, front.size, *back.address, front.size, chosen.address,
          weights.address, weights.dtype, weights.stride, value, *result.address, threads);
  return true;
}

// grad_foreground and grad_background may be None, as may what only grad_alpha needs.
bool backward_of(py::handle grad, py::handle foreground, py::handle background, py::handle alpha, double value, py::handle index,
                 std::int64_t background_rows, py::handle grad_foreground, py::handle grad_background, py::handle grad_alpha,
                 int threads) {
  const Part from(grad), front(foreground), back(background), weights(alpha), chosen(index);
  if (!from.dense || !front.dense || !back.dense || !chosen.dense) return false;
  const Part own(grad_foreground), other(grad_background), sums(grad_alpha);
  backward(from.dtype, from.rows, background_rows, from.size, *from.address, from.size, front.address, from.size, back.address,
           from.size, chosen.address, weights.address, weights.dtype, weights.stride, value, own.address, other.address, sums.address,
           threads);
  return true;
}

// erase_boxes and keep_boxes of contiguous images in one call; boxes are fp64 or fp32.
void fill_boxes(std::int64_t item, std::int64_t batch, std::int64_t channels, std::int64_t height, std::int64_t width, std::int64_t boxes,
                std::uintptr_t images, std::uintptr_t box, int box_dtype, std::uintptr_t fill, int replaced, std::uintptr_t out,
                int threads) {
  const std::int64_t corners = batch * boxes * 4, pixels = height * width;
  std::vector<double> wide(corners);
  if (static_cast<DType>(box_dtype) == DType::f64)
    std::copy_n(pointer<const double>(box), corners, wide.begin());
  else
    std::copy_n(pointer<const float>(box), corners, wide.begin());
  for (std::int64_t i = 0; i < corners; ++i)
    if (wide[i] != wide[i])
      throw py::value_error("boxes must not hold NaN; box " + std::to_string(i / 4 % boxes) + " of image " +
                            std::to_string(i / 4 / boxes) + " does");
  const std::unique_ptr<std::uint8_t[]> mask(new std::uint8_t[batch * pixels]);
  const BoxMask inside{batch, boxes, height, width, wide.data(), mask.get(), threads};
  const BoxFill call{item, batch, channels, pixels, channels * pixels, pixels, 1, channels * pixels, pixels, 1,
                     pointer<const void>(images), mask.get(), static_cast<std::uint8_t>(replaced), pointer<const void>(fill), 0,
                     pointer<void>(out), threads};
  ReleaseGil release(batch * channels * pixels >= kReleaseGilElements);
  blend_kernels().box_mask(inside);
  blend_kernels().box_fill(call);
}

void box_mask(std::int64_t batch, std::int64_t boxes, std::int64_t height, std::int64_t width, std::uintptr_t box, std::uintptr_t mask,
              int threads) {
  const BoxMask call{batch, boxes, height, width, pointer<const double>(box), pointer<std::uint8_t>(mask), threads};
  ReleaseGil release(batch * height * width >= kReleaseGilElements);
  blend_kernels().box_mask(call);
}

void box_fill(std::int64_t item, std::int64_t batch, std::int64_t channels, std::int64_t pixels, std::int64_t batch_stride,
              std::int64_t channel_stride, std::int64_t pixel_stride, std::int64_t out_batch_stride, std::int64_t out_channel_stride,
              std::int64_t out_pixel_stride, std::uintptr_t images, std::uintptr_t mask, int replaced, std::uintptr_t fill,
              std::int64_t fill_stride, std::uintptr_t out, int threads) {
  const BoxFill call{item, batch, channels, pixels, batch_stride, channel_stride, pixel_stride, out_batch_stride,
                     out_channel_stride, out_pixel_stride, pointer<const void>(images), pointer<const std::uint8_t>(mask),
                     static_cast<std::uint8_t>(replaced), pointer<const void>(fill), fill_stride, pointer<void>(out), threads};
  ReleaseGil release(batch * channels * pixels >= kReleaseGilElements);
  blend_kernels().box_fill(call);
}

// Asks for huge pages behind fresh memory that is about to be written: a tenth of the page faults. Advice, so failure is fine.
void advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t begin = (address + page - 1) & ~(page - 1), end = (address + bytes) & ~(page - 1);
  if (end > begin) madvise(pointer<void>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

void bind_blend(py::module_& module) {
  module.def("blend_forward", forward);
  module.def("blend_backward", backward);
  module.def("blend_forward_of", forward_of);
  module.def("blend_backward_of", backward_of);
  module.def("box_mask", box_mask);
  module.def("box_fill", box_fill);
  module.def("fill_boxes", fill_boxes);
  module.def("advise_huge_pages", advise_huge_pages);
}

}  // namespace fedkern
