#include "fedkern/aggregate_order.h"

#include <limits>

#include "aggregate_store.h"
#include "aggregate_streams.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Vectors side by side in a tile: enough to hide the comparators' latency.
constexpr int kWide = 4;
template <typename C>
constexpr std::int64_t kWidth = kWide * Vec<C>::lanes;
// Shares of the weights' sum closer to one half than this count as one half, however their sum was rounded.
constexpr double kHalf = 0x1p-40;

// One tile's values [M, width], where NaN became +inf, and (weighted means) which vector each came from; those that were
// NaN count M more, which sorts them behind true infinities.
template <typename C>
struct Tile {
  std::int64_t count;
  C* values;
  C* origin;
  C nans[kWidth<C>];
};

template <bool weighted, typename T, typename C>
void load_tile(const SortedMean& a, std::int64_t begin, std::int64_t n, Tile<C>& tile) {
  using V = Vec<C>;
  const V infinity = V::set(std::numeric_limits<C>::infinity());
  V nans[kWide];
  for (V& v : nans) v = V::set(0);
  for (std::int64_t first = 0; first < a.count; first += kStreams) {
#pragma GCC unroll 10
    for (int k = 0; k < kStreams; ++k) {
      const std::int64_t m = first + k;
      if (m >= a.count) break;
      const T* x = static_cast<const T*>(a.vectors[m]) + begin;
      prefetch_ahead<kWidth<C> * static_cast<std::int64_t>(sizeof(T))>(x);
      T last[kWidth<C>];
      if (n < kWidth<C>) {
        for (std::int64_t j = 0; j < kWidth<C>; ++j) last[j] = x[j < n ? j : 0];
        x = last;
      }
      C* row = tile.values + m * kWidth<C>;
      for (int u = 0; u < kWide; ++u) {
        const V value = V::load(x + u * V::lanes);
        const auto number = value == value;
        nans[u] = nans[u] + select(number, V::set(0), V::set(1));
        select(number, value, infinity).store(row + u * V::lanes);
        if constexpr (weighted) {
          const V place = V::set(static_cast<C>(m));
          select(number, place, place + V::set(static_cast<C>(a.count))).store(tile.origin + m * kWidth<C> + u * V::lanes);
        }
      }
    }
  }
  for (int u = 0; u < kWide; ++u) nans[u].store(tile.nans + u * V::lanes);
}

template <typename C>
void sort_values(const SortedMean& a, const Tile<C>& tile) {
  using V = Vec<C>;
  for (std::int64_t e = 0; e < a.exchanges; ++e) {
    const Comparator& exchange = a.network[e];
    C *low = tile.values + exchange.low * kWidth<C>, *high = tile.values + exchange.high * kWidth<C>;
    V x[kWide], y[kWide];
    for (int u = 0; u < kWide; ++u) x[u] = V::load(low + u * V::lanes), y[u] = V::load(high + u * V::lanes);
    if (exchange.keep_low)
      for (int u = 0; u < kWide; ++u) min(x[u], y[u]).store(low + u * V::lanes);
    if (exchange.keep_high)
      for (int u = 0; u < kWide; ++u) max(x[u], y[u]).store(high + u * V::lanes);
  }
}

// Equal values in the order of their vectors.
template <typename C>
void sort_pairs(const SortedMean& a, const Tile<C>& tile) {
  using V = Vec<C>;
  for (std::int64_t e = 0; e < a.exchanges; ++e) {
    const std::int64_t low = a.network[e].low * kWidth<C>, high = a.network[e].high * kWidth<C>;
    for (std::int64_t j = 0; j < kWidth<C>; j += V::lanes) {
      const V x = V::load(tile.values + low + j), y = V::load(tile.values + high + j);
      const V of_x = V::load(tile.origin + low + j), of_y = V::load(tile.origin + high + j);
      const auto swap = (x > y) | ((x == y) & (of_x > of_y));
      select(swap, y, x).store(tile.values + low + j);
      select(swap, x, y).store(tile.values + high + j);
      select(swap, of_y, of_x).store(tile.origin + low + j);
      select(swap, of_x, of_y).store(tile.origin + high + j);
    }
  }
}

template <typename C>
void mean_of_places(const SortedMean& a, const Tile<C>& tile, double* mean) {
  using V = Vec<double>;
  const V number = V::set(static_cast<double>(a.high - a.low)), most = V::set(static_cast<double>(a.count - a.high));
  const V nan = V::set(std::numeric_limits<double>::quiet_NaN());
  for (std::int64_t j = 0; j < kWidth<C>; j += V::lanes) {
    V sum = V::load(tile.values + a.low * kWidth<C> + j);
    for (std::int64_t k = a.low + 1; k < a.high; ++k) sum = sum + V::load(tile.values + k * kWidth<C> + j);
    select(V::load(tile.nans + j) > most, nan, sum / number).store(mean + j);
  }
}

// The value at one place of one coordinate, and its vector's weight.
template <typename C>
FEDKERN_INLINE double value_at(const Tile<C>& tile, const double* weights, std::int64_t at, double& weight) {
  const auto origin = static_cast<std::int64_t>(tile.origin[at]);
  weight = weights[origin < tile.count ? origin : origin - tile.count];
  return origin < tile.count ? static_cast<double>(tile.values[at]) : std::numeric_limits<double>::quiet_NaN();
}

template <typename C>
void weighted_mean_of_places(const SortedMean& a, const Tile<C>& tile, double* mean) {
  for (std::int64_t j = 0; j < kWidth<C>; ++j) {
    double sum = 0, total = 0, weight;
    for (std::int64_t k = a.low; k < a.high; ++k) {
      const double value = value_at(tile, a.weights, k * kWidth<C> + j, weight);
      if (weight != 0) sum += weight * value;
      total += weight;
    }
    mean[j] = sum / total;
  }
}

template <typename C>
void weighted_medians(const SortedMean& a, const Tile<C>& tile, double* mean) {
  const double little = a.half * (1 - kHalf), much = a.half * (1 + kHalf);
  for (std::int64_t j = 0; j < kWidth<C>; ++j) {
    double below = 0, weight, value = 0, lower = 0;
    bool found = false;
    for (std::int64_t k = 0; k < a.count; ++k) {
      value = value_at(tile, a.weights, k * kWidth<C> + j, weight);
      below += weight;
      if (!found && !(below < little)) found = true, lower = value;
      if (!(below <= much)) break;
    }
    mean[j] = lower == value ? value : (lower + value) / 2;
  }
}

template <typename T>
void sorted_mean(const SortedMean& a) {
  using C = computed_t<T>;
  const bool weighted = a.mean != OrderMean::plain;
  const Scratch<C> memory((weighted ? 2 : 1) * a.count * kWidth<C>, parallel_workers(a.size, kChunk / 4, a.threads));
  auto chunks = [&](std::int64_t begin, std::int64_t end, int worker) {
    Tile<C> tile;
    tile.count = a.count, tile.values = memory.get(worker), tile.origin = weighted ? tile.values + a.count * kWidth<C> : nullptr;
    for (std::int64_t i = begin; i < end; i += kWidth<C>) {
      const std::int64_t n = std::min(kWidth<C>, end - i);
      double mean[kWidth<C>];
      if (weighted) {
        load_tile<true, T>(a, i, n, tile);
        sort_pairs(a, tile);
        if (a.mean == OrderMean::weighted)
          weighted_mean_of_places(a, tile, mean);
        else
          weighted_medians(a, tile, mean);
      } else {
        load_tile<false, T>(a, i, n, tile);
        sort_values(a, tile);
        mean_of_places(a, tile, mean);
      }
      write_mean(mean, n, Undivided{}, static_cast<T*>(a.out) + i, false);
    }
  };
  // A comparator takes about two cycles per vector register, five with weights.
  const double each = static_cast<double>(a.exchanges) * (weighted ? 6e-10 : 1.5e-10) / Vec<C>::lanes * 4 + static_cast<double>(a.count) * 2e-10;
  parallel_for(a.size, kChunk / 4, a.threads, each * static_cast<double>(a.size), chunks);
}

void sorted_mean_any(const SortedMean& a) {
  with_type(a.dtype, [&](auto in) { sorted_mean<decltype(in)>(a); });
}

}  // namespace

const AggregateOrderTable aggregate_order_table = {sorted_mean_any};

}  // namespace fedkern::FEDKERN_ISA
