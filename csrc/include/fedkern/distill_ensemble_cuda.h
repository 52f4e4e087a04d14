// Losses of K teachers on CUDA: the contract of distill_ensemble.h, on a device and a stream of the caller's.
#pragma once

#include "fedkern/distill_ensemble.h"

namespace fedkern::cuda {

// Numbers per teacher that a row keeps in the workspace while it is worked on, and those for the totals.
inline constexpr std::int64_t kEnsembleNumbers = 13;
inline constexpr std::int64_t kEnsembleTotals = 4112;

// `workspace`: kEnsembleTotals numbers and kEnsembleNumbers * call.count for each of `slots` rows, at least kEnsembleSlots, that
// may be worked on at a time.
inline constexpr std::int64_t kEnsembleSlots = 256;
void distill_ensemble(const EnsembleCall& call, double* workspace, std::int64_t slots, int device, void* stream);

}  // namespace fedkern::cuda
