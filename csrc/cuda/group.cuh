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
  static_assert(Lanes <= kBlock && (Lanes <= 32 ? 32 % Lanes == 0 : kBlock % Lanes == 0));
  static constexpr int lanes = Lanes;
  static constexpr int rows = kBlock / Lanes;  // per block

  __device__ static int lane() { return static_cast<int>(threadIdx.x % Lanes); }
  __device__ static int row() { return static_cast<int>(threadIdx.x / Lanes); }

  // All threads of the block must come here together.
  template <typename T, typename Combine>
  __device__ static T reduce(T value, Combine combine) {
    T all[1] = {value};
    reduce_all(all, combine);
    return all[0];
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
  static constexpr int kTogether = Lanes < 32 ? Lanes : 32, kGroupWarps = Lanes / kTogether;

  template <typename T>
  __device__ static T larger(T a, T b) {
    return a > b || b != b ? a : b;
  }
  template <typename T, int N, typename Combine>
  __device__ __forceinline__ static void reduce_all(T (&value)[N], Combine combine) {
    fold<kTogether / 2>(value, combine);
    if constexpr (Lanes > 32) {
      __shared__ T part[kWarps][N];
      const unsigned warp = threadIdx.x / 32, first = warp / kGroupWarps * kGroupWarps;
      __syncthreads();  // the last reduction's reads are over
      if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) part[warp][i] = value[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < N; ++i) {
        value[i] = part[first][i];
#pragma unroll
        for (int other = 1; other < kGroupWarps; ++other) value[i] = combine(value[i], part[first + other][i]);
      }
    }
  }
  // Of lanes up to 2 Distance - 1 apart. Several values: one half of the lanes goes on with half of them, the other with the rest,
  // and at last they tell each other, which takes fewer shuffles than all lanes with all values.
  template <int Distance, typename T, int N, typename Combine>
  __device__ __forceinline__ static void fold(T (&value)[N], Combine combine) {
    if constexpr (Distance == 0) {
      return;
    } else if constexpr (N == 1 || Distance < 8) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = combine(value[i], __shfl_xor_sync(kEveryLane, value[i], Distance));
      fold<Distance / 2>(value, combine);
    } else {
      constexpr int half = (N + 1) / 2;
      const bool upper = threadIdx.x & Distance;
      T mine[half];
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const T low = value[i], high = value[half + i < N ? half + i : i];
        mine[i] = combine(upper ? high : low, __shfl_xor_sync(kEveryLane, upper ? low : high, Distance));
      }
      fold<Distance / 2>(mine, combine);
      const int from = static_cast<int>(threadIdx.x) & (31 & ~Distance);
#pragma unroll
      for (int i = 0; i < half; ++i) {
        value[i] = __shfl_sync(kEveryLane, mine[i], from);
        if (half + i < N) value[half + i] = __shfl_sync(kEveryLane, mine[i], from | Distance);
      }
    }
  }
};

}  // namespace fedkern::cuda
