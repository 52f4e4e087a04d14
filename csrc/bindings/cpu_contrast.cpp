#include "fedkern/contrast.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "bindings.h"

namespace fedkern {
namespace {

// statistics: [5, count] in the order of ContrastStatistics.
ContrastStatistics statistics_at(std::uintptr_t statistics, std::int64_t count) {
  auto* at = pointer<double>(statistics);
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
double largest(DType dtype, std::int64_t rows, std::int64_t columns, std::uintptr_t x, std::uintptr_t y, double scale) {
  const auto& kernels = contrast_kernels();
  const double squares = kernels.largest_square(dtype, rows, columns, pointer<const void>(x)) *
                         kernels.largest_square(dtype, rows, columns, pointer<const void>(y));
  return std::sqrt(squares) * scale;
}

// All similarities at once. rounded: for the sums, or None; factor: of the gradient that the similarities become, or 0.
double whole(int dtype, std::int64_t count, std::int64_t columns, std::uintptr_t x, std::uintptr_t y, std::uintptr_t similarities,
             std::int64_t stride, double scale, double factor, const OptionalAddress& rounded, int threads) {
  const auto type = static_cast<DType>(dtype);
  ReleaseGil release(count * (count + columns) >= kReleaseGilElements);
  const bool bounded = largest(type, count, columns, x, y, scale) <= kContrastBound, keep = bounded && factor != 0;
  std::vector<double> memory(static_cast<std::size_t>(7 * count));  // the statistics, and the sums as floats
  const ContrastStatistics at = statistics_at(reinterpret_cast<std::uintptr_t>(memory.data()), count);
  begin(at, count);
  const ContrastTile tile{type, count, count, pointer<void>(similarities), stride, 0, scale, bounded, threads};
  const auto& kernels = contrast_kernels();
  kernels.sums(tile, keep, at);
  const double loss = total_loss(at, count, scale, bounded);
  void* const sums = rounded ? pointer<void>(*rounded) : type == DType::f64 ? at.row_top : memory.data() + 5 * count;
  if (sums != at.row_top) round_sums(type, at, count, sums);
  if (factor != 0) kernels.gradient(tile, keep, factor, sums);
  return loss;
}

// A tile of rows from `first` on.
void sums(int dtype, std::int64_t rows, std::int64_t count, std::uintptr_t tile, std::int64_t stride, std::int64_t first, double scale, bool bounded,
          std::uintptr_t statistics, int threads) {
  ReleaseGil release(rows * count >= kReleaseGilElements);
  const ContrastStatistics to = statistics_at(statistics, count);
  if (first == 0) begin(to, count);
  contrast_kernels().sums({static_cast<DType>(dtype), rows, count, pointer<void>(tile), stride, first, scale, bounded, threads},
                          false, to);
}

// After the last tile: writes the sums and returns the loss.
double finish(int dtype, std::int64_t count, double scale, bool bounded, std::uintptr_t statistics, const OptionalAddress& rounded) {
  const ContrastStatistics from = statistics_at(statistics, count);
  if (rounded) round_sums(static_cast<DType>(dtype), from, count, pointer<void>(*rounded));
  return total_loss(from, count, scale, bounded);
}

void gradient(int dtype, std::int64_t rows, std::int64_t count, std::uintptr_t tile, std::int64_t stride, std::int64_t first, double scale, bool bounded,
              double factor, std::uintptr_t rounded, int threads) {
  ReleaseGil release(rows * count >= kReleaseGilElements);
  contrast_kernels().gradient({static_cast<DType>(dtype), rows, count, pointer<void>(tile), stride, first, scale, bounded, threads},
                              false, factor, pointer<const void>(rounded));
}

bool bounded(int dtype, std::int64_t rows, std::int64_t columns, std::uintptr_t x, std::uintptr_t y, double scale) {
  ReleaseGil release(rows * columns >= kReleaseGilElements);
  return largest(static_cast<DType>(dtype), rows, columns, x, y, scale) <= kContrastBound;
}

double dot(int dtype, std::int64_t count, std::uintptr_t a, std::uintptr_t b) {
  ReleaseGil release(count >= kReleaseGilElements);
  return contrast_kernels().dot(static_cast<DType>(dtype), count, pointer<const void>(a), pointer<const void>(b));
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
