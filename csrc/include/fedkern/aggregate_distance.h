// aggregate: squared distances between vectors, to a point, and from the origin.
//
// Differences are taken in fp64 before they are squared. Every chunk of elements has its own partial sums, which are added
// up in order: the same bits for any number of threads.
#pragma once

#include "fedkern/aggregate.h"

namespace fedkern {

struct PairDistances {
  DType dtype;
  std::int64_t count, size;
  const void* const* vectors;  // of unit stride
  std::int64_t chunk;          // elements per partial sum
  double* partial;             // [chunks, count, count], zeros; filled below the diagonal
  int threads;
};

struct PointDistances {
  DType dtype;
  std::int64_t count, size;
  const void* const* vectors;
  Optional<const double> point;  // absent: the origin
  std::int64_t chunk;
  double* partial;  // [chunks, count]
  int threads;
};

struct AggregateDistanceTable {
  void (*pairs)(const PairDistances&);
  void (*to_point)(const PointDistances&);
};

FEDKERN_DECLARE_TABLE(AggregateDistanceTable, aggregate_distance)

}  // namespace fedkern
