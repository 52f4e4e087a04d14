#include "fedkern/sparse.h"

#include <algorithm>
#include <cmath>

#include "fedkern/parallel.h"
#include "fedkern/simd_math.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

constexpr std::int64_t kMaxChunks = 256;
constexpr std::int64_t kChunkElements = 8192;
constexpr double kInfinity = __builtin_inf();

// A full vector, or the end of a row.
template <typename T>
struct Full {
  FEDKERN_INLINE Vec<T> load(const auto* p, T = 0) const { return Vec<T>::load(p); }
  FEDKERN_INLINE void store(auto* p, Vec<T> v) const { v.store(p); }
};
template <typename T>
struct Part {
  std::ptrdiff_t n;
  FEDKERN_INLINE Vec<T> load(const auto* p, T fill = 0) const { return Vec<T>::load_partial(p, n, fill); }
  FEDKERN_INLINE void store(auto* p, Vec<T> v) const { v.store_partial(p, n); }
};

// f(part, place) for the vectors of a row.
template <typename T, typename F>
FEDKERN_INLINE void each(std::int64_t size, F f) {
  constexpr int lanes = Vec<T>::lanes;
  std::int64_t c = 0;
  for (; c + lanes <= size; c += lanes) f(Full<T>{}, c);
  if (c < size) f(Part<T>{static_cast<std::ptrdiff_t>(size - c)}, c);
}

// The sum of f(part, place). Partial sums are short, so that rounding errors do not grow with the number of classes.
template <typename T, typename F>
FEDKERN_INLINE double sum_each(std::int64_t size, F f) {
  constexpr std::int64_t run = 64 * Vec<T>::lanes;
  double sum = 0;
  for (std::int64_t from = 0; from < size; from += run) {
    Vec<T> partial = Vec<T>::set(0);
    each<T>(size - from < run ? size - from : run, [&](auto part, std::int64_t c) { partial = partial + f(part, from + c); });
    sum += static_cast<double>(reduce_add(partial));
  }
  return sum;
}

// P (e^u - 1 - u) and Q - P of classes that have P and Q, where u is log Q - log P.
template <typename T>
struct Term {
  Vec<T> value, difference;

  FEDKERN_INLINE Term(Vec<T> p, Vec<T> q, Vec<T> u) {
    using V = Vec<T>;
    const Mask<T> small = abs(u) < V::set(small_exponent<T>), present = p > V::set(0);
    const V remainder = u * u * exp_remainder(u), far = q - p;
    value = select(present, select(small, p * remainder, fma(V::set(0) - p, u, far)), q);
    difference = select(small & present, p * (u + remainder), far);
  }
};

// T: what is computed in, S: what student and gradient are stored in.
template <typename T, typename S>
class Rows {
  using V = Vec<T>;
  using D = Vec<double>;

 public:
  explicit Rows(const SparseCall& call) : a_(call), inverse_(1 / call.temperature), padded_(pad(call.count)) {}

  // Doubles that a worker needs: the exponentials of a row, and five numbers for each of the k classes.
  std::int64_t memory() const { return pad(a_.classes) + 5 * padded_; }

  // The weighted loss of a row, whose gradient is written.
  double run(std::int64_t row, double* memory, bool& unfit) const {
    T* const power = reinterpret_cast<T*>(memory);
    double* const kept = memory + pad(a_.classes);
    double *const value = kept, *const logit = kept + padded_, *const q = kept + 2 * padded_, *const p = kept + 3 * padded_;
    double* const difference = kept + 4 * padded_;
    const S* const x = static_cast<const S*>(a_.student.data) + row * a_.student.step;
    const std::int64_t* const index = a_.indices + row * a_.count;

    const T most = maximum(x);
    const V top = V::set(most), scale = V::set(static_cast<T>(inverse_));
    each<T>(a_.classes, [&](auto part, std::int64_t c) {
      part.store(power + c, exp_of_nonpositive((part.load(x + c) - top) * scale));
    });

    // The teacher's classes are taken out of the exponentials: a negative number marks them.
    double highest = -kInfinity;
    for (std::int64_t i = 0; i < a_.count; ++i) {
      const std::int64_t c = index[i];
      if (c < 0 || c >= a_.classes || power[c] < 0) return unfit = true, 0.0;
      value[i] = load_scalar(a_.values.dtype, a_.values.data, row * a_.count + i);
      if (a_.spreads && value[i] > kMostLogProbability) return unfit = true, 0.0;
      highest = value[i] > highest ? value[i] : highest;
      logit[i] = static_cast<double>(widen(x[c])) - static_cast<double>(most);
      q[i] = static_cast<double>(power[c]);
      power[c] = -1;
    }

    // What the teacher's probabilities leave to each other class.
    double rest = -kInfinity;
    if (a_.spreads && a_.count < a_.classes) {
      const double taken = sum_each<double>(a_.count, [&](auto part, std::int64_t i) { return exp(part.load(value + i, -kInfinity)); });
      rest = taken < 1 ? std::log((1 - taken) / static_cast<double>(a_.classes - a_.count)) : taken != taken ? taken : -kInfinity;
      highest = rest > highest ? rest : highest;
    }

    // Sums of the exponentials: of student and teacher, at all classes.
    const double others = sum_each<T>(a_.classes, [&](auto part, std::int64_t c) { return max(V::set(0), part.load(power + c)); });
    const double beside = rest == -kInfinity ? 0.0 : std::exp((rest - highest) * inverse_);
    const D inverse = D::set(inverse_), peak = D::set(highest);
    const double known = sum_each<double>(a_.count, [&](auto part, std::int64_t i) {
      const D power_p = exp_of_nonpositive((part.load(value + i, -kInfinity) - peak) * inverse);
      part.store(p + i, power_p);
      return power_p;
    });
    const double sum_q = others + sum_each<double>(a_.count, [&](auto part, std::int64_t i) { return part.load(q + i); });
    const double sum_p = known + beside * static_cast<double>(a_.classes - a_.count);
    const double ratio = std::log(sum_q / sum_p);

    const D over_q = D::set(1 / sum_q), over_p = D::set(1 / sum_p), shift = D::set(ratio);
    double loss = sum_each<double>(a_.count, [&](auto part, std::int64_t i) {
      const D over = part.load(logit + i) - (part.load(value + i) - peak);
      const Term<double> term(part.load(p + i) * over_p, part.load(q + i) * over_q, fma(over, inverse, D::set(0) - shift));
      part.store(difference + i, term.difference);
      return term.value;  // 0 past the end, where P and Q are 0
    });

    const double weight = number(a_.weight, row, 1), square = a_.temperature * a_.temperature;
    const double factor = weight * a_.scale * a_.temperature * number(a_.grad, row, 1);
    S* const to = a_.gradient.present ? static_cast<S*>(a_.gradient.data) + row * a_.gradient.step : nullptr;
    const V share = V::set(static_cast<T>(1 / sum_q)), slope = V::set(static_cast<T>(factor));
    if (!(beside <= 0)) {
      const V p_rest = V::set(static_cast<T>(beside / sum_p));
      const V move = V::set(static_cast<T>(-(ratio + (rest - highest) * inverse_)));
      loss += sum_each<T>(a_.classes, [&](auto part, std::int64_t c) {
        const V e = part.load(power + c, -1), u = fma(part.load(x + c) - top, scale, move);
        const Term<T> term(p_rest, e * share, u);
        if (to) part.store(to + c, term.difference * slope);
        return select(e < V::set(0), V::set(0), term.value);
      });
    } else {
      loss += others / sum_q;
      const V both = share * slope;
      if (to) each<T>(a_.classes, [&](auto part, std::int64_t c) { part.store(to + c, part.load(power + c) * both); });
    }
    for (std::int64_t i = 0; to && i < a_.count; ++i) narrow(static_cast<T>(difference[i] * factor), to[index[i]]);
    if (weight == 0 && to) each<T>(a_.classes, [&](auto part, std::int64_t c) { part.store(to + c, V::set(0)); });

    const double weighted = weight == 0 ? 0 : weight * square * (loss < 0 ? 0 : loss);
    if (a_.losses.present) store_scalar(a_.losses.dtype, a_.losses.data, row * a_.losses.step, weighted);
    return weighted;
  }

 private:
  static std::int64_t pad(std::int64_t size) { return (size + 7) / 8 * 8; }

  static double number(const RowNumbers& x, std::int64_t row, double otherwise) {
    return x.present ? load_scalar(x.dtype, x.data, row * x.step) : otherwise;
  }

  T maximum(const S* x) const {
    V most = V::set(static_cast<T>(-kInfinity));
    each<T>(a_.classes, [&](auto part, std::int64_t c) { most = max(most, part.load(x + c, static_cast<T>(-kInfinity))); });
    return reduce_max(most);
  }

  const SparseCall& a_;
  const double inverse_;
  const std::int64_t padded_;
};

template <typename T, typename S>
bool run_as(const SparseCall& call) {
  const Rows<T, S> rows(call);
  const std::int64_t least = kChunkElements / call.classes + 1, even = (call.rows + kMaxChunks - 1) / kMaxChunks;
  const std::int64_t chunk = least > even ? least : even;
  const Scratch<double> memory(rows.memory(), parallel_workers(call.rows, chunk, call.threads));
  double partial[kMaxChunks] = {};
  bool unfit[kMaxChunks] = {};
  auto body = [&](std::int64_t begin, std::int64_t end, int worker) {
    for (std::int64_t row = begin; row < end; ++row) partial[begin / chunk] += rows.run(row, memory.get(worker), unfit[begin / chunk]);
  };
  const double elements = static_cast<double>(call.rows) * static_cast<double>(call.classes);
  parallel_for(call.rows, chunk, call.threads, elements * (sizeof(T) == 8 ? 3 : 1) * 6.4e-9 / Vec<float>::lanes, body);
  double total = 0;
  for (std::int64_t i = 0; i * chunk < call.rows; ++i) total += partial[i];
  if (call.total.present) store_scalar(call.total.dtype, call.total.data, 0, total * call.scale);
  return std::none_of(unfit, unfit + kMaxChunks, [](bool x) { return x; });
}

bool run(const SparseCall& call) {
  switch (call.student.dtype) {
    case DType::f64: return run_as<double, double>(call);
    case DType::bf16: return run_as<float, bf16>(call);
    case DType::f16: return run_as<float, f16>(call);
    default: return run_as<float, float>(call);
  }
}

}  // namespace

const SparseTable sparse_table = {run};

}  // namespace fedkern::FEDKERN_ISA
