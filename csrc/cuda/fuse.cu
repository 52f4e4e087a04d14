// fuse on CUDA. Every map is read and every result written once, in 128-bit accesses where addresses and sizes allow; products
// and sums are taken in fp32 (fp64 for fp64 maps) and rounded once. Gradients of scale and shift are summed in fp64, in an
// order that the sizes and the device fix.
#include <algorithm>

#include "fedkern/fuse_cuda.h"
#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

// Maps side by side on the channels, as a kernel's parameter.
struct Maps {
  int count;
  int start[kMostMaps + 1];  // each map's first channel
  FeatureMap map[kMostMaps];

  // The map that channel c is of; absent ones (with as many channels) count.
  __device__ __forceinline__ int holder(int c) const {
    int low = 0, high = count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (c < start[middle])
        high = middle;
      else
        low = middle;
    }
    return low;
  }
};

struct Shape {
  std::int64_t batch, positions;
  int channels;  // of all maps, or, for a mean, of one
  bool relu, mean;
  Optional<const void> scale, shift;
};

__device__ __forceinline__ std::int64_t address(const FeatureMap& map, std::int64_t b, int c, std::int64_t p) {
  return b * map.batch + c * map.channel + p * map.position;
}

// A unit is N elements that lie together: positions of a channel, or (Interleaved) channels of a position.
template <int N, bool Interleaved>
struct Unit {
  std::int64_t b, p;
  int c;

  __device__ __forceinline__ Unit(std::int64_t unit, std::int64_t positions, int channels) {
    if constexpr (Interleaved) {
      const int inner = channels / N;
      c = static_cast<int>(unit % inner) * N;
      unit /= inner;
      p = unit % positions;
      b = unit / positions;
    } else {
      const std::int64_t inner = positions / N;
      p = unit % inner * N;
      unit /= inner;
      c = static_cast<int>(unit % channels);
      b = unit / channels;
    }
  }
};

// scale x + shift of N elements from channel `c` on.
template <typename C, int N, bool Interleaved>
__device__ __forceinline__ void affine(const Shape& a, int c, C (&x)[N]) {
  const C *const scale = static_cast<const C*>(a.scale.data), *const shift = static_cast<const C*>(a.shift.data);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int at = c + (Interleaved ? i : 0);
    if (a.scale.present) x[i] *= scale[at];
    if (a.shift.present) x[i] += shift[at];
  }
}

template <typename T, typename C, int N>
__device__ __forceinline__ void load_map(const FeatureMap& map, std::int64_t at, C (&x)[N]) {
  const auto pack = load_pack<T, N>(map.data, at);
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = widen<C>(pack.lane[i]);
}
template <typename T, typename C, int N>
__device__ __forceinline__ void store_map(const FeatureMap& map, std::int64_t at, const C (&x)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(x[i]);
  store_pack<T, N>(map.data, at, pack);
}

template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kBlock) forward_kernel(const __grid_constant__ Maps from, const __grid_constant__ Shape a, const FeatureMap out,
                                                         std::int64_t units) {
  using C = typename Computed<T>::type;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; unit < units; unit += step) {
    const Unit<N, Interleaved> at(unit, a.positions, a.channels);
    const int first = a.mean ? 0 : from.holder(at.c), last = a.mean ? from.count : first + 1;
    C sum[N] = {};
    for (int m = first; m < last; ++m) {
      C x[N];
      load_map<T>(from.map[m], address(from.map[m], at.b, a.mean ? at.c : at.c - from.start[m], at.p), x);
      affine<C, N, Interleaved>(a, a.mean ? from.start[m] + at.c : at.c, x);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += a.relu && x[i] <= 0 ? C(0) : x[i];  // NaN passes, as in torch
    }
    if (a.mean) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] /= static_cast<C>(from.count);
    }
    store_map<T>(out, address(out, at.b, at.c, at.p), sum);
  }
}

// The gradient of scale x + shift, for N elements of map m: of channel c there, `all` of all.
template <typename T, typename C, int N, bool Interleaved>
__device__ __forceinline__ void inner_gradient(const Maps& from, const Shape& a, const FeatureMap& grad, const FeatureMap& out, int m,
                                               std::int64_t b, int c, int all, std::int64_t p, C (&g)[N]) {
  load_map<T>(grad, address(grad, b, a.mean ? c : all, p), g);
  if (a.mean) {
#pragma unroll
    for (int i = 0; i < N; ++i) g[i] /= static_cast<C>(from.count);
  }
  if (!a.relu) return;
  C y[N];
  if (out.present) {
    load_map<T>(out, address(out, b, all, p), y);
  } else {
    load_map<T>(from.map[m], address(from.map[m], b, c, p), y);
    affine<C, N, Interleaved>(a, all, y);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] = y[i] <= 0 ? C(0) : g[i];
}

// Units of all maps together: for a mean, too.
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kBlock) backward_kernel(const __grid_constant__ Maps from, const __grid_constant__ Maps to,
                                                          const __grid_constant__ Shape a, const FeatureMap grad, const FeatureMap out,
                                                          std::int64_t units) {
  using C = typename Computed<T>::type;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kBlock;
  for (std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; unit < units; unit += step) {
    const Unit<N, Interleaved> at(unit, a.positions, to.start[to.count]);
    const int m = to.holder(at.c), c = at.c - to.start[m];
    const FeatureMap& target = to.map[m];
    if (!target.present) continue;
    C g[N];
    inner_gradient<T, C, N, Interleaved>(from, a, grad, out, m, at.b, c, at.c, at.p, g);
    if (a.scale.present) {
#pragma unroll
      for (int i = 0; i < N; ++i) g[i] *= static_cast<const C*>(a.scale.data)[at.c + (Interleaved ? i : 0)];
    }
    store_map<T>(target, address(target, at.b, c, at.p), g);
  }
}

// Sums over batch and positions for scale and shift: partial[split][channel][2]. Neighbouring threads read neighbours in memory:
// positions of one channel, or 32 channels of a position.
template <typename T, bool Interleaved>
__global__ void __launch_bounds__(kBlock) channel_sums(const __grid_constant__ Maps from, const __grid_constant__ Shape a, const FeatureMap grad,
                                                       const FeatureMap out, double* partial, int splits) {
  using C = typename Computed<T>::type;
  constexpr int kWide = Interleaved ? 32 : 1, kDeep = kBlock / kWide;
  const int channels = from.start[from.count], groups = (channels + kWide - 1) / kWide;
  const int thread = static_cast<int>(threadIdx.x), deep = thread / kWide;
  const std::int64_t rows = a.batch * a.positions;
  for (std::int64_t work = blockIdx.x; work < static_cast<std::int64_t>(groups) * splits; work += gridDim.x) {
    const int all = static_cast<int>(work % groups) * kWide + thread % kWide, split = static_cast<int>(work / groups);
    double product = 0, sum = 0;
    if (all < channels) {
      const int m = from.holder(all), c = all - from.start[m];
      for (std::int64_t row = static_cast<std::int64_t>(split) * kDeep + deep; row < rows; row += static_cast<std::int64_t>(splits) * kDeep) {
        const std::int64_t b = row / a.positions, p = row % a.positions;
        C g[1], x[1] = {0};
        inner_gradient<T, C, 1, Interleaved>(from, a, grad, out, m, b, c, all, p, g);
        if (from.map[m].present) load_map<T>(from.map[m], address(from.map[m], b, c, p), x);
        product += static_cast<double>(g[0]) * static_cast<double>(x[0]);
        sum += static_cast<double>(g[0]);
      }
    }
    if constexpr (Interleaved) {
      __shared__ double part[2][kDeep][kWide];
      __syncthreads();
      part[0][deep][thread % kWide] = product, part[1][deep][thread % kWide] = sum;
      __syncthreads();
      if (deep == 0) {
        for (int d = 1; d < kDeep; ++d) product += part[0][d][thread], sum += part[1][d][thread];
      }
    } else {
      product = Group<kBlock>::sum(product), sum = Group<kBlock>::sum(sum);
    }
    if (deep == 0 && all < channels) {
      double* const to = partial + (static_cast<std::int64_t>(split) * channels + all) * 2;
      to[0] = product, to[1] = sum;
    }
  }
}

__global__ void __launch_bounds__(kBlock) finish_channels(const double* partial, int channels, int splits, Optional<double> to_scale,
                                                           Optional<double> to_shift) {
  const int c = static_cast<int>(blockIdx.x) * kBlock + static_cast<int>(threadIdx.x);
  if (c >= channels) return;
  double product = 0, sum = 0;
  for (int split = 0; split < splits; ++split) {
    product += partial[(static_cast<std::int64_t>(split) * channels + c) * 2];
    sum += partial[(static_cast<std::int64_t>(split) * channels + c) * 2 + 1];
  }
  if (to_scale.present) to_scale.data[c] = product;
  if (to_shift.present) to_shift.data[c] = sum;
}

// The maps [begin, end) of a call; `maps` may be empty.
Maps maps_of(const FuseCall& a, const std::vector<FeatureMap>& maps, std::size_t begin, std::size_t end) {
  Maps result{static_cast<int>(end - begin), {}, {}};
  for (std::size_t m = begin; m < end; ++m) {
    result.start[m - begin + 1] = result.start[m - begin] + static_cast<int>(a.channels[m]);
    result.map[m - begin] = maps.empty() ? FeatureMap{} : maps[m];
  }
  return result;
}

Optional<const void> shifted(const FuseCall& a, Optional<const void> vector, std::int64_t channels) {
  if (vector.data) vector.data = static_cast<const char*>(vector.data) + channels * (a.dtype == DType::f64 ? 8 : 4);
  return vector;
}
Optional<double> shifted(Optional<double> sums, std::int64_t channels) {
  if (sums.data) sums.data += channels;
  return sums;
}
FeatureMap shifted(const FuseCall& a, FeatureMap map, std::int64_t channels) {
  if (map.data) map.data = static_cast<char*>(map.data) + channels * map.channel * static_cast<std::int64_t>(item_size(a.dtype));
  return map;
}

// True when N elements of every map lie together in that order and at a multiple of 16 bytes.
template <int N, bool Interleaved>
bool packs(const FuseCall& a, const Maps& maps, const FeatureMap& map, std::size_t begin, std::size_t end) {
  const auto fits = [&](const FeatureMap& x) {
    if (!x.present) return true;
    if ((Interleaved ? x.channel : x.position) != 1 || !aligned16(x.data)) return false;
    return (a.batch == 1 || x.batch % N == 0) && (Interleaved ? a.positions == 1 || x.position % N == 0 : x.channel % N == 0);
  };
  bool all = fits(map) && (Interleaved || a.positions % N == 0);
  for (int m = 0; m < maps.count; ++m) all = all && fits(maps.map[m]);
  if (Interleaved)
    for (std::size_t m = begin; m < end; ++m) all = all && a.channels[m] % N == 0;
  return all;
}

// Interleaved where the result's (or its gradient's) channels lie closer than its positions.
bool interleaved(const FuseCall& a, const FeatureMap& x) { return a.positions == 1 || (x.channel == 1 && x.position != 1); }

// body(type, N, Interleaved), the last two as integral_constants.
template <typename Packs, typename Body>
void with_layout(DType dtype, bool inner_channels, Packs&& may_pack, Body&& body) {
  with_type(dtype, [&](auto type) {
    using Wide = std::integral_constant<int, kLanes<decltype(type)>>;
    using One = std::integral_constant<int, 1>;
    if (inner_channels)
      may_pack(Wide{}, std::true_type{}) ? body(type, Wide{}, std::true_type{}) : body(type, One{}, std::true_type{});
    else
      may_pack(Wide{}, std::false_type{}) ? body(type, Wide{}, std::false_type{}) : body(type, One{}, std::false_type{});
  });
}

// Calls body(begin, end, first channel) for the maps of each launch.
template <typename Body>
void in_turn(const FuseCall& a, Body&& body) {
  std::int64_t channel = 0;
  for (std::size_t begin = 0; begin < a.channels.size();) {
    const std::size_t end = std::min(begin + kMostMaps, a.channels.size());
    body(begin, end, channel);
    for (; begin < end; ++begin) channel += a.channels[begin];
  }
}

}  // namespace

void fuse_forward(const FuseCall& a, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  in_turn(a, [&](std::size_t begin, std::size_t end, std::int64_t channel) {
    const Maps from = maps_of(a, a.features, begin, end);
    const int channels = a.mean ? from.start[1] : from.start[from.count];
    const Shape shape{a.batch, a.positions, channels, a.relu, a.mean, shifted(a, a.scale, channel), shifted(a, a.shift, channel)};
    const FeatureMap out = a.mean ? a.out : shifted(a, a.out, channel);
    const std::int64_t elements = a.batch * a.positions * channels;
    if (!elements) return;
    with_layout(
        a.dtype, interleaved(a, out), [&](auto n, auto inner) { return packs<n, inner>(a, from, out, begin, end); },
        [&](auto type, auto n, auto inner) {
          launch("fuse_forward", forward_kernel<decltype(type), n, inner>, grid(elements / n, kBlock, queue), kBlock, queue, from, shape, out,
                 elements / n);
        });
  });
}

void fuse_backward(const FuseCall& a, const FuseBackward& to, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  in_turn(a, [&](std::size_t begin, std::size_t end, std::int64_t channel) {
    const Maps from = maps_of(a, a.features, begin, end), targets = maps_of(a, to.to_features, begin, end);
    const int channels = from.start[from.count];
    const Shape shape{a.batch, a.positions, a.mean ? from.start[1] : channels, a.relu, a.mean, shifted(a, a.scale, channel), shifted(a, a.shift, channel)};
    const FeatureMap out = shifted(a, a.out, channel), grad = a.mean ? to.grad : shifted(a, to.grad, channel);
    const std::int64_t rows = a.batch * a.positions, elements = rows * channels;
    const bool inner_channels = interleaved(a, grad);
    if (elements && !to.to_features.empty()) {
      const bool maps_inner = interleaved(a, *std::find_if(to.to_features.begin(), to.to_features.end(), [](const FeatureMap& x) { return x.present; }));
      with_layout(
          a.dtype, maps_inner,
          [&](auto n, auto inner) {
            return packs<n, inner>(a, from, grad, begin, end) && packs<n, inner>(a, targets, out, begin, end);
          },
          [&](auto type, auto n, auto inner) {
            launch("fuse_backward", backward_kernel<decltype(type), n, inner>, grid(elements / n, kBlock, queue), kBlock, queue, from, targets, shape,
                   grad, out, elements / n);
          });
    }
    if (!channels || (!to.to_scale.present && !to.to_shift.present)) return;
    const std::int64_t groups = inner_channels ? (channels + 31) / 32 : channels, deep = inner_channels ? kBlock / 32 : kBlock;
    const int splits = static_cast<int>(std::clamp<std::int64_t>(std::min(4 * multiprocessors(device) / groups, rows / (8 * deep)), 1, kFuseSplits));
    double* const partial = to.partial;
    with_type(a.dtype, [&](auto type) {
      using T = decltype(type);
      const auto kernel = inner_channels ? channel_sums<T, true> : channel_sums<T, false>;
      launch("fuse_channel_sums", kernel, grid(groups * splits, 1, queue), kBlock, queue, from, shape, grad, out, partial, splits);
    });
    launch("fuse_channels", finish_channels, (channels + kBlock - 1) / kBlock, kBlock, queue, partial, channels, splits,
           shifted(to.to_scale, channel), shifted(to.to_shift, channel));
  });
}

}  // namespace fedkern::cuda
