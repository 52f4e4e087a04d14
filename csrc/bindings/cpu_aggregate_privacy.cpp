#include <algorithm>
#include <cmath>

#include "aggregate_call.h"
#include "fedkern/aggregate_distance.h"
#include "fedkern/aggregate_privacy.h"
#include "fedkern/parallel.h"

namespace fedkern {
namespace {

// factors: [count]; out: [count, size].
bool scale_and_noise(py::handle vectors, py::handle factors, double deviation, std::uint64_t seed, std::uint64_t offset, py::handle out, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  const double* const each = doubles_of(factors, x.count);
  void* const to = alike_of(out, x, x.count);
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  aggregate_privacy_kernels().scale_and_noise({x.dtype, x.count, x.size, x.data.data(), each, deviation, seed, offset, to, threads});
  return true;
}

// Elements of a vector that is measured and scaled while it stays in L1 or L2: one partial sum of its square.
constexpr std::int64_t kShort = 16384;
// Sums of squares below this have lost digits to the end of fp64's range.
constexpr double kLeastSquare = 1e-280;

// min(1, max_norm / |x|) for fp64 numbers whose squares leave the range: by way of x over its largest element.
double factor_beside_largest(const double* x, std::int64_t size, double max_norm) {
  double largest = 0, square = 0;
  for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, std::fabs(x[i]));
  if (largest == 0) return 1;
  for (std::int64_t i = 0; i < size; ++i) square += (x[i] / largest) * (x[i] / largest);
  return std::min(max_norm / largest / std::sqrt(square), 1.0);
}

// out: [count, size]: short vectors, each scaled to a norm of at most max_norm (and noise added) as soon as it is measured.
// NaN in a vector makes all of it NaN.
bool clip_short(py::handle vectors, double max_norm, double deviation, std::uint64_t seed, std::uint64_t offset, py::handle out, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  if (x.size > kShort) throw std::invalid_argument("vectors are too long for clip_short");
  auto* const to = static_cast<char*>(alike_of(out, x, x.count));
  const AggregateDistanceTable& distance = aggregate_distance_kernels();
  const AggregatePrivacyTable& privacy = aggregate_privacy_kernels();
  // The same numbers as in plain.py: what rounding to 16 bits may add to a norm is taken off before. Noise has no bound to keep.
  const double rounding = deviation != 0 ? 1 : x.dtype == DType::bf16 ? 1 - 0x1p-8 : x.dtype == DType::f16 ? 1 - 0x1p-11 : 1;
  auto rows = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
      const void* const* const vector = &x.data[static_cast<std::size_t>(m)];
      double square = 0;
      distance.to_point({x.dtype, 1, x.size, vector, {}, kShort, &square, 1});
      // The same operations as for long vectors, in torch: a reciprocal, and then a product.
      const double least = 1 / std::sqrt(square) * max_norm;
      double factor = least > 1 ? 1 : least;
      const auto* const wide = static_cast<const double*>(*vector);
      const bool outside = square < kLeastSquare || std::isinf(square);
      if (x.dtype == DType::f64 && outside && std::none_of(wide, wide + x.size, [](double value) { return std::isinf(value); }))
        factor = factor_beside_largest(wide, x.size, max_norm);
      if (factor < 1) factor *= rounding;
      const auto place = static_cast<std::uint64_t>(m * x.size);
      privacy.scale_and_noise({x.dtype, 1, x.size, vector, &factor, deviation, seed, offset + place, to + place * item_size(x.dtype), 1});
    }
  };
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  const double each = static_cast<double>(item_size(x.dtype)) * 1.8e-10 + (deviation == 0 ? 0 : 1e-9);
  const std::int64_t together = std::max<std::int64_t>(1, kShort / std::max<std::int64_t>(x.size, 1));
  parallel_for(x.count, together, threads, each * static_cast<double>(x.size * x.count), rows);
  return true;
}

}  // namespace

void bind_aggregate_privacy(py::module_& module) {
  module.def("scale_and_noise", scale_and_noise);
  module.def("clip_short", clip_short);
}

}  // namespace fedkern
