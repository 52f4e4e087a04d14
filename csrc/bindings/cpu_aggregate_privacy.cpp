#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_distance.h"
#include "fedkern/aggregate_privacy.h"
#include "fedkern/parallel.h"

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

// Elements of a vector that is measured and scaled while it stays in L1 or L2: one partial sum of its square.
constexpr std::int64_t kShort = 16384;

// out: [count, size]: short vectors, each scaled to a norm of at most max_norm (and noise added) as soon as it is measured.
// NaN in a vector makes all of it NaN.
void clip_short(int dtype, std::int64_t size, const std::vector<std::uintptr_t>& data, double max_norm, double deviation, std::uint64_t seed,
                std::uint64_t offset, std::uintptr_t out, int threads) {
  if (size > kShort) throw std::invalid_argument("vectors are too long for clip_short");
  const auto type = static_cast<DType>(dtype);
  const auto count = static_cast<std::int64_t>(data.size());
  const AggregateDistanceTable& distance = aggregate_distance_kernels();
  const AggregatePrivacyTable& privacy = aggregate_privacy_kernels();
  auto rows = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin; m < end; ++m) {
      const void* x = pointer<const void>(data[static_cast<std::size_t>(m)]);
      double square = 0;
      distance.to_point({type, 1, size, &x, {}, kShort, &square, 1});
      // The same operations as for long vectors, in torch: a reciprocal, and then a product.
      const double least = 1 / std::sqrt(square) * max_norm, factor = least > 1 ? 1 : least;
      const auto place = static_cast<std::uint64_t>(m * size);
      void* to = pointer<void>(out + place * item_size(type));
      privacy.scale_and_noise({type, 1, size, &x, &factor, deviation, seed, offset + place, to, 1});
    }
  };
  ReleaseGil release(size * count >= kReleaseGilElements);
  const double each = static_cast<double>(item_size(type)) * 1.8e-10 + (deviation == 0 ? 0 : 1e-9);
  const std::int64_t together = std::max<std::int64_t>(1, kShort / std::max<std::int64_t>(size, 1));
  parallel_for(count, together, threads, each * static_cast<double>(size * count), rows);
}

}  // namespace

void bind_aggregate_privacy(py::module_& module) {
  module.def("scale_and_noise", scale_and_noise);
  module.def("clip_short", clip_short);
}

}  // namespace fedkern
