// mlp: loss and gradients of linear layers with ReLU between them and the mean cross-entropy behind them, in one call.
//
// fp32. Every number is one chain of sums, in an order that depends on no block, vector width or number of threads.
#pragma once

#include <cstdint>

#include "fedkern/isa.h"

namespace fedkern {

struct MlpLayer {
  std::int64_t in, out;
  const float *weight, *bias;            // [out, in], [out] or null
  float *weight_gradient, *bias_gradient;  // as these; written over
};

inline constexpr std::int64_t kMlpIgnored = -100;  // a target that does not count, as PyTorch's

struct MlpPass {
  const MlpLayer* layers;
  std::int64_t count, rows;
  const float* x;               // [rows, layers[0].in]
  const std::int64_t* targets;  // [rows], of 0 to layers[count - 1].out - 1, or kMlpIgnored; at least one counts
  int threads;
};

struct MlpTable {
  float (*pass)(const MlpPass&);  // returns the loss
};

FEDKERN_DECLARE_TABLE(MlpTable, mlp)

}  // namespace fedkern
