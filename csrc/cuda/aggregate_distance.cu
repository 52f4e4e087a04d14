// aggregate on CUDA: squared distances between vectors, to a point and from the origin, and the shares that Krum and geometric
// medians give to vectors by them.
#include <type_traits>

#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

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

// Distances between all vectors. A thread has a sum in registers for each pair of its vectors: of all of them where they are
// few, else of one group with itself or with another one. A block takes a part of the coordinates.
constexpr double kMostApart = 1e8;  // _MOST_APART of fedkern/ops/_aggregate/distances.py
constexpr int kFew = 10, kGroup = 5;
constexpr int kPairThreads = 128;  // of a block: three blocks of a multiprocessor have 168 registers a thread

constexpr int cells(bool few) { return few ? kFew * (kFew - 1) / 2 : kGroup * kGroup; }
using Vectors = Table<(kMostSorted + kGroup - 1) / kGroup * kGroup>;

// What a geometric median knows of the vectors before it iterates.
struct MedianStart {
  double centre;  // whose differences to it the vectors are to be drawn in by; -1: they are taken as they are
  double scale;
  double middle;
  double factors[kTable], shares[kTable];
};

// Where the sum of vectors m > k lies among those of a chunk of the coordinates.
__device__ __forceinline__ int place_of(int m, int k, bool few) {
  if (few) return m * (m - 1) / 2 + k;
  const int row = m / kGroup, column = k / kGroup, unit = row * (row + 1) / 2 + column, one = m % kGroup, other = k % kGroup;
  return unit * cells(false) + (row == column ? one * (one - 1) / 2 + other : one * kGroup + other);
}

// The packs of N coordinates of one thread.
struct Walk {
  int first, step;
};

// Sums of Rows vectors from `row` on with each other, or with as many as Columns says from `column` on.
template <typename T, int N, int Rows, int Columns>
struct Pairs {
  static constexpr int vectors = Rows + Columns, cells = Columns ? Rows * Columns : Rows * (Rows - 1) / 2;
  double sum[cells] = {};

  template <bool Careful>
  __device__ __forceinline__ void add(const double (&x)[vectors]) {
#pragma unroll
    for (int k = 0; k < Rows; ++k)
#pragma unroll
      for (int l = 0; l < (Columns ? Columns : k); ++l) {
        const double one = x[k], other = x[Columns ? Rows + l : l], away = Careful ? difference(one, other) : one - other;
        double& to = sum[Columns ? k * Columns + l : k * (k - 1) / 2 + l];
        to = fma(away, away, to);
      }
  }

  // Two equal infinities at a place, which are not apart, make a sum NaN: only a thread that finds one walks again, and looks.
  __device__ __forceinline__ void walk(const Vectors& x, int row, int column, const MedianStart* drawn, const Walk& own) {
    const auto index = [&](int k) { return k < Rows ? row + k : column + k - Rows; };
    double value[vectors];
    std::int64_t pack = own.first;
    if (!drawn) {
      for (const std::int64_t packs = x.size / N; pack < packs; pack += own.step) {
        Pack<T, N> held[vectors];
#pragma unroll
        for (int k = 0; k < vectors; ++k) held[k] = load_pack<T, N>(x[index(k)], N > 1 ? pack * N : pack * x.stride);
#pragma unroll
        for (int i = 0; i < N; ++i) {
#pragma unroll
          for (int k = 0; k < vectors; ++k) value[k] = widen<double>(held[k].lane[i]);
          add<false>(value);
        }
      }
      double all = 0;
#pragma unroll
      for (int i = 0; i < cells; ++i) all += sum[i];
      if (all != all) {
        pack = own.first;
#pragma unroll
        for (int i = 0; i < cells; ++i) sum[i] = 0;
      }
    }
    // What is left: nothing, or less than a pack; everything once more; vectors that are drawn in.
    for (; pack * N < x.size; pack += own.step)
      for (std::int64_t at = pack * N; at < std::min(pack * N + N, x.size); ++at) {
#pragma unroll
        for (int k = 0; k < vectors; ++k) value[k] = widen<double>(load_pack<T, 1>(x[index(k)], at * x.stride).lane[0]);
        if (drawn) {
          const double middle = widen<double>(load_pack<T, 1>(x[static_cast<int>(drawn->centre)], at * x.stride).lane[0]);
#pragma unroll
          for (int k = 0; k < vectors; ++k) value[k] = difference(value[k], middle) * drawn->factors[std::min(index(k), x.count - 1)];
        }
        add<true>(value);
      }
  }

  __device__ __forceinline__ void leave(double* to) {
    Group<kPairThreads>::sum_all(sum);
    if (threadIdx.x) return;
#pragma unroll
    for (int i = 0; i < cells; ++i) to[i] = sum[i];
  }
};

template <typename T, int N, bool Few>
__global__ void __launch_bounds__(kPairThreads, 3) distances_kernel(const __grid_constant__ Vectors x, int units, const MedianStart* drawn,
                                                                              double* partial) {
  if (drawn && drawn->centre < 0) return;
  const int chunks = static_cast<int>(gridDim.x) / (Few ? 1 : units), chunk = static_cast<int>(blockIdx.x) / (Few ? 1 : units);
  const Walk own{chunk * kPairThreads + static_cast<int>(threadIdx.x), chunks * kPairThreads};
  partial += static_cast<std::int64_t>(blockIdx.x) * cells(Few);
  const auto sums = [&](auto pairs, int row, int column) {
    pairs.walk(x, row, column, drawn, own);
    pairs.leave(partial);
  };
  if constexpr (Few) {
    sums(Pairs<T, N, kFew, 0>{}, 0, 0);
  } else {
    int row = 0, column = static_cast<int>(blockIdx.x) % units;
    while (column > row) column -= ++row;
    row == column ? sums(Pairs<T, N, kGroup, 0>{}, row * kGroup, 0) : sums(Pairs<T, N, kGroup, kGroup>{}, row * kGroup, column * kGroup);
  }
}

// A warp per element of the matrix. `each`: the sums of a chunk.
__global__ void __launch_bounds__(kBlock) finish_distances(const double* partial, std::int64_t chunks, int count, std::int64_t each, bool root,
                                                           const MedianStart* drawn, double* out) {
  if (drawn && drawn->centre < 0) return;
  using Warp = Group<32>;
  const int element = static_cast<int>(blockIdx.x) * Warp::rows + Warp::row(), row = element / count, column = element % count;
  if (row >= count) return;
  const int m = row > column ? row : column, k = row > column ? column : row;
  double sum = 0;
  if (m != k)
    for (std::int64_t chunk = Warp::lane(); chunk < chunks; chunk += Warp::lanes) sum += partial[chunk * each + place_of(m, k, count <= kFew)];
  sum = Warp::sum(sum);
  if (Warp::lane() == 0) out[element] = root ? sqrt(sum) : sum;
}

// Krum's shares: 1 for the vectors that it keeps, 0 for the others, all NaN where a kept score is infinite: _shares() of
// fedkern/ops/_aggregate/distances.py. Distances that are not finite count as infinite.
__global__ void __launch_bounds__(kBlock) krum_kernel(const double* squared, int count, int byzantine, int keep, double* shares) {
  __shared__ double ascending[kMostSorted * kMostSorted], score[kMostSorted];
  const auto away = [&](int m, int k) {
    const double x = squared[m * count + k];
    return x == x ? x : INFINITY;
  };
  for (int pair = static_cast<int>(threadIdx.x); pair < count * count; pair += kBlock) {
    const int m = pair / count, k = pair % count;
    if (m == k) continue;
    const double own = away(m, k);
    int place = 0;
    for (int other = 0; other < count; ++other) place += other != m && (away(m, other) < own || (away(m, other) == own && other < k));
    ascending[m * count + place] = own;
  }
  __syncthreads();
  const int m = static_cast<int>(threadIdx.x);
  if (m < count) {
    double sum = 0;
    for (int place = 0; place < count - byzantine - 2; ++place) sum += ascending[m * count + place];
    score[m] = sum;
  }
  __syncthreads();
  if (m >= count) return;
  int place = 0, finite = 0;
  for (int k = 0; k < count; ++k) {
    place += score[k] < score[m] || (score[k] == score[m] && k < m);
    finite += score[k] < INFINITY;
  }
  shares[m] = finite < keep ? NAN : place < keep ? 1.0 : 0.0;
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
    for (int k = 0; k < count; ++k) {
      const bool number = away[k] == away[k], own = away[m] == away[m];
      place += away[k] < away[m] || (k < m ? !(away[m] < away[k]) && (number || !own) : !own && number);
    }
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

}  // namespace

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
  const int count = static_cast<int>(x.count), groups = (count + kGroup - 1) / kGroup;
  const bool few = count <= kFew;
  const int units = few ? 1 : groups * (groups + 1) / 2;
  const auto vectors = table<std::extent_v<decltype(Vectors::each)>>(x, 0, count);
  with_type(x.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr int N = kLanes<T> / 2;  // 8 bytes: registers are short
    // Few vectors: as many blocks as run at once. More: a block's work depends on its groups.
    const std::int64_t chunks = std::max<std::int64_t>(1, grid((x.size + N - 1) / N, kPairThreads, queue, few ? 3 : 6) / units);
    const auto pick = [&](auto packs) {
      constexpr int n = decltype(packs)::value;
      return few ? distances_kernel<T, n, true> : distances_kernel<T, n, false>;
    };
    const bool packed = vectors.aligned >= N * static_cast<int>(sizeof(T));
    launch("squared_distances", packed ? pick(std::integral_constant<int, N>{}) : pick(std::integral_constant<int, 1>{}), chunks * units, kPairThreads,
           queue, vectors, units, drawn, workspace);
    launch("squared_distances_sum", finish_distances, (count * count + kWarps - 1) / kWarps, kBlock, queue, workspace, chunks, count,
           static_cast<std::int64_t>(units) * cells(few), root, drawn, out);
  });
}

}  // namespace

void squared_distances(const Uploads& x, bool root, double* out, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  distances(x, root, nullptr, out, workspace, {place.device, place.stream});
}

void krum_shares(const Uploads& x, int byzantine, int keep, double* shares, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  double* const squared = workspace + kAggregateWorkspace - kMostSorted * kMostSorted;
  distances(x, false, nullptr, squared, workspace, queue);
  launch("krum", krum_kernel, 1, kBlock, queue, squared, static_cast<int>(x.count), byzantine, keep, shares);
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
