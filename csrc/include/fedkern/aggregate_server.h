// aggregate: one round of a server optimiser, with every client's delta norm and product with the mean delta.
//
// Deltas, their weighted mean and the update are computed in fp64 and rounded once; a tile of elements of all clients stays
// in L1 between the passes over it.
#pragma once

#include "fedkern/aggregate.h"

namespace fedkern {

// The numbers are shared with fedkern/ops/_aggregate/rules.py.
enum class ServerRule : int { mean = 0, momentum = 1, adam = 2, yogi = 3, adagrad = 4 };

struct ServerStep {
  DType dtype, state_dtype, out_dtype;
  std::int64_t count, size;
  const void* global;          // [P], of unit stride like all of these
  const void* const* vectors;  // [count][P]
  const double* weights;
  double total;  // their sum
  ServerRule rule;
  double learning_rate, beta1, beta2, tau;
  Optional<void> first, second;  // [P] of state_dtype, updated; absent where the rule has none
  void* out;             // [P]; may be `global`
  bool stream;           // write `out` past the caches
  std::int64_t chunk;    // elements per row of `partial`
  double* partial;       // [chunks, 2 count + 1]: |delta_m|^2, <delta_m, mean>, |mean|^2
  int threads;
};

struct AggregateServerTable {
  void (*server_step)(const ServerStep&);
};

FEDKERN_DECLARE_TABLE(AggregateServerTable, aggregate_server)

}  // namespace fedkern
