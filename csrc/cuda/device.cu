// What this core was built for. Kernels reach no GPU older than the oldest of its architectures, and a runtime that is
// linked in needs a driver of its own major version: Python asks before it sends the first call.
#include "fedkern/device_cuda.h"

#include <cuda_runtime.h>

namespace fedkern::cuda {

std::vector<int> architectures() {
  std::vector<int> found{__CUDA_ARCH_LIST__};
  for (int& architecture : found) architecture /= 10;
  return found;
}

std::pair<int, int> versions() {
  int runtime = 0, driver = 0;
  // Neither needs a driver; where there is none, its version is 0.
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  return {runtime, driver};
}

}  // namespace fedkern::cuda
