// contrast on CUDA. A tile is read once for its softmaxes, in square blocks: two exponentials for every similarity, one
// below its row's maximum there and one below its column's. A second launch joins the blocks, in order.
#include "fedkern/contrast_cuda.h"

#include "distill_math.cuh"
#include "group.cuh"
#include "launch.cuh"
#include "numeric.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kSide = kContrastBlock;
constexpr int kBands = kBlock / kSide;  // of rows: a thread holds a column's similarities in one of them
constexpr int kHeld = kSide / kBands;
// In shared memory rows lie so far apart that eight rows' threads, kBands to a row, meet different banks.
constexpr int kPitch = kSide + kBands;

struct Similarities {
  std::int64_t rows, count, stride, first, across;  // across: blocks side by side
  void* data;
  Optional<const void> temperature;
  double value;

  template <typename C>
  __device__ __forceinline__ C scale() const {
    return C(1) / (temperature.present ? *static_cast<const C*>(temperature.data) : static_cast<C>(value));
  }
};

// A row or column of -inf only adds nothing.
template <typename C>
__device__ __forceinline__ C base_of(C top) {
  return top == -infinity<C>() ? C(0) : top;
}

template <typename C>
__device__ __forceinline__ C larger(C a, C b) {
  return b > a ? b : a;
}

template <typename C>
__global__ void __launch_bounds__(kBlock) look_kernel(const Similarities tile, C* pieces, C* own) {
  __shared__ C held[kSide * kPitch];
  __shared__ C part[kBands][kSide];
  const C scale = tile.scale<C>();
  const std::int64_t down = blockIdx.x / tile.across, along = blockIdx.x % tile.across;
  const std::int64_t sums = (tile.count + kSide - 1) / kSide * 2 * tile.count;  // where they begin, behind the maxima
  const int thread = static_cast<int>(threadIdx.x), c = thread % kSide, band = thread / kSide;
  const std::int64_t column = along * kSide + c;
  C s[kHeld];
#pragma unroll
  for (int r = 0; r < kHeld; ++r) {
    const int i = band * kHeld + r;
    const std::int64_t row = down * kSide + i;
    const bool inside = row < tile.rows && column < tile.count;
    s[r] = inside ? static_cast<const C*>(tile.data)[row * tile.stride + column] : -infinity<C>();
    held[i * kPitch + c] = s[r];
    if (inside && tile.first + row == column) own[column] = s[r];
  }
  C top = s[0];
#pragma unroll
  for (int r = 1; r < kHeld; ++r) top = larger(top, s[r]);
  part[band][c] = top;
  __syncthreads();
#pragma unroll
  for (int b = 0; b < kBands; ++b) top = larger(top, part[b][c]);
  C sum = 0;
#pragma unroll
  for (int r = 0; r < kHeld; ++r) sum += exponential((s[r] - base_of(top)) * scale);
  __syncthreads();
  part[band][c] = sum;
  __syncthreads();
  if (band == 0 && column < tile.count) {
    sum = part[0][c];
#pragma unroll
    for (int b = 1; b < kBands; ++b) sum += part[b][c];
    const std::int64_t place = (tile.first / kSide + down) * 2 * tile.count + tile.count + column;
    pieces[place] = top, pieces[sums + place] = sum;
  }
  // The same for rows, kBands threads to each.
  const int i = thread / kBands, lane = thread % kBands;
  const std::int64_t row = down * kSide + i;
  top = -infinity<C>();
#pragma unroll
  for (int k = 0; k < kHeld; ++k) top = larger(top, held[i * kPitch + k * kBands + lane]);
  top = Group<kBands>::reduce(top, [](C a, C b) { return larger(a, b); });
  sum = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) sum += exponential((held[i * kPitch + k * kBands + lane] - base_of(top)) * scale);
  sum = Group<kBands>::sum(sum);
  if (lane == 0 && row < tile.rows) {
    const std::int64_t place = along * 2 * tile.count + tile.first + row;
    pieces[place] = top, pieces[sums + place] = sum;
  }
}

// One thread to a row or column.
template <typename C>
__global__ void __launch_bounds__(kBlock) join_kernel(const Similarities all, const C* pieces, const C* own, C* sums, double* losses) {
  const std::int64_t line = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x, lines = 2 * all.count;
  if (line >= lines) return;
  const C scale = all.scale<C>();
  const C* const totals = pieces + all.across * lines;
  C top = -infinity<C>(), total = 0;
  for (std::int64_t block = 0; block < all.across; ++block) {
    const C more = pieces[block * lines + line], most = larger(top, more), base = base_of(most);
    total = total * exponential((top - base) * scale) + totals[block * lines + line] * exponential((more - base) * scale);
    top = most;
  }
  C* const to = sums + line + (line < all.count ? 0 : all.count);
  to[0] = top, to[all.count] = total;
  const double loss = static_cast<double>(top - own[line % all.count]) * static_cast<double>(scale) + static_cast<double>(logarithm(total));
  losses[line] = loss < 0 ? 0 : loss;
}

__global__ void __launch_bounds__(kBlock) finish_kernel(const double* losses, std::int64_t count, DType dtype, void* loss) {
  double sum = 0;
  for (std::int64_t i = threadIdx.x; i < 2 * count; i += kBlock) sum += losses[i];
  sum = Group<kBlock>::sum(sum);
  if (threadIdx.x == 0) store_value(loss, dtype, 0, sum / static_cast<double>(count));
}

template <typename C>
__global__ void __launch_bounds__(kBlock) gradient_kernel(const Similarities tile, const C* sums) {
  const C scale = tile.scale<C>(), weight = scale / static_cast<C>(tile.count);
  const std::int64_t down = blockIdx.x / tile.across, along = blockIdx.x % tile.across;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t column = along * kSide + thread % kSide;
  if (column >= tile.count) return;
  const C below = base_of(sums[2 * tile.count + column]), share = C(1) / sums[3 * tile.count + column];
#pragma unroll 4
  for (int r = 0; r < kHeld; ++r) {
    const std::int64_t row = down * kSide + r * kBands + thread / kSide, line = tile.first + row;
    if (row >= tile.rows) return;
    C* const at = static_cast<C*>(tile.data) + row * tile.stride + column;
    const C by_row = exponential((*at - base_of(sums[line])) * scale) / sums[tile.count + line];
    const C by_column = exponential((*at - below) * scale) * share;
    *at = (by_row + by_column - (line == column ? C(2) : C(0))) * weight;
  }
}

std::int64_t blocks_of(std::int64_t n) { return (n + kSide - 1) / kSide; }

Similarities similarities(const ContrastTile& a) {
  return {a.rows, a.count, a.stride, a.first, blocks_of(a.count), a.data, a.temperature, a.value};
}

// body(a value of the computing type)
template <typename Body>
void with_computed(DType dtype, Body&& body) {
  dtype == DType::f64 ? body(double{}) : body(float{});
}

}  // namespace

void contrast_look(const ContrastTile& tile, void* pieces, void* own, int device, void* stream) {
  const DeviceGuard guard(device);
  const Similarities s = similarities(tile);
  if (!s.rows || !s.count) return;
  with_computed(tile.dtype, [&](auto type) {
    using C = decltype(type);
    launch("contrast_look", look_kernel<C>, blocks_of(s.rows) * s.across, kBlock, Queue{device, stream}, s, static_cast<C*>(pieces),
           static_cast<C*>(own));
  });
}

void contrast_join(const ContrastTile& tile, const void* pieces, const void* own, void* sums, double* losses, DType loss_dtype,
                   void* loss, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  const Similarities s = similarities(tile);
  if (!s.count) return;
  with_computed(tile.dtype, [&](auto type) {
    using C = decltype(type);
    launch("contrast_join", join_kernel<C>, (2 * s.count + kBlock - 1) / kBlock, kBlock, queue, s, static_cast<const C*>(pieces),
           static_cast<const C*>(own), static_cast<C*>(sums), losses);
  });
  launch("contrast_finish", finish_kernel, 1, kBlock, queue, losses, s.count, loss_dtype, loss);
}

void contrast_gradient(const ContrastTile& tile, const void* sums, int device, void* stream) {
  const DeviceGuard guard(device);
  const Similarities s = similarities(tile);
  if (!s.rows || !s.count) return;
  with_computed(tile.dtype, [&](auto type) {
    using C = decltype(type);
    launch("contrast_gradient", gradient_kernel<C>, blocks_of(s.rows) * s.across, kBlock, Queue{device, stream}, s, static_cast<const C*>(sums));
  });
}

}  // namespace fedkern::cuda
