// optimise: one step of SGD or AdamW on flat vectors, in one pass over parameters, gradients and state.
//
// Products and sums are fused or rounded apart exactly as in torch's own kernels of the same ISA level, so that a step has
// the bits of the expressions in fedkern/ops/_optimise/reference.py. 16-bit types are computed in fp32 and rounded once.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

enum class OptimiserRule : int { sgd = 0, adamw = 1 };

// [rows, size] of unit stride within a row; `step` elements from row to row, 0 where all share one.
struct RowsOf {
  void* data = nullptr;
  std::int64_t step = 0;
  bool present = false;
};

struct OptimiserStep {
  DType dtype;
  OptimiserRule rule;
  std::int64_t rows, size;
  RowsOf parameters, gradients;
  RowsOf first, second;  // SGD: the velocity, where there is momentum; AdamW: both moments
  RowsOf anchor, correction, gradient_sum;
  const double* rates;   // [rows]: SGD: -lr; AdamW: -lr / (1 - beta1^t)
  const double* decays;  // [rows]: AdamW: 1 - lr weight_decay
  double momentum, weight_decay, proximal;
  double beta1, beta2, root, eps;  // root: sqrt(1 - beta2^t)
  const double* scales;            // [rows]: what clipping multiplies the gradient by; null without
  bool zero;                       // leave zeros in `gradients`
  std::int64_t chunk;              // elements per column of `squares` and `finite`
  double* squares;                 // [rows, chunks]: of the gradient before clipping; the step leaves them alone with `scales`
  bool* finite;                    // [rows, chunks]: whether all that was written is
  int threads;
};

struct OptimiseTable {
  void (*squares)(const OptimiserStep&);
  void (*step)(const OptimiserStep&);
};

FEDKERN_DECLARE_TABLE(OptimiseTable, optimise)

}  // namespace fedkern
