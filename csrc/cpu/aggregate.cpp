#include "fedkern/aggregate.h"

#include <cmath>

#include "aggregate_exact.h"
#include "aggregate_lanes.h"
#include "aggregate_store.h"
#include "aggregate_streams.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// With more than kStreams vectors, the sums of a block wait in L2 while so many at a time are read in long runs.
constexpr std::int64_t kBlock = 16384;

// Whether fp64 holds the product of every weight and any number of type T: numbers of samples and fp32 weights have few
// digits. Then a fused multiply-add gives the bits of product and sum rounded one by one, in one instruction.
template <typename T>
bool exact_products(const double* weights, std::int64_t count) {
  constexpr int digits = sizeof(T) == 8 ? 53 : sizeof(T) == 4 ? 24 : std::is_same_v<T, f16> ? 11 : 8;
  if (digits == 53) return false;
  for (std::int64_t m = 0; m < count; ++m) {
    const auto bits = bit_cast<std::uint64_t>(weights[m]);
    // Far enough from both ends of the range for every product to be neither infinite nor cut off below.
    const bool inside = std::fabs(weights[m]) > 0x1p-800 && std::fabs(weights[m]) < 0x1p800;
    if (!inside || bits & ((std::uint64_t{1} << digits) - 1)) return false;
  }
  return true;
}

// Where the sums of a group of clients begin and end: at zero or at `sum`, in `sum` or (out not null) as means in `out`.
template <typename Out>
struct Ends {
  bool fresh;
  double* sum;
  Out* out;
  Divisor divisor;
  bool stream;
};

// (+)= weights[m] * x[m][j], m ascending, for `count` <= kStreams vectors of unit stride and begin <= j < begin + n.
template <bool fused, typename T, typename Out>
void add_clients(const Vector* vectors, const double* weights, std::int64_t count, std::int64_t begin, std::int64_t n, const Ends<Out> ends) {
  using V = Vec<double>;
  constexpr int kHeld = Lanes<T>::held;
  constexpr std::int64_t step = kHeld * V::lanes;
  const T* x[kStreams];
  double weight[kStreams];
  for (std::int64_t m = 0; m < count; ++m) x[m] = static_cast<const T*>(vectors[m].data) + begin, weight[m] = weights[m];
  std::int64_t j = 0;
  for (; j + step <= n; j += step) {
    V held[kHeld];
    for (int u = 0; u < kHeld; ++u) held[u] = ends.fresh ? V::set(0.0) : V::load(ends.sum + j + u * V::lanes);
    Lanes<T>::from_order(held);
#pragma GCC unroll 10
    for (int m = 0; m < kStreams; ++m) {
      if (m >= count) break;
      const T* from = x[m] + j;
#if defined(__GNUC__)
      // One pointer with constant offsets; else a register is spent on every offset.
      asm("" : "+r"(from));
#endif
      // A tenth faster from memory (Intel, Sapphire Rapids), however well the prefetchers in hardware follow.
      prefetch_ahead<step * static_cast<std::int64_t>(sizeof(T)), 2>(from);
      const V w = V::set(weight[m]);
      Lanes<T>::each(from, [&](int u, V value) __attribute__((always_inline)) {
        held[u] = fused ? fma(w, value, held[u]) : held[u] + w * value;
        keep_order();
      });
    }
    Lanes<T>::to_order(held);
    if (ends.out)
      write_held<kHeld>(held, ends.divisor, ends.out + j, ends.stream);
    else
      for (int u = 0; u < kHeld; ++u) held[u].store(ends.sum + j + u * V::lanes);
  }
  for (; j < n; ++j) {
    double value = ends.fresh ? 0.0 : ends.sum[j];
    for (std::int64_t m = 0; m < count; ++m) value = value + weight[m] * static_cast<double>(widen(x[m][j]));
    if (ends.out)
      write_mean(&value, 1, ends.divisor, ends.out + j, false);
    else
      ends.sum[j] = value;
  }
}

template <typename T>
void add_strided(const Vector& vector, double weight, std::int64_t begin, std::int64_t n, bool fresh, double* sum) {
  const T* x = static_cast<const T*>(vector.data) + begin * vector.stride;
  for (std::int64_t j = 0; j < n; ++j)
    sum[j] = (fresh ? 0.0 : sum[j]) + weight * static_cast<double>(widen(x[j * vector.stride]));
}

template <typename T, typename Out>
void weighted_mean(const WeightedMean& a) {
  bool together = a.count <= kStreams;
  for (std::int64_t m = 0; m < a.count; ++m) together &= a.vectors[m].stride == 1;
  const std::int64_t block = together ? kChunk : kBlock;
  const Divisor divisor(a.total, std::is_same_v<Out, double>);
  const bool stream = can_stream(a.out, a.stream);
  const auto add = exact_products<T>(a.weights, a.count) ? add_clients<sizeof(T) != 8, T, Out> : add_clients<false, T, Out>;
  // Not on the stack, of which a thread may have 64 KB.
  const std::int64_t chunk = vector_chunk(a.size), held = together ? 0 : std::min({block, chunk, a.size});
  const Scratch<double> memory(held, parallel_workers(a.size, chunk, a.threads));
  auto chunks = [&](std::int64_t begin, std::int64_t end, int worker) {
    double* const sum = memory.get(worker);
    for (std::int64_t i = begin; i < end; i += block) {
      const std::int64_t n = std::min(block, end - i);
      Out* out = static_cast<Out*>(a.out) + i;
      for (std::int64_t m = 0, last = 0; m < a.count; m = last) {
        while (last < a.count && last - m < kStreams && a.vectors[last].stride == 1) ++last;
        if (last == m) {
          add_strided<T>(a.vectors[m], a.weights[m], i, n, m == 0, sum);
          if (++last == a.count) write_mean(sum, n, divisor, out, stream);
        } else {
          const Ends<Out> ends{m == 0, sum, last == a.count ? out : nullptr, divisor, stream};
          add(a.vectors + m, a.weights + m, last - m, i, n, ends);
        }
      }
    }
    if (stream) finish_streams();
  };
  const double bytes = static_cast<double>(a.count + 1) * static_cast<double>(a.size) * sizeof(T);
  parallel_for(a.size, chunk, a.threads, seconds(bytes), chunks);
}

template <typename T>
void accumulator_add(const AccumulatorAdd& a) {
  const Divisor divisor(1.0, true);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    if (a.vector.stride == 1)
      add_clients<false, T, double>(&a.vector, &a.weight, 1, begin, end - begin, {false, a.sum + begin, nullptr, divisor, false});
    else
      add_strided<T>(a.vector, a.weight, begin, end - begin, false, a.sum + begin);
  };
  parallel_for(a.size, vector_chunk(a.size), a.threads, seconds(static_cast<double>(a.size) * (16 + sizeof(T))), chunks);
}

template <typename Out>
void accumulator_mean(const AccumulatorMean& a) {
  const Divisor divisor(a.total, std::is_same_v<Out, double>);
  const bool stream = can_stream(a.out, a.stream);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    write_mean(a.sum + begin, end - begin, divisor, static_cast<Out*>(a.out) + begin, stream);
    if (stream) finish_streams();
  };
  parallel_for(a.size, vector_chunk(a.size), a.threads, seconds(static_cast<double>(a.size) * (8 + sizeof(Out))), chunks);
}

void weighted_mean_any(const WeightedMean& a) {
  with_type(a.dtype, [&](auto in) {
    with_type(a.out_dtype, [&](auto out) { weighted_mean<decltype(in), decltype(out)>(a); });
  });
}
void accumulator_add_any(const AccumulatorAdd& a) {
  with_type(a.dtype, [&](auto in) { accumulator_add<decltype(in)>(a); });
}
void accumulator_mean_any(const AccumulatorMean& a) {
  with_type(a.out_dtype, [&](auto out) { accumulator_mean<decltype(out)>(a); });
}
void exact_add_any(const ExactAdd& a) {
  with_type(a.dtype, [&](auto in) { exact_add<decltype(in)>(a); });
}
void exact_mean_any(const ExactMean& a) {
  with_type(a.out_dtype, [&](auto out) { exact_mean<decltype(out)>(a); });
}

}  // namespace

const AggregateTable aggregate_table = {weighted_mean_any, accumulator_add_any, accumulator_mean_any, exact_add_any, exact_mean_any};

}  // namespace fedkern::FEDKERN_ISA
