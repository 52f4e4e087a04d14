// aggregate on CUDA: the server optimisers, and what is summed per vector along the way: norms, cosines, distances.
#include "aggregate_uploads.cuh"

namespace fedkern::cuda {
namespace {

struct Step {
  Table<> x;
  Weights<> weight;
  Total total;
  ServerStep call;
  bool packed;  // the global model, the result and the states start at a multiple of 16 bytes
};

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

// A tile is read twice, for the mean delta and for the products with it; the second time from the caches.
// Leaves [block][M][squares of the deltas, products with the mean], then [block] the squares of the mean.
__global__ void __launch_bounds__(kBlock, 2) step_kernel(const __grid_constant__ Step a) {
  __shared__ double tallies[kTable * 2 * kWarps];
  const int count = a.x.count;
  Tallies<2> tally(tallies, count);
  const double total = a.total();
  double square = 0;
  for (std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kTileElements; tile < a.x.size; tile += gridDim.x * kTileElements) {
    const std::int64_t at = tile + static_cast<std::int64_t>(threadIdx.x) * kPack;
    double old[kPack], mean[kPack] = {};
    load_run<double>(a.call.global, a.x.dtype, at, 1, a.x.size, a.packed, old);
    for (int m = 0; m < count; ++m) {
      const double weight = a.weight[m];
      double x[kPack], sum = 0;
      load_run<double>(a.x[m], a.x.dtype, at, a.x.stride, a.x.size, a.x.packed, x);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const double delta = difference(x[i], old[i]);
        sum += delta * delta;
        mean[i] = weight == 0 ? mean[i] : mean[i] + weight * delta;
      }
      tally.add(m, 0, sum);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      mean[i] = at + i < a.x.size ? mean[i] / total : 0.0;
      square += mean[i] * mean[i];
    }
    for (int m = 0; m < count; ++m) {
      double x[kPack], sum = 0;
      load_run<double>(a.x[m], a.x.dtype, at, a.x.stride, a.x.size, a.x.packed, x);
#pragma unroll
      for (int i = 0; i < kPack; ++i) sum += difference(x[i], old[i]) * mean[i];
      tally.add(m, 1, sum);
    }
    double one[kPack] = {}, two[kPack] = {};
    if (a.call.first.present) load_run<double>(a.call.first.data, a.call.first_dtype, at, 1, a.x.size, a.packed, one);
    if (a.call.second.present) load_run<double>(a.call.second.data, a.call.second_dtype, at, 1, a.x.size, a.packed, two);
#pragma unroll
    for (int i = 0; i < kPack; ++i) old[i] += update(a.call, mean[i], one[i], two[i]);
    if (a.call.first.present) store_run<double>(a.call.first.data, a.call.first_dtype, at, a.x.size, a.packed, one);
    if (a.call.second.present) store_run<double>(a.call.second.data, a.call.second_dtype, at, a.x.size, a.packed, two);
    store_run<double>(a.call.out, a.call.out_dtype, at, a.x.size, a.packed, old);
  }
  tally.leave(a.call.workspace + static_cast<std::int64_t>(blockIdx.x) * 2 * count);
  square = Group<kBlock>::sum(square);
  if (threadIdx.x == 0) a.call.workspace[static_cast<std::int64_t>(gridDim.x) * 2 * count + blockIdx.x] = square;
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

__global__ void __launch_bounds__(kBlock, 2) distances_to_kernel(const __grid_constant__ Table<> x, Optional<const double> point, double* partial) {
  __shared__ double tallies[kTable * kWarps];
  Tallies<1> tally(tallies, x.count);
  for (std::int64_t tile = static_cast<std::int64_t>(blockIdx.x) * kTileElements; tile < x.size; tile += gridDim.x * kTileElements) {
    const std::int64_t at = tile + static_cast<std::int64_t>(threadIdx.x) * kPack;
    double from[kPack] = {};
    if (point.present) load_run<double>(point.data, DType::f64, at, 1, x.size, false, from);
    for (int m = 0; m < x.count; ++m) {
      double value[kPack], sum = 0;
      load_run<double>(x[m], x.dtype, at, x.stride, x.size, x.packed, value);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const double apart = difference(value[i], from[i]);
        sum += apart * apart;
      }
      tally.add(m, 0, sum);
    }
  }
  tally.leave(partial + static_cast<std::int64_t>(blockIdx.x) * x.count);
}

// out[i] = sum over blocks of partial[block][i]; a block per i.
__global__ void __launch_bounds__(kBlock, 2) sum_blocks(const double* partial, std::int64_t blocks, double* out) {
  double sum = 0;
  for (std::int64_t block = threadIdx.x; block < blocks; block += kBlock) sum += partial[block * gridDim.x + blockIdx.x];
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// Distances between all vectors: a tile of coordinates in shared memory, every thread with some of the pairs, or, where these
// are fewer than threads, with a slice of the tile for one pair.
constexpr int kTile = 32;
constexpr int kMostPairs = kMostSorted * (kMostSorted - 1) / 2;
constexpr int kPairsPerThread = (kMostPairs + kBlock - 1) / kBlock;

__global__ void __launch_bounds__(kBlock, 2) distances_kernel(const __grid_constant__ Table<kMostSorted> x, int slices, double* partial) {
  __shared__ double tile[kMostSorted][kTile + 1];
  __shared__ unsigned char left[kMostPairs], right[kMostPairs];
  const int count = x.count, pairs = count * (count - 1) / 2, items = pairs * slices, thread = static_cast<int>(threadIdx.x);
  for (int m = thread; m < count; m += kBlock)
    for (int k = 0; k < m; ++k) left[m * (m - 1) / 2 + k] = static_cast<unsigned char>(m), right[m * (m - 1) / 2 + k] = static_cast<unsigned char>(k);
  double sum[kPairsPerThread] = {};
  for (std::int64_t begin = static_cast<std::int64_t>(blockIdx.x) * kTile; begin < x.size; begin += static_cast<std::int64_t>(gridDim.x) * kTile) {
    __syncthreads();
    for (int i = thread; i < count * kTile; i += kBlock) {
      const std::int64_t at = begin + i % kTile;
      tile[i / kTile][i % kTile] = at < x.size ? load_value<double>(x[i / kTile], x.dtype, at * x.stride) : 0.0;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPairsPerThread; ++k) {
      const int item = thread + k * kBlock;
      if (item >= items) break;
      const double *const a = tile[left[item / slices]], *const b = tile[right[item / slices]];
      for (int c = item % slices; c < kTile; c += slices) {
        const double apart = difference(a[c], b[c]);
        sum[k] += apart * apart;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kPairsPerThread; ++k) {
    const int item = thread + k * kBlock;
    if (item < items) partial[static_cast<std::int64_t>(blockIdx.x) * items + item] = sum[k];
  }
}

// A block per element of the matrix.
__global__ void __launch_bounds__(kBlock, 2) finish_distances(const double* partial, std::int64_t blocks, int count, int slices, bool root, double* out) {
  const int row = static_cast<int>(blockIdx.x) / count, column = static_cast<int>(blockIdx.x) % count;
  const int m = row > column ? row : column, k = row > column ? column : row, items = count * (count - 1) / 2 * slices;
  double sum = 0;
  if (m != k) {
    const int pair = m * (m - 1) / 2 + k;
    for (std::int64_t i = threadIdx.x; i < blocks * slices; i += kBlock) sum += partial[i / slices * items + pair * slices + i % slices];
  }
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = root ? sqrt(sum) : sum;
}

// Blocks that a workspace of `each` numbers per block allows.
std::int64_t blocks_for(std::int64_t units, std::int64_t each, const Queue& queue) {
  return std::max<std::int64_t>(1, std::min(grid(units, 1, queue, 4), kAggregateWorkspace / each));
}

}  // namespace

void server_step(const Uploads& x, const UploadWeights& weights, const ServerStep& call, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const Step a{table(x, 0, x.count), weights_of(weights, 0, x.count), total_of(x, weights), call,
               aligned16(call.global) && aligned16(call.out) && aligned16(call.first.data) && aligned16(call.second.data)};
  const std::int64_t tiles = (x.size + kTileElements - 1) / kTileElements, blocks = blocks_for(tiles, 2 * x.count + 1, queue);
  launch("server_step", step_kernel, blocks, kBlock, queue, a);
  launch("server_step_norms", finish_step, x.count, kBlock, queue, call, blocks, static_cast<int>(x.count));
}

void squared_distances_to(const Uploads& x, const Optional<const double>& point, double* out, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const std::int64_t tiles = (x.size + kTileElements - 1) / kTileElements;
  for (std::int64_t begin = 0; begin < x.count; begin += kTable) {
    const std::int64_t count = std::min<std::int64_t>(x.count - begin, kTable), blocks = blocks_for(tiles, count, queue);
    launch("squared_distances_to", distances_to_kernel, blocks, kBlock, queue, table(x, begin, count), point, workspace);
    launch("squared_distances_to_sum", sum_blocks, count, kBlock, queue, workspace, blocks, out + begin);
  }
}

void squared_distances(const Uploads& x, bool root, double* out, double* workspace, const Place& place) {
  const DeviceGuard guard(place.device);
  const Queue queue{place.device, place.stream};
  const int count = static_cast<int>(x.count), pairs = count * (count - 1) / 2;
  const int slices = std::max(1, std::min(kTile, kBlock / std::max(1, pairs)));
  const std::int64_t tiles = (x.size + kTile - 1) / kTile, blocks = blocks_for(tiles, std::max(1, pairs * slices), queue);
  launch("squared_distances", distances_kernel, blocks, kBlock, queue, table<kMostSorted>(x, 0, count), slices, workspace);
  launch("squared_distances_sum", finish_distances, static_cast<std::int64_t>(count) * count, kBlock, queue, workspace, blocks, count, slices, root, out);
}

}  // namespace fedkern::cuda
