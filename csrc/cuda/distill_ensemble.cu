// ensemble_kl, js_div and consensus on CUDA: a warp to a row, a block to a long one, a thread where positions lie side by side.
// What happens within a row is in distill_probabilities.cuh, distill_logits.cuh, distill_mean.cuh and distill_limits.cuh.
#include <algorithm>

#include "distill_limits.cuh"
#include "distill_logits.cuh"
#include "distill_mean.cuh"
#include "distill_probabilities.cuh"
#include "distill_tile.cuh"
#include "launch.cuh"

namespace fedkern::cuda {
namespace {

constexpr std::int64_t kBlockRow = 1024;  // classes from which on a block takes a row

struct RowLosses {
  double loss[2];
};

// A row in fp64: rare, and called, so that the registers it takes are not taken from the rest.
template <template <typename, int, typename> class Row, int Lanes>
__device__ __noinline__ RowLosses run_wide(const EnsembleCall& a, std::int64_t row, double* slot, std::int64_t step) {
  const EnsemblePlace at(a, row);
  RowLosses result{};
  Row<double, Lanes, void>(a, at, slot, step).run(result.loss);
  return result;
}

// False where fp32 does not do.
template <template <typename, int, typename> class Row, int Lanes, typename T>
__device__ __forceinline__ bool run_narrow(const EnsembleCall& a, std::int64_t row, double* slot, std::int64_t step, RowLosses& result) {
  const EnsemblePlace at(a, row);
  return Row<float, Lanes, T>(a, at, slot, step).run(result.loss);
}

template <template <typename, int, typename> class Row, int Lanes, typename T>
__global__ void __launch_bounds__(kBlock, 2) ensemble_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, const Totals totals, double* slots) {
  using G = Group<Lanes>;
  // Neighbouring threads' numbers lie side by side, neighbouring groups' one after another.
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * G::rows + G::row(), groups = static_cast<std::int64_t>(gridDim.x) * G::rows;
  double* const slot = slots + (Lanes == 1 ? group : group * kEnsembleNumbers * a.count);
  double total[2] = {};
  for (std::int64_t row = group; row < rows; row += groups) {
    const std::int64_t step = Lanes == 1 ? groups : 1;
    RowLosses result{};
    bool done = false;
    if constexpr (!Row<float, Lanes, T>::kExact)
      done = (kKnown<T> || a.compute != DType::f64) && run_narrow<Row, Lanes, T>(a, row, slot, step, result);
    if constexpr (!kKnown<T> || !Row<float, Lanes, T>::kSure)
      if (!done) result = run_wide<Row, Lanes>(a, row, slot, step);
    if (G::lane()) continue;
    const EnsemblePlace at(a, row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += result.loss[r];
      if (a.row_loss[r].present) store_value<double>(a.row_loss[r].data, a.row_loss[r].dtype, at.row_loss[r], result.loss[r]);
    }
  }
  if (wants_totals(a)) Group<kBlock>::sum_all(total);
  leave_totals(a, total, totals);
}

template <int Lanes, typename T>
auto kernel_of(const EnsembleCall& a) {
  if (a.limit) return ensemble_kernel<LimitRow, Lanes, void>;
  switch (a.kind) {
    case EnsembleKind::logits: return ensemble_kernel<LogitsRow, Lanes, T>;
    case EnsembleKind::mean: return ensemble_kernel<MeanRow, Lanes, T>;
    default: return ensemble_kernel<ProbabilityRow, Lanes, T>;
  }
}
template <int Lanes>
auto kernel_of(const EnsembleCall& a) {
  const auto all = [&](auto type) {
    using T = decltype(type);
    return a.compute == DType::f32 && !a.by_class && holds<T>(a.teachers) && holds<T>(a.student) && holds<T>(a.teachers_grad) && holds<T>(a.student_grad);
  };
  return all(float{}) ? kernel_of<Lanes, float>(a) : all(__nv_bfloat16{}) ? kernel_of<Lanes, __nv_bfloat16>(a) : kernel_of<Lanes, void>(a);
}

void run(const EnsembleCall& a, std::int64_t rows, const Totals& totals, std::int64_t slots, const Queue& queue) {
  const bool outside = a.teachers.class_stride != 1 && a.classes > 1;
  const int lanes = a.classes <= 4 || (outside && a.classes < kBlockRow) ? 1 : a.classes < kBlockRow ? 32 : kBlock;
  const std::int64_t each = kBlock / lanes;
  const std::int64_t blocks = std::max<std::int64_t>(1, std::min({grid(rows, each, queue, 8), kMostBlocks, slots / each}));
  const auto kernel = lanes == 1 ? kernel_of<1, void>(a) : lanes == 32 ? kernel_of<32>(a) : kernel_of<kBlock>(a);
  launch("distill_ensemble", kernel, blocks, kBlock, queue, a, rows, totals, totals.sums + kEnsembleTotals);
}

}  // namespace

void distill_ensemble(const EnsembleCall& a, double* workspace, std::int64_t slots, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  std::int64_t rows = 1;
  for (int d = 0; d < a.row_dims; ++d) rows *= a.row_size[d];
  if (!rows && !a.total[0].present) return;
  const Totals totals{workspace, next_ticket()};
  if (!distill_tile(a, rows, totals, queue) && !distill_student_tile(a, rows, totals, queue)) run(a, rows, totals, slots, queue);
}

}  // namespace fedkern::cuda
