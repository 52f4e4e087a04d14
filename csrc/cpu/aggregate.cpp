#include "fedkern/aggregate.h"

#include <time.h>

#include <atomic>

#include "aggregate_exact.h"
#include "aggregate_store.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Up to this many vectors are read side by side, their sums held in registers until they are written out: memory then
// delivers them at the speed of a copy. More of them at once come at two thirds of it.
constexpr std::int64_t kStreams = 10;
// With more vectors, the sums of a block wait in L2 while so many at a time are read in long runs.
constexpr std::int64_t kBlock = 16384;
// Vectors of sums held in registers at once: of fp32, eight cache lines on AVX-512 and two on AVX2.
#if defined(FEDKERN_ISA_avx512)
constexpr int kHeld = 16;
#else
constexpr int kHeld = 8;
#endif

// Whether to prefetch by instruction in a long call. Where the hardware follows the streams it is a third faster without,
// where it does not three times slower, so the first chunks try both ways.
class Prefetching {
 public:
  // In the last-level cache, and with 16-bit elements, instructions never cost.
  Prefetching(std::int64_t chunks, bool always) : trials_(always || chunks < 16 ? 0 : 6) {}
  template <typename Body>
  void run(Body&& body) {
    const int trial = next_.load(std::memory_order_relaxed) < trials_ ? next_.fetch_add(1, std::memory_order_relaxed) : trials_;
    if (trial >= trials_) return body(trials_ == 0 || least_[1].load(std::memory_order_relaxed) <= least_[0].load(std::memory_order_relaxed));
    const auto start = now();
    body(trial % 2 != 0);
    const std::int64_t elapsed = now() - start;
    std::atomic<std::int64_t>& least = least_[trial % 2];
    if (elapsed < least.load(std::memory_order_relaxed)) least.store(elapsed, std::memory_order_relaxed);
  }

 private:
  static std::int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + time.tv_nsec;
  }
  const int trials_;
  std::atomic<int> next_{0};
  std::atomic<std::int64_t> least_[2] = {INT64_MAX, INT64_MAX};
};

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
template <bool prefetch, typename T, typename Out>
void add_clients(const Vector* vectors, const double* weights, std::int64_t count, std::int64_t begin, std::int64_t n, const Ends<Out>& ends) {
  using V = Vec<double>;
  constexpr std::int64_t step = kHeld * V::lanes;
  const T* x[kStreams];
  double weight[kStreams];
  for (std::int64_t m = 0; m < count; ++m) x[m] = static_cast<const T*>(vectors[m].data) + begin, weight[m] = weights[m];
  std::int64_t j = 0;
  for (; j + step <= n; j += step) {
    V held[kHeld];
    for (int u = 0; u < kHeld; ++u) held[u] = ends.fresh ? V::set(0.0) : V::load(ends.sum + j + u * V::lanes);
    for (std::int64_t m = 0; m < count; ++m) {
      const T* from = x[m] + j;
#if defined(__GNUC__)
      // One pointer with constant offsets; else a register is spent on every offset.
      asm("" : "+r"(from));
#endif
      if constexpr (prefetch) prefetch_ahead<step * static_cast<std::int64_t>(sizeof(T))>(from);
      const V w = V::set(weight[m]);
      for (int u = 0; u < kHeld; ++u) held[u] = held[u] + w * V::load(from + u * V::lanes);
    }
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
  auto part = [&](std::int64_t begin, std::int64_t end, bool prefetch) {
    alignas(64) double sum[kBlock];
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
          if (prefetch)
            add_clients<true, T>(a.vectors + m, a.weights + m, last - m, i, n, ends);
          else
            add_clients<false, T>(a.vectors + m, a.weights + m, last - m, i, n, ends);
        }
      }
    }
    if (stream) finish_stores();
  };
  Prefetching prefetching((a.size + kChunk - 1) / kChunk, sizeof(T) == 2);
  auto chunks = [&](std::int64_t begin, std::int64_t end) { prefetching.run([&](bool prefetch) { part(begin, end, prefetch); }); };
  const double bytes = static_cast<double>(a.count + 1) * static_cast<double>(a.size) * sizeof(T);
  parallel_for(a.size, kChunk, a.threads, seconds(bytes), chunks);
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
  parallel_for(a.size, kChunk, a.threads, seconds(static_cast<double>(a.size) * (16 + sizeof(T))), chunks);
}

template <typename Out>
void accumulator_mean(const AccumulatorMean& a) {
  const Divisor divisor(a.total, std::is_same_v<Out, double>);
  const bool stream = can_stream(a.out, a.stream);
  auto chunks = [&](std::int64_t begin, std::int64_t end) {
    write_mean(a.sum + begin, end - begin, divisor, static_cast<Out*>(a.out) + begin, stream);
    if (stream) finish_stores();
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
