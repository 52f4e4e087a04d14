// fuse on CUDA. Every map is read and every result written once, in 128-bit accesses where addresses and sizes allow, backward
// too; products and sums are taken in fp32 (fp64 for fp64 maps) and rounded once. Gradients of scale and shift are summed in
// fp64, in an order that sizes, alignment and the device fix; those of 16-bit maps over a few places in fp32 before.
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
  bool relu, mean;
  ChannelNumbers scale, shift;
};

// Packs of N elements that a thread loads before it uses the first.
template <typename T, int N>
inline constexpr int kDeep = N > 1 ? 2 : sizeof(T) == 8 ? 4 : 8;

// How blocks share maps. Places are packs of N positions, or (Interleaved) positions, where `wide` threads side by side
// each take a pack of N channels. A thread keeps its channels: block work % groups has `length` places of theirs.
struct Share {
  std::int64_t places, inner, length;  // of all samples, of one, of a block
  std::int64_t skip_b, skip_p;         // samples and places to the thread's next place
  int channels, groups, splits, wide;

  template <typename T, int N, bool Interleaved>
  static Share of(std::int64_t batch, std::int64_t positions, int channels, std::int64_t most_splits, const Queue& queue) {
    int wide = 1;
    while (Interleaved && wide < 32 && wide * N < channels) wide *= 2;
    const auto parts = [](std::int64_t all, std::int64_t each) { return std::max<std::int64_t>((all + each - 1) / each, 1); };
    const std::int64_t inner = std::max<std::int64_t>(Interleaved ? positions : positions / N, 1), places = positions ? batch * inner : 0;
    const std::int64_t deep = kBlock / wide, step = deep * kDeep<T, N>, groups = parts(channels, Interleaved ? wide * N : 1);
    const std::int64_t wanted = std::clamp<std::int64_t>(32 * multiprocessors(queue.device) / groups, 1, most_splits);
    const std::int64_t length = parts(parts(places, wanted), step) * step;
    return {places, inner, length, deep / inner, deep % inner, channels, static_cast<int>(groups), static_cast<int>(parts(places, length)), wide};
  }
  std::int64_t blocks() const { return static_cast<std::int64_t>(groups) * splits; }

  __device__ __forceinline__ int split() const { return static_cast<int>(blockIdx.x) / groups; }
  // The thread's first channel; may be none.
  template <int N, bool Interleaved>
  __device__ __forceinline__ int channel() const {
    const int group = static_cast<int>(blockIdx.x) % groups;
    return Interleaved ? (group * wide + static_cast<int>(threadIdx.x) % wide) * N : group;
  }
};

// Of the places past the end the first one is read again: branches would keep loads from overlapping.
template <int K>
struct Places {
  std::int64_t b[K], p[K];
  bool valid[K];
};

// body(places) for all of the thread's places, K at a time.
template <int N, bool Interleaved, int K, typename Body>
__device__ __forceinline__ void each_place(const Share& s, Body&& body) {
  const int deep = kBlock / s.wide;
  const std::int64_t begin = s.split() * s.length, end = begin + s.length < s.places ? begin + s.length : s.places;
  std::int64_t place = begin + static_cast<int>(threadIdx.x) / s.wide, b = place / s.inner, p = place % s.inner;
  while (place < end) {
    Places<K> at;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      at.valid[k] = place < end;
      at.b[k] = at.valid[k] ? b : at.b[0], at.p[k] = at.valid[k] ? p : at.p[0];
      place += deep, b += s.skip_b, p += s.skip_p;
      if (p >= s.inner) p -= s.inner, ++b;
    }
    body(at);
  }
}

// The element of a map at place k; what packs together has stride 1.
template <int N, bool Interleaved, int K>
__device__ __forceinline__ std::int64_t element(const FeatureMap& map, int c, const Places<K>& at, int k) {
  const std::int64_t channel = N > 1 && Interleaved ? c : c * map.channel;
  return at.b[k] * map.batch + channel + (N > 1 && !Interleaved ? at.p[k] * N : at.p[k] * map.position);
}
template <typename T, int N, bool Interleaved, int K>
__device__ __forceinline__ void load(const FeatureMap& map, int c, const Places<K>& at, Pack<T, N> (&to)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) to[k] = load_pack<T, N>(map.data, element<N, Interleaved>(map, c, at, k));
}
template <typename T, bool Interleaved, typename C, int N, int K>
__device__ __forceinline__ void store(const FeatureMap& map, int c, const Places<K>& at, const C (&x)[K][N]) {
#pragma unroll
  for (int k = 0; k < K; ++k) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.lane[i] = narrow<T>(x[k][i]);
    if (at.valid[k]) store_pack<T, N>(map.data, element<N, Interleaved>(map, c, at, k), pack);
  }
}

// scale and shift of a thread's channels: of one, or of each element of its packs.
template <typename C, int Channels>
struct Affine {
  C scale[Channels], shift[Channels];

  __device__ __forceinline__ void read(const Shape& a, int c) {
    read(a.scale, c, C(1), scale);
    read(a.shift, c, C(0), shift);
  }
  __device__ __forceinline__ static void read(const ChannelNumbers& from, int c, C absent, C (&to)[Channels]) {
    const auto each = [&](auto type) {
#pragma unroll
      for (int i = 0; i < Channels; ++i) to[i] = from.present ? widen<C>(static_cast<const decltype(type)*>(from.data)[c + i]) : absent;
    };
    switch (from.dtype) {
      case DType::bf16: return each(__nv_bfloat16{});
      case DType::f16: return each(__half{});
      case DType::f64: return each(C{});
      default: return each(float{});
    }
  }
  __device__ __forceinline__ C operator()(C x, int i) const { return scale[i % Channels] * x + shift[i % Channels]; }
};

template <typename T, int N, bool Interleaved, bool Mean>
__global__ void __launch_bounds__(kBlock) forward_kernel(const __grid_constant__ Maps from, const __grid_constant__ Shape a, const FeatureMap out,
                                                         const Share s) {
  using C = typename Computed<T>::type;
  constexpr int K = kDeep<T, N>;
  const int c = s.channel<N, Interleaved>();
  if (c >= s.channels) return;
  const int first = Mean ? 0 : from.holder(c), last = Mean ? from.count : first + 1;
  Affine<C, Interleaved ? N : 1> affine;
  if (!Mean) affine.read(a, c);
  const C count = static_cast<C>(from.count), inverse = C(1) / count;
  const bool exact = (from.count & (from.count - 1)) == 0;
  each_place<N, Interleaved, K>(s, [&](const Places<K>& at) {
    C sum[K][N] = {};
    for (int m = first; m < last; ++m) {
      Pack<T, N> x[K];
      load<T, N, Interleaved>(from.map[m], Mean ? c : c - from.start[m], at, x);
      if (Mean) affine.read(a, from.start[m] + c);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C y = affine(widen<C>(x[k].lane[i]), i);
          sum[k][i] += a.relu && y <= 0 ? C(0) : y;  // NaN passes, as in torch
        }
    }
    if constexpr (Mean) {
      const auto scale = [&](auto&& share) {
#pragma unroll
        for (int k = 0; k < K; ++k)
#pragma unroll
          for (int i = 0; i < N; ++i) sum[k][i] = share(sum[k][i]);
      };
      // By a power of two the product is the same number, and a fraction of the work.
      exact ? scale([&](C x) { return x * inverse; }) : scale([&](C x) { return x / count; });
    }
    store<T, Interleaved>(out, c, at, sum);
  });
}

// More bytes of parameters need a driver of R530.
static_assert(2 * sizeof(Maps) + sizeof(Shape) + 2 * sizeof(FeatureMap) + sizeof(Share) + sizeof(double*) <= 4096);

// The maps' gradients, and in the same pass sums over a block's places for scale and shift: partial[split][channel][2], or null.
template <typename T, int N, bool Interleaved>
__global__ void __launch_bounds__(kBlock, Interleaved || N == 1 ? 2 : 3) backward_kernel(const __grid_constant__ Maps from, const __grid_constant__ Maps to,
                                                          const __grid_constant__ Shape a, const FeatureMap grad, const FeatureMap out,
                                                          const Share s, double* partial) {
  using C = typename Computed<T>::type;
  constexpr int kChannels = Interleaved ? N : 1, K = kChannels > 4 ? 1 : kDeep<T, N>;  // as registers allow
  const int all = s.channel<N, Interleaved>();
  double product[kChannels] = {}, sum[kChannels] = {};
  // Products of 16-bit numbers are exact in fp32. Eight (or as many as are read at once) are added there: conversions to fp64 take
  // longest of all.
  using Few = std::conditional_t<sizeof(T) == 2, float, double>;
  constexpr int kTurns = std::max(8 * kChannels / (K * N), 1);
  if (all < s.channels) {
    const int m = from.holder(all), c = all - from.start[m];
    const FeatureMap map = from.map[m], target = to.map[m], gate = map.data ? map : out;
    const C share = a.mean ? C(1) / static_cast<C>(from.count) : C(1);
    Affine<C, kChannels> affine;
    affine.read(a, all);
    C factor[kChannels];
#pragma unroll
    for (int i = 0; i < kChannels; ++i) factor[i] = affine.scale[i] * share;
    Few products[kChannels] = {}, sums[kChannels] = {};
    int turns = 0;
    const auto add_up = [&] {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) product[i] += products[i], sum[i] += sums[i], products[i] = sums[i] = 0;
      turns = 0;
    };
    each_place<N, Interleaved, K>(s, [&](const Places<K>& at) {
      Pack<T, N> grads[K], seen[K] = {};
      load<T, N, Interleaved>(grad, a.mean ? c : all, at, grads);
      if (gate.data) load<T, N, Interleaved>(gate, map.data ? c : all, at, seen);
      C g[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (!at.valid[k]) grads[k] = seen[k] = {};
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const C x = widen<C>(seen[k].lane[i]), y = map.data ? affine(x, i) : x;
          g[k][i] = a.relu && y <= 0 ? C(0) : widen<C>(grads[k].lane[i]);
          if (partial) {
            products[i % kChannels] += static_cast<Few>(g[k][i]) * static_cast<Few>(x);
            sums[i % kChannels] += static_cast<Few>(g[k][i]);
          }
          g[k][i] *= factor[i % kChannels];
        }
      if (sizeof(T) == 2 && partial && ++turns == kTurns) add_up();
      if (target.data) store<T, Interleaved>(target, c, at, g);
    });
    add_up();
  }
  if (!partial) return;
  __shared__ double part[2][kBlock];
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < kChannels; ++i) {
    for (int distance = 16; distance >= s.wide; distance /= 2) {
      product[i] += __shfl_xor_sync(kEveryLane, product[i], distance);
      sum[i] += __shfl_xor_sync(kEveryLane, sum[i], distance);
    }
    __syncthreads();
    part[0][thread] = product[i], part[1][thread] = sum[i];
    __syncthreads();
    if (thread >= s.wide || all >= s.channels) continue;
    for (int warp = 1; warp < kWarps; ++warp) product[i] += part[0][warp * 32 + thread], sum[i] += part[1][warp * 32 + thread];
    double* const at = partial + (static_cast<std::int64_t>(s.split()) * s.channels + all + i) * 2;
    at[0] = product[i], at[1] = sum[i];
  }
}

// A warp per channel; `maps` share a mean's gradient.
__global__ void __launch_bounds__(kBlock) finish_channels(const double* partial, int channels, int splits, int maps, Optional<double> to_scale,
                                                           Optional<double> to_shift) {
  using Warp = Group<32>;
  const int c = static_cast<int>(blockIdx.x) * Warp::rows + Warp::row();
  if (c >= channels) return;
  double product = 0, sum = 0;
  for (int split = Warp::lane(); split < splits; split += 32) {
    product += partial[(static_cast<std::int64_t>(split) * channels + c) * 2];
    sum += partial[(static_cast<std::int64_t>(split) * channels + c) * 2 + 1];
  }
  product = Warp::sum(product), sum = Warp::sum(sum);
  if (Warp::lane()) return;
  if (to_scale.present) to_scale.data[c] = product / maps;
  if (to_shift.present) to_shift.data[c] = sum / maps;
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

ChannelNumbers shifted(ChannelNumbers numbers, std::int64_t channels) {
  if (numbers.present) numbers.data = static_cast<const char*>(numbers.data) + channels * static_cast<std::int64_t>(item_size(numbers.dtype));
  return numbers;
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
    if (!x.data) return true;
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
    const Shape shape{a.relu, a.mean, shifted(a.scale, channel), shifted(a.shift, channel)};
    const FeatureMap out = a.mean ? a.out : shifted(a, a.out, channel);
    if (!(a.batch * a.positions * channels)) return;
    with_layout(
        a.dtype, interleaved(a, out), [&](auto n, auto inner) { return packs<n, inner>(a, from, out, begin, end); },
        [&](auto type, auto n, auto inner) {
          using T = decltype(type);
          const Share share = Share::of<T, n, inner>(a.batch, a.positions, channels, a.batch * a.positions, queue);
          const auto kernel = a.mean ? forward_kernel<T, n, inner, true> : forward_kernel<T, n, inner, false>;
          launch("fuse_forward", kernel, share.blocks(), kBlock, queue, from, shape, out, share);
        });
  });
}

void fuse_backward(const FuseCall& a, const FuseBackward& to, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const auto target = std::find_if(to.to_features.begin(), to.to_features.end(), [](const FeatureMap& x) { return x.data; });
  const bool inner_channels = interleaved(a, target == to.to_features.end() ? to.grad : *target);
  const bool summed = to.to_scale.present || to.to_shift.present;
  in_turn(a, [&](std::size_t begin, std::size_t end, std::int64_t channel) {
    const Maps from = maps_of(a, a.features, begin, end), targets = maps_of(a, to.to_features, begin, end);
    const int channels = from.start[from.count];
    const Shape shape{a.relu, a.mean, shifted(a.scale, channel), shifted(a.shift, channel)};
    const FeatureMap out = shifted(a, a.out, channel), grad = a.mean ? to.grad : shifted(a, to.grad, channel);
    if (!channels || !(summed || a.batch * a.positions)) return;
    int splits = 0;
    with_layout(
        a.dtype, inner_channels,
        [&](auto n, auto inner) { return packs<n, inner>(a, from, grad, begin, end) && packs<n, inner>(a, targets, out, begin, end); },
        [&](auto type, auto n, auto inner) {
          using T = decltype(type);
          const Share share = Share::of<T, n, inner>(a.batch, a.positions, channels, fuse_partials(channels) / (2 * channels), queue);
          splits = share.splits;
          launch("fuse_backward", backward_kernel<T, n, inner>, share.blocks(), kBlock, queue, from, targets, shape, grad, out, share,
                 summed ? to.partial : nullptr);
        });
    if (summed)
      launch("fuse_channels", finish_channels, (channels + kWarps - 1) / kWarps, kBlock, queue, to.partial, channels, splits,
             a.mean ? from.count : 1, shifted(to.to_scale, channel), shifted(to.to_shift, channel));
  });
}

}  // namespace fedkern::cuda
