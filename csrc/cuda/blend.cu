// blend on CUDA. fp32, bf16 and f16 are computed in fp32 and rounded once; sums over several samples are taken in fp64, in
// ascending order of the sample, without atomics: the same bits every time. Traffic: each map once, in accesses as wide as
// pointers and strides allow, several of them in flight.
// Release builds keep the device assertions: looking at an index from the host would cost a synchronisation.
#undef NDEBUG
#include <algorithm>
#include <cassert>

#include "blend_boxes.cuh"
#include "fedkern/blend_cuda.h"
#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kThreads = 256;

// Packs of N elements that a thread loads before it uses the first: eight elements, four of fp64.
template <typename T, int N>
inline constexpr int kDeep = (sizeof(T) == 8 ? 4 : 8) / N;

// How blocks share `rows` of `size` elements: a tile is `across` threads wide, and as many rows high as leaves kThreads.
struct Tiles {
  std::int64_t rows, size, per_row, count;
  int across;

  template <typename T, int N>
  static Tiles of(std::int64_t rows, std::int64_t size) {
    constexpr int deep = kDeep<T, N>;
    const std::int64_t packs = (size + N - 1) / N;
    int across = 1;
    while (across < kThreads && across < (across < 32 ? packs : (packs + deep - 1) / deep)) across *= 2;
    const std::int64_t per_row = (packs + across * deep - 1) / (across * deep), down = kThreads / across;
    return {rows, size, per_row, (rows + down - 1) / down * per_row, across};
  }
};

// A thread's part of a tile: kDeep packs, `step` elements apart.
struct Place {
  std::int64_t row, column, size;
  int step;
};

// body(place, whole): whether all packs lie within the row is known to the compiler.
template <typename T, int N, typename Body>
__device__ __forceinline__ void each_place(const Tiles& tiles, Body&& body) {
  const int thread = static_cast<int>(threadIdx.x), step = tiles.across * N;
  for (std::int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const std::int64_t row = tile / tiles.per_row * (kThreads / tiles.across) + thread / tiles.across;
    const std::int64_t column = (tile % tiles.per_row * tiles.across * kDeep<T, N> + thread % tiles.across) * N;
    if (row >= tiles.rows) continue;
    const Place place{row, column, tiles.size, step};
    if (column + (kDeep<T, N> - 1) * step + N <= tiles.size)
      body(place, std::true_type{});
    else
      body(place, std::false_type{});
  }
}

template <typename T, int N>
struct Packs {
  Pack<T, N> deep[kDeep<T, N>];
};
template <typename T, int N, bool Whole>
__device__ __forceinline__ Packs<T, N> load(const Rows& rows, std::int64_t row, const Place& place, std::bool_constant<Whole>) {
  Packs<T, N> packs{};
#pragma unroll
  for (int k = 0; k < kDeep<T, N>; ++k) {
    const std::int64_t column = place.column + k * place.step, at = row * rows.stride + column;
    if (Whole || column + N <= place.size) {
      packs.deep[k] = load_pack<T, N>(rows.data, at);
    } else {
#pragma unroll
      for (int i = 0; i < N - 1; ++i)
        if (column + i < place.size) packs.deep[k].lane[i] = static_cast<const T*>(rows.data)[at + i];
    }
  }
  return packs;
}
template <typename T, int N, bool Whole>
__device__ __forceinline__ void store(const Rows& rows, std::int64_t row, const Place& place, std::bool_constant<Whole>, const Packs<T, N>& packs) {
#pragma unroll
  for (int k = 0; k < kDeep<T, N>; ++k) {
    const std::int64_t column = place.column + k * place.step, at = row * rows.stride + column;
    if (Whole || column + N <= place.size) {
      store_pack<T, N>(rows.data, at, packs.deep[k]);
    } else {
#pragma unroll
      for (int i = 0; i < N - 1; ++i)
        if (column + i < place.size) static_cast<T*>(rows.data)[at + i] = packs.deep[k].lane[i];
    }
  }
}
// to = f(to's number, from's number), element by element.
template <typename To, typename T, int N, typename F>
__device__ __forceinline__ void combine(To (&to)[kDeep<T, N>][N], const Packs<T, N>& from, F&& f) {
#pragma unroll
  for (int k = 0; k < kDeep<T, N>; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) to[k][i] = f(to[k][i], widen<To>(from.deep[k].lane[i]));
}
template <typename T, int N, typename From>
__device__ __forceinline__ Packs<T, N> rounded(const From (&from)[kDeep<T, N>][N]) {
  Packs<T, N> to;
#pragma unroll
  for (int k = 0; k < kDeep<T, N>; ++k)
#pragma unroll
    for (int i = 0; i < N; ++i) to.deep[k].lane[i] = narrow<T>(from[k][i]);
  return to;
}
template <typename T, int N, typename C>
__device__ __forceinline__ Packs<T, N> scaled(C factor, const Packs<T, N>& from) {
  C product[kDeep<T, N>][N];
  combine<C, T, N>(product, from, [&](C, C x) { return factor * x; });
  return rounded<T, N>(product);
}

__device__ double alpha_at(const Alpha& alpha, std::int64_t b) { return alpha.each.present ? alpha.each.data[b * alpha.stride] : alpha.value; }

// The background row that sample b meets.
template <typename Call>
__device__ __forceinline__ std::int64_t partner(const Call& a, std::int64_t b, std::int64_t background_rows) {
  const std::int64_t row = a.index.present ? a.index.data[b] : b;
  assert(row >= 0 && row < background_rows && "blend: index out of range");
  return row;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) forward(BlendForward a, std::int64_t background_rows, Tiles tiles) {
  using C = typename Computed<T>::type;
  each_place<T, N>(tiles, [&](const Place& place, auto whole) {
    const std::int64_t b = place.row;
    const double alpha = alpha_at(a.alpha, b);
    const C weight = static_cast<C>(alpha), rest = static_cast<C>(1.0 - alpha);
    const auto x = load<T, N>(a.foreground, b, place, whole), y = load<T, N>(a.background, partner(a, b, background_rows), place, whole);
    C out[kDeep<T, N>][N];
    combine<C, T, N>(out, y, [&](C, C y) { return rest * y; });
    combine<C, T, N>(out, x, [&](C z, C x) { return weight * x + z; });
    store<T, N>(a.out, b, place, whole, rounded<T, N>(out));
  });
}

// Gradients of both maps from one look at the result's: of every background row (or, without its gradient, every sample)
// and of the samples that met it.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 4) grad_maps(BlendBackward a, Tiles tiles) {
  using C = typename Computed<T>::type;
  const bool listed = a.grad_background.present && a.start.present;
  each_place<T, N>(tiles, [&](const Place& place, auto whole) {
    const std::int64_t row = place.row, begin = listed ? a.start.data[row] : row, end = listed ? a.start.data[row + 1] : row + 1;
    double alpha = 0;
    const auto next = [&](std::int64_t k) {
      const std::int64_t b = listed ? a.order[k] : row;
      alpha = alpha_at(a.alpha, b);
      const auto grad = load<T, N>(a.grad, b, place, whole);
      if (a.grad_foreground.present) store<T, N>(a.grad_foreground, b, place, whole, scaled<T, N>(static_cast<C>(alpha), grad));
      return grad;
    };
    if (end == begin + 1) {
      const auto grad = next(begin);
      if (a.grad_background.present) store<T, N>(a.grad_background, row, place, whole, scaled<T, N>(static_cast<C>(1.0 - alpha), grad));
      return;
    }
    double sum[kDeep<T, N>][N] = {};
    for (std::int64_t k = begin; k < end; ++k) {
      const auto grad = next(k);
      combine<double, T, N>(sum, grad, [&](double sum, double g) { return sum + (1.0 - alpha) * g; });
    }
    store<T, N>(a.grad_background, row, place, whole, rounded<T, N>(sum));
  });
}

// One block per chunk of a sample, summed in fp64 in an order fixed by the block's size.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, 3) grad_alpha(BlendBackward a) {
  constexpr int deep = kDeep<T, N>;
  const std::int64_t chunks = blend_chunks(a.size);
  for (std::int64_t work = blockIdx.x; work < a.rows * chunks; work += gridDim.x) {
    const std::int64_t b = work / chunks, begin = work % chunks * kBlendChunk, end = begin + kBlendChunk < a.size ? begin + kBlendChunk : a.size;
    const std::int64_t source = partner(a, b, a.background_rows);
    double sum[deep][N] = {};
    const auto add = [&](const Place& place, auto whole) {
      const auto grad = load<T, N>(a.grad, b, place, whole);
      const auto x = load<T, N>(a.foreground, b, place, whole), y = load<T, N>(a.background, source, place, whole);
      double apart[deep][N];
      combine<double, T, N>(apart, x, [](double, double x) { return x; });
      combine<double, T, N>(apart, y, [](double x, double y) { return x - y; });
#pragma unroll
      for (int k = 0; k < deep; ++k)
#pragma unroll
        for (int i = 0; i < N; ++i) sum[k][i] += widen<double>(grad.deep[k].lane[i]) * apart[k][i];
    };
    for (Place place{b, begin + static_cast<int>(threadIdx.x) * N, end, kThreads * N}; place.column < end; place.column += deep * place.step) {
      if (place.column + (deep - 1) * place.step + N <= end)
        add(place, std::true_type{});
      else
        add(place, std::false_type{});
    }
    double own = 0;
#pragma unroll
    for (int k = 0; k < deep; ++k)
#pragma unroll
      for (int i = 0; i < N; ++i) own += sum[k][i];
    own = Group<kThreads>::sum(own);
    if (threadIdx.x == 0) a.grad_alpha.data[work] = own;
  }
}

// What a stable sort of the index gives, by counting: for few samples sooner done than sorted.
__global__ void __launch_bounds__(kThreads) list_users(const std::int64_t* index, std::int64_t rows, std::int64_t* start, std::int64_t background_rows,
                                                       std::int64_t* order) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x, row = i - rows;
  if (row > background_rows) return;
  const std::int64_t own = row < 0 ? index[i] : row;
  std::int64_t before = 0;
#pragma unroll 8
  for (std::int64_t b = 0; b < rows; ++b) before += index[b] < own || (index[b] == own && b < i && row < 0);
  if (row < 0)
    order[before] = i;
  else
    start[row] = before;
}

// Rows without gaps that meet their own background at one weight are one long row.
template <typename Call>
void flatten(Call& a, std::initializer_list<Rows*> maps) {
  if (a.index.present || a.alpha.each.present) return;
  for (const Rows* rows : maps)
    if (rows->present && rows->stride != a.size) return;
  for (Rows* rows : maps) rows->stride = 0;
  a.size *= a.rows, a.rows = 1;
}

// body(N) with the largest N of 1, 2 and 16 bytes' elements that every row of every map starts at a multiple of.
template <typename T, typename Body>
void with_lanes(std::initializer_list<Rows> maps, Body&& body) {
  std::uintptr_t bits = 0;
  for (const Rows& rows : maps)
    if (rows.present) bits |= reinterpret_cast<std::uintptr_t>(rows.data) | static_cast<std::uintptr_t>(rows.stride) * sizeof(T);
  if (bits % 16 == 0) return body(std::integral_constant<int, kLanes<T>>{});
  if (kLanes<T> > 2 && bits % (2 * sizeof(T)) == 0) return body(std::integral_constant<int, 2>{});
  body(std::integral_constant<int, 1>{});
}

}  // namespace

void blend_forward(const BlendForward& call, std::int64_t background_rows, int device, void* stream) {
  if (!call.rows || !call.size) return;
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  BlendForward a = call;
  flatten(a, {&a.foreground, &a.background, &a.out});
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    with_lanes<T>({a.foreground, a.background, a.out}, [&](auto n) {
      const Tiles tiles = Tiles::of<T, n>(a.rows, a.size);
      launch("blend_forward", forward<T, n>, grid(tiles.count, 1, queue), kThreads, queue, a, background_rows, tiles);
    });
  });
}

void blend_backward(const BlendBackward& call, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  BlendBackward a = call;
  flatten(a, {&a.grad, &a.grad_foreground, &a.grad_background});
  if (!a.index.present) a.background_rows = a.rows;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const auto maps = [&](Rows own, Rows other, std::int64_t rows) {
      if (!(own.present || other.present) || !rows || !a.size) return;
      BlendBackward part = a;
      part.grad_foreground = own, part.grad_background = other;
      with_lanes<T>({a.grad, own, other}, [&](auto n) {
        const Tiles tiles = Tiles::of<T, n>(rows, a.size);
        launch("blend_grad_maps", grad_maps<T, n>, grid(tiles.count, 1, queue), kThreads, queue, part, tiles);
      });
    };
    // Few background rows are not enough work for the samples' gradients too.
    if (a.grad_background.present && a.background_rows >= a.rows) {
      maps(a.grad_foreground, a.grad_background, a.background_rows);
    } else {
      maps(a.grad_foreground, {nullptr, 0, false}, a.rows);
      maps({nullptr, 0, false}, a.grad_background, a.background_rows);
    }
    if (a.grad_alpha.present && a.rows && a.size)
      with_lanes<T>({a.grad, a.foreground, a.background}, [&](auto n) {
        launch("blend_grad_alpha", grad_alpha<T, n>, grid(a.rows * blend_chunks(a.size), 1, queue), kThreads, queue, a);
      });
  });
}

void blend_users(const std::int64_t* index, std::int64_t rows, std::int64_t* start, std::int64_t background_rows, std::int64_t* order, int device,
                 void* stream) {
  const DeviceGuard guard(device);
  launch("blend_users", list_users, (rows + background_rows + kThreads) / kThreads, kThreads, {device, stream}, index, rows, start, background_rows,
         order);
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
