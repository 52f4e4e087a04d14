// What the CUDA core was built for, and the driver that it finds.
#pragma once

#include <utility>
#include <vector>

namespace fedkern::cuda {

// Compute capabilities that kernels were compiled for, ascending, 90 for 9.0.
std::vector<int> architectures();

// Of CUDA, as its runtime that is linked in and the driver number them, 13000 for 13.0; the driver's is 0 without one.
std::pair<int, int> versions();

}  // namespace fedkern::cuda
