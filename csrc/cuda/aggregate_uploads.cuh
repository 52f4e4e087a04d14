// Uploads as a kernel sees them.
#pragma once

#include <algorithm>

#include "fedkern/aggregate_cuda.h"
#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {

inline constexpr int kTogether = 4;  // vectors whose elements are on their way at once

// At most Most vectors, as a kernel's parameter; the last one's address stands for those that are missing.
template <int Most = kTable>
struct Table {
  DType dtype;
  int count;
  int aligned;  // every vector starts at a multiple of so many bytes, at most 16; 0 where the stride is not 1
  std::int64_t size, stride;
  const void* each[Most];

  __device__ __forceinline__ const void* operator[](int m) const { return each[m]; }
};

// The vectors [begin, begin + count).
template <int Most = kTable>
inline Table<Most> table(const Uploads& x, std::int64_t begin, std::int64_t count) {
  const std::int64_t row_bytes = x.size ? x.row_stride * static_cast<std::int64_t>(item_size(x.dtype)) : 0;
  Table<Most> result;
  result.dtype = x.dtype;
  result.count = static_cast<int>(count);
  result.size = x.size;
  result.stride = x.stride;
  std::uintptr_t places = 16;
  for (std::int64_t m = 0; m < Most; ++m) {
    const std::int64_t from = begin + std::min(m, count - 1);
    result.each[m] = !count ? nullptr : x.first.present ? static_cast<const char*>(x.first.data) + from * row_bytes : x.each[static_cast<std::size_t>(from)];
    places |= reinterpret_cast<std::uintptr_t>(result.each[m]);
  }
  result.aligned = x.stride == 1 ? alignment(places) : 0;
  return result;
}

template <int Most = kTable>
struct Weights {
  Optional<const double> device;
  double host[Most];

  __device__ __forceinline__ double operator[](int m) const { return device.present ? device.data[m] : host[m]; }
};

template <int Most = kTable>
inline Weights<Most> weights_of(const UploadWeights& weights, std::int64_t begin, std::int64_t count) {
  Weights<Most> result;
  result.device = weights.device;
  if (weights.device.present)
    result.device.data += begin;
  else
    std::copy_n(weights.host.begin() + begin, count, result.host);
  return result;
}

// The weights' sum, in order: given, or taken from the device.
struct Total {
  double value;
  Optional<const double> device;
  std::int64_t count;

  __device__ __forceinline__ double operator()() const {
    if (!device.present) return value;
    double sum = 0;
    for (std::int64_t m = 0; m < count; ++m) sum = __dadd_rn(sum, device.data[m]);
    return sum;
  }
};
inline Total total_of(const Uploads& x, const UploadWeights& weights) { return {weights.total, weights.device, x.count}; }

// A thread's Each elements of a tile: packs of N, kBlock packs apart, so that a warp's accesses touch whole sectors. Unless the
// tile is Full, elements from `size` on are 0 and stay unwritten.
template <int N, int Each = kPack>
struct Tile {
  static constexpr int packs = Each / N;
  std::int64_t begin, size;

  __device__ __forceinline__ std::int64_t at(int pack) const { return begin + (static_cast<std::int64_t>(pack) * kBlock + threadIdx.x) * N; }
  template <typename T, bool Full>
  __device__ __forceinline__ void load(const void* data, std::int64_t stride, T (&x)[Each]) const {
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if constexpr (Full) {
        constexpr int part = N < kLanes<T> ? N : kLanes<T>;
#pragma unroll
        for (int i = 0; i < N; i += part) {
          const auto loaded = load_pack<T, part>(data, N > 1 ? at(pack) + i : at(pack) * stride);
#pragma unroll
          for (int k = 0; k < part; ++k) x[pack * N + i + k] = loaded.lane[k];
        }
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i) x[pack * N + i] = at(pack) + i < size ? static_cast<const T*>(data)[(at(pack) + i) * stride] : T(0.0f);
      }
    }
  }
  template <typename T, bool Full>
  __device__ __forceinline__ void store(void* data, const double (&x)[Each]) const {
#pragma unroll
    for (int pack = 0; pack < packs; ++pack) {
      if constexpr (Full) {
        constexpr int part = N < kLanes<T> ? N : kLanes<T>;
#pragma unroll
        for (int i = 0; i < N; i += part) {
          Pack<T, part> stored;
#pragma unroll
          for (int k = 0; k < part; ++k) stored.lane[k] = narrow<T>(x[pack * N + i + k]);
          store_pack<T, part>(data, at(pack) + i, stored);
        }
      } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
          if (at(pack) + i < size) static_cast<T*>(data)[at(pack) + i] = narrow<T>(x[pack * N + i]);
      }
    }
  }
};

// Sums per vector and block: those of four vectors are added up over a warp's lanes at once, those of its tiles in shared memory.
template <int Values>
class Tallies {
 public:
  // `shared`: [kTable][Values][kWarps]
  __device__ Tallies(double* shared, int count) : shared_(shared), count_(count) {}
  __device__ void clear() {
    for (int i = static_cast<int>(threadIdx.x); i < kTable * Values * kWarps; i += kBlock) shared_[i] = 0;
    __syncthreads();
  }
  // Of the vectors from m, a multiple of 4, on. Halves of the warp take half of the values each, then quarters.
  __device__ __forceinline__ void add(int m, int value, const double (&x)[4]) {
    const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
    const double one = (upper ? x[2] : x[0]) + __shfl_xor_sync(kEveryLane, upper ? x[0] : x[2], 16);
    const double two = (upper ? x[3] : x[1]) + __shfl_xor_sync(kEveryLane, upper ? x[1] : x[3], 16);
    double sum = (odd ? two : one) + __shfl_xor_sync(kEveryLane, odd ? one : two, 8);
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(kEveryLane, sum, distance);
    if (threadIdx.x % 8 == 0) shared_[((m + threadIdx.x % 32 / 8) * Values + value) * kWarps + threadIdx.x / 32] += sum;
  }
  // to[m * Values + value]
  __device__ void leave(double* to) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count_ * Values; i += kBlock) {
      double sum = 0;
      for (int warp = 0; warp < kWarps; ++warp) sum += shared_[i * kWarps + warp];
      to[i] = sum;
    }
  }

 private:
  double* shared_;
  int count_;
};

inline constexpr std::int64_t kTileElements = kBlock * kPack;

// Blocks that a workspace of `each` numbers per block allows.
inline std::int64_t blocks_for(std::int64_t units, std::int64_t each, const Queue& queue, int waves = 8) {
  return std::max<std::int64_t>(1, std::min(grid(units, 1, queue, waves), kAggregateWorkspace / each));
}

}  // namespace fedkern::cuda
