// js_div and consensus of few numbers per row: by blocks, as distill_tile.cuh has it, or, where a row fits a thread's registers,
// by threads.
#include "distill_tile.cuh"

namespace fedkern::cuda {
namespace {

constexpr int kFewTeachers = 5, kHeldTeachers = 8, kHeldClasses = 4;  // of a row in registers

// What a class adds to its teacher's sums, and its gradient once those are known.
//   js         sum p (e^u - 1 - u) with u = log m - log p, and sum (m - p), which is 0 but for what u is rounded by;
//              -p (u + KL)
//   consensus  entropy and cross entropy; p (g (-log m - cross entropy) + h (-log p - entropy))
struct Loss {
  bool js;
  float g, h;

  // From a class's log p as the mixture's: log m - log p; consensus: log p.
  __device__ __forceinline__ float log_of(const Mixed& c, float log_p) const { return js ? c.log_m - log_p : log_p; }
  // `log`: from log_of.
  __device__ __forceinline__ void add(float (&sums)[2], const Mixed& c, float log, float p) const {
    const Term<float> term(p, c.m, log);
    sums[0] += js ? term.value : p > 0 ? -p * log : p;
    sums[1] += js ? term.difference : p > 0 ? -p * c.log_m : p;
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
    const double most = js ? static_cast<double>(logarithm(static_cast<float>(count))) : 0.0;
    loss[0] = js ? (first > most ? most : first) : second < 0 ? 0.0 : second;
    loss[1] = first;
  }
};

template <int Numbers, int Lanes>
__global__ void __launch_bounds__(kTileThreads, 2)
    tile_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, unsigned reciprocal, const Totals totals) {
  using G = Group<Lanes>;
  constexpr int kShared = Lanes == 8 ? 8 : 4;  // threads to a class of the mixture
  __shared__ Tile<Numbers> tile;
  const int count = static_cast<int>(a.count), classes = static_cast<int>(a.classes);
  const bool js = a.kind == EnsembleKind::js;
  const bool wants_loss = a.row_loss[0].present || a.row_loss[1].present || a.total[0].present || a.total[1].present;
  double total[2] = {};
#pragma unroll 1
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const EnsemblePlace at(a, row, false);
    tile.load(a, at, reciprocal);
    __syncthreads();
    tile.template find_softmaxes<Lanes>(0, count, classes, 1);
    __syncthreads();
    const Member first = tile.member[tile.first];
    tile.template each_row<kShared>(0, classes, [&](int c, bool mine) {
      Mixing mixing(first, tile.x[tile.first * classes + c], js, 1);
      __syncwarp();  // the anchor is read; from here on log p stands in the logits' place
#pragma unroll 4
      for (int k = Group<kShared>::lane(); k < (mine ? count : 0); k += kShared) {
        float& x = tile.x[k * classes + c];
        x = mixing.add(tile.member[k], x, tile.probability(k, c, classes));
      }
      mixing.template gather<kShared>();
      if (mine && Group<kShared>::lane() == 0) tile.mixed[c] = mixing.mixed();
    });
    __syncthreads();
    const Loss loss{js, static_cast<float>(tile.outer[0] * a.scale), static_cast<float>(tile.outer[1] * a.scale)};
    tile.template each_row<Lanes>(0, count, [&](int k, bool mine) {
      const Member teacher = tile.member[k];
      float part[2] = {};
      for (int c = G::lane(); c < (mine && teacher.share != 0 ? classes : 0); c += Lanes) {
        const Mixed mixed = tile.mixed[c];
        loss.add(part, mixed, loss.log_of(mixed, tile.x[k * classes + c]), tile.probability(k, c, classes));
      }
      double sums[2] = {part[0], part[1]};
      G::sum_all(sums);
      const double dot = loss.dot(sums);
      if (!mine) return;
      if (G::lane() == 0) tile.dot[k] = dot, tile.sums[0][k] = js ? dot : sums[0], tile.sums[1][k] = sums[1];
      if (!a.teachers_grad.present) return;
      as_stored<void, float>(a.teachers_grad, [&](auto type, std::int64_t stride) {
        auto* const to = static_cast<decltype(type)*>(a.teachers_grad.data) + at.teachers_grad + k * a.teachers_grad.stack_stride;
        for (int c = G::lane(); c < classes; c += Lanes) {
          const Mixed mixed = tile.mixed[c];
          const float log = loss.log_of(mixed, tile.x[k * classes + c]);
          to[c * stride] = narrow<decltype(type)>(loss.gradient(teacher, mixed, log, tile.probability(k, c, classes), static_cast<float>(dot)));
        }
      });
    });
    __syncthreads();
    if (threadIdx.x < 32) {
      if (wants_loss) {
        double found[2];
        loss.results(tile.mean(tile.sums[0], count), js ? 0.0 : tile.mean(tile.sums[1], count), count, found);
        if (threadIdx.x == 0) leave(a, at, found, total);
      }
      tile.weight_gradients(a, at, js ? tile.outer[0] * a.scale : 1.0);
    }
    if (row + gridDim.x < rows) __syncthreads();
  }
  leave_totals(a, total, totals);
}

// Without gradients of weights, which would take more registers than there are.
template <int K>
__global__ void __launch_bounds__(kBlock, 2) held_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, const Totals totals) {
  constexpr int C = kHeldClasses;
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
    // The first teacher that counts is the anchor.
    Member member[K], first;
    float anchor[C], p[K][C];
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
      for (int c = 0; c < C; ++c) p[k][c] = exponential(x[k][c] - from), sum += p[k][c];
      member[k].share = weights == 0 ? 1.0f / static_cast<float>(count) : static_cast<float>(weight_of(a, at.weights, k, 0) * inverse);
      member[k].set(highest, static_cast<double>(sum));
#pragma unroll
      for (int c = 0; c < C; ++c) p[k][c] *= member[k].inverse;
      if (k > 0 && (found || !(member[k].share > 0))) continue;
      found = member[k].share > 0, first = member[k];
#pragma unroll
      for (int c = 0; c < C; ++c) anchor[c] = x[k][c];
    }
    static_assert(C == 4);
    Mixing mixing[C] = {{first, anchor[0], js, 1}, {first, anchor[1], js, 1}, {first, anchor[2], js, 1}, {first, anchor[3], js, 1}};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      const Apart apart(member[k], first);
#pragma unroll
      for (int c = 0; c < C; ++c) x[k][c] = mixing[c].add(member[k], apart, x[k][c], p[k][c]);
    }
    const Mixed mixed[C] = {mixing[0].mixed(), mixing[1].mixed(), mixing[2].mixed(), mixing[3].mixed()};
    // Found again, which saves the registers until now.
    const EnsemblePlace to(a, row, false);
    const Loss loss{js, static_cast<float>(to.factor(a, 0) * a.scale), static_cast<float>(to.factor(a, 1) * a.scale)};
    double first_mean = 0, second_mean = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k >= count) break;
      float part[2] = {};
#pragma unroll
      for (int c = 0; c < C; ++c) {
        x[k][c] = loss.log_of(mixed[c], x[k][c]);
        if (member[k].share != 0 && c < classes) loss.add(part, mixed[c], x[k][c], p[k][c]);
      }
      const double sums[2] = {part[0], part[1]}, dot = loss.dot(sums), share = static_cast<double>(member[k].share);
      first_mean += share * (js ? dot : sums[0]), second_mean += share * sums[1];
      if (!a.teachers_grad.present) continue;
      as_stored<void, float>(a.teachers_grad, [&](auto type, std::int64_t stride) {
        auto* const data = static_cast<decltype(type)*>(a.teachers_grad.data) + to.teachers_grad + k * a.teachers_grad.stack_stride;
#pragma unroll
        for (int c = 0; c < C; ++c)
          if (c < classes) data[c * stride] = narrow<decltype(type)>(loss.gradient(member[k], mixed[c], x[k][c], p[k][c], static_cast<float>(dot)));
      });
    }
    double results[2];
    loss.results(first_mean, second_mean, count, results);
    leave(a, to, results, total);
  }
  if (wants_totals(a)) Group<kBlock>::sum_all(total);
  leave_totals(a, total, totals);
}

}  // namespace

bool distill_tile(const EnsembleCall& a, std::int64_t rows, const Totals& totals, const Queue& queue) {
  if (a.kind < EnsembleKind::js || a.compute == DType::f64 || !rows) return false;
  if (a.count <= kHeldTeachers && a.classes <= kHeldClasses && !a.weights_grad.present) {
    const std::int64_t blocks = std::min(grid(rows, kBlock, queue, 8), kMostBlocks);
    launch("distill_held", a.count <= kFewTeachers ? held_kernel<kFewTeachers> : held_kernel<kHeldTeachers>, blocks, kBlock, queue, a, rows, totals);
    return true;
  }
  if (!fits_tile(a, rows, 0, queue)) return false;
  run_tile(a, rows, 0, kTileThreads - 32, [&](auto numbers, auto lanes, std::int64_t blocks, int threads, unsigned reciprocal) {
    launch("distill_tile", tile_kernel<numbers.value, lanes.value>, blocks, threads, queue, a, rows, reciprocal, totals);
  });
  return true;
}

}  // namespace fedkern::cuda
