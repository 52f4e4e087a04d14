// The limit T = infinity of ensemble_kl, and gradients that mixtures of logits share with it.
#pragma once

#include "distill_consensus.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class LimitLosses : public ConsensusLosses<T, LanesAreRows> {
 protected:
  using Base = ConsensusLosses<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::V;
  using Base::call_, Base::factor_, Base::fetch, Base::finish, Base::K_, Base::kDenominator, Base::kDot, Base::kDrift;
  using Base::kInverse, Base::kLogSum, Base::kLoss, Base::kMaximum, Base::kOut, Base::kShare, Base::kSum, Base::kU;
  using Base::set, Base::share, Base::single, Base::stat, Base::store, Base::tiles_, Base::total, Base::vectors_;
  using Base::x;

  // A weight of 0 gets no gradient, nor do weights that sum to 0.
  void store_class_weights(std::int64_t k, Line out) {
    const V zero = V::set(0);
    for (std::int64_t v = 0; v < vectors_; ++v) {
      const Mask<T> nothing = (share(k)[v] == zero) | (single(kDenominator)[v] == zero);
      out.set(v, select(nothing, zero, out[v]));
    }
    store(call_.weights_grad, k * call_.weights_grad.stack_stride, out);
  }

  // From the gradient of the mixed logits (kU) to those of teachers and weights in the current tile. Where teachers
  // were centered, kDrift is what that takes from every class.
  void spread_logit_gradient() {
    const V zero = V::set(0);
    const Line g = single(kU), out = single(kOut);
    const std::int64_t z = K_ + 1;
    for (std::int64_t k = 0; k < K_; ++k) {
      if (call_.teachers_grad.present) {
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V w = call_.by_class ? share(k)[v] : stat(kShare, k);
          V value = w * g[v];
          if (this->centered_) value = value - select(x(k)[v] > V::set(kNone<T>), stat(kDrift, k), zero);
          out.set(v, value * factor_[0]);
        }
        store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
      }
      if (!call_.weights_grad.present) continue;
      V sum = zero;
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V value = select(g[v] == zero, zero, g[v] * (x(k)[v] - x(z)[v]));
        sum = sum + value;
        if (call_.by_class) out.set(v, value * factor_[0] / single(kDenominator)[v]);
      }
      set(kDot, k, stat(kDot, k) + total(sum));
      if (call_.by_class) store_class_weights(k, out);
    }
  }

  // --- T = infinity: half the variance over classes of mixed logits - student

  // d of line k at v, and whether the class is unmasked in both.
  FEDKERN_INLINE V difference(std::int64_t k, std::int64_t v, Mask<T>& masked) const {
    const V a = x(k)[v], b = x(K_)[v], none = V::set(kNone<T>);
    masked = (a == none) | (b == none);
    return this->over_student(k, v);
  }

  // Adds up f(k, d) over the unmasked classes of lines [begin, end) into `name`.
  template <typename F>
  void sum_differences(std::int64_t begin, std::int64_t end, typename Base::Stat name, F f) {
    this->clear(name);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (std::int64_t k = begin; k < end; ++k) {
        V sum = V::set(0);
        for (std::int64_t v = 0; v < vectors_; ++v) {
          Mask<T> masked;
          const V d = difference(k, v, masked);
          sum = sum + select(masked, V::set(0), f(k, d));
        }
        set(name, k, stat(name, k) + total(sum));
      }
    }
  }

  void limit(Sums& sums) {
    const V zero = V::set(0);
    const bool mixed = call_.kind != EnsembleKind::mean;
    if (mixed && call_.kind == EnsembleKind::probs && call_.by_class) find_centers();
    const std::int64_t begin = mixed ? K_ + 1 : 0, end = mixed ? K_ + 2 : K_;
    // kInverse: number of classes; kMaximum: mean of the differences; kLoss: half their variance.
    sum_differences(begin, end, kInverse, [](std::int64_t, V) { return V::set(1); });
    sum_differences(begin, end, kMaximum, [](std::int64_t, V d) { return d; });
    for (std::int64_t k = begin; k < end; ++k) set(kMaximum, k, stat(kMaximum, k) / stat(kInverse, k));
    // The mean of what is left over corrects the rounding of the first one.
    sum_differences(begin, end, kLoss, [&](std::int64_t k, V d) { return d - stat(kMaximum, k); });
    for (std::int64_t k = begin; k < end; ++k) set(kMaximum, k, stat(kMaximum, k) + bounded<T>(stat(kLoss, k) / stat(kInverse, k)));
    sum_differences(begin, end, kLoss, [&](std::int64_t k, V d) {
      const V rest = d - stat(kMaximum, k);
      return rest * rest;
    });
    V loss = zero;
    for (std::int64_t k = begin; k < end; ++k) {
      const V w = mixed ? V::set(1) : stat(kShare, k), value = stat(kLoss, k) * V::set(T(0.5)) / stat(kInverse, k);
      set(kDot, k, value);
      loss = loss + select(w == zero, zero, w * value);
    }
    finish(0, loss, sums);
    mixed ? mixed_limit_gradients() : mean_limit_gradients();
  }

  FEDKERN_INLINE V deviation(std::int64_t k, std::int64_t v) const {
    Mask<T> masked;
    const V d = difference(k, v, masked);
    return select(masked, V::set(0), (d - stat(kMaximum, k)) / stat(kInverse, k));
  }

  void mixed_limit_gradients() {
    const V zero = V::set(0);
    this->clear(kDot), this->clear(kDrift);
    for (int round = this->centered_ ? 0 : 1; round < 2; ++round)
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        fetch(tile);
        const Line g = single(kU), out = single(kOut);
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V value = deviation(K_ + 1, v);
          g.set(v, value);
          out.set(v, (zero - value) * factor_[0]);
        }
        if (round == 0) {  // kDrift: what the centre takes from every class of a teacher
          for (std::int64_t k = 0; k < K_; ++k) {
            V sum = zero;
            for (std::int64_t v = 0; v < vectors_; ++v) sum = sum + share(k)[v] * g[v];
            set(kDrift, k, stat(kDrift, k) + total(sum) / stat(kLogSum, k));
          }
          continue;
        }
        if (call_.student_grad.present) store(call_.student_grad, 0, out);
        spread_logit_gradient();
      }
    if (call_.weights_grad.present && !call_.by_class) this->store_weight_gradients(factor_[0]);
  }

  void mean_limit_gradients() {
    const V zero = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      const Line out = single(kOut), sum = single(kU);
      for (std::int64_t v = 0; v < vectors_; ++v) sum.set(v, zero);
      for (std::int64_t k = 0; k < K_; ++k) {
        const V w = stat(kShare, k);
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V value = select(w == zero, zero, w * deviation(k, v) * factor_[0]);
          out.set(v, value);
          sum.set(v, sum[v] - value);
        }
        if (call_.teachers_grad.present) store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
      }
      if (call_.student_grad.present) store(call_.student_grad, 0, sum);
    }
    if (call_.weights_grad.present) this->store_weight_gradients(factor_[0]);
  }

  // The mean of every teacher's finite logits, which softmax ignores but weights per class do not: kSum, their number
  // kLogSum. From then on tiles are fetched without it.
  void find_centers() {
    const V zero = V::set(0), none = V::set(kNone<T>);
    this->centered_ = false;
    this->loaded_ = -1;
    this->clear(kSum), this->clear(kLogSum);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (std::int64_t k = 0; k < K_; ++k) {
        V sum = zero, count = zero;
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V value = x(k)[v];
          const Mask<T> masked = value == none;
          sum = sum + select(masked, zero, value);
          count = count + select(masked, zero, V::set(1));
        }
        set(kSum, k, stat(kSum, k) + total(sum));
        set(kLogSum, k, stat(kLogSum, k) + total(count));
      }
    }
    for (std::int64_t k = 0; k < K_; ++k) set(kSum, k, stat(kSum, k) / stat(kLogSum, k));
    this->centered_ = true;
    this->loaded_ = -1;
  }

 public:
  using Base::Base;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
