// js_div and consensus of few numbers per row. A block takes a row: the logits are read once into shared memory, the teachers
// are spread over groups of threads, the classes of their mixture over threads. Where a row fits a thread's registers and
// rows lie side by side, a thread takes a row.
//
// Rows that nearly agree keep their digits in fp32: log(mixture / a) = log1p(sum w (e^v - 1)) with a the first teacher that
// counts and v = log p - log a, from differences of logits.
#include "distill_tile.cuh"

#include <algorithm>

#include "distill_mixture.cuh"
#include "distill_teachers.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kTileTeachers = 64, kTileClasses = 1024;
constexpr int kLargeTile = 2048, kSmallTile = 512;  // numbers of a row
constexpr int kHeldTeachers = 8, kHeldClasses = 4;  // of a row in registers
constexpr int kTileThreads = kBlock + 32;
constexpr std::int64_t kMostBlocks = kEnsembleTotals / 2;

__device__ __forceinline__ float log_of(float m) { return logarithm(m > 1e-37f || m != m ? m : 1e-37f); }

// A teacher: p = e^(x - maximum) inverse.
struct Member {
  float share, maximum, inverse, log_sum;

  __device__ __forceinline__ void set(float highest, double sum) {
    maximum = highest, inverse = 1 / static_cast<float>(sum), log_sum = logarithm(static_cast<float>(sum));
  }
  __device__ __forceinline__ float log_p(float x) const { return (x - maximum) - log_sum; }
  // log p - log a, where `first` has the logit a.
  __device__ __forceinline__ float over(const Member& first, float x, float a) const {
    return (x - a) - (maximum - first.maximum) - (log_sum - first.log_sum);
  }
};

// A class of the mixture.
struct Mixed {
  float m, log_m, anchor;  // log_m: over the anchor's probability where the anchor, a logit, is not NaN
};
class Mixing {
 public:
  __device__ Mixing(const Member& first, float anchor, bool anchored) : first_(first), anchor_(anchor), near_(anchored) {}

  __device__ __forceinline__ void add(const Member& teacher, float x, float p) {
    if (teacher.share == 0) return;  // it may hold anything
    m_ = fmaf(teacher.share, p, m_);
    const float d = teacher.over(first_, x, anchor_);
    near_ = near_ && fabsf(d) < small_exponent<float>();
    rest_ = fmaf(teacher.share, fmaf(d * d, exp_remainder(d), d), rest_);
  }
  __device__ __forceinline__ Mixed mixed() const {
    return {m_, near_ ? log1pf(rest_) : log_of(m_), near_ ? anchor_ : NAN};
  }

 private:
  const Member& first_;
  const float anchor_;
  float m_ = 0, rest_ = 0;
  bool near_;
};

// What a class adds to its teacher's sums, and its gradient once those are known.
//   js         sum p (e^u - 1 - u) with u = log m - log p, and sum (m - p), which is 0 but for what u is rounded by;
//              -p (u + KL)
//   consensus  entropy and cross entropy; p (g (-log m - cross entropy) + h (-log p - entropy))
struct Loss {
  bool js;
  float g, h;

  __device__ __forceinline__ float log_of(const Member& teacher, const Member& first, const Mixed& c, float x) const {
    if (!js) return teacher.log_p(x);
    return c.log_m - (c.anchor == c.anchor ? teacher.over(first, x, c.anchor) : teacher.log_p(x));
  }
  // `log`: from log_of.
  __device__ __forceinline__ void add(double (&sums)[2], const Mixed& c, float log, float p) const {
    const MixtureTerm<float> term(p, c.m, log);
    sums[0] += static_cast<double>(js ? term.value : p > 0 ? -p * log : p);
    sums[1] += static_cast<double>(js ? term.difference : p > 0 ? -p * c.log_m : p);
  }
  // The derivative toward the teacher's share, and what its classes have in common.
  __device__ __forceinline__ double dot(const double (&sums)[2]) const {
    return js ? settled(sums[0], sums[1]) : static_cast<double>(g) * sums[1] + static_cast<double>(h) * sums[0];
  }
  __device__ __forceinline__ float gradient(const Member& teacher, const Mixed& c, float log, float p, float dot) const {
    if (p == 0 || teacher.share == 0) return 0;
    return teacher.share * (js ? -p * (log + dot) * g : p * (-g * c.log_m - h * log - dot));
  }
  // From the means over teachers of their sums; js: of their divergences, the first.
  __device__ __forceinline__ void results(double first, double second, int count, double (&loss)[2]) const {
    const double most = js ? log(static_cast<double>(count)) : 0.0;
    loss[0] = js ? (first > most ? most : first) : second < 0 ? 0.0 : second;
    loss[1] = first;
  }
};

// A row's results; adds them to the totals.
__device__ __forceinline__ void leave(const EnsembleCall& a, const EnsemblePlace& at, const double (&loss)[2], double (&total)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += loss[r];
    if (a.row_loss[r].present) store_value<double>(a.row_loss[r].data, a.row_loss[r].dtype, at.row_loss[r], loss[r]);
  }
}

template <int Numbers>
struct Tile {
  static constexpr int classes = Numbers < kTileClasses ? Numbers : kTileClasses;

  float x[Numbers], power[Numbers];  // [teachers, classes]; e^(x - maximum)
  Member member[kTileTeachers];
  Mixed mixed[classes];
  double share[kTileTeachers], sums[2][kTileTeachers], dot[kTileTeachers];
  double outer[2], weights;  // the sum of the weights
  int first;                 // the first teacher that counts
};

// Lanes: threads per teacher. The last warp reads what is not logits while the others read those.
template <int Numbers, int Lanes>
__global__ void __launch_bounds__(kTileThreads, 3)
    tile_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, unsigned reciprocal, double* totals) {
  using G = Group<Lanes>;
  __shared__ Tile<Numbers> tile;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
  const int count = static_cast<int>(a.count), classes = static_cast<int>(a.classes), groups = threads / Lanes;
  const bool js = a.kind == EnsembleKind::js;
  double total[2] = {};
#pragma unroll 1
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const EnsemblePlace at(a, row, false);
    if (thread < threads - 32) {
      as_stored<void, float>(a.teachers, [&](auto type, std::int64_t stride) {
        const auto* const from = static_cast<const decltype(type)*>(a.teachers.data) + at.teachers;
#pragma unroll 4
        for (int i = thread; i < count * classes; i += threads - 32) {
          const int k = static_cast<int>(__umulhi(static_cast<unsigned>(i), reciprocal));
          tile.x[i] = widen<float>(from[k * a.teachers.stack_stride + (i - k * classes) * stride]);
        }
      });
    } else {
      const double w[2] = {lane < count ? weight_of(a, at.weights, lane, 0) : 0, lane + 32 < count ? weight_of(a, at.weights, lane + 32, 0) : 0};
      const double sum = Group<32>::sum(w[0] + w[1]);
      int first = kTileTeachers;
#pragma unroll
      for (int i = 1; i >= 0; --i) {
        const int k = lane + 32 * i;
        const double share = k >= count ? 0.0 : sum == 0 ? 1.0 / count : w[i] / sum;
        const unsigned counts = __ballot_sync(kEveryLane, share > 0);
        if (counts) first = 32 * i + __ffs(static_cast<int>(counts)) - 1;
        if (k < count) tile.share[k] = share, tile.member[k].share = static_cast<float>(share);
      }
      if (lane == 0) tile.first = first < count ? first : 0, tile.weights = sum;
      if (lane == 0) tile.outer[0] = at.factor(a, 0);
      if (lane == 1) tile.outer[1] = at.factor(a, 1);
    }
    __syncthreads();
    for (int base = 0; base < count; base += groups) {
      const int k = base + G::row(), end = k < count ? classes : 0;
      float highest = -infinity<float>();
      for (int c = G::lane(); c < end; c += Lanes) highest = tile.x[k * classes + c] > highest ? tile.x[k * classes + c] : highest;
      highest = G::maximum(highest);
      const float from = Softmax<float>::reference(highest);
      double sum = 0;
      for (int c = G::lane(); c < end; c += Lanes) {
        const float e = exponential(tile.x[k * classes + c] - from);
        tile.power[k * classes + c] = e;
        sum += static_cast<double>(e);
      }
      sum = G::sum(sum);
      if (end && G::lane() == 0) tile.member[k].set(highest, sum);
    }
    __syncthreads();
    const Member first = tile.member[tile.first];
    for (int c = thread; c < classes; c += threads) {
      Mixing mixing(first, tile.x[tile.first * classes + c], js);
#pragma unroll 4
      for (int k = 0; k < count; ++k) mixing.add(tile.member[k], tile.x[k * classes + c], tile.power[k * classes + c] * tile.member[k].inverse);
      tile.mixed[c] = mixing.mixed();
    }
    __syncthreads();
    const Loss loss{js, static_cast<float>(tile.outer[0] * a.scale), static_cast<float>(tile.outer[1] * a.scale)};
    for (int base = 0; base < count; base += groups) {
      const int k = base + G::row(), end = k < count && tile.member[k].share != 0 ? classes : 0;
      const Member teacher = tile.member[k < count ? k : 0];
      double sums[2] = {};
      for (int c = G::lane(); c < end; c += Lanes) {
        const Mixed mixed = tile.mixed[c];
        const float log = loss.log_of(teacher, first, mixed, tile.x[k * classes + c]);
        loss.add(sums, mixed, log, tile.power[k * classes + c] * teacher.inverse);
      }
      sums[0] = G::sum(sums[0]), sums[1] = G::sum(sums[1]);
      const double dot = loss.dot(sums);
      if (k < count && G::lane() == 0) tile.dot[k] = dot, tile.sums[0][k] = js ? dot : sums[0], tile.sums[1][k] = sums[1];
      if (!a.teachers_grad.present || k >= count) continue;
      as_stored<void, float>(a.teachers_grad, [&](auto type, std::int64_t stride) {
        auto* const to = static_cast<decltype(type)*>(a.teachers_grad.data) + at.teachers_grad + k * a.teachers_grad.stack_stride;
        for (int c = G::lane(); c < classes; c += Lanes) {
          const Mixed mixed = tile.mixed[c];
          const float log = loss.log_of(teacher, first, mixed, tile.x[k * classes + c]);
          to[c * stride] = narrow<decltype(type)>(
              loss.gradient(teacher, mixed, log, tile.power[k * classes + c] * teacher.inverse, static_cast<float>(dot)));
        }
      });
    }
    __syncthreads();
    if (thread < 32) {
      const auto mean = [&](const double* of) {
        double sum = lane < count ? tile.share[lane] * of[lane] : 0.0;
        if (lane + 32 < count) sum += tile.share[lane + 32] * of[lane + 32];
        return Group<32>::sum(sum);
      };
      double found[2];
      loss.results(mean(tile.sums[0]), js ? 0.0 : mean(tile.sums[1]), count, found);
      if (lane == 0) leave(a, at, found, total);
      if (a.weights_grad.present) {
        const double middle = mean(tile.dot), factor = js ? tile.outer[0] * a.scale : 1.0;
        for (int k = lane; k < count; k += 32)
          store_weight_gradient(a.weights_grad, at.weights_grad + k * a.weights_grad.stack_stride,
                                tile.weights == 0 || tile.share[k] == 0 ? 0.0 : factor * (tile.dot[k] - middle) / tile.weights);
      }
    }
    if (row + gridDim.x < rows) __syncthreads();
  }
  if (thread) return;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (!a.total[r].present) continue;
    if (gridDim.x > 1)
      totals[r * kMostBlocks + blockIdx.x] = total[r];
    else
      store_value<double>(a.total[r].data, a.total[r].dtype, 0, total[r] * a.scale);
  }
}

// Without gradients of weights, which would take more registers than there are.
__global__ void __launch_bounds__(kBlock, 2) held_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, double* totals) {
  constexpr int K = kHeldTeachers, C = kHeldClasses;
  const int count = static_cast<int>(a.count), classes = static_cast<int>(a.classes);
  const bool js = a.kind == EnsembleKind::js;
  double total[2] = {};
#pragma unroll 1
  for (std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kBlock + threadIdx.x; row < rows; row += static_cast<std::int64_t>(gridDim.x) * kBlock) {
    const EnsemblePlace at(a, row, false);
    float x[K][C];
    as_stored<void, float>(a.teachers, [&](auto type, std::int64_t stride) {
      const auto* const from = static_cast<const decltype(type)*>(a.teachers.data) + at.teachers;
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int c = 0; c < C; ++c) x[k][c] = k < count && c < classes ? widen<float>(from[k * a.teachers.stack_stride + c * stride]) : -infinity<float>();
    });
    Member member[K], first;
    float anchor[C];
    bool found = false;
    const double weights = weight_sum(a, at.weights, 0), inverse = 1 / weights;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      float highest = -infinity<float>();
#pragma unroll
      for (int c = 0; c < C; ++c) highest = x[k][c] > highest ? x[k][c] : highest;
      const float from = Softmax<float>::reference(highest);
      float sum = 0;
#pragma unroll
      for (int c = 0; c < C; ++c) sum += exponential(x[k][c] - from);
      member[k].share = weights == 0 ? 1.0f / static_cast<float>(count) : static_cast<float>(weight_of(a, at.weights, k, 0) * inverse);
      member[k].set(highest, static_cast<double>(sum));
      if (k > 0 && (found || !(member[k].share > 0))) continue;
      found = member[k].share > 0, first = member[k];
#pragma unroll
      for (int c = 0; c < C; ++c) anchor[c] = x[k][c];
    }
    const auto power = [&](int k, int c) { return exponential(member[k].log_p(x[k][c])); };
    Mixed mixed[C];
#pragma unroll
    for (int c = 0; c < C; ++c) {
      Mixing mixing(first, anchor[c], js);
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k < count) mixing.add(member[k], x[k][c], power(k, c));
      mixed[c] = mixing.mixed();
    }
    const Loss loss{js, static_cast<float>(at.factor(a, 0) * a.scale), static_cast<float>(at.factor(a, 1) * a.scale)};
    double first_mean = 0, second_mean = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      double sums[2] = {};
      float log[C], p[C];
#pragma unroll
      for (int c = 0; c < C; ++c) {
        log[c] = loss.log_of(member[k], first, mixed[c], x[k][c]), p[c] = power(k, c);
        if (member[k].share != 0 && c < classes) loss.add(sums, mixed[c], log[c], p[c]);
      }
      const double dot = loss.dot(sums), share = static_cast<double>(member[k].share);
      first_mean += share * (js ? dot : sums[0]), second_mean += share * sums[1];
      if (!a.teachers_grad.present) continue;
      as_stored<void, float>(a.teachers_grad, [&](auto type, std::int64_t stride) {
        auto* const to = static_cast<decltype(type)*>(a.teachers_grad.data) + at.teachers_grad + k * a.teachers_grad.stack_stride;
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (c < classes) to[c * stride] = narrow<decltype(type)>(loss.gradient(member[k], mixed[c], log[c], p[c], static_cast<float>(dot)));
      });
    }
    double results[2];
    loss.results(first_mean, second_mean, count, results);
    leave(a, at, results, total);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (a.total[r].present) leave_total(total[r], totals + r * kMostBlocks, a.total[r], a.scale);
}

}  // namespace

bool distill_tile(const EnsembleCall& a, std::int64_t rows, double* totals, const Queue& queue) {
  const std::int64_t numbers = a.count * a.classes;
  if (a.kind < EnsembleKind::js || a.compute == DType::f64 || !rows) return false;
  std::int64_t blocks;
  if (a.count <= kHeldTeachers && a.classes <= kHeldClasses && !a.weights_grad.present) {
    blocks = std::min(grid(rows, kBlock, queue, 8), kMostBlocks);
    launch("distill_held", held_kernel, blocks, kBlock, queue, a, rows, totals);
  } else {
    // Where positions lie side by side, threads read together only if each has a row: worth more than a block's where there are many.
    const bool outside = a.teachers.class_stride != 1 && rows >= 16 * multiprocessors(queue.device);
    if (outside || a.count > kTileTeachers || a.classes > kTileClasses || numbers > kLargeTile || a.classes < 2) return false;
    const int lanes = a.classes <= 32 ? 8 : 32;
    const std::int64_t wanted = std::max(a.count * lanes, numbers / 8);
    const int threads = static_cast<int>(std::clamp<std::int64_t>((wanted + 31) / 32 * 32, 64, kBlock)) + 32;
    const auto reciprocal = static_cast<unsigned>((std::int64_t{1} << 32) / a.classes + 1);
    blocks = std::min(rows, kMostBlocks);
    const auto run = [&](auto kernel) { launch("distill_tile", kernel, blocks, threads, queue, a, rows, reciprocal, totals); };
    if (numbers <= kSmallTile)
      run(lanes == 8 ? tile_kernel<kSmallTile, 8> : tile_kernel<kSmallTile, 32>);
    else
      run(lanes == 8 ? tile_kernel<kLargeTile, 8> : tile_kernel<kLargeTile, 32>);
  }
  if (blocks == 1) return true;
  for (int r = 0; r < 2; ++r)
    if (a.total[r].present) launch("distill_ensemble_total", sum_partials, 1, kBlock, queue, totals + r * kMostBlocks, blocks, a.total[r], a.scale);
  return true;
}

}  // namespace fedkern::cuda
