// aggregate: means over part of every coordinate's order, and weighted medians.
//
// A sorting network runs over the vectors, with coordinates side by side in the lanes of vector registers: the same
// comparisons for all of them and no branches on data. NaN counts as larger than every number.
#pragma once

#include "fedkern/aggregate.h"

namespace fedkern {

// One comparator: afterwards place `low` holds the smaller value and place `high` the larger one. Where only one of the two
// is ever looked at again, the other need not be written.
struct Comparator {
  std::int32_t low, high;
  bool keep_low, keep_high;
};

enum class OrderMean : int { plain, weighted, weighted_median };

struct SortedMean {
  DType dtype;
  std::int64_t count, size;  // M vectors of P elements
  const void* const* vectors;  // of unit stride
  OrderMean mean;
  std::int64_t low, high;  // the places that are averaged; all of them for the weighted median
  const double* weights;   // [M]; not for the plain mean
  double half;             // of the weights' sum, for the weighted median
  const Comparator* network;
  std::int64_t exchanges;
  void* out;  // [P]
  int threads;
};

struct AggregateOrderTable {
  void (*sorted_mean)(const SortedMean&);
};

FEDKERN_DECLARE_TABLE(AggregateOrderTable, aggregate_order)

}  // namespace fedkern
