// aggregate: weighted means of flat vectors, all at once or one upload at a time.
//
// Products weight * x and their sums are taken in fp64, client after client in the order given, and divided by the sum of
// the weights: the same bits for any number of threads, any ISA level, and for one call as for an accumulator.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

// One client's vector; the stride between elements may be anything, 0 included.
struct Vector {
  const void* data;
  std::int64_t stride;
};

struct WeightedMean {
  DType dtype, out_dtype;
  std::int64_t count, size;  // M clients of P elements
  const Vector* vectors;
  const double* weights;
  double total;  // their sum
  void* out;     // [P], contiguous; may be one of the vectors
  bool stream;   // write past the caches: for results that do not fit there
  int threads;
};

// sum += weight * x
struct AccumulatorAdd {
  DType dtype;
  std::int64_t size;
  Vector vector;
  double weight;
  double* sum;
  int threads;
};

// out = sum / total
struct AccumulatorMean {
  DType out_dtype;
  std::int64_t size;
  const double* sum;
  double total;
  void* out;
  bool stream;
  int threads;
};

// The exact accumulator of one element: the sum of the products (each rounded to fp64 once) as three digits in base 2^32,
//   high * 2^(32 top) + middle * 2^(32 (top - 1)) + low * 2^(32 (top - 2)),
// each a signed integer that no carry leaves. A product falls into digits on a grid that is fixed once and for all, cut
// toward zero below `low`; `top` only ever rises, to the digit of the largest product's leading bit, and what then falls out
// at the bottom would have been cut anyway. So the digits do not depend on the order of arrival, and the sum is within
// 2^-64 of the largest product for every product added. 2^31 products fit.
struct ExactState {
  std::int64_t *high, *middle, *low;  // [P]
  std::int8_t* top;                   // [P]: -31 ... 31, or one of the codes below
};
inline constexpr std::int8_t kExactLowest = -31, kExactInfinity = 32, kExactMinusInfinity = 33, kExactNaN = 34;

struct ExactAdd {
  DType dtype;
  std::int64_t size;
  Vector vector;
  double weight;
  ExactState state;
  int threads;
};

struct ExactMean {
  DType out_dtype;
  std::int64_t size;
  ExactState state;
  double total;
  void* out;
  bool stream;
  int threads;
};

struct AggregateTable {
  void (*weighted_mean)(const WeightedMean&);
  void (*accumulator_add)(const AccumulatorAdd&);
  void (*accumulator_mean)(const AccumulatorMean&);
  void (*exact_add)(const ExactAdd&);
  void (*exact_mean)(const ExactMean&);
};

FEDKERN_DECLARE_TABLE(AggregateTable, aggregate)

}  // namespace fedkern
