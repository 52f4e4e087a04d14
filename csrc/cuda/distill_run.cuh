// distill on CUDA: which threads take a row. The losses are in distill_losses.cuh, their arithmetic in distill_math.cuh,
// loading and storing in distill_rows.cuh.
//
// Where classes lie together in memory, part of a warp takes a short row, a warp a longer one, a block a long one, and several
// blocks where long rows are few; they hold the row in registers while it fits. Where positions lie together (class axis
// outside), a thread takes a row, so that neighbours read together. Row losses are summed in fp64, those of blocks by the last
// one, in an order that the sizes and the device fix: the same bits every time.
#pragma once

#include <algorithm>

#include "distill_losses.cuh"
#include "fedkern/distill_cuda.h"
#include "last_block.cuh"
#include "launch.cuh"

namespace fedkern::cuda {
namespace {

constexpr std::int64_t kSplitRow = 8192;   // classes from which on several blocks may take a row
constexpr std::int64_t kMaxBlocks = 2048;  // that leave a partial sum
constexpr std::int64_t kMaxUnits = 1024;   // rows times blocks per row
static_assert(1 + kMaxUnits * (kFound + kSums) + kMaxUnits <= kDistillWorkspace && 1 + kMaxBlocks <= kDistillWorkspace && kMaxBlocks < kTicketBlocks);

// What blocks add to the total, `before` numbers after the workspace's first, where they count how many of them have done so.
struct Partials {
  double* workspace;
  std::int64_t before;
  Ticket ticket;

  __device__ __forceinline__ double* sums() const { return workspace + 1 + before; }
  // out = scale * sum of sums()[0, count), in the last of `count` blocks to come here, whose first thread has written one.
  __device__ __forceinline__ void add_up(unsigned count, const RowValues& out, double scale) const {
    if (!is_last_block(reinterpret_cast<Ticket*>(workspace), ticket, count)) return;
    double total = 0;
    for (unsigned i = threadIdx.x; i < count; i += kBlock) total += *static_cast<const volatile double*>(sums() + i);
    total = Group<kBlock>::sum(total);
    if (threadIdx.x == 0) store_value<double>(out.data, out.dtype, 0, total * scale);
  }
};

template <typename C>
__device__ __forceinline__ C factor_of(const DistillCall& a, const RowPlace& at) {
  return static_cast<C>(at.outer * at.weight * a.scale);
}

// What a row of weight 0 leaves.
template <typename C, typename G, typename T, int Inputs>
__device__ __forceinline__ void write_zeros(const DistillCall& a, const GradientPlace& place, std::int64_t begin, std::int64_t end) {
#pragma unroll
  for (int k = 0; k < Inputs; ++k) {
    const Logits& to = k == 0 ? a.teacher_grad : a.student_grad[k == 0 ? 0 : k - 1];
    if (!to.present) continue;
    each_classes<G, 1>(begin, end, [&](const auto& part) {
      const C zero[1] = {};
      store_classes<T>(to, place.gradient[k], part, zero);
    });
  }
}

// Writes a row's losses; returns what it adds to the total.
__device__ __forceinline__ double write_loss(const DistillCall& a, std::int64_t row, double weight, double loss) {
  const double raw = weight == 0 ? 0 : loss;
  if (a.row_loss.present || a.raw_loss.present) {
    std::int64_t row_loss = 0, raw_loss = 0;
    each_index(a, row, [&](int d, std::int64_t i) { row_loss += i * a.row_loss.row_stride[d], raw_loss += i * a.raw_loss.row_stride[d]; });
    if (a.row_loss.present) store_value<double>(a.row_loss.data, a.row_loss.dtype, row_loss, raw * weight);
    if (a.raw_loss.present) store_value<double>(a.raw_loss.data, a.raw_loss.dtype, raw_loss, raw);
  }
  return raw * weight;
}

template <typename C>
__device__ __forceinline__ C* kept_of(const DistillCall& a, std::int64_t row) {
  return static_cast<C*>(a.kept.data) + row * kept_numbers(a);
}
// Whether the call reads what another kept.
__host__ __device__ inline bool recalls(const DistillCall& a) { return a.kept.present && wants_gradients(a); }

template <template <typename, typename, typename, int> class Loss, typename C, int Lanes, typename T, int Hold, int Blocks>
__global__ void __launch_bounds__(kBlock, Blocks) rows_kernel(const __grid_constant__ DistillCall a, std::int64_t rows, const Partials partials) {
  using G = Group<Lanes>;
  using Row = Loss<C, G, T, Hold>;
  __shared__ double totals[G::rows];  // of a group's rows; in registers they would be two too many
  if (G::lane() == 0) totals[G::row()] = 0;
  // All threads stay to the end: the sums within groups need every lane.
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * G::rows; first < rows; first += static_cast<std::int64_t>(gridDim.x) * G::rows) {
    const std::int64_t row = first + G::row();
    const bool mine = row < rows;
    RowPlace at(a, mine ? row : 0);
    Row loss(a, at);
    loss.hold(mine ? a.classes : 0);
    const bool recall = recalls(a);
    if (recall) loss.recall(kept_of<C>(a, mine ? row : 0));
    at.read_factors(a);
    const std::int64_t classes = mine && at.weight != 0 ? a.classes : 0;
    if (!recall) {
      loss.look(0, classes);
      loss.gather_found();
      loss.settle_found();
      if (wants_loss(a) || a.kept.present || Row::wants_sums(a)) {
        loss.sum(0, classes);
        G::sum_all(loss.summed);
        loss.settle_sums();
      }
      if (a.kept.present && mine && G::lane() == 0) loss.keep(kept_of<C>(a, row));
    }
    if (wants_gradients(a)) {
      const GradientPlace to(a, mine ? row : 0);
      loss.gradients(to, 0, classes, factor_of<C>(a, at));
      if (mine && at.weight == 0) write_zeros<C, G, T, Row::inputs>(a, to, 0, a.classes);
    }
    if (wants_loss(a) && mine && G::lane() == 0) totals[G::row()] += write_loss(a, row, at.weight, loss.loss());
  }
  if (!a.total.present) return;
  const double total = Group<kBlock>::sum(G::lane() == 0 ? totals[G::row()] : 0.0);
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) store_value<double>(a.total.data, a.total.dtype, 0, total * a.scale);
  } else {
    if (threadIdx.x == 0) partials.sums()[blockIdx.x] = total;
    partials.add_up(gridDim.x, a.total, a.scale);
  }
}

// Long rows of which there are few: `splits` blocks to a row, one step of the three per launch; the last one alone where what
// the row leaves was kept.
struct Shares {
  std::int64_t splits, classes;  // per row; of each
  double* found;                 // [rows, splits, kFound]
  double* sums;                  // [rows, splits, kSums]
  Partials losses;               // of rows
};

// By one block for each row.
__device__ __forceinline__ void leave_loss(const DistillCall& a, std::int64_t row, double weight, double loss, const Shares& shares) {
  if (wants_loss(a) && threadIdx.x == 0) shares.losses.sums()[row] = write_loss(a, row, weight, loss);
  if (a.total.present) shares.losses.add_up(gridDim.x / static_cast<unsigned>(shares.splits), a.total, a.scale);
}

template <template <typename, typename, typename, int> class Loss, typename C, typename T>
__global__ void __launch_bounds__(kBlock, 2) shared_rows_kernel(const __grid_constant__ DistillCall a, const Shares shares, int step) {
  using G = Group<kBlock>;
  using Row = Loss<C, G, T, 0>;
  const std::int64_t row = blockIdx.x / shares.splits, split = blockIdx.x % shares.splits;
  RowPlace at(a, row);
  at.read_factors(a);
  const std::int64_t begin = split * shares.classes, end = begin + shares.classes < a.classes ? begin + shares.classes : a.classes;
  if (at.weight == 0) {  // the whole block leaves
    if (step == 2) write_zeros<C, G, T, Row::inputs>(a, {a, row}, begin, end);
    if (step == 2 && split == 0) leave_loss(a, row, 0, 0, shares);
    return;
  }
  double *const found = shares.found + row * shares.splits * kFound, *const sums = shares.sums + row * shares.splits * kSums;
  Row loss(a, at);
  if (step == 0) {
    loss.look(begin, end);
    loss.gather_found();
    if (threadIdx.x == 0) loss.save_found(found + split * kFound);
    return;
  }
  if (recalls(a)) {
    loss.recall(kept_of<C>(a, row));
  } else {
    if (threadIdx.x < shares.splits) loss.load_found(found + threadIdx.x * kFound);
    loss.gather_found();
    loss.settle_found();
    if (step == 1) {
      loss.sum(begin, end);
      G::sum_all(loss.summed);
#pragma unroll
      for (int i = 0; i < Row::sums; ++i)
        if (threadIdx.x == 0) sums[split * kSums + i] = loss.summed[i];
      return;
    }
#pragma unroll
    for (int i = 0; i < Row::sums; ++i) loss.summed[i] = threadIdx.x < shares.splits ? sums[threadIdx.x * kSums + i] : 0.0;
    G::sum_all(loss.summed);
    loss.settle_sums();
    if (a.kept.present && split == 0 && threadIdx.x == 0) loss.keep(kept_of<C>(a, row));
  }
  if (wants_gradients(a)) loss.gradients({a, row}, begin, end, factor_of<C>(a, at));
  if (split == 0) leave_loss(a, row, at.weight, loss.loss(), shares);
}

template <template <typename, typename, typename, int> class Loss, typename C, int Lanes, typename T, int Hold = 0, int Blocks = 2>
void run_rows(const DistillCall& a, std::int64_t rows, const Optional<double>& workspace, const Queue& queue) {
  std::int64_t blocks = grid(rows, Group<Lanes>::rows, queue, 8);
  if (a.total.present) blocks = workspace.present ? std::min(blocks, kMaxBlocks) : 1;
  launch("distill", rows_kernel<Loss, C, Lanes, T, Hold, Blocks>, blocks, kBlock, queue, a, rows, Partials{workspace.data, 0, next_ticket()});
}

template <template <typename, typename, typename, int> class Loss, typename C, typename T>
void run_shared_rows(const DistillCall& a, std::int64_t rows, std::int64_t splits, double* workspace, const Queue& queue) {
  // Even shares, so that pairs of classes are whole.
  const std::int64_t classes = (a.classes + 2 * splits - 1) / (2 * splits) * 2, units = rows * ((a.classes + classes - 1) / classes);
  double *const found = workspace + 1, *const sums = found + units * kFound;
  const Shares shares{units / rows, classes, found, sums, {workspace, units * (kFound + kSums), next_ticket()}};
  for (int step = recalls(a) ? 2 : 0; step < 3; ++step)
    launch("distill", shared_rows_kernel<Loss, C, T>, rows * shares.splits, kBlock, queue, a, shares, step);
}

template <template <typename, typename, typename, int> class Loss, typename C, bool Fast>
void run_as(const DistillCall& a, const Optional<double>& workspace, const Queue& queue) {
  std::int64_t rows = 1;
  for (int d = 0; d < a.row_dims; ++d) rows *= a.row_size[d];
  if (!rows && !a.total.present) return;
  const auto all = [&](auto good) {
    return good(a.teacher) && good(a.student[0]) && good(a.student[1]) && good(a.teacher_grad) && good(a.student_grad[0]) && good(a.student_grad[1]);
  };
  const bool dense = all([](const Logits& x) { return !x.present || x.class_stride == 1; });
  const std::int64_t fill = 2 * multiprocessors(queue.device);
  const bool wide = rows >= fill * kBlock / 2;  // enough rows for a thread each
  const bool block = a.classes >= 2048;
  if (a.classes <= 4 || (!dense && (wide || !block))) return run_rows<Loss, C, 1, void>(a, rows, workspace, queue);
  // What is rare (fp64, the limit) has fewer variants to choose from.
  if constexpr (Fast) {
    if (a.classes <= 16) return run_rows<Loss, C, 4, void, 4, 3>(a, rows, workspace, queue);
    if (a.classes <= 32) return run_rows<Loss, C, 8, void, 4, 3>(a, rows, workspace, queue);
    const std::int64_t most = std::max<std::int64_t>(rows, 1);
    const std::int64_t each = std::min({fill / most, a.classes / (kSplitRow / 2), kMaxUnits / most, std::int64_t{kBlock}});
    const std::int64_t splits = recalls(a) ? a.classes / (kSplitRow / 2) : each;
    // No rows are no blocks to share them: the total of nothing is left to run_rows.
    const bool shared = workspace.present && rows && a.classes >= kSplitRow && splits > 1;
    const auto run = [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (shared) return run_shared_rows<Loss, C, T>(a, rows, splits, workspace.data, queue);
      if constexpr (kKnown<T>) {
        // As many blocks to a multiprocessor as there are registers for.
        constexpr int blocks = Loss<C, Group<32>, T, 1>::inputs < 3 ? 3 : 2;
        if (a.classes <= 128) return run_rows<Loss, C, 16, T, 8, blocks>(a, rows, workspace, queue);
        if (a.classes <= 512) return run_rows<Loss, C, 32, T, 16, blocks>(a, rows, workspace, queue);
        if (a.classes <= 1024) return run_rows<Loss, C, 64, T, 16, blocks>(a, rows, workspace, queue);
        if (a.classes <= 4096) return run_rows<Loss, C, kBlock, T, 16, blocks>(a, rows, workspace, queue);
        return run_rows<Loss, C, kBlock, T>(a, rows, workspace, queue);
      }
      if constexpr (!kKnown<T>) block ? run_rows<Loss, C, kBlock, T>(a, rows, workspace, queue) : run_rows<Loss, C, 32, T>(a, rows, workspace, queue);
    };
    if (all(holds<float>)) return run(static_cast<float*>(nullptr));
    if (all(holds<Half>)) return run(static_cast<Half*>(nullptr));
    return run(static_cast<void*>(nullptr));
  }
  block ? run_rows<Loss, C, kBlock, void>(a, rows, workspace, queue) : run_rows<Loss, C, 32, void>(a, rows, workspace, queue);
}

}  // namespace

// kl with one student; with two.
void distill_kl(const DistillCall& a, const Optional<double>& workspace, const Queue& queue);
void distill_dual(const DistillCall& a, const Optional<double>& workspace, const Queue& queue);

}  // namespace fedkern::cuda
