// aggregate on CUDA: the server optimisers, and what is summed per vector along the way: norms, cosines, distances.
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Step {
  Table<> x;
  Weights<> weight;
  Total total;
  ServerStep call;
};

constexpr int kTogether = 4;  // vectors whose elements are on their way at once

// What is added to the global model; `one` and `two` are the optimiser's state.
__device__ __forceinline__ double update(const ServerStep& a, double mean, double& one, double& two) {
  if (a.rule == ServerRule::mean) return a.learning_rate * mean;
  if (a.rule == ServerRule::momentum) {
    one = a.beta1 * one + mean;
    return a.learning_rate * one;
  }
  one = a.beta1 * one + (1 - a.beta1) * mean;
  const double square = mean * mean;
  if (a.rule == ServerRule::adam)
    two = a.beta2 * two + (1 - a.beta2) * square;
  else if (a.rule == ServerRule::yogi)
    two -= (1 - a.beta2) * square * (two > square ? 1.0 : two < square ? -1.0 : two - square);
  else
    two += square;
  return a.learning_rate * one / (sqrt(two) + a.tau);
}

// x - from, with equal infinities at no distance; `wide` is `from`. Compared as they are: fp64 has fewer units.
template <typename C>
__device__ __forceinline__ double apart(C x, C from, double wide) {
  return x == from ? 0.0 : static_cast<double>(x) - wide;
}

template <bool Full, int N>
__device__ __forceinline__ void load_state(const Tile<N>& tile, const Optional<void>& state, DType dtype, double (&x)[kPack]) {
  if (!state.present) return;
  if (dtype == DType::f64) return tile.template load<double, Full>(state.data, 1, x);
  float narrow[kPack];
  tile.template load<float, Full>(state.data, 1, narrow);
#pragma unroll
  for (int i = 0; i < kPack; ++i) x[i] = narrow[i];
}

template <bool Full, int N>
__device__ __forceinline__ void store_any(const Tile<N>& tile, void* data, DType dtype, const double (&x)[kPack]) {
  switch (dtype) {
    case DType::bf16: return tile.template store<__nv_bfloat16, Full>(data, x);
    case DType::f16: return tile.template store<__half, Full>(data, x);
    case DType::f64: return tile.template store<double, Full>(data, x);
    default: return tile.template store<float, Full>(data, x);
  }
}

// A tile is read twice, for the mean delta and for the products with it; the second time from the caches.
template <typename T, int N, bool Full>
__device__ __forceinline__ void step_tile(const Step& a, const Tile<N>& tile, double total, Tallies<2>& tally, double& square) {
  using C = typename Computed<T>::type;
  T raw[kPack], x[kTogether][kPack];
  C before[kPack];
  double old[kPack], mean[kPack] = {}, sum[kTogether];
  tile.template load<T, Full>(a.call.global, 1, raw);
#pragma unroll
  for (int i = 0; i < kPack; ++i) old[i] = before[i] = widen<C>(raw[i]);
  const auto load = [&](int begin) {
#pragma unroll
    for (int k = 0; k < kTogether; ++k) tile.template load<T, Full>(a.x[std::min(begin + k, a.x.count - 1)], a.x.stride, x[k]);
  };
  for (int begin = 0; begin < a.x.count; begin += kTogether) {
    load(begin);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      const double weight = begin + k < a.x.count ? a.weight[begin + k] : 0.0;
      double delta[kPack];
      sum[k] = 0;
#pragma unroll
      for (int i = 0; i < kPack; ++i) delta[i] = apart(widen<C>(x[k][i]), before[i], old[i]), sum[k] += delta[i] * delta[i];
      if (weight != 0) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) mean[i] += weight * delta[i];
      }
    }
    tally.add(begin, 0, sum);
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    mean[i] = Full || tile.at(i / N) + i % N < tile.size ? mean[i] / total : 0.0;
    square += mean[i] * mean[i];
  }
  for (int begin = 0; begin < a.x.count; begin += kTogether) {
    load(begin);
#pragma unroll
    for (int k = 0; k < kTogether; ++k) {
      sum[k] = 0;
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum[k] += apart(widen<C>(x[k][i]), before[i], old[i]) * mean[i];
    }
    tally.add(begin, 1, sum);
  }
  double one[kPack] = {}, two[kPack] = {};
  load_state<Full>(tile, a.call.first, a.call.first_dtype, one);
  load_state<Full>(tile, a.call.second, a.call.second_dtype, two);
#pragma unroll
  for (int i = 0; i < kPack; ++i) old[i] += update(a.call, mean[i], one[i], two[i]);
  if (a.call.first.present) store_any<Full>(tile, a.call.first.data, a.call.first_dtype, one);
  if (a.call.second.present) store_any<Full>(tile, a.call.second.data, a.call.second_dtype, two);
  store_any<Full>(tile, a.call.out, a.call.out_dtype, old);
}

// Leaves [block][M][squares of the deltas, products with the mean], then [block] the squares of the mean.
template <typename T, int N>
__global__ void __launch_bounds__(kBlock, 2) step_kernel(const __grid_constant__ Step a) {
  __shared__ double tallies[kTable * 2 * kWarps];
  Tallies<2> tally(tallies, a.x.count);
  const double total = a.total();
  double square = 0;
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTileElements; begin < a.x.size; begin += gridDim.x * kTileElements) {
    const Tile<N> tile{begin, a.x.size};
    begin + kTileElements <= a.x.size ? step_tile<T, N, true>(a, tile, total, tally, square) : step_tile<T, N, false>(a, tile, total, tally, square);
  }
  tally.leave(a.call.workspace + static_cast<std::int64_t>(blockIdx.x) * 2 * a.x.count);
  square = Group<kBlock>::sum(square);
  if (threadIdx.x == 0) a.call.workspace[static_cast<std::int64_t>(gridDim.x) * 2 * a.x.count + blockIdx.x] = square;
}

// A block per vector.
__global__ void __launch_bounds__(kBlock, 2) finish_step(ServerStep a, std::int64_t blocks, int count) {
  double squares = 0, products = 0, square = 0;
  for (std::int64_t block = threadIdx.x; block < blocks; block += kBlock) {
    squares += a.workspace[(block * count + blockIdx.x) * 2];
    products += a.workspace[(block * count + blockIdx.x) * 2 + 1];
    square += a.workspace[blocks * 2 * count + block];
  }
  squares = Group<kBlock>::sum(squares), products = Group<kBlock>::sum(products), square = Group<kBlock>::sum(square);
  if (threadIdx.x) return;
  const double scale = sqrt(squares * square);
  a.norms[blockIdx.x] = sqrt(squares);
  a.cosines[blockIdx.x] = scale == 0 ? 0.0 : products / scale;
}

template <typename T, int N, int Together, bool Full>
__device__ __forceinline__ void distances_tile(const Table<>& x, const Optional<const double>& point, int begin, const Tile<N>& tile,
                                               double (&sum)[Together]) {
  T value[Together][kPack];
  double from[kPack];
#pragma unroll
  for (int k = 0; k < Together; ++k) tile.template load<T, Full>(x[std::min(begin + k, x.count - 1)], x.stride, value[k]);
  if (point.present) tile.template load<double, Full>(point.data, 1, from);
#pragma unroll
  for (int k = 0; k < Together; ++k)
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const double wide = widen<double>(value[k][i]), away = point.present ? difference(wide, from[i]) : wide;
      sum[k] += away * away;
    }
}

template <typename T, int N, int Together>
__global__ void __launch_bounds__(kBlock) distances_to_kernel(const __grid_constant__ Table<> x, Optional<const double> point, double* partial) {
  for (int first = 0; first < x.count; first += Together) {
    double sum[Together] = {};
    for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTileElements; begin < x.size; begin += gridDim.x * kTileElements) {
      const Tile<N> tile{begin, x.size};
      begin + kTileElements <= x.size ? distances_tile<T, N, Together, true>(x, point, first, tile, sum)
                                      : distances_tile<T, N, Together, false>(x, point, first, tile, sum);
    }
#pragma unroll
    for (int k = 0; k < Together; ++k) {
      const double all = Group<kBlock>::sum(sum[k]);
      if (threadIdx.x == 0 && first + k < x.count) partial[static_cast<std::int64_t>(blockIdx.x) * x.count + first + k] = all;
    }
  }
}

// out[i] = sum over blocks of partial[block][i]; a block per i.
__global__ void __launch_bounds__(kBlock, 2) sum_blocks(const double* partial, std::int64_t blocks, double* out) {
  double sum = 0;
  for (std::int64_t block = threadIdx.x; block < blocks; block += kBlock) sum += partial[block * gridDim.x + blockIdx.x];
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Distances between all vectors. A block takes a part of the coordinates and one pair of groups of vectors, or one group with
// itself; a thread has a sum for each pair of their vectors in registers.
constexpr double kMostApart = 1e8;  // _MOST_APART of fedkern/ops/_aggregate/distances.py
constexpr int kGroup = 5, kCells = kGroup * kGroup;

// What a geometric median knows of the vectors before it iterates.
struct MedianStart {
  double centre;  // whose differences to it the vectors are to be drawn in by; -1: they are taken as they are
  double scale;
  double middle;
  double factors[kTable], shares[kTable];
};

template <typename T, int N>
__device__ __forceinline__ void distances_at(const Table<kMostSorted>& x, int row, int column, std::int64_t at, const MedianStart* drawn,
                                             double (&sum)[kGroup][kGroup]) {
  using C = typename Computed<T>::type;
  Pack<T, N> one[kGroup], other[kGroup], centre;
  const std::int64_t from = N > 1 ? at : at * x.stride;
#pragma unroll
  for (int k = 0; k < kGroup; ++k) {
    one[k] = load_pack<T, N>(x[std::min(row + k, x.count - 1)], from);
    other[k] = load_pack<T, N>(x[std::min(column + k, x.count - 1)], from);
  }
  if (drawn) centre = load_pack<T, N>(x[static_cast<int>(drawn->centre)], from);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    double a[kGroup], b[kGroup];
    C odd = 0;  // NaN where one of them is not finite
#pragma unroll
    for (int k = 0; k < kGroup; ++k) {
      const C p = widen<C>(one[k].lane[i]), q = widen<C>(other[k].lane[i]);
      odd += p - p + (q - q);
      a[k] = p, b[k] = q;
    }
    if (drawn || odd != 0) {
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        if (drawn) {
          const double middle = widen<double>(centre.lane[i]);
          a[k] = difference(a[k], middle) * drawn->factors[std::min(row + k, x.count - 1)];
          b[k] = difference(b[k], middle) * drawn->factors[std::min(column + k, x.count - 1)];
        }
      }
#pragma unroll
      for (int k = 0; k < kGroup; ++k)
#pragma unroll
        for (int l = 0; l < kGroup; ++l) {
          const double away = difference(a[k], b[l]);
          sum[k][l] += away * away;
        }
      continue;
    }
#pragma unroll
    for (int k = 0; k < kGroup; ++k)
#pragma unroll
      for (int l = 0; l < kGroup; ++l)
        if (l < k || row != column) {
          const double away = a[k] - b[l];
          sum[k][l] += away * away;
        }
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kBlock, 2) distances_kernel(const __grid_constant__ Table<kMostSorted> x, int units, const MedianStart* drawn,
                                                           double* partial) {
  if (drawn && drawn->centre < 0) return;
  int row = 0, column = static_cast<int>(blockIdx.x) % units;
  while (column > row) column -= ++row;
  row *= kGroup, column *= kGroup;
  double sum[kGroup][kGroup] = {};
  const std::int64_t packs = x.size / N, chunk = blockIdx.x / units, step = static_cast<std::int64_t>(gridDim.x) / units * kBlock;
  for (std::int64_t pack = chunk * kBlock + threadIdx.x; pack < packs; pack += step) distances_at<T, N>(x, row, column, pack * N, drawn, sum);
  if (N > 1 && chunk == 0 && threadIdx.x < x.size % N) distances_at<T, 1>(x, row, column, packs * N + threadIdx.x, drawn, sum);
#pragma unroll
  for (int k = 0; k < kGroup; ++k)
#pragma unroll
    for (int l = 0; l < kGroup; ++l) {
      const double all = Group<kBlock>::sum(sum[k][l]);
      if (threadIdx.x == 0) partial[static_cast<std::int64_t>(blockIdx.x) * kCells + k * kGroup + l] = all;
    }
}

// A block per element of the matrix.
__global__ void __launch_bounds__(kBlock) finish_distances(const double* partial, std::int64_t chunks, int count, int units, bool root,
                                                           const MedianStart* drawn, double* out) {
  if (drawn && drawn->centre < 0) return;
  const int row = static_cast<int>(blockIdx.x) / count, column = static_cast<int>(blockIdx.x) % count;
  const int m = row > column ? row : column, k = row > column ? column : row, group = m / kGroup;
  const int unit = group * (group + 1) / 2 + k / kGroup, cell = m % kGroup * kGroup + k % kGroup;
  double sum = 0;
  if (m != k)
    for (std::int64_t chunk = threadIdx.x; chunk < chunks; chunk += kBlock) sum += partial[(chunk * units + unit) * kCells + cell];
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = root ? sqrt(sum) : sum;
}

// The rest of a geometric median is one block's: a thread has a vector, and what it does is in
// fedkern/ops/_aggregate/distances.py and robust_reference.py.
static_assert(kTable <= kBlock);

// Where it starts: start() there. NaN and infinities among the distances end up as NaN in the shares.
__global__ void __launch_bounds__(kBlock) median_start(const double* squared, const double* weights, int count, double smoothing, MedianStart* start) {
  __shared__ double sums[kTable], away[kTable], weight[kTable], scale;
  __shared__ int order[kTable], middle;
  const int m = static_cast<int>(threadIdx.x);
  if (m < count) weight[m] = weights[m];
  __syncthreads();
  const bool used = m < count && weight[m] > 0;
  if (m < count) {
    double sum = used ? 0.0 : INFINITY;
    for (int k = 0; k < count; ++k) sum += weight[k] > 0 ? sqrt(squared[m * count + k]) * weight[k] : 0.0;
    sums[m] = used ? sum : INFINITY;
  }
  __syncthreads();
  if (m == 0) {
    middle = 0;
    for (int k = 1; k < count; ++k)
      if (sums[k] < sums[middle] || !(weight[middle] > 0)) middle = k;
  }
  __syncthreads();
  if (m < count) away[m] = used ? sqrt(squared[middle * count + m]) : INFINITY;
  __syncthreads();
  if (m < count) {  // its place in the order, NaN last
    int place = 0;
    for (int k = 0; k < count; ++k) place += away[k] < away[m] || (k < m ? !(away[m] < away[k]) && (away[k] == away[k] || away[m] != away[m]) : away[m] != away[m] && away[k] == away[k]);
    order[place] = m;
  }
  __syncthreads();
  if (m == 0) {
    double total = 0, below = 0;
    for (int k = 0; k < count; ++k) total += weight[order[k]] > 0 ? weight[order[k]] : 0.0;
    int half = 0;
    for (; half < count - 1; ++half) {
      below += weight[order[half]];
      if (!(2 * below <= total)) break;
    }
    scale = away[order[half]] < smoothing ? smoothing : away[order[half]];
  }
  __syncthreads();
  const double most = Group<kBlock>::maximum(used ? away[m] : 0.0);
  const bool far = most > 1e4 * scale && most > 1e10 * smoothing;
  double pull = 0;
  if (used) pull = (far ? weight[m] / (away[m] > scale ? away[m] : scale) : weight[m]) + (away[m] - away[m]);
  if (m < count && weight[m] != weight[m]) pull = weight[m];
  const double total = Group<kBlock>::sum(pull);
  const bool drawn = most > kMostApart * scale;
  if (m < count) start->shares[m] = pull / total, start->factors[m] = drawn && used && scale < away[m] ? scale / away[m] : 1.0;
  if (m == 0) start->centre = drawn ? middle : -1, start->middle = middle, start->scale = scale;
}

// The iterations. shares[m] are the last ones.
__global__ void __launch_bounds__(kBlock) median_shares(const double* squared, const double* weights, int count, std::int64_t iterations, double tolerance,
                                                        double smoothing, const MedianStart* start, double* shares) {
  __shared__ double held[kTable], norm[kTable], inverse[kTable];
  const int m = static_cast<int>(threadIdx.x), middle = static_cast<int>(start->middle);
  const double weight = m < count ? weights[m] : 0.0, least = tolerance * start->scale;
  const bool used = weight > 0;
  double share = m < count ? start->shares[m] : 0.0;
  if (m < count) norm[m] = used ? squared[middle * count + m] : 0.0, inverse[m] = used ? 1 / start->factors[m] : 0.0;
  __syncthreads();
  // The products of the differences to the middle with those of all vectors, times `x` of these, summed.
  const auto product = [&](int k) { return inverse[k] == 0 ? 0.0 : (norm[m] + norm[k] - squared[k * count + m]) / 2 * inverse[m] * inverse[k]; };
  const auto times = [&](double x) {
    __syncthreads();
    if (m < count) held[m] = x;
    __syncthreads();
    double sum = 0;
    if (used)
      for (int k = 0; k < count; ++k) sum += product(k) * held[k];
    return sum;
  };
  for (std::int64_t iteration = 0; iteration < iterations; ++iteration) {
    const double sum = times(share), square = (used ? product(m) : 0.0) - 2 * sum + Group<kBlock>::sum(share * sum);
    const double away = sqrt(square < 0 ? 0.0 : square);
    const double pull = used ? weight / (away < smoothing ? smoothing : away) : weight != weight ? weight : 0.0;
    const double following = pull / Group<kBlock>::sum(pull), change = following - share;
    const double step = Group<kBlock>::sum(change * times(change));
    share = following;
    if (!(step > least * least)) break;  // NaN too
  }
  if (m < count) shares[m] = share;
}

// Blocks that a workspace of `each` numbers per block allows.
std::int64_t blocks_for(std::int64_t units, std::int64_t each, const Queue& queue) {
  return std::max<std::int64_t>(1, std::min(grid(units, 1, queue, 8), kAggregateWorkspace / each));
}

}  // namespace

void server_step(const Uploads& x, const UploadWeights& weights, const ServerStep& call, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const Step a{table(x, 0, x.count), weights_of(weights, 0, x.count), total_of(x, weights), call};
  const bool packed = a.x.aligned == 16 && aligned16(call.global) && aligned16(call.out) && aligned16(call.first.data) && aligned16(call.second.data);
  const std::int64_t tiles = (x.size + kTileElements - 1) / kTileElements, blocks = blocks_for(tiles, 2 * x.count + 1, queue);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    launch("server_step", packed ? step_kernel<T, kLanes<T>> : step_kernel<T, 1>, blocks, kBlock, queue, a);
  });
  launch("server_step_norms", finish_step, x.count, kBlock, queue, call, blocks, static_cast<int>(x.count));
}

void squared_distances_to(const Uploads& x, const Optional<const double>& point, double* out, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const std::int64_t tiles = (x.size + kTileElements - 1) / kTileElements;
  for (std::int64_t begin = 0; begin < x.count; begin += kTable) {
    const std::int64_t count = std::min<std::int64_t>(x.count - begin, kTable), blocks = blocks_for(tiles, count, queue);
    const auto part = table(x, begin, count);
    const bool packed = part.aligned == 16 && aligned16(point.data);
    with_type(x.dtype, [&](auto type) {
      using T = decltype(type);
      const auto kernel = count == 1 ? (packed ? distances_to_kernel<T, kLanes<T>, 1> : distances_to_kernel<T, 1, 1>)
                                     : (packed ? distances_to_kernel<T, kLanes<T>, kTogether> : distances_to_kernel<T, 1, kTogether>);
      launch("squared_distances_to", kernel, blocks, kBlock, queue, part, point, workspace);
    });
    launch("squared_distances_to_sum", sum_blocks, count, kBlock, queue, workspace, blocks, out + begin);
  }
}

namespace {

void distances(const Uploads& x, bool root, const MedianStart* drawn, double* out, double* workspace, const Queue& queue) {
  const int count = static_cast<int>(x.count), groups = (count + kGroup - 1) / kGroup, units = groups * (groups + 1) / 2;
  const auto vectors = table<kMostSorted>(x, 0, count);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kLanes<T> / 2;  // 8 bytes: registers are short
    const std::int64_t chunks = std::max<std::int64_t>(1, grid(x.size / N, kBlock, queue, 4) / units), blocks = chunks * units;
    launch("squared_distances", vectors.aligned >= 8 ? distances_kernel<T, N> : distances_kernel<T, 1>, blocks, kBlock, queue, vectors, units, drawn,
           workspace);
    launch("squared_distances_sum", finish_distances, static_cast<std::int64_t>(count) * count, kBlock, queue, workspace, chunks, count, units, root,
           drawn, out);
  });
}

}  // namespace

void squared_distances(const Uploads& x, bool root, double* out, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  distances(x, root, nullptr, out, workspace, {place.device, place.stream});
}

void geometric_shares(const Uploads& x, const double* weights, std::int64_t iterations, double tolerance, double smoothing, double* shares,
                      double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const int count = static_cast<int>(x.count);
  auto* const start = reinterpret_cast<MedianStart*>(workspace + kAggregateWorkspace - sizeof(MedianStart) / sizeof(double));
  double* const squared = reinterpret_cast<double*>(start) - kMostSorted * kMostSorted;
  distances(x, false, nullptr, squared, workspace, queue);
  launch("geometric_median_start", median_start, 1, kBlock, queue, squared, weights, count, smoothing, start);
  distances(x, false, start, squared, workspace, queue);  // again, of what is drawn in, if it has to be
  launch("geometric_median", median_shares, 1, kBlock, queue, squared, weights, count, iterations, tolerance, smoothing, start, shares);
}

}  // namespace fedkern::cuda
