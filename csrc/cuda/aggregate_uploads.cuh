// Uploads as a kernel sees them.
#pragma once

#include <algorithm>

#include "fedkern/aggregate_cuda.h"
#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {

// At most Most vectors, as a kernel's parameter.
template <int Most = kTable>
struct Table {
  DType dtype;
  int count;
  bool packed;  // unit stride, and every vector starts at a multiple of 16 bytes
  bool matrix;  // rows from `first` on, else `each`
  std::int64_t size, stride, row_bytes;
  const char* first;
  const void* each[Most];

  __device__ __forceinline__ const void* operator[](int m) const { return matrix ? first + m * row_bytes : each[m]; }
};

// The vectors [begin, begin + count).
template <int Most = kTable>
inline Table<Most> table(const Uploads& x, std::int64_t begin, std::int64_t count) {
  const std::int64_t item = static_cast<std::int64_t>(item_size(x.dtype));
  Table<Most> result;
  result.dtype = x.dtype;
  result.count = static_cast<int>(count);
  result.size = x.size;
  result.stride = x.stride;
  result.row_bytes = x.row_stride * item;
  result.matrix = x.first.present;
  result.first = static_cast<const char*>(x.first.data) + (x.size ? begin * result.row_bytes : 0);
  result.packed = x.stride == 1 && (!result.matrix || (aligned16(result.first) && (count == 1 || result.row_bytes % 16 == 0)));
  if (!result.matrix)
    for (std::int64_t m = 0; m < count; ++m) {
      result.each[m] = x.each[static_cast<std::size_t>(begin + m)];
      result.packed = result.packed && aligned16(result.each[m]);
    }
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

// kPack elements from `at` on, as far as there are so many, else 0.
template <typename C>
__device__ __forceinline__ void load_run(const void* data, DType dtype, std::int64_t at, std::int64_t stride, std::int64_t size, bool packed,
                                         C (&x)[kPack]) {
  if (packed && at + kPack <= size) {
    switch (dtype) {
      case DType::bf16: return load_eight<C, __nv_bfloat16>(data, at, x);
      case DType::f16: return load_eight<C, __half>(data, at, x);
      case DType::f64: return load_eight<C, double>(data, at, x);
      default: return load_eight<C, float>(data, at, x);
    }
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) x[i] = at + i < size ? load_value<C>(data, dtype, (at + i) * stride) : C(0);
}

template <typename C>
__device__ __forceinline__ void store_run(void* data, DType dtype, std::int64_t at, std::int64_t size, bool packed, const C (&x)[kPack]) {
  if (packed && at + kPack <= size) {
    switch (dtype) {
      case DType::bf16: return store_eight<C, __nv_bfloat16>(data, at, x);
      case DType::f16: return store_eight<C, __half>(data, at, x);
      case DType::f64: return store_eight<C, double>(data, at, x);
      default: return store_eight<C, float>(data, at, x);
    }
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i)
    if (at + i < size) store_value<C>(data, dtype, at + i, x[i]);
}

// Sums per vector and block: a warp's lanes are added up at once, its tiles in shared memory.
template <int Values>
class Tallies {
 public:
  // `shared`: [kTable][Values][kWarps]
  __device__ Tallies(double* shared, int count) : shared_(shared), count_(count) {
    for (int i = static_cast<int>(threadIdx.x); i < count * Values * kWarps; i += kBlock) shared_[i] = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(int m, int value, double x) {
    x = Group<32>::sum(x);
    if (threadIdx.x % 32 == 0) shared_[(m * Values + value) * kWarps + threadIdx.x / 32] += x;
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

}  // namespace fedkern::cuda
