// ensemble_kl: K teachers, or what they are mixed into, against a student.
#pragma once

#include "distill_probabilities.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class EnsembleLosses : public ProbabilityLosses<T, LanesAreRows> {
  using Base = ProbabilityLosses<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::Term;
  using typename Base::V;
  using Base::call_, Base::corrected, Base::e, Base::factor_, Base::fetch_with_exponentials, Base::finish, Base::K_;
  using Base::kDot, Base::kDrift, Base::kInverse, Base::kLoss, Base::kOut, Base::kShare, Base::kSum, Base::kU;
  using Base::log_ratio, Base::set, Base::single, Base::stat, Base::store, Base::student_inverse_;
  using Base::student_probability, Base::temperature_, Base::term, Base::tiles_, Base::total, Base::vectors_, Base::x;

 public:
  explicit EnsembleLosses(const EnsembleCall& call) : Base(call) {
    this->mixes_logits_ = call.kind == EnsembleKind::logits || (call.limit && call.kind == EnsembleKind::probs);
    if (this->mixes_logits_) this->end_ = K_ + 2;
    this->unkept_ = !LanesAreRows && tiles_ == 1 && call.kind == EnsembleKind::probs && !call.limit && !call.as_is;
    this->passing_ = this->mixes_logits_ && !call.by_class && !call.weights_grad.present;
  }

  // Does `rows` rows from `row` on along the innermost dimension; adds their losses.
  void run(std::int64_t row, int rows, Sums& sums) {
    this->begin(row, rows);
    factor_[0] = factor_[0] * temperature_;  // of gradients toward logits; those toward weights have one more
    switch (call_.kind) {
      case EnsembleKind::js: return this->jensen_shannon(sums);
      case EnsembleKind::consensus: return this->consensus(sums);
      default: break;
    }
    if (call_.limit) return this->limit(sums);
    switch (call_.kind) {
      case EnsembleKind::probs: return this->probabilities(sums);
      case EnsembleKind::logits: return logits(sums);
      default: return mean(sums);
    }
  }

 private:
  // --- a mixture of logits

  void logits(Sums& sums) {
    const std::int64_t z = K_ + 1;
    this->find_statistics(K_, K_ + 2, false, true);
    student_inverse_ = V::set(1) / stat(kSum, K_);
    const bool late = call_.teachers_grad.present || call_.weights_grad.present;
    const V inverse = stat(kInverse, z), zero = V::set(0);
    // Late gradients take the mean of the ratios themselves, not the loss: ratios of large logits share a rounding error
    // that the loss is free of, and weights multiply what is left of their sum by the distance between the teachers.
    V loss = zero, drift = zero, middle = zero;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      const Line out = single(kOut);
      V sum = zero, rest = zero, ratios = zero;
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const Term t = pair(z, v);
        sum = sum + t.value;
        rest = rest + t.difference;
        out.set(v, t.difference * factor_[0]);
        if (!late) continue;
        const V p = e(z)[v] * inverse;
        ratios = ratios + select(p == zero, zero, p * log_ratio(z, v));
      }
      loss = loss + total(sum);
      drift = drift + total(rest);
      middle = middle + total(ratios);
      if (call_.student_grad.present) store(call_.student_grad, 0, out);
    }
    loss = corrected(loss, drift);
    finish(0, loss * temperature_ * temperature_, sums);
    if (!late) return;
    this->clear(kDot);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      const Line g = single(kU);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V p = e(z)[v] * inverse;
        g.set(v, select(p == zero, zero, (zero - p) * (log_ratio(z, v) - middle)));
      }
      this->spread_logit_gradient();
    }
    // kDot is that of g (x - z): the sum over the teachers of share * kDot is 0 but for rounding.
    if (call_.weights_grad.present && !call_.by_class) this->store_weight_gradients(factor_[0]);
  }

  FEDKERN_INLINE Term pair(std::int64_t k, std::int64_t v) const {
    return term(e(k)[v] * stat(kInverse, k), student_probability(v), log_ratio(k, v));
  }

  // --- the mean of the divergences

  void mean(Sums& sums) {
    const V zero = V::set(0);
    this->find_statistics(0, K_ + 1, call_.as_is, true);
    student_inverse_ = V::set(1) / stat(kSum, K_);
    this->clear(kLoss), this->clear(kDrift);
    // The sum of log-probabilities taken as they are need not be 1.
    V excess = zero;
    if (call_.as_is)
      for (std::int64_t k = 0; k < K_; ++k) excess = excess + stat(kShare, k) * (stat(kSum, k) - V::set(1));
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      const Line out = single(kOut);
      for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, excess * student_probability(v));
      for (std::int64_t k = 0; k < K_; ++k) {
        const V w = stat(kShare, k);
        V sum = zero, rest = zero;
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const Term t = pair(k, v);
          sum = sum + t.value;
          rest = rest + t.difference;
          out.set(v, fma(w, t.difference, out[v]));
        }
        set(kLoss, k, stat(kLoss, k) + total(sum));
        set(kDrift, k, stat(kDrift, k) + total(rest));
      }
      if (!call_.student_grad.present) continue;
      for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, out[v] * factor_[0]);
      store(call_.student_grad, 0, out);
    }
    V loss = zero;
    for (std::int64_t k = 0; k < K_; ++k) {
      set(kLoss, k, corrected(stat(kLoss, k), call_.as_is ? zero : stat(kDrift, k)));
      loss = loss + select(stat(kShare, k) == zero, zero, stat(kShare, k) * stat(kLoss, k));
      set(kDot, k, stat(kLoss, k));
    }
    finish(0, loss * temperature_ * temperature_, sums);
    for (std::int64_t tile = 0; tile < tiles_ && call_.teachers_grad.present; ++tile) {
      fetch_with_exponentials(tile);
      const Line out = single(kOut);
      for (std::int64_t k = 0; k < K_; ++k) {
        const V kl = call_.as_is ? zero : stat(kLoss, k), w = (zero - stat(kShare, k)) * factor_[0] * stat(kInverse, k);
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V power = e(k)[v];
          out.set(v, select((power == zero) | (w == zero), zero, w * power * (log_ratio(k, v) + kl)));
        }
        store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
      }
    }
    if (call_.weights_grad.present) this->store_weight_gradients(factor_[0] * temperature_);
  }
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
