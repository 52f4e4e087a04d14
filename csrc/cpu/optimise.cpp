#include "fedkern/optimise.h"

#include <algorithm>
#include <utility>

#include "fedkern/parallel.h"
#include "fedkern/tiles.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Vectors of a row that are worked on side by side.
constexpr int kGroup = 4;

// One row's vectors, null where absent.
template <typename T>
struct Row {
  T *parameters, *gradients, *first, *second, *sum;
  const T *anchor, *correction;

  Row(const OptimiserStep& a, std::int64_t row) {
    auto of = [&](const RowsOf& x) { return x.present ? static_cast<T*>(x.data) + row * x.step : nullptr; };
    parameters = of(a.parameters), gradients = of(a.gradients), first = of(a.first), second = of(a.second), sum = of(a.gradient_sum);
    anchor = a.proximal != 0 ? of(a.anchor) : nullptr;
    correction = of(a.correction);
  }
};

// A call's numbers in the type that is computed in, which is how torch takes them.
template <typename C>
struct Numbers {
  Vec<C> rate, decay, momentum, weight_decay, proximal, scale, weight, beta2, rest2, root, eps;
  bool clip, decays, near;  // near: the first moment moves less than half of the way, see lerp

  Numbers(const OptimiserStep& a, std::int64_t row) {
    auto set = [](double x) { return Vec<C>::set(static_cast<C>(x)); };
    rate = set(a.rates[row]), momentum = set(a.momentum), weight_decay = set(a.weight_decay), proximal = set(a.proximal);
    clip = a.scales != nullptr, scale = set(clip ? a.scales[row] : 1.0), decays = a.weight_decay != 0;
    const C way = static_cast<C>(1 - a.beta1);
    near = way < C(0.5), weight = Vec<C>::set(near ? way : way - C(1));
    decay = set(a.rule == OptimiserRule::adamw ? a.decays[row] : 1.0);
    beta2 = set(a.beta2), rest2 = set(1 - a.beta2), root = set(a.root), eps = set(a.eps);
  }
};

// A vector of floats as two of doubles.
FEDKERN_INLINE void halves(Vec<float> x, Vec<double>& low, Vec<double>& high) {
#if defined(FEDKERN_ISA_avx512)
  low.v = _mm512_cvtps_pd(_mm512_castps512_ps256(x.v));
  high.v = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1));
#elif defined(FEDKERN_ISA_avx2)
  low.v = _mm256_cvtps_pd(_mm256_castps256_ps128(x.v));
  high.v = _mm256_cvtps_pd(_mm256_extractf128_ps(x.v, 1));
#else
  low.v = Native<double>::type{x.v[0], x.v[1]};
  high.v = Native<double>::type{x.v[2], x.v[3]};
#endif
}

// Running sums of squares in fp64, and a vector that is zero as long as all values were finite.
template <typename C>
struct Tally {
  Vec<double> squares[2] = {Vec<double>::set(0), Vec<double>::set(0)};
  Vec<C> odd = Vec<C>::set(0);

  FEDKERN_INLINE void square(Vec<float> x) {
    Vec<double> low, high;
    halves(x, low, high);
    squares[0] = fma(low, low, squares[0]);
    squares[1] = fma(high, high, squares[1]);
  }
  FEDKERN_INLINE void square(Vec<double> x) {
    std::swap(squares[0], squares[1]);
    squares[0] = fma(x, x, squares[0]);
  }
  FEDKERN_INLINE void look(Vec<C> x) { odd = fma(x, Vec<C>::set(0), odd); }
  double sum() const { return reduce_add(squares[0] + squares[1]); }
  bool finite() const { return !(!(odd == Vec<C>::set(0))).any(); }
};

// A vector of a row: all lanes, or the first n.
template <bool whole, typename C, typename T>
FEDKERN_INLINE Vec<C> get(const T* from, std::ptrdiff_t n) {
  if constexpr (whole)
    return Vec<C>::load(from);
  else
    return Vec<C>::load_partial(from, n);
}
// Writes and looks at what was written: lanes past the end hold anything, and 16-bit types overflow when they are rounded.
template <bool whole, typename C, typename T>
FEDKERN_INLINE void put(Vec<C> x, T* to, std::ptrdiff_t n, Tally<C>& tally) {
  if constexpr (whole)
    x.store(to);
  else
    x.store_partial(to, n);
  tally.look(whole && sizeof(T) > 2 ? x : get<whole, C>(to, n));
}

// The gradient with the method's terms, as far as it is needed for the norm.
template <int count, bool whole, typename C, typename T>
FEDKERN_INLINE void with_terms(const Row<T>& row, const Numbers<C>& k, std::int64_t at, std::ptrdiff_t n, const Vec<C>* theta, Vec<C>* g) {
  constexpr int lanes = Vec<C>::lanes;
  if (row.correction)
    for (int u = 0; u < count; ++u) g[u] = g[u] + get<whole, C>(row.correction + at + u * lanes, n);
  if (row.anchor)
    for (int u = 0; u < count; ++u) g[u] = fma(theta[u] - get<whole, C>(row.anchor + at + u * lanes, n), k.proximal, g[u]);
}

template <int count, bool whole, typename C, typename T>
FEDKERN_INLINE void add_squares(const Row<T>& row, const Numbers<C>& k, std::int64_t at, std::ptrdiff_t n, Tally<C>& tally) {
  constexpr int lanes = Vec<C>::lanes;
  Vec<C> theta[count], g[count];
  for (int u = 0; u < count; ++u) g[u] = get<whole, C>(row.gradients + at + u * lanes, n);
  for (int u = 0; u < count; ++u) theta[u] = row.anchor ? get<whole, C>(row.parameters + at + u * lanes, n) : g[u];
  with_terms<count, whole>(row, k, at, n, theta, g);
  for (int u = 0; u < count; ++u) tally.square(g[u]);
}

template <OptimiserRule rule, int count, bool whole, typename C, typename T>
FEDKERN_INLINE void advance(const OptimiserStep& a, const Row<T>& row, const Numbers<C>& k, std::int64_t at, std::ptrdiff_t n, Tally<C>& tally) {
  using V = Vec<C>;
  constexpr int lanes = V::lanes;
  V theta[count], g[count];
  for (int u = 0; u < count; ++u) g[u] = get<whole, C>(row.gradients + at + u * lanes, n);
  for (int u = 0; u < count; ++u) theta[u] = get<whole, C>(row.parameters + at + u * lanes, n);
  if (row.sum)
    for (int u = 0; u < count; ++u) put<whole>(get<whole, C>(row.sum + at + u * lanes, n) + g[u], row.sum + at + u * lanes, n, tally);
  if (a.zero)
    for (int u = 0; u < count; ++u) {
      if constexpr (whole)
        V::set(0).store(row.gradients + at + u * lanes);
      else
        V::set(0).store_partial(row.gradients + at + u * lanes, n);
    }
  with_terms<count, whole>(row, k, at, n, theta, g);
  if (k.clip)
    for (int u = 0; u < count; ++u) g[u] = g[u] * k.scale;
  else
    for (int u = 0; u < count; ++u) tally.square(g[u]);
  if constexpr (rule == OptimiserRule::sgd) {
    if (k.decays)
      for (int u = 0; u < count; ++u) g[u] = fma(theta[u], k.weight_decay, g[u]);
    if (row.first)
      for (int u = 0; u < count; ++u) {
        g[u] = get<whole, C>(row.first + at + u * lanes, n) * k.momentum + g[u];
        put<whole>(g[u], row.first + at + u * lanes, n, tally);
      }
    for (int u = 0; u < count; ++u) put<whole>(fma(g[u], k.rate, theta[u]), row.parameters + at + u * lanes, n, tally);
  } else {
    for (int u = 0; u < count; ++u) {
      const V old = get<whole, C>(row.first + at + u * lanes, n);
      const V one = fma(k.weight, g[u] - old, k.near ? old : g[u]);
      const V two = fma(k.rest2 * g[u], g[u], get<whole, C>(row.second + at + u * lanes, n) * k.beta2);
      put<whole>(one, row.first + at + u * lanes, n, tally);
      put<whole>(two, row.second + at + u * lanes, n, tally);
      put<whole>((k.rate * one) / (sqrt(two) / k.root + k.eps) + theta[u] * k.decay, row.parameters + at + u * lanes, n, tally);
    }
  }
}

// Calls body<vectors, whole>(place, lanes in use) over [begin, end) of a row.
template <typename C, typename Body>
FEDKERN_INLINE void over(std::int64_t begin, std::int64_t end, Body&& body) {
  constexpr int lanes = Vec<C>::lanes;
  std::int64_t at = begin;
  for (; at + kGroup * lanes <= end; at += kGroup * lanes) body.template operator()<kGroup, true>(at, lanes);
  for (; at + lanes <= end; at += lanes) body.template operator()<1, true>(at, lanes);
  if (at < end) body.template operator()<1, false>(at, end - at);
}

// Calls body(row, begin, end, chunk) for every chunk of every row.
template <typename Body>
void each_chunk(const OptimiserStep& a, double seconds, Body&& body) {
  const std::int64_t chunks = (a.size + a.chunk - 1) / a.chunk;
  auto some = [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t unit = first; unit < last; ++unit) {
      const std::int64_t begin = unit % chunks * a.chunk;
      body(unit / chunks, begin, std::min(begin + a.chunk, a.size), unit);
    }
  };
  parallel_for(a.rows * chunks, 1, a.threads, seconds * static_cast<double>(a.rows * a.size), some);
}

template <typename T>
void squares(const OptimiserStep& a) {
  using C = computed_t<T>;
  each_chunk(a, 3 * sizeof(T) * 0.6e-10, [&](std::int64_t m, std::int64_t begin, std::int64_t end, std::int64_t unit) {
    const Row<T> row(a, m);
    const Numbers<C> numbers(a, m);
    Tally<C> tally;
    over<C>(begin, end, [&]<int count, bool whole>(std::int64_t at, std::ptrdiff_t n) { add_squares<count, whole, C>(row, numbers, at, n, tally); });
    a.squares[unit] = tally.sum();
  });
}

template <typename T, OptimiserRule rule>
void step(const OptimiserStep& a) {
  using C = computed_t<T>;
  const double each = 5 * sizeof(T) * 0.6e-10 + (rule == OptimiserRule::adamw ? 5e-10 : 0);
  each_chunk(a, each, [&](std::int64_t m, std::int64_t begin, std::int64_t end, std::int64_t unit) {
    const Row<T> row(a, m);
    const Numbers<C> numbers(a, m);
    Tally<C> tally;
    over<C>(begin, end, [&]<int count, bool whole>(std::int64_t at, std::ptrdiff_t n) { advance<rule, count, whole, C>(a, row, numbers, at, n, tally); });
    if (!a.scales) a.squares[unit] = tally.sum();
    a.finite[unit] = tally.finite();
  });
}

void squares_any(const OptimiserStep& a) {
  with_type(a.dtype, [&](auto in) { squares<decltype(in)>(a); });
}

void step_any(const OptimiserStep& a) {
  with_type(a.dtype, [&](auto in) {
    if (a.rule == OptimiserRule::adamw)
      step<decltype(in), OptimiserRule::adamw>(a);
    else
      step<decltype(in), OptimiserRule::sgd>(a);
  });
}

}  // namespace

const OptimiseTable optimise_table = {squares_any, step_any};

}  // namespace fedkern::FEDKERN_ISA
