// optimise on CUDA: one step of SGD or AdamW on flat vectors; see optimise.h.
#pragma once

#include "fedkern/optimise.h"

namespace fedkern::cuda {

// Threads' blocks that share the work on all rows, at least one to a row.
inline constexpr std::int64_t kOptimiseBlocks = 4096;

struct OptimiserStep {
  DType dtype;
  bool adamw;
  std::int64_t rows, size;
  RowsOf parameters, gradients, first, second, anchor, correction, gradient_sum;
  double lr;                        // of all rows, or
  Optional<const double> lr_each;   // [rows] on the device
  double momentum, weight_decay, proximal;
  double beta1, beta2, bias, root, eps;  // bias: 1 - beta1^t, root: sqrt(1 - beta2^t)
  double max_norm;                       // 0: no clipping
  bool zero;
  double* workspace;  // [2, rows, blocks]
  double* squared;    // [rows]
  bool* finite;       // [rows]
};

std::int64_t optimise_blocks(std::int64_t rows, std::int64_t size);
void optimise_step(const OptimiserStep& step, int device, void* stream);

}  // namespace fedkern::cuda
