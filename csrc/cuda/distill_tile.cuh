// js_div and consensus of rows whose logits, of all teachers together, a block or a thread holds.
#pragma once

#include "fedkern/distill_ensemble.h"
#include "launch.cuh"

namespace fedkern::cuda {

// Does the call where it is of that kind; `totals` is the beginning of distill_ensemble's workspace. False where it is not.
bool distill_tile(const EnsembleCall& a, std::int64_t rows, double* totals, const Queue& queue);

}  // namespace fedkern::cuda
