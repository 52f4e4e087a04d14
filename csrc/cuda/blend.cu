// blend on CUDA. fp32, bf16 and f16 are computed in fp32 and rounded once; sums over several samples are taken in fp64, in
// ascending order of the sample, without atomics: the same bits every time. Traffic: each map once, in 128-bit accesses
// where pointers, strides and the sample's size allow.
// Release builds keep the device assertions: looking at an index from the host would cost a synchronisation.
#undef NDEBUG
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <initializer_list>

#include "fedkern/blend_cuda.h"
#include "launch.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Computed {
  using type = float;
};
template <>
struct Computed<double> {
  using type = double;
};

template <typename C, typename T>
__device__ C widen(T x) {
  return static_cast<C>(static_cast<float>(x));
}
template <>
__device__ double widen<double, double>(double x) {
  return x;
}

// Rounded to odd on the way from fp64, so that the second rounding is exact.
__device__ float round_to_odd(double x) {
  const float toward_zero = __double2float_rz(x);
  if (static_cast<double>(toward_zero) == x || x != x) return toward_zero;
  return __int_as_float(__float_as_int(toward_zero) | 1);
}

template <typename T>
__device__ T narrow(float x) {
  return static_cast<T>(x);
}
template <typename T>
__device__ T narrow(double x) {
  if constexpr (sizeof(T) > 2)
    return static_cast<T>(x);
  else
    return static_cast<T>(round_to_odd(x));
}

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T lane[N];
};

__device__ double alpha_at(const Alpha& alpha, std::int64_t b) { return alpha.data ? alpha.data[b * alpha.stride] : alpha.value; }

template <typename T, int N>
__device__ Pack<T, N> load(const Rows& rows, std::int64_t row, std::int64_t column) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(rows.data) + row * rows.stride + column);
}
template <typename T, int N>
__device__ void store(const Rows& rows, std::int64_t row, std::int64_t column, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(rows.data) + row * rows.stride + column) = pack;
}

// One thread takes a pack of N elements of one sample at a time; `packs` of them make a sample.
template <typename T, int N>
__global__ void forward(BlendForward a, std::int64_t background_rows, std::int64_t packs) {
  using C = typename Computed<T>::type;
  const std::int64_t total = a.rows * packs, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < total; unit += step) {
    const std::int64_t b = unit / packs, column = (unit % packs) * N, source = a.index ? a.index[b] : b;
    assert(source >= 0 && source < background_rows && "blend: index out of range");
    const double alpha = alpha_at(a.alpha, b);
    const C weight = static_cast<C>(alpha), rest = static_cast<C>(1.0 - alpha);
    const auto x = load<T, N>(a.foreground, b, column), y = load<T, N>(a.background, source, column);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.lane[i] = narrow<T>(weight * widen<C>(x.lane[i]) + rest * widen<C>(y.lane[i]));
    store<T, N>(a.out, b, column, out);
  }
}

template <typename T, int N>
__global__ void grad_foreground(BlendBackward a, std::int64_t packs) {
  using C = typename Computed<T>::type;
  const std::int64_t total = a.rows * packs, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < total; unit += step) {
    const std::int64_t b = unit / packs, column = (unit % packs) * N;
    const C weight = static_cast<C>(alpha_at(a.alpha, b));
    const auto grad = load<T, N>(a.grad, b, column);
    Pack<T, N> out;
#pragma unroll
    for (int i = 0; i < N; ++i) out.lane[i] = narrow<T>(weight * widen<C>(grad.lane[i]));
    store<T, N>(a.grad_foreground, b, column, out);
  }
}

template <typename T, int N>
__global__ void grad_background(BlendBackward a, std::int64_t packs) {
  using C = typename Computed<T>::type;
  const std::int64_t total = a.background_rows * packs, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < total; unit += step) {
    const std::int64_t row = unit / packs, column = (unit % packs) * N;
    const std::int64_t begin = a.start ? a.start[row] : row, end = a.start ? a.start[row + 1] : row + 1;
    Pack<T, N> out;
    if (end == begin + 1) {
      const std::int64_t b = a.order ? a.order[begin] : row;
      const C rest = static_cast<C>(1.0 - alpha_at(a.alpha, b));
      const auto grad = load<T, N>(a.grad, b, column);
#pragma unroll
      for (int i = 0; i < N; ++i) out.lane[i] = narrow<T>(rest * widen<C>(grad.lane[i]));
    } else {
      double sum[N] = {};
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t b = a.order[k];
        const double rest = 1.0 - alpha_at(a.alpha, b);
        const auto grad = load<T, N>(a.grad, b, column);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += rest * static_cast<double>(widen<C>(grad.lane[i]));
      }
#pragma unroll
      for (int i = 0; i < N; ++i) out.lane[i] = narrow<T>(sum[i]);
    }
    store<T, N>(a.grad_background, row, column, out);
  }
}

// One block per sample, summed in fp64 in an order fixed by the block's size.
template <typename T, int N>
__global__ void grad_alpha(BlendBackward a, std::int64_t packs) {
  using C = typename Computed<T>::type;
  __shared__ double part[kThreads];
  for (std::int64_t b = blockIdx.x; b < a.rows; b += gridDim.x) {
    const std::int64_t source = a.index ? a.index[b] : b;
    assert(source >= 0 && source < a.background_rows && "blend: index out of range");
    double sum = 0;
    for (std::int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
      const auto grad = load<T, N>(a.grad, b, pack * N);
      const auto x = load<T, N>(a.foreground, b, pack * N), y = load<T, N>(a.background, source, pack * N);
#pragma unroll
      for (int i = 0; i < N; ++i)
        sum += static_cast<double>(widen<C>(grad.lane[i])) *
               (static_cast<double>(widen<C>(x.lane[i])) - static_cast<double>(widen<C>(y.lane[i])));
    }
    part[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.grad_alpha[b] = part[0];
    __syncthreads();
  }
}

// True when every row of every map starts at a multiple of 16 bytes.
template <typename T>
bool aligned(std::int64_t size, std::initializer_list<Rows> maps) {
  constexpr std::int64_t lanes = 16 / sizeof(T);
  if (size % lanes) return false;
  for (const Rows& rows : maps)
    if (rows.data && (reinterpret_cast<std::uintptr_t>(rows.data) % 16 || rows.stride % lanes)) return false;
  return true;
}

unsigned blocks_for(std::int64_t units) {
  // Enough blocks to fill any device; the loops walk the rest.
  const std::int64_t blocks = (units + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > 65536 ? 65536 : blocks);
}

template <typename T, int N>
void launch_forward(const BlendForward& a, std::int64_t background_rows, cudaStream_t stream) {
  const std::int64_t packs = a.size / N;
  forward<T, N><<<blocks_for(a.rows * packs), kThreads, 0, stream>>>(a, background_rows, packs);
  check_launch("blend_forward");
}

template <typename T, int N>
void launch_backward(const BlendBackward& a, cudaStream_t stream) {
  const std::int64_t packs = a.size / N;
  if (a.grad_foreground.data && a.rows * packs) {
    grad_foreground<T, N><<<blocks_for(a.rows * packs), kThreads, 0, stream>>>(a, packs);
    check_launch("blend_grad_foreground");
  }
  if (a.grad_background.data && a.background_rows * packs) {
    grad_background<T, N><<<blocks_for(a.background_rows * packs), kThreads, 0, stream>>>(a, packs);
    check_launch("blend_grad_background");
  }
  if (a.grad_alpha && a.rows) {
    grad_alpha<T, N><<<static_cast<unsigned>(a.rows < 65536 ? a.rows : 65536), kThreads, 0, stream>>>(a, packs);
    check_launch("blend_grad_alpha");
  }
}

template <typename Body>
void with_type(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::f32: return body(float{});
    case DType::f64: return body(double{});
    case DType::bf16: return body(__nv_bfloat16{});
    case DType::f16: return body(__half{});
  }
}

}  // namespace

void blend_forward(const BlendForward& a, std::int64_t background_rows, int device, void* stream) {
  if (!a.rows || !a.size) return;
  const DeviceGuard guard(device);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (aligned<T>(a.size, {a.foreground, a.background, a.out}))
      launch_forward<T, 16 / sizeof(T)>(a, background_rows, static_cast<cudaStream_t>(stream));
    else
      launch_forward<T, 1>(a, background_rows, static_cast<cudaStream_t>(stream));
  });
}

void blend_backward(const BlendBackward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const Rows none{nullptr, 0};
    const Rows foreground = a.grad_alpha ? a.foreground : none, background = a.grad_alpha ? a.background : none;
    if (aligned<T>(a.size, {a.grad, foreground, background, a.grad_foreground, a.grad_background}))
      launch_backward<T, 16 / sizeof(T)>(a, static_cast<cudaStream_t>(stream));
    else
      launch_backward<T, 1>(a, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace fedkern::cuda
