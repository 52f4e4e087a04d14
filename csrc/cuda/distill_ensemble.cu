// ensemble_kl, js_div and consensus on CUDA: a warp to a row, a block to a long one, a thread where positions lie side by side.
// What happens within a row is in distill_ensemble.cuh.
#include <algorithm>

#include "distill_ensemble.cuh"
#include "launch.cuh"

namespace fedkern::cuda {
namespace {

constexpr std::int64_t kBlockRow = 1024;  // classes from which on a block takes a row
constexpr std::int64_t kMostBlocks = kEnsembleTotals / 2;

struct RowLosses {
  double loss[2];
};

// A row in fp64: rare, and called, so that the registers it takes are not taken from the rest.
template <int Lanes>
__device__ __noinline__ RowLosses run_wide(const EnsembleCall& a, std::int64_t row, double* slot, std::int64_t step) {
  const EnsemblePlace at(a, row);
  RowLosses result{};
  EnsembleRow<double, Lanes>(a, at, slot, step).run(result.loss);
  return result;
}

// False where fp32 does not do.
template <int Lanes>
__device__ __forceinline__ bool run_narrow(const EnsembleCall& a, std::int64_t row, double* slot, std::int64_t step, RowLosses& result) {
  const EnsemblePlace at(a, row);
  return EnsembleRow<float, Lanes>(a, at, slot, step).run(result.loss);
}

template <int Lanes>
__global__ void __launch_bounds__(kBlock, 2) ensemble_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, double* totals, double* slots) {
  using G = Group<Lanes>;
  // Neighbouring threads' numbers lie side by side, neighbouring groups' one after another.
  const std::int64_t group = static_cast<std::int64_t>(blockIdx.x) * G::rows + G::row(), groups = static_cast<std::int64_t>(gridDim.x) * G::rows;
  double* const slot = slots + (Lanes == 1 ? group : group * kEnsembleNumbers * a.count);
  double total[2] = {};
  for (std::int64_t row = group; row < rows; row += groups) {
    const std::int64_t step = Lanes == 1 ? groups : 1;
    RowLosses result{};
    if (a.compute == DType::f64 || !run_narrow<Lanes>(a, row, slot, step, result)) result = run_wide<Lanes>(a, row, slot, step);
    if (G::lane()) continue;
    const EnsemblePlace at(a, row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total[r] += result.loss[r];
      if (a.row_loss[r].data) store_value<double>(a.row_loss[r].data, a.row_loss[r].dtype, at.row_loss[r], result.loss[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (a.total[r].data) leave_total(total[r], totals + r * kMostBlocks, a.total[r], a.scale);
}

void run(const EnsembleCall& a, std::int64_t rows, double* workspace, std::int64_t slots, const Queue& queue) {
  const bool outside = a.teachers.class_stride != 1 && a.classes > 1;
  const int lanes = a.classes <= 4 || (outside && a.classes < kBlockRow) ? 1 : a.classes < kBlockRow ? 32 : kBlock;
  const std::int64_t each = kBlock / lanes;
  const std::int64_t blocks = std::max<std::int64_t>(1, std::min({grid(rows, each, queue, 8), kMostBlocks, slots / each}));
  const auto kernel = lanes == 1 ? ensemble_kernel<1> : lanes == 32 ? ensemble_kernel<32> : ensemble_kernel<kBlock>;
  launch("distill_ensemble", kernel, blocks, kBlock, queue, a, rows, workspace, workspace + kEnsembleTotals);
  if (blocks == 1) return;
  for (int r = 0; r < 2; ++r)
    if (a.total[r].data) launch("distill_ensemble_total", sum_partials, 1, kBlock, queue, workspace + r * kMostBlocks, blocks, a.total[r], a.scale);
}

}  // namespace

void distill_ensemble(const EnsembleCall& a, double* workspace, std::int64_t slots, int device, void* stream) {
  const DeviceGuard guard(device);
  const Queue queue{device, stream};
  std::int64_t rows = 1;
  for (int d = 0; d < a.row_dims; ++d) rows *= a.row_size[d];
  if (!rows && !a.total[0].data) return;
  run(a, rows, workspace, slots, queue);
}

}  // namespace fedkern::cuda
