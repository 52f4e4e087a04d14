#include "fedkern/aggregate_server.h"

#include "aggregate_store.h"
#include "aggregate_streams.h"
#include "fedkern/parallel.h"
#include "fedkern/tiles.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

using V = Vec<double>;

// Vectors of mean deltas held in registers at once. Longer steps ask memory for more lines of a vector in one burst, which
// takes a quarter longer where everything comes from there.
constexpr int kMeans = 8;
constexpr std::int64_t kStep = kMeans * V::lanes;

// Asks for what follows `x` beforehand, in L2: vectors of a power of two's distance, as large ones have, compete for the
// same lines of L1, which are fewer than the vectors and states of ten clients.
template <typename T>
FEDKERN_INLINE void prefetch_step(const T* x) {
  prefetch_ahead<kStep * static_cast<std::int64_t>(sizeof(T)), 2>(x);
}

// Per client: the running sums of squared deltas and of their products with the mean, one register each.
struct Sums {
  double *squares, *products;  // [count, lanes]
  V square;                    // of the mean
};

// squares += (x - global)^2, and `held` += weight * (x - global), for kStep elements of one client.
template <typename T>
FEDKERN_INLINE void add_delta(const T* x, const double* global, double weight, V* held, double* squares) {
  const V w = V::set(weight);
  V sums[2] = {V::load(squares), V::set(0)};
  for (int u = 0; u < kMeans; ++u) {
    const V delta = V::load(x + u * V::lanes) - V::load(global + u * V::lanes);
    held[u] = fma(w, delta, held[u]);
    sums[u % 2] = fma(delta, delta, sums[u % 2]);
  }
  (sums[0] + sums[1]).store(squares);
}

// The same for a weight of zero, which must not spread NaN. It is rare: a call keeps it out of the unrolled loop.
template <typename T>
__attribute__((noinline)) void add_square(const T* x, const double* global, double* squares) {
  V sum = V::load(squares);
  for (int u = 0; u < kMeans; ++u) {
    const V delta = V::load(x + u * V::lanes) - V::load(global + u * V::lanes);
    sum = fma(delta, delta, sum);
  }
  sum.store(squares);
}

// mean[0 ... kStep) of the clients' deltas, and their sums.
template <typename T>
FEDKERN_INLINE void mean_delta(const ServerStep& a, const Divisor& divisor, std::int64_t at, const double* global, double* mean, Sums& sums) {
  V held[kMeans];
  for (V& value : held) value = V::set(0);
  for (std::int64_t first = 0; first < a.count; first += kStreams) {
#pragma GCC unroll 10
    for (int k = 0; k < kStreams; ++k) {
      const std::int64_t m = first + k;
      if (m >= a.count) break;
      const T* x = static_cast<const T*>(a.vectors[m]) + at;
#if defined(__GNUC__)
      asm("" : "+r"(x));
#endif
      prefetch_step(x);
      if (__builtin_expect(a.weights[m] != 0, 1))
        add_delta(x, global, a.weights[m], held, sums.squares + m * V::lanes);
      else
        add_square(x, global, sums.squares + m * V::lanes);
    }
  }
  for (int u = 0; u < kMeans; ++u) {
    held[u] = divisor.apply(held[u]);
    sums.square = fma(held[u], held[u], sums.square);
    held[u].store(mean + u * V::lanes);
  }
  for (std::int64_t m = 0; m < a.count; ++m) {
    const T* x = static_cast<const T*>(a.vectors[m]) + at;
    V products[2] = {V::load(sums.products + m * V::lanes), V::set(0)};
    for (int u = 0; u < kMeans; ++u)
      products[u % 2] = fma(V::load(x + u * V::lanes) - V::load(global + u * V::lanes), held[u], products[u % 2]);
    (products[0] + products[1]).store(sums.products + m * V::lanes);
  }
}

// x - global, with equal infinities at no distance: a mask of -inf that every model holds changes nothing.
template <typename T>
FEDKERN_INLINE double delta_of(T x, double global) {
  const double wide = static_cast<double>(widen(x));
  return wide == global ? 0.0 : wide - global;
}

// Whether all of kStep elements are finite numbers.
FEDKERN_INLINE bool all_finite(const double* x) {
  V zero = V::set(0);
  for (int u = 0; u < kMeans; ++u) zero = fma(V::load(x + u * V::lanes), V::set(0), zero);
  return reduce_add(zero) == 0;
}

// The same for n <= kStep elements, one by one, where some of them may be infinite; the sums go into the first lanes.
template <typename T>
void mean_delta_tail(const ServerStep& a, const Divisor& divisor, std::int64_t at, std::int64_t n, const double* global, double* mean, Sums& sums) {
  double square = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    double sum = 0;
    for (std::int64_t m = 0; m < a.count; ++m) {
      const double delta = delta_of(static_cast<const T*>(a.vectors[m])[at + j], global[j]);
      if (a.weights[m] != 0) sum += a.weights[m] * delta;
      sums.squares[m * V::lanes] += delta * delta;
    }
    mean[j] = divisor.apply(sum);
    square += mean[j] * mean[j];
    for (std::int64_t m = 0; m < a.count; ++m)
      sums.products[m * V::lanes] += delta_of(static_cast<const T*>(a.vectors[m])[at + j], global[j]) * mean[j];
  }
  double lanes[V::lanes] = {square};
  sums.square = sums.square + V::load(lanes);
}

// model = global + update, and the states: FedOpt (arXiv 2003.00295), algorithm 2.
template <ServerRule rule, typename S>
void update(const ServerStep& a, const double* global, const double* mean, S* first, S* second, double* model) {
  const V rate = V::set(a.learning_rate), beta1 = V::set(a.beta1), rest1 = V::set(1 - a.beta1);
  const V beta2 = V::set(a.beta2), rest2 = V::set(1 - a.beta2), tau = V::set(a.tau);
  for (std::int64_t j = 0; j < kStep; j += V::lanes) {
    const V delta = V::load(mean + j), old = V::load(global + j);
    if constexpr (rule == ServerRule::mean) {
      (old + rate * delta).store(model + j);
    } else if constexpr (rule == ServerRule::momentum) {
      const V one = beta1 * V::load(first + j) + delta;
      one.store(first + j);
      (old + rate * one).store(model + j);
    } else {
      const V one = beta1 * V::load(first + j) + rest1 * delta, square = delta * delta;
      V two = V::load(second + j);
      if constexpr (rule == ServerRule::adam) {
        two = beta2 * two + rest2 * square;
      } else if constexpr (rule == ServerRule::yogi) {
        const V change = rest2 * square;
        two = select(two > square, two - change, select(two < square, two + change, two + (square - square)));
      } else {
        two = two + square;
      }
      one.store(first + j);
      two.store(second + j);
      (old + rate * one / (sqrt(two) + tau)).store(model + j);
    }
  }
}

template <typename S>
using Update = void (*)(const ServerStep&, const double*, const double*, S*, S*, double*);

template <typename S>
Update<S> update_of(ServerRule rule) {
  switch (rule) {
    case ServerRule::momentum: return update<ServerRule::momentum, S>;
    case ServerRule::adam: return update<ServerRule::adam, S>;
    case ServerRule::yogi: return update<ServerRule::yogi, S>;
    case ServerRule::adagrad: return update<ServerRule::adagrad, S>;
    default: return update<ServerRule::mean, S>;
  }
}

// The states of n <= kStep elements go through a tile of their own.
template <typename S>
void update_tail(const ServerStep& a, Update<S> body, std::int64_t n, const double* global, const double* mean, S* first, S* second, double* model) {
  S one[kStep] = {}, two[kStep] = {};
  std::copy_n(first, first ? n : 0, one);
  std::copy_n(second, second ? n : 0, two);
  body(a, global, mean, one, two, model);
  std::copy_n(one, first ? n : 0, first);
  std::copy_n(two, second ? n : 0, second);
}

template <typename T, typename S>
void server_step(const ServerStep& a) {
  const Divisor divisor(a.total, sizeof(T) == 8);
  const Update<S> body = update_of<S>(a.rule);
  const bool stream = can_stream(a.out, a.stream);
  const Scratch<double> memory(2 * a.count * V::lanes, parallel_workers(a.size, a.chunk, a.threads));
  auto chunks = [&](std::int64_t begin, std::int64_t end, int worker) {
    double* const squares = memory.get(worker);
    std::fill_n(squares, 2 * a.count * V::lanes, 0.0);
    Sums sums{squares, squares + a.count * V::lanes, V::set(0)};
    alignas(64) double global[kStep] = {}, mean[kStep] = {}, model[kStep];
    for (std::int64_t at = begin; at < end; at += kStep) {
      const std::int64_t n = std::min(kStep, end - at);
      widen_tile(static_cast<const T*>(a.global) + at, n, global);
      S* const first = a.first.present ? static_cast<S*>(a.first.data) + at : nullptr;
      S* const second = a.second.present ? static_cast<S*>(a.second.data) + at : nullptr;
      if (n == kStep && __builtin_expect(all_finite(global), 1)) {
        prefetch_step(static_cast<const T*>(a.global) + at);
        if (first) prefetch_step(first);
        if (second) prefetch_step(second);
        mean_delta<T>(a, divisor, at, global, mean, sums);
        body(a, global, mean, first, second, model);
      } else {
        mean_delta_tail<T>(a, divisor, at, n, global, mean, sums);
        update_tail<S>(a, body, n, global, mean, first, second, model);
      }
      with_type(a.out_dtype, [&](auto out) { write_mean(model, n, Undivided{}, static_cast<decltype(out)*>(a.out) + at, stream); });
    }
    if (stream) finish_streams();
    double* partial = a.partial + begin / a.chunk * (2 * a.count + 1);
    for (std::int64_t m = 0; m < a.count; ++m) {
      partial[m] = reduce_add(V::load(sums.squares + m * V::lanes));
      partial[a.count + m] = reduce_add(V::load(sums.products + m * V::lanes));
    }
    partial[2 * a.count] = reduce_add(sums.square);
  };
  const double bytes = static_cast<double>(a.size) * (static_cast<double>(a.count + 2) * sizeof(T) + 4 * sizeof(S));
  parallel_for(a.size, a.chunk, a.threads, 2 * seconds(bytes), chunks);
}

void server_step_any(const ServerStep& a) {
  with_type(a.dtype, [&](auto in) {
    if (a.state_dtype == DType::f64)
      server_step<decltype(in), double>(a);
    else
      server_step<decltype(in), float>(a);
  });
}

}  // namespace

const AggregateServerTable aggregate_server_table = {server_step_any};

}  // namespace fedkern::FEDKERN_ISA
