// How rows are walked: chunks, blocks of rows, and which of the two kernels takes them.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "distill_memory.h"
#include "fedkern/parallel.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

constexpr std::int64_t kMaxChunks = 256;

// Measured with and without gradients: what a thread takes per logit is nearly the same.
template <typename T>
constexpr double kElementSeconds = (sizeof(T) == 8 ? 3 : 1) * 6.4e-9 / Vec<float>::lanes;

// Enough work per chunk that taking it from the counter does not show.
constexpr std::int64_t kChunkElements = 8192;

struct Plan {
  bool lanes_are_rows;           // a vector holds one class of several rows, else several classes of one row
  std::int64_t width;            // rows of a block
  std::int64_t inner, blocks;    // size of the innermost row dimension, blocks in it
  std::int64_t units;            // blocks in all
  std::int64_t chunk;            // units of a chunk
};

// The losses of one chunk; two sums, since some operators have two results.
struct Sums {
  double value[2] = {0, 0};
};

// Runs a call: Kernel<T, LanesAreRows>(call) does blocks of rows, `stacked` inputs per row and class, whose classes are
// adjacent in memory where `dense`. Returns the sums of the row losses.
template <typename T, template <typename, bool> class Kernel, typename Call>
Sums walk(const Call& call, bool dense, std::int64_t stacked) {
  Plan plan;
  plan.inner = call.row_size[call.row_dims - 1];
  // Short rows would leave lanes empty and pay the sums across lanes too often; where classes lie apart in memory,
  // neighbouring rows lie together.
  const bool want_rows = !dense || call.classes < kShortRow<T>;
  plan.lanes_are_rows = want_rows && plan.inner * 4 >= Vec<T>::lanes;
  plan.width = plan.lanes_are_rows ? Kernel<T, true>::width(call.classes) : Kernel<T, false>::width(call.classes);
  plan.blocks = (plan.inner + plan.width - 1) / plan.width;
  plan.units = plan.blocks;
  for (int d = 0; d + 1 < call.row_dims; ++d) plan.units *= call.row_size[d];
  const std::int64_t least = kChunkElements / (plan.width * call.classes) + 1;
  const std::int64_t even = (plan.units + kMaxChunks - 1) / kMaxChunks;
  plan.chunk = least > even ? least : even;

  Sums partial[kMaxChunks];
  const auto run_chunk = [&](auto kernel, std::int64_t begin, std::int64_t end) {
    Sums& sums = partial[begin / plan.chunk];
    std::int64_t outer = begin / plan.blocks, index = begin % plan.blocks;
    kernel->move_to(outer);
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t row = index * plan.width, left = plan.inner - row;
      kernel->run(row, static_cast<int>(left < plan.width ? left : plan.width), sums);
      if (++index == plan.blocks && unit + 1 < end) {
        index = 0;
        kernel->move_to(++outer);
      }
    }
  };
  // Not on the stack, of which a thread may have 64 KB: a kernel's buffers fill twice that.
  const Scratch<char> memory(std::max(sizeof(Kernel<T, true>), sizeof(Kernel<T, false>)), parallel_workers(plan.units, plan.chunk, call.threads));
  auto body = [&](std::int64_t begin, std::int64_t end, int worker) {
    const auto run_with = [&](auto* kernel) {
      run_chunk(kernel, begin, end);
      std::destroy_at(kernel);
    };
    if (plan.lanes_are_rows)
      run_with(new (memory.get(worker)) Kernel<T, true>(call));
    else
      run_with(new (memory.get(worker)) Kernel<T, false>(call));
  };
  const double elements = static_cast<double>(plan.units) * static_cast<double>(plan.width * call.classes * stacked);
  parallel_for(plan.units, plan.chunk, call.threads, elements * kElementSeconds<T>, body);
  Sums all;
  for (std::int64_t chunk = 0; chunk * plan.chunk < plan.units; ++chunk)
    for (int i = 0; i < 2; ++i) all.value[i] += partial[chunk].value[i];
  return all;
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
