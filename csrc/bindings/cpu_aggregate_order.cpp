#include <vector>

#include "bindings.h"
#include "fedkern/aggregate_order.h"

namespace fedkern {
namespace {

// Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M), without the comparators that
// the places [low, high) do not depend on.
std::vector<Exchange> network(std::int64_t count, std::int64_t low, std::int64_t high) {
  std::vector<Exchange> all;
  std::int64_t top = 1;
  while (2 * top < count) top *= 2;
  for (std::int64_t p = top; count > 1 && p > 0; p /= 2) {
    std::int64_t q = top, r = 0, d = p;
    for (;;) {
      for (std::int64_t i = 0; i + d < count; ++i)
        if ((i & p) == r) all.push_back({static_cast<std::int32_t>(i), static_cast<std::int32_t>(i + d), false, false});
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
  std::vector<char> wanted(static_cast<std::size_t>(count), 0);
  for (std::int64_t k = low; k < high; ++k) wanted[static_cast<std::size_t>(k)] = 1;
  std::vector<Exchange> kept;
  for (auto exchange = all.rbegin(); exchange != all.rend(); ++exchange) {
    char &one = wanted[static_cast<std::size_t>(exchange->low)], &other = wanted[static_cast<std::size_t>(exchange->high)];
    if (!one && !other) continue;
    kept.push_back({exchange->low, exchange->high, one != 0, other != 0});
    one = other = 1;
  }
  return {kept.rbegin(), kept.rend()};
}

// weights: none for the plain mean; half: of their sum for the weighted median of all places, else 0.
void sorted_mean(int dtype, std::int64_t size, const std::vector<std::uintptr_t>& data, std::int64_t low, std::int64_t high,
                 const std::vector<double>& weights, double half, std::uintptr_t out, int threads) {
  std::vector<const void*> vectors(data.size());
  for (std::size_t m = 0; m < data.size(); ++m) vectors[m] = pointer<const void>(data[m]);
  const auto count = static_cast<std::int64_t>(data.size());
  const OrderMean mean = half > 0 ? OrderMean::weighted_median : weights.empty() ? OrderMean::plain : OrderMean::weighted;
  ReleaseGil release(size * count >= kReleaseGilElements);
  const std::vector<Exchange> exchanges = network(count, low, high);
  aggregate_order_kernels().sorted_mean({static_cast<DType>(dtype), count, size, vectors.data(), mean, low, high, weights.data(), half,
                                         exchanges.data(), static_cast<std::int64_t>(exchanges.size()), pointer<void>(out), threads});
}

}  // namespace

void bind_aggregate_order(py::module_& module) { module.def("sorted_mean", sorted_mean); }

}  // namespace fedkern
