#include "fedkern/contrast.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "contrast_call.h"

namespace fedkern {
namespace {

// statistics: [5, count] in the order of ContrastStatistics.
ContrastStatistics statistics_at(double* at, std::int64_t count) {
  return {at, at + count, at + 2 * count, at + 3 * count, at + 4 * count};
}

void begin(const ContrastStatistics& to, std::int64_t count) {
  std::fill_n(to.column_top, count, -HUGE_VAL);
  std::fill_n(to.column_sum, count, 0.0);
}

// How far a row's or column's own similarity lies below the logarithm of its sum: never negative.
double loss_of(double top, double sum, double own, double scale, bool bounded) {
  const double loss = bounded ? std::log(sum / own) : (top - own) * scale + std::log(sum);
  return loss < 0 ? 0 : loss;
}

double total_loss(const ContrastStatistics& from, std::int64_t count, double scale, bool bounded) {
  double total = 0;
  for (std::int64_t i = 0; i < count; ++i)
    total += loss_of(from.row_top[i], from.row_sum[i], from.own[i], scale, bounded) +
             loss_of(from.column_top[i], from.column_sum[i], from.own[i], scale, bounded);
  return count ? total / static_cast<double>(count) : 0;
}

// The tile type's [4, count] sums.
void round_sums(DType dtype, const ContrastStatistics& from, std::int64_t count, void* to) {
  for (std::int64_t i = 0; i < 4 * count; ++i) {
    if (dtype == DType::f64)
      static_cast<double*>(to)[i] = from.row_top[i];
    else
      static_cast<float*>(to)[i] = static_cast<float>(from.row_top[i]);
  }
}

// The largest |S| that embeddings of contiguous rows can have, times scale.
double largest(const Matrix& x, const Matrix& y, double scale) {
  const auto& kernels = contrast_kernels();
  const double squares = kernels.largest_square(x.dtype, x.rows, x.columns, x.data) * kernels.largest_square(y.dtype, y.rows, y.columns, y.data);
  return std::sqrt(squares) * scale;
}

// fp64 [5, count].
ContrastStatistics statistics_of(py::handle tensor, std::int64_t& count) {
  const TensorView seen = checked_view(tensor.ptr());
  if (seen.code != 2 || seen.bits != 64 || seen.dims != 2 || seen.shape[0] != 5 || !seen.contiguous()) throw py::type_error("statistics must be float64 [5, B]");
  return statistics_at(static_cast<double*>(seen.data), count = seen.shape[1]);
}

// All similarities at once. rounded: for the sums, or None; factor: of the gradient that the similarities become, or 0.
double whole(py::handle x, py::handle y, py::handle similarities, double scale, double factor, py::handle rounded, int threads) {
  const Matrix left(x), right(y), all(similarities);
  const std::int64_t count = all.rows;
  require(left.dense().alike(right.dense()) && left.rows == count && left.dtype == all.dtype, "x and y differ in shape or dtype, or from their similarities");
  all.check_tile(0, count);
  void* const given = rounded.is_none() ? nullptr : contiguous(rounded, all.dtype, 4 * count);
  ReleaseGil release(count * (count + left.columns) >= kReleaseGilElements);
  const bool bounded = largest(left, right, scale) <= kContrastBound, keep = bounded && factor != 0;
  std::vector<double> memory(static_cast<std::size_t>(7 * count));  // the statistics, and the sums as floats
  const ContrastStatistics at = statistics_at(memory.data(), count);
  begin(at, count);
  const ContrastTile tile{all.dtype, count, count, all.data, all.stride, 0, scale, bounded, threads};
  const auto& kernels = contrast_kernels();
  kernels.sums(tile, keep, at);
  const double loss = total_loss(at, count, scale, bounded);
  void* const sums = given ? given : all.dtype == DType::f64 ? at.row_top : memory.data() + 5 * count;
  if (sums != at.row_top) round_sums(all.dtype, at, count, sums);
  if (factor != 0) kernels.gradient(tile, keep, factor, sums);
  return loss;
}

// A tile of rows from `first` on.
void sums(py::handle tile, std::int64_t first, double scale, bool bounded, py::handle statistics, int threads) {
  const Matrix seen(tile);
  std::int64_t count;
  const ContrastStatistics to = statistics_of(statistics, count);
  seen.check_tile(first, count);
  ReleaseGil release(seen.rows * count >= kReleaseGilElements);
  if (first == 0) begin(to, count);
  contrast_kernels().sums({seen.dtype, seen.rows, count, seen.data, seen.stride, first, scale, bounded, threads}, false, to);
}

// After the last tile: writes the sums, where they are wanted, and returns the loss.
double finish(double scale, bool bounded, py::handle statistics, py::handle rounded) {
  std::int64_t count;
  const ContrastStatistics from = statistics_of(statistics, count);
  if (!rounded.is_none()) {
    const Matrix to(rounded);
    require(to.rows == 4 && to.columns == count && to.stride == count, "sums must be [4, B]");
    round_sums(to.dtype, from, count, to.data);
  }
  return total_loss(from, count, scale, bounded);
}

void gradient(py::handle tile, std::int64_t first, double scale, bool bounded, double factor, py::handle rounded, int threads) {
  const Matrix seen(tile);
  seen.check_tile(first, seen.columns);
  const void* const sums = contiguous(rounded, seen.dtype, 4 * seen.columns);
  ReleaseGil release(seen.rows * seen.columns >= kReleaseGilElements);
  contrast_kernels().gradient({seen.dtype, seen.rows, seen.columns, seen.data, seen.stride, first, scale, bounded, threads}, false, factor, sums);
}

bool bounded(py::handle x, py::handle y, double scale) {
  const Matrix left(x), right(y);
  require(left.dense().alike(right.dense()), "x and y differ in shape or dtype");
  ReleaseGil release(left.rows * left.columns >= kReleaseGilElements);
  return largest(left, right, scale) <= kContrastBound;
}

// The sum of the products of two contiguous tensors' elements.
double dot(py::handle a, py::handle b) {
  const Matrix left(a);
  const void* const right = contiguous(b, left.dense().dtype, left.rows * left.columns);
  ReleaseGil release(left.rows * left.columns >= kReleaseGilElements);
  return contrast_kernels().dot(left.dtype, left.rows * left.columns, left.data, right);
}

}  // namespace

void bind_contrast(py::module_& module) {
  module.def("contrast_whole", whole);
  module.def("contrast_sums", sums);
  module.def("contrast_finish", finish);
  module.def("contrast_gradient", gradient);
  module.def("contrast_bounded", bounded);
  module.def("contrast_dot", dot);
}

}  // namespace fedkern
