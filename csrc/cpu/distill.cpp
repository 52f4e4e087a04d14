// How rows are walked: chunks, blocks of rows, and which of the two kernels takes them. The arithmetic is in
// distill_losses.h, blocks in distill_block.h, loading and
// storing in distill_memory.h.
#include "fedkern/distill.h"

#include "distill_losses.h"
#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

constexpr std::int64_t kMaxChunks = 256;

// Measured with and without gradients: what a thread takes per logit is nearly the same.
template <typename T>
constexpr double kElementSeconds = (sizeof(T) == 8 ? 3 : 1) * 6.4e-9 / Vec<float>::lanes;

// Enough work per chunk that taking it from the counter does not show.
constexpr std::int64_t kChunkElements = 8192;

struct Plan {
  bool lanes_are_rows;              // a vector holds one class of several rows, else several classes of one row
  std::int64_t width;               // rows of a block
  std::int64_t inner, blocks;       // size of the innermost row dimension, blocks in it
  std::int64_t units;               // blocks in all
  std::int64_t chunk;               // units of a chunk
};

template <typename T>
Plan make_plan(const DistillCall& call) {
  Plan plan;
  plan.inner = call.row_size[call.row_dims - 1];
  bool dense = call.teacher.class_stride == 1;
  for (int k = 0; k < call.students; ++k) dense = dense && call.student[k].class_stride == 1;
  // Short rows would leave lanes empty and pay the sums across lanes too often; where classes lie apart in memory,
  // neighbouring rows lie together.
  const bool want_rows = !dense || call.classes < kShortRow<T>;
  plan.lanes_are_rows = want_rows && plan.inner * 4 >= Vec<T>::lanes;
  plan.width = plan.lanes_are_rows ? Losses<T, true>::width(call.classes) : Losses<T, false>::width(call.classes);
  plan.blocks = (plan.inner + plan.width - 1) / plan.width;
  plan.units = plan.blocks;
  for (int d = 0; d + 1 < call.row_dims; ++d) plan.units *= call.row_size[d];
  const std::int64_t least = kChunkElements / (plan.width * call.classes) + 1;
  const std::int64_t even = (plan.units + kMaxChunks - 1) / kMaxChunks;
  plan.chunk = least > even ? least : even;
  return plan;
}

template <typename T, bool LanesAreRows>
double run_chunk(const DistillCall& call, const Plan& plan, std::int64_t begin, std::int64_t end) {
  Losses<T, LanesAreRows> block(call);
  double sum = 0;
  std::int64_t outer = begin / plan.blocks, index = begin % plan.blocks;
  block.move_to(outer);
  for (std::int64_t unit = begin; unit < end; ++unit) {
    const std::int64_t row = index * plan.width, left = plan.inner - row;
    sum += block.run(row, static_cast<int>(left < plan.width ? left : plan.width));
    if (++index == plan.blocks && unit + 1 < end) {
      index = 0;
      block.move_to(++outer);
    }
  }
  return sum;
}

template <typename T>
void run_as(const DistillCall& call) {
  const Plan plan = make_plan<T>(call);
  double partial[kMaxChunks];  // one per chunk
  auto body = [&](std::int64_t begin, std::int64_t end) {
    partial[begin / plan.chunk] =
        plan.lanes_are_rows ? run_chunk<T, true>(call, plan, begin, end) : run_chunk<T, false>(call, plan, begin, end);
  };
  const double elements = static_cast<double>(plan.units) * static_cast<double>(plan.width * call.classes) * (1 + call.students);
  parallel_for(plan.units, plan.chunk, call.threads, elements * kElementSeconds<T>, body);
  if (call.total.data) {
    double sum = 0;
    for (std::int64_t chunk = 0; chunk * plan.chunk < plan.units; ++chunk) sum += partial[chunk];
    store_scalar(call.total.dtype, call.total.data, 0, sum * call.scale);
  }
}

void run(const DistillCall& call) { call.compute == DType::f64 ? run_as<double>(call) : run_as<float>(call); }

template <typename T>
void exp_as(std::int64_t count, const void* in, void* out) {
  for (std::int64_t i = 0; i < count; i += Vec<T>::lanes) {
    const std::ptrdiff_t n = count - i < Vec<T>::lanes ? count - i : Vec<T>::lanes;
    exp(Vec<T>::load_partial(static_cast<const T*>(in) + i, n)).store_partial(static_cast<T*>(out) + i, n);
  }
}

void exp_of(DType dtype, std::int64_t count, const void* in, void* out) {
  dtype == DType::f64 ? exp_as<double>(count, in, out) : exp_as<float>(count, in, out);
}

}  // namespace

const DistillTable distill_table = {run, exp_of};

}  // namespace fedkern::FEDKERN_ISA
