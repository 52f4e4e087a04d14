// What every CUDA operator shares on the host: the device set and restored, launch errors as exceptions, grid sizes.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace fedkern::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status) +
                             (status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice
                                  ? " (fedkern._cuda needs an NVIDIA GPU and its driver)"
                                  : ""));
}

// Makes `device` current for as long as it lives.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) {
      check(cudaSetDevice(device), "cudaSetDevice");
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

// A device and a stream of the caller's; where a kernel's arguments go besides its parameters.
struct Queue {
  int device;
  void* stream;
};

// Starts `kernel`, whose name the exception gives where that fails.
template <typename... P, typename... A>
void launch(const char* name, void (*kernel)(P...), std::int64_t blocks, int threads, const Queue& queue, const A&... arguments) {
  std::tuple<P...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), pointers, 0,
                               static_cast<cudaStream_t>(queue.stream)),
              name);
      },
      values);
}

inline int multiprocessors(int device) {
  constexpr int kKnown = 64;
  static std::atomic<int> known[kKnown];
  if (device >= 0 && device < kKnown && known[device]) return known[device];
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  if (device >= 0 && device < kKnown) known[device] = count;
  return count;
}

// Blocks for a loop over `units`, `per_block` at a time: enough to fill the device `waves` times over; the loop walks the rest.
inline std::int64_t grid(std::int64_t units, std::int64_t per_block, const Queue& queue, int waves = 32) {
  const std::int64_t blocks = (units + per_block - 1) / per_block, most = static_cast<std::int64_t>(multiprocessors(queue.device)) * waves;
  return blocks < 1 ? 1 : blocks > most ? most : blocks;
}

}  // namespace fedkern::cuda
