// distill on CUDA: the contract of distill.h, on a device and a stream of the caller's.
#pragma once

#include "fedkern/distill.h"

namespace fedkern::cuda {

// fp64 numbers of a workspace on the device that serves any call.
inline constexpr std::int64_t kDistillWorkspace = 16384;

// Device pointers throughout; `threads` is not looked at. Without a workspace one block does the work, if a total is
// asked for, and rows are not shared between blocks: the right choice for small calls alone.
void distill(const DistillCall& call, const Optional<double>& workspace, int device, void* stream);

}  // namespace fedkern::cuda
