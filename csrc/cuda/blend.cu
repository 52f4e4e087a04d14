// blend on CUDA. fp32, bf16 and f16 are computed in fp32 and rounded once; sums over several samples are taken in fp64, in
// ascending order of the sample, without atomics: the same bits every time. Traffic: each map once, in 128-bit accesses
// where pointers, strides and the sample's size allow.
// Release builds keep the device assertions: looking at an index from the host would cost a synchronisation.
#undef NDEBUG
#include <cassert>

#include "blend_boxes.cuh"
#include "fedkern/blend_cuda.h"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kThreads = 256;

__device__ double alpha_at(const Alpha& alpha, std::int64_t b) { return alpha.each.present ? alpha.each.data[b * alpha.stride] : alpha.value; }

// The background row that sample b meets.
template <typename Call>
__device__ __forceinline__ std::int64_t partner(const Call& a, std::int64_t b) {
  return a.index.present ? a.index.data[b] : b;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> load(const Rows& rows, std::int64_t row, std::int64_t column) {
  return load_pack<T, N>(rows.data, row * rows.stride + column);
}
template <typename T, int N>
__device__ __forceinline__ void store(const Rows& rows, std::int64_t row, std::int64_t column, const Pack<T, N>& pack) {
  store_pack<T, N>(rows.data, row * rows.stride + column, pack);
}

// One thread takes a pack of N elements of one sample at a time; `packs` of them make a sample.
template <typename T, int N>
__global__ void forward(BlendForward a, std::int64_t background_rows, std::int64_t packs) {
  using C = typename Computed<T>::type;
  const std::int64_t total = a.rows * packs, step = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < total; unit += step) {
    const std::int64_t b = unit / packs, column = (unit % packs) * N, source = partner(a, b);
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
    const bool listed = a.start.present;
    const std::int64_t begin = listed ? a.start.data[row] : row, end = listed ? a.start.data[row + 1] : row + 1;
    Pack<T, N> out;
    if (end == begin + 1) {
      const std::int64_t b = listed ? a.order[begin] : row;
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
        for (int i = 0; i < N; ++i) sum[i] += rest * widen<double>(grad.lane[i]);
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
  __shared__ double part[kThreads];
  for (std::int64_t b = blockIdx.x; b < a.rows; b += gridDim.x) {
    const std::int64_t source = partner(a, b);
    assert(source >= 0 && source < a.background_rows && "blend: index out of range");
    double sum = 0;
    for (std::int64_t pack = threadIdx.x; pack < packs; pack += kThreads) {
      const auto grad = load<T, N>(a.grad, b, pack * N);
      const auto x = load<T, N>(a.foreground, b, pack * N), y = load<T, N>(a.background, source, pack * N);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += widen<double>(grad.lane[i]) * (widen<double>(x.lane[i]) - widen<double>(y.lane[i]));
    }
    part[threadIdx.x] = sum;
    for (int half = kThreads / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    }
    if (threadIdx.x == 0) a.grad_alpha.data[b] = part[0];
    __syncthreads();
  }
}

// True when every row of every map starts at a multiple of 16 bytes.
template <typename T>
bool aligned(std::int64_t size, std::initializer_list<Rows> maps) {
  if (size % kLanes<T>) return false;
  for (const Rows& rows : maps)
    if (rows.present && (!aligned16(rows.data) || rows.stride % kLanes<T>)) return false;
  return true;
}

template <typename T, int N>
void launch_forward(const BlendForward& a, std::int64_t background_rows, const Queue& queue) {
  const std::int64_t packs = a.size / N;
  launch("blend_forward", forward<T, N>, grid(a.rows * packs, kThreads, queue), kThreads, queue, a, background_rows, packs);
}

template <typename T, int N>
void launch_backward(const BlendBackward& a, const Queue& queue) {
  const std::int64_t packs = a.size / N;
  if (a.grad_foreground.present && a.rows * packs)
    launch("blend_grad_foreground", grad_foreground<T, N>, grid(a.rows * packs, kThreads, queue), kThreads, queue, a, packs);
  if (a.grad_background.present && a.background_rows * packs)
    launch("blend_grad_background", grad_background<T, N>, grid(a.background_rows * packs, kThreads, queue), kThreads, queue, a, packs);
  if (a.grad_alpha.present && a.rows) launch("blend_grad_alpha", grad_alpha<T, N>, grid(a.rows, 1, queue), kThreads, queue, a, packs);
}

}  // namespace

void blend_forward(const BlendForward& a, std::int64_t background_rows, int device, void* stream) {
  if (!a.rows || !a.size) return;
  const DeviceGuard guard(device);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (aligned<T>(a.size, {a.foreground, a.background, a.out}))
      launch_forward<T, kLanes<T>>(a, background_rows, {device, stream});
    else
      launch_forward<T, 1>(a, background_rows, {device, stream});
  });
}

void blend_backward(const BlendBackward& a, int device, void* stream) {
  const DeviceGuard guard(device);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const bool read = a.grad_alpha.present;
    const Rows foreground{a.foreground.data, a.foreground.stride, read}, background{a.background.data, a.background.stride, read};
    if (aligned<T>(a.size, {a.grad, foreground, background, a.grad_foreground, a.grad_background}))
      launch_backward<T, kLanes<T>>(a, {device, stream});
    else
      launch_backward<T, 1>(a, {device, stream});
  });
}

void fill_boxes(const FillBoxes& a, int device, void* stream) {
  if (!a.batch || !a.channels || !a.height || !a.width) return;
  const DeviceGuard guard(device);
  switch (a.item) {
    case 1: return launch_boxes<std::uint8_t>(a, {device, stream});
    case 2: return launch_boxes<std::uint16_t>(a, {device, stream});
    case 4: return launch_boxes<std::uint32_t>(a, {device, stream});
    default: return launch_boxes<std::uint64_t>(a, {device, stream});
  }
}

}  // namespace fedkern::cuda
