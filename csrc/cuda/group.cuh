// Sums and maxima over the threads that work on one row: one thread, part of a warp, a warp or a block. Every thread gets
// the result, with the same bits whoever asks and however often.
#pragma once

#include <cuda_runtime.h>

namespace fedkern::cuda {

inline constexpr int kBlock = 256;  // threads of every block that uses groups
inline constexpr int kWarps = kBlock / 32;
inline constexpr unsigned kEveryLane = 0xffffffff;

template <int Lanes>
struct Group {
  static_assert(Lanes == kBlock || (Lanes <= 32 && 32 % Lanes == 0));
  static constexpr int lanes = Lanes;
  static constexpr int rows = kBlock / Lanes;  // per block

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % Lanes; }
  __device__ static int row() { return static_cast<int>(threadIdx.x) / Lanes; }

  // All threads of the block must come here together.
  template <typename T, typename Combine>
  __device__ static T reduce(T value, Combine combine) {
#pragma unroll
    for (int distance = (Lanes < 32 ? Lanes : 32) / 2; distance > 0; distance /= 2)
      value = combine(value, __shfl_xor_sync(kEveryLane, value, distance));
    if constexpr (Lanes == kBlock) {
      __shared__ T part[kWarps];
      __syncthreads();  // the last reduction's reads are over
      if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = value;
      __syncthreads();
      value = part[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) value = combine(value, part[warp]);
    }
    return value;
  }
  template <typename T>
  __device__ static T sum(T value) {
    return reduce(value, [](T a, T b) { return a + b; });
  }
  // Ignores NaN unless there is nothing else.
  template <typename T>
  __device__ static T maximum(T value) {
    return reduce(value, larger<T>);
  }
  // The same of several values at a time, with the barriers of one.
  template <typename T, int N>
  __device__ static void sum_all(T (&value)[N]) {
    reduce_all(value, [](T a, T b) { return a + b; });
  }
  template <typename T, int N>
  __device__ static void maximum_all(T (&value)[N]) {
    reduce_all(value, larger<T>);
  }

 private:
  template <typename T>
  __device__ static T larger(T a, T b) {
    return a > b || b != b ? a : b;
  }
  template <typename T, int N, typename Combine>
  __device__ static void reduce_all(T (&value)[N], Combine combine) {
#pragma unroll
    for (int distance = (Lanes < 32 ? Lanes : 32) / 2; distance > 0; distance /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = combine(value[i], __shfl_xor_sync(kEveryLane, value[i], distance));
    }
    if constexpr (Lanes == kBlock) {
      __shared__ T part[kWarps][N];
      __syncthreads();  // the last reduction's reads are over
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) part[threadIdx.x / 32][i] = value[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value[i] = part[0][i];
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) value[i] = combine(value[i], part[warp][i]);
      }
    }
  }
};

}  // namespace fedkern::cuda
