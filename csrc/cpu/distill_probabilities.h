// ensemble_kl(mix="probs"): a student against what K teachers' probabilities are mixed into.
#pragma once

#include "distill_limits.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class ProbabilityLosses : public LimitLosses<T, LanesAreRows> {
 protected:
  using Base = LimitLosses<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::Term;
  using typename Base::V;
  using Base::call_, Base::corrected, Base::e, Base::factor_, Base::fetch_with_exponentials, Base::finish;
  using Base::K_, Base::kAnchor, Base::kDenominator, Base::kDot, Base::kInverse, Base::kLogSum, Base::kMaximum;
  using Base::kMixture, Base::kNear, Base::kOut, Base::kShare, Base::kSum, Base::kTiny, Base::kU;
  using Base::log1p, Base::mix, Base::set, Base::share, Base::single, Base::small_exp_minus_one, Base::stat;
  using Base::store, Base::term, Base::tiles_, Base::total, Base::vectors_, Base::x;

 public:
  explicit ProbabilityLosses(const EnsembleCall& call)
      : Base(call),
        temperature_(V::set(static_cast<T>(call.limit ? 1.0 : call.temperature))),
        inverse_(V::set(static_cast<T>(call.limit ? 1.0 : 1.0 / call.temperature))) {}

 protected:
  // log q - log p of the student and teacher (or mixture of logits) k.
  FEDKERN_INLINE V log_ratio(std::int64_t k, std::int64_t v) const {
    const V over = (V::set(0) - this->moved_over_student(k, v)) - stat(Base::kShift, k);
    return fma(over, inverse_, stat(kLogSum, k) - stat(kLogSum, K_));
  }
  // From the sum itself: it is there before the teachers' inverses, which come by the vector.
  FEDKERN_INLINE V student_probability(std::int64_t v) const { return e(K_)[v] * student_inverse_; }

  void probabilities(Sums& sums) {
    this->find_statistics(0, K_ + 1, call_.as_is, false);
    student_inverse_ = V::set(1) / stat(kSum, K_);
    V loss = divergence<Way::direct>();
    const Way way = choose(loss < V::set(kNear));
    if (way != Way::direct) loss = again(way);
    finish(0, loss * temperature_ * temperature_, sums);
    if (!call_.teachers_grad.present && !call_.weights_grad.present) return;
    switch (way) {
      case Way::direct: return late<Way::direct>(loss);
      case Way::near: return late<Way::near>(loss);
      case Way::lifted: return late<Way::lifted>(loss);
    }
  }

  const V temperature_, inverse_;
  V student_inverse_ = V::set(1);

 private:
  // How the mixture is taken: as a sum of probabilities; where it is near the student's, relative to that; the same
  // over its mass, where masks or weights by class leave so little (or log-probabilities hold so much) that plain
  // probabilities underflow, or that 1 + sum (m - q) has none of its digits.
  enum class Way { direct, near, lifted };
  // The mass that probabilities can be divided by, and their products with gradients taken.
  static constexpr T kFaint = sizeof(T) == 8 ? T(1e-200) : T(1e-20);

  // For all rows of the block, whose normalisers are there.
  Way choose(Mask<T> close) const {
    const Mask<T> held = (normaliser_ > V::set(kFaint)) & (normaliser_ < V::set(1 / kFaint));
    const Mask<T> whole = (normaliser_ > V::set(T(0.5))) & (normaliser_ < V::set(2));
    if ((!held).any() || (close.any() && (!whole).any())) return Way::lifted;
    return close.any() ? Way::near : Way::direct;
  }

  __attribute__((noinline)) V again(Way way) {
    this->find_logs(0, K_ + 1, call_.as_is);
    this->keep_lines();
    if (way == Way::near) return divergence<Way::near>();
    find_mass();
    return divergence<Way::lifted>();
  }

  FEDKERN_INLINE V weight(std::int64_t k, std::int64_t v) const {
    return call_.by_class ? share(k)[v] : stat(kShare, k);
  }

  // lift_: the logarithm of the mixture's sum over classes, -inf where it has nothing.
  void find_mass() {
    V peak = V::set(kNone<T>), sum = V::set(0);
    lift_ = sum;
    each_weighted([&](std::int64_t k, std::int64_t v, V w) {
      peak = max(peak, select(w == V::set(0), V::set(kNone<T>), log_probability(k, v)));
    });
    lift_ = this->most(peak);
    each_weighted([&](std::int64_t k, std::int64_t v, V w) { sum = sum + w * probability<Way::lifted>(k, v, w); });
    lift_ = lift_ + log(max(V::set(kTiny), total(sum)));
  }
  template <typename F>
  FEDKERN_INLINE void each_weighted(F f) {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      for (std::int64_t k = 0; k < K_; ++k)
        for (std::int64_t v = 0; v < vectors_; ++v) f(k, v, weight(k, v));
    }
  }

  // log p of a teacher - lift_.
  FEDKERN_INLINE V log_probability(std::int64_t k, std::int64_t v) const {
    return fma(x(k)[v] - stat(kMaximum, k), inverse_, V::set(0) - (stat(kLogSum, k) + lift_));
  }
  // A teacher's p, of which the mixture is made: lifted over its mass, and then of those who count alone.
  template <Way W>
  FEDKERN_INLINE V probability(std::int64_t k, std::int64_t v, V w) const {
    if constexpr (W == Way::lifted) return select(w == V::set(0), w, exp(log_probability(k, v)));
    return e(k)[v] * stat(kInverse, k);
  }

  // kMixture: the mixture m, not renormalised; kU: log q - log m, where they are near from log(m / q) = log1p(r), and
  // then kAnchor holds m - q = q r. Lifted, m is over its mass.
  template <Way W>
  void find_mixture() {
    constexpr bool lifted = W == Way::lifted;
    if (!lifted) mix();
    const Line m = single(kMixture), u = single(kU), rest = single(kAnchor);
    const V shift = stat(kMaximum, K_), total = stat(kSum, K_);
    for (std::int64_t v = 0; v < vectors_; ++v) {
      const V student = x(K_)[v];
      V sum = lifted ? V::set(0) : m[v], r = V::set(0);
      Mask<T> near = r == r;
      if constexpr (W != Way::direct) {
        const V zero = V::set(0);
        for (std::int64_t k = 0; k < K_; ++k) {
          const V w = weight(k, v), d = lifted ? zero - (log_ratio(k, v) + lift_) : zero - log_ratio(k, v);
          near = near & ((abs(d) < V::set(small_exponent<T>)) | (w == zero));
          r = r + select(w == zero, zero, w * small_exp_minus_one(d));
          if (lifted) sum = sum + w * probability<W>(k, v, w);
        }
        if (lifted) m.set(v, sum);
      }
      V value = fma(student - shift, inverse_, V::set(0) - log(max(V::set(kTiny), sum) * total));
      if constexpr (W != Way::direct) {
        const V q = student_probability(v);
        value = select(near, V::set(0) - log1p(r), value);
        rest.set(v, select(near, q * r, sum - q));
      }
      u.set(v, value);
    }
  }

  // The sum of the mixture over classes: not 1 where weights differ between classes.
  template <Way W>
  void find_normaliser() {
    constexpr bool near = W != Way::direct;
    normaliser_ = V::set(1), log_normaliser_ = V::set(0);
    if (!call_.by_class && !call_.as_is) return;
    V sum = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      find_mixture<W>();
      V part = V::set(0);
      for (std::int64_t v = 0; v < vectors_; ++v) part = part + single(near ? kAnchor : kMixture)[v];
      sum = sum + total(part);
    }
    normaliser_ = near ? V::set(1) + sum : sum;
    log_normaliser_ = near ? log1p(sum) : log(sum);
    if (W == Way::lifted) normaliser_ = fma(lift_, V::set(0), normaliser_);  // of nothing: NaN
  }

  template <Way W>
  V divergence() {
    find_normaliser<W>();
    const bool found = tiles_ == 1 && (call_.by_class || call_.as_is);
    const V inverse = V::set(1) / normaliser_;
    V loss = V::set(0), drift = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      if (!found) find_mixture<W>();
      const Line m = single(kMixture), u = single(kU), out = single(kOut);
      V sum = V::set(0), rest = V::set(0);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const Term t = term(m[v] * inverse, student_probability(v), u[v] + log_normaliser_);
        sum = sum + t.value;
        rest = rest + t.difference;
        out.set(v, t.difference * factor_[0]);
      }
      loss = loss + total(sum);
      drift = drift + total(rest);
      if (call_.student_grad.present) store(call_.student_grad, 0, out);
    }
    return corrected(loss, drift);
  }

  // Gradients of teachers and weights. With g = -(u + KL) / normaliser, dKL / d mixture:
  // toward logits p (w g - sum p w g), toward weights g (p - mixture) over the sum of the weights.
  // Lifted, p of the weights, the mixture and 1 / g are over its mass.
  template <Way W>
  void late(V loss) {
    const V zero = V::set(0), inverse = V::set(1) / normaliser_;
    const bool sums = !call_.by_class || (call_.teachers_grad.present && !call_.as_is);
    this->clear(kDot);
    // Two rounds: the sums, then the gradients. The kU of a single tile is found once.
    for (int round = sums ? 0 : 1; round < 2; ++round)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        fetch_with_exponentials(tile);
        if (tiles_ > 1) find_mixture<W>();
        const Line g = single(kU);
        if (tiles_ > 1 || round == (sums ? 0 : 1))
          for (std::int64_t v = 0; v < vectors_; ++v) {
            const V value = (zero - inverse) * (g[v] + log_normaliser_ + loss);
            g.set(v, select(single(kMixture)[v] > zero, value, zero));
          }
        for (std::int64_t k = 0; k < K_; ++k) round == 0 ? add_dot<W>(k) : store_late<W>(k);
      }
    if (call_.weights_grad.present && !call_.by_class) this->store_weight_gradients(factor_[0] * temperature_);
  }

  FEDKERN_INLINE V weighted(std::int64_t k, std::int64_t v, V g) const {
    if (!call_.by_class) return g;
    const V w = share(k)[v];
    return select(w == V::set(0), w, w * g);
  }

  template <Way W>
  void add_dot(std::int64_t k) {
    constexpr bool lifted = W == Way::lifted;
    const Line g = single(kU);
    V sum = V::set(0);
    for (std::int64_t v = 0; v < vectors_; ++v) {
      const V part = weighted(k, v, g[v]), next = fma(lifted ? probability<W>(k, v, weight(k, v)) : e(k)[v], part, sum);
      // Who counts nowhere may hold anything.
      sum = call_.by_class ? select(part == V::set(0), sum, next) : next;
    }
    sum = total(sum);
    set(kDot, k, stat(kDot, k) + (lifted ? sum : select(sum == V::set(0), sum, sum * stat(kInverse, k))));
  }

  template <Way W>
  void store_late(std::int64_t k) {
    const Line g = single(kU), out = single(kOut);
    const V zero = V::set(0), inverse = stat(kInverse, k);
    if (call_.teachers_grad.present) {
      const V factor = (call_.by_class ? V::set(1) : stat(kShare, k)) * factor_[0];
      const V dot = call_.as_is ? zero : stat(kDot, k);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        if constexpr (W == Way::lifted) {
          // Where the teacher counts nothing its p may be as much above the mixture as numbers go: dot takes it plain.
          const V plain = select(dot == zero, zero, e(k)[v] * inverse * dot);
          out.set(v, factor * (probability<W>(k, v, weight(k, v)) * weighted(k, v, g[v]) - plain));
        } else {
          const V rest = weighted(k, v, g[v]) - dot;
          out.set(v, select(rest == zero, zero, factor * inverse * e(k)[v] * rest));
        }
      }
      store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
    }
    if (call_.weights_grad.present && call_.by_class) {
      const Line m = single(kMixture), sums = single(kDenominator);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V p = probability<W>(k, v, share(k)[v]);
        out.set(v, g[v] * (p - m[v]) * factor_[0] * temperature_ / sums[v]);
      }
      this->store_class_weights(k, out);
    }
  }

  V normaliser_ = V::set(1), log_normaliser_ = V::set(0), lift_ = V::set(0);
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
