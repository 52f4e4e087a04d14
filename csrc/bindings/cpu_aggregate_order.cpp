#include "aggregate_call.h"
#include "fedkern/aggregate_order.h"

namespace fedkern {
namespace {

// Batcher's merge exchange (Knuth, The Art of Computer Programming 3, 5.2.2, algorithm M), without the comparators that
// the places [low, high) do not depend on.
std::vector<Comparator> network(std::int64_t count, std::int64_t low, std::int64_t high) {
  std::vector<Comparator> all;
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
  std::vector<Comparator> kept;
  for (auto exchange = all.rbegin(); exchange != all.rend(); ++exchange) {
    char &one = wanted[static_cast<std::size_t>(exchange->low)], &other = wanted[static_cast<std::size_t>(exchange->high)];
    if (!one && !other) continue;
    kept.push_back({exchange->low, exchange->high, one != 0, other != 0});
    one = other = 1;
  }
  return {kept.rbegin(), kept.rend()};
}

// weights: None for the plain mean; median: the weighted median of all places instead of a mean.
bool sorted_mean(py::handle vectors, std::int64_t low, std::int64_t high, py::handle weights, bool median, py::handle out, int threads) {
  const VectorList x = vectors_of(vectors);
  if (!x.unit()) return false;
  check_sorted(x, low, high, !weights.is_none(), median);
  const WeightList w = weights.is_none() ? WeightList{} : numbers_of(weights, x.count);
  void* const to = alike_of(out, x, 1);
  const OrderMean mean = median ? OrderMean::weighted_median : w.numbers.empty() ? OrderMean::plain : OrderMean::weighted;
  ReleaseGil release(x.size * x.count >= kReleaseGilElements);
  const std::vector<Comparator> exchanges = network(x.count, low, high);
  aggregate_order_kernels().sorted_mean({x.dtype, x.count, x.size, x.data.data(), mean, low, high, w.numbers.data(), median ? w.total / 2 : 0.0,
                                         exchanges.data(), static_cast<std::int64_t>(exchanges.size()), to, threads});
  return true;
}

}  // namespace

void bind_aggregate_order(py::module_& module) { module.def("sorted_mean", sorted_mean); }

}  // namespace fedkern
