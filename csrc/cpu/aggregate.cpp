#include "fedkern/aggregate.h"

#include "aggregate_exact.h"
#include "aggregate_store.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Up to this many vectors are read side by side with their sums in registers: memory delivers that many streams at the
// speed of a copy.
constexpr std::int64_t kStreams = 12;
// With more, the sums of a block wait in L2 while a few vectors at a time are read in long runs.
constexpr std::int64_t kBlock = 16384, kFew = 5;
// Vectors of sums held in registers at once: four cache lines of fp32 on AVX-512.
constexpr int kHeld = 8;

// sum[j] (+)= weight[m] * x[m][j], m ascending, for clients first ... last - 1 with unit stride.
template <typename T>
void add_clients(const WeightedMean& a, std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t n, bool fresh, double* sum) {
  using V = Vec<double>;
  constexpr std::int64_t step = kHeld * V::lanes;
  std::int64_t j = 0;
  for (; j + step <= n; j += step) {
    V held[kHeld];
    for (int u = 0; u < kHeld; ++u) held[u] = fresh ? V::set(0.0) : V::load(sum + j + u * V::lanes);
    for (std::int64_t m = first; m < last; ++m) {
      const T* x = static_cast<const T*>(a.vectors[m].data) + begin + j;
      const V weight = V::set(a.weights[m]);
      for (int u = 0; u < kHeld; ++u) held[u] = held[u] + weight * V::load(x + u * V::lanes);
    }
    for (int u = 0; u < kHeld; ++u) held[u].store(sum + j + u * V::lanes);
  }
  for (; j < n; ++j) {
    double value = fresh ? 0.0 : sum[j];
    for (std::int64_t m = first; m < last; ++m)
      value = value + a.weights[m] * static_cast<double>(widen(static_cast<const T*>(a.vectors[m].data)[begin + j]));
    sum[j] = value;
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
  const std::int64_t together = a.count <= kStreams ? kStreams : kFew;
  const std::int64_t block = a.count <= kStreams ? kTile : kBlock;
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    alignas(64) double sum[kBlock];
    for (std::int64_t i = begin; i < end; i += block) {
      const std::int64_t n = std::min(block, end - i);
      for (std::int64_t m = 0; m < a.count;) {
        std::int64_t last = m;
        while (last < a.count && last - m < together && a.vectors[last].stride == 1) ++last;
        if (last == m) {
          add_strided<T>(a.vectors[m], a.weights[m], i, n, m == 0, sum);
          ++m;
        } else {
          add_clients<T>(a, m, last, i, n, m == 0, sum);
          m = last;
        }
      }
      write_mean(sum, n, a.total, static_cast<Out*>(a.out) + i, a.stream);
    }
    if (a.stream) finish_stores();
  };
  const double bytes = static_cast<double>(a.count + 1) * static_cast<double>(a.size) * sizeof(T);
  parallel_for(a.size, kChunk, a.threads, seconds(bytes), chunks);
}

template <typename T>
void accumulator_add(const AccumulatorAdd& a) {
  const WeightedMean one{a.dtype, a.dtype, 1, a.size, &a.vector, &a.weight, 1.0, nullptr, false, a.threads};
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    if (a.vector.stride == 1)
      add_clients<T>(one, 0, 1, begin, end - begin, false, a.sum + begin);
    else
      add_strided<T>(a.vector, a.weight, begin, end - begin, false, a.sum + begin);
  };
  parallel_for(a.size, kChunk, a.threads, seconds(static_cast<double>(a.size) * (16 + sizeof(T))), chunks);
}

template <typename Out>
void accumulator_mean(const AccumulatorMean& a) {
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    alignas(64) double sum[kTile];
    for (std::int64_t i = begin; i < end; i += kTile) {
      const std::int64_t n = std::min(kTile, end - i);
      std::copy_n(a.sum + i, n, sum);
      write_mean(sum, n, a.total, static_cast<Out*>(a.out) + i, a.stream);
    }
    if (a.stream) finish_stores();
  };
  parallel_for(a.size, kChunk, a.threads, seconds(static_cast<double>(a.size) * (8 + sizeof(Out))), chunks);
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
