// js and consensus: K distributions against their mixture.
#pragma once

#include "distill_lines.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class ConsensusLosses : public Lines<T, LanesAreRows> {
 protected:
  using Base = Lines<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::V;
  using Base::call_, Base::e, Base::factor_, Base::fetch_with_exponentials, Base::finish, Base::K_, Base::log1p;
  using Base::kAnchor, Base::kDot, Base::kDrift, Base::kInverse, Base::kLogSum, Base::kLoss, Base::kMaximum;
  using Base::kMixture, Base::kOut, Base::kShare, Base::kSum, Base::kTiny, Base::kTogether, Base::kU, Base::lanes;
  using Base::mean_of, Base::mix, Base::packs, Base::set, Base::share, Base::single,
      Base::stat, Base::stats, Base::store, Base::tiles_, Base::total;
  using Base::vectors_, Base::x;

  // Losses (in units of T^2) below this are computed again relative to an anchor row.
  static constexpr T kNear = T(0.01);

  struct Term {
    V value;       // P (e^u - 1 - u)
    V difference;  // Q - P
  };

  // u = log Q - log P is looked at where P is not 0; elsewhere Q alone counts.
  static FEDKERN_INLINE Term term(V p, V q, V u) {
    u = select(p > V::set(0), u, V::set(2));
    const Mask<T> small = abs(u) < V::set(small_exponent<T>);
    const V remainder = u * u * exp_remainder(u), difference = q - p;
    return {select(small, p * remainder, fma(V::set(0) - p, u, difference)),
            select(small, p * (u + remainder), difference)};
  }

  // A rounded normaliser shifts every u of a row by some e: sum (Q - P) shows it as e^e - 1 where it should be 0, and
  // it has added e^e - 1 - e to the divergence. That counts where Q ~ P.
  static FEDKERN_INLINE V corrected(V sum, V drift) {
    return max(V::set(0), fma(drift * drift, V::set(static_cast<T>(-0.5)), sum));
  }

  static FEDKERN_INLINE V small_exp_minus_one(V x) { return fma(x * x, exp_remainder(x), x); }

  // --- Jensen-Shannon

  void jensen_shannon(Sums& sums) {
    this->find_statistics(0, K_, false, true);
    V loss = divergences<false>();
    const bool near = (loss < V::set(kNear)).any();
    if (near) loss = divergences<true>();
    // Rounded down: no result exceeds log K.
    const double most = __builtin_log(static_cast<double>(K_));
    T bound = static_cast<T>(most);
    if (static_cast<double>(bound) > most) bound *= 1 - (sizeof(T) == 8 ? T(2.3e-16) : T(1.2e-7));
    loss = min(V::set(bound), loss);
    finish(0, loss, sums);
    if (call_.teachers_grad.present) near ? js_gradients<true>() : js_gradients<false>();
    if (call_.weights_grad.present) {
      for (std::int64_t k = 0; k < K_; ++k) set(kDot, k, stat(kLoss, k));
      this->store_weight_gradients(factor_[0]);
    }
  }

  // log of the mixture: of its own, or relative to the anchor's probability (then kAnchor holds its logit) where all
  // differences from the anchor are small.
  template <bool Near>
  void find_log_mixture() {
    mix();
    const Line m = single(kMixture), out = single(kU), anchor = single(kAnchor);
    if constexpr (!Near) {
      for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, log(max(V::set(kTiny), m[v])));
    } else {
      const V zero = V::set(0);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        V a = x(0)[v];
        for (std::int64_t k = K_ - 1; k >= 0; --k) a = select(stat(kShare, k) > zero, x(k)[v], a);
        V r = zero;
        Mask<T> near = V::set(0) == V::set(0);
        for (std::int64_t k = 0; k < K_; ++k) {
          const V d = relative(k, x(k)[v], a), w = stat(kShare, k);
          near = near & ((abs(d) < V::set(small_exponent<T>)) | (w == zero));
          r = r + select(w == zero, zero, w * small_exp_minus_one(d));
        }
        out.set(v, select(near, log1p(r), log(max(V::set(kTiny), m[v]))));
        anchor.set(v, select(near, a, V::set(static_cast<T>(__builtin_nan("")))));
      }
    }
  }

  // log p of teacher k, of its own or relative to the anchor.
  FEDKERN_INLINE V relative(std::int64_t k, V value, V a) const {
    return (value - a) - (stat(kMaximum, k) - anchor_maximum_) - (stat(kLogSum, k) - anchor_log_sum_);
  }
  // The same, its statistics in registers.
  template <bool Near>
  struct LogP {
    V peak, log_sum, shift, ratio;
    Line anchor;
    FEDKERN_INLINE V operator()(V value, std::int64_t v) const {
      const V own = (value - peak) - log_sum;
      if constexpr (!Near) return own;
      const V a = anchor[v];
      return select(a == a, (value - a) - shift - ratio, own);
    }
  };
  template <bool Near>
  FEDKERN_INLINE LogP<Near> log_p(std::int64_t k) const {
    const V peak = stat(kMaximum, k), log_sum = stat(kLogSum, k);
    return {peak, log_sum, peak - anchor_maximum_, log_sum - anchor_log_sum_, single(kAnchor)};
  }

  // What the current tile adds to kLoss and kDrift of teachers k to k + N - 1.
  template <bool Near, int N>
  FEDKERN_INLINE void add_divergences(std::int64_t k) const {
    const V zero = V::set(0);
    const Line m = single(kMixture), l = single(kU);
    const std::int64_t count = vectors_;
    V inverse[N], sum[N], drift[N];
    LogP<Near> log_of[N];
    Line from[N], power[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      inverse[i] = stat(kInverse, k + i), log_of[i] = log_p<Near>(k + i);
      from[i] = x(k + i), power[i] = e(k + i);
      sum[i] = drift[i] = zero;
    }
    for (std::int64_t v = 0; v < count; ++v)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V value = from[i][v], u = l[v] - log_of[i](value, v), p = power[i][v] * inverse[i];
        if constexpr (Near) {
          const Term t = term(p, m[v], u);
          sum[i] = sum[i] + t.value;
          drift[i] = drift[i] + t.difference;
        } else {  // far apart nothing cancels
          sum[i] = sum[i] - select(p == zero, p, p * u);
        }
      }
    this->template add_totals<N>(kLoss, k, sum);
    if (Near) this->template add_totals<N>(kDrift, k, drift);
  }

  // KL(p || mixture) of every teacher as kLoss; returns their weighted sum.
  template <bool Near>
  V divergences() {
    if constexpr (Near) {
      const V zero = V::set(0);
      anchor_maximum_ = stat(kMaximum, 0), anchor_log_sum_ = stat(kLogSum, 0);
      for (std::int64_t k = K_ - 1; k >= 0; --k) {
        const Mask<T> counts = stat(kShare, k) > zero;
        anchor_maximum_ = select(counts, stat(kMaximum, k), anchor_maximum_);
        anchor_log_sum_ = select(counts, stat(kLogSum, k), anchor_log_sum_);
      }
    }
    this->clear(kLoss), this->clear(kDrift);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      find_log_mixture<Near>();
      std::int64_t k = 0;
      if (!Near)
        for (; k + kTogether <= K_; k += kTogether) add_divergences<Near, kTogether>(k);
      for (; k < K_; ++k) add_divergences<Near, 1>(k);
    }
    for (std::int64_t i = 0; i < packs(K_); ++i) stats(kLoss).set(i, corrected(stats(kLoss)[i], stats(kDrift)[i]));
    return mean_of(kLoss);
  }

  // -w p (u + KL)
  template <bool Near>
  void js_gradients() {
    const V zero = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      if (tiles_ > 1) {
        fetch_with_exponentials(tile);
        find_log_mixture<Near>();
      }
      const Line l = single(kU), out = single(kOut);
      const std::int64_t count = vectors_;
      for (std::int64_t k = 0; k < K_; ++k) {
        const V kl = stat(kLoss, k), w = (zero - stat(kShare, k)) * factor_[0] * stat(kInverse, k);
        const LogP<Near> log_of = log_p<Near>(k);
        const Line from = x(k), powers = e(k);
        for (std::int64_t v = 0; v < count; ++v) {
          const V power = powers[v], u = l[v] - log_of(from[v], v);
          out.set(v, select(power == zero, zero, w * power * (u + kl)));
        }
        store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
      }
    }
  }

  // --- entropy of the mixture, mean of the entropies

  void consensus(Sums& sums) {
    const V zero = V::set(0), one = V::set(1);
    const bool kept = call_.kept.present;
    if (kept && call_.teachers_grad.present) return resume_consensus();
    const bool gradients = call_.teachers_grad.present || call_.weights_grad.present || kept;
    // Gradients of logits take no entropies: those of a backward pass alone need no log Z.
    bool entropies = call_.weights_grad.present;
    for (int i = 0; i < 2; ++i) entropies = entropies || call_.row_loss[i].present || call_.total[i].present;
    // kLoss: sum p (max - x), the entropy less log Z, both >= 0; kDot: the cross entropy to the mixture.
    this->clear(kLoss), this->clear(kDot);
    this->template find_statistics<true>(0, K_, false, entropies);
    V mixed = zero;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile);
      find_log_mixture<false>();
      const Line m = single(kMixture), l = single(kU);
      V sum = zero;
      for (std::int64_t v = 0; v < vectors_; ++v) sum = sum - m[v] * l[v];
      mixed = mixed + total(sum);
      if (kept) store(call_.kept, 4 * K_ * call_.kept.class_stride, l);
      if (!gradients) continue;
      std::int64_t k = 0;
      for (; k + kTogether <= K_; k += kTogether) add_cross<kTogether>(k);
      for (; k < K_; ++k) add_cross<1>(k);
    }
    for (std::int64_t i = 0; i < packs(K_); ++i) {
      const V depth = stats(kLoss)[i] * stats(kInverse)[i];
      stats(kDrift).set(i, depth);
      if (entropies) stats(kLoss).set(i, depth + stats(kLogSum)[i]);
    }
    if (kept)
      for (int place = 0; place < 4; ++place) this->keep(place, kKept[place]);
    // A mixture that rounding lifts above 1 would make this negative.
    if (entropies) finish(0, max(zero, mixed), sums), finish(1, mean_of(kLoss), sums);
    if (call_.teachers_grad.present) consensus_gradients();
    if (call_.weights_grad.present) {
      for (std::int64_t k = 0; k < K_; ++k)
        set(kDot, k, factor_[0] * stat(kDot, k) + factor_[1] * stat(kLoss, k));
      this->store_weight_gradients(one);
    }
  }

  static constexpr typename Base::Stat kKept[4] = {kMaximum, kInverse, kDot, kDrift};

  // The backward pass, from what the forward pass kept.
  void resume_consensus() {
    for (int place = 0; place < 4; ++place) this->take_back(place, kKept[place]);
    const bool in_place = this->in_place(call_.teachers) && this->in_place(call_.teachers_grad);
    if (tiles_ > 1 || this->any_zero_ || !in_place) return consensus_gradients();
    this->set_tile(0);
    const std::int64_t step = LanesAreRows ? call_.teachers.class_stride : lanes;
    const std::int64_t out_step = LanesAreRows ? call_.teachers_grad.class_stride : lanes;
    const std::int64_t whole = LanesAreRows ? vectors_ : this->classes_here() / lanes;
    const std::ptrdiff_t left = LanesAreRows ? 0 : this->classes_here() % lanes;
    const std::int64_t ahead = LanesAreRows ? lanes : call_.teachers.row_stride[call_.row_dims - 1];
    const T* from = static_cast<const T*>(call_.teachers.data) + this->offset(call_.teachers);
    T* out = static_cast<T*>(call_.teachers_grad.data) + this->offset(call_.teachers_grad);
    const Line l = single(kU);
    this->load(call_.kept, 4 * K_ * call_.kept.class_stride, l, T(0));
    const ScaledExp<T> power_of = this->power_;
    const V zero = V::set(0);
    for (std::int64_t k = 0; k < K_; ++k) {
      const Slope slope = slope_of(k);
      const V start = this->origin(stat(kMaximum, k));
      for (std::int64_t v = 0; v < whole; ++v) {
        __builtin_prefetch(from + v * step + ahead);
        const V over = V::load(from + v * step) - start, power = power_of(over);
        select(power == zero, zero, power * slope(l[v], over)).store(out + v * out_step);
      }
      if (left) {
        const V over = V::load_partial(from + whole * lanes, left, kNone<T>) - start, power = power_of(over);
        select(power == zero, zero, power * slope(l[whole], over)).store_partial(out + whole * lanes, left);
      }
      from += call_.teachers.stack_stride, out += call_.teachers_grad.stack_stride;
    }
  }

  // What the current tile adds to kDot of teachers k to k + N - 1.
  template <int N>
  FEDKERN_INLINE void add_cross(std::int64_t k) const {
    const Line l = single(kU);
    const std::int64_t count = vectors_;
    Line power[N];
    V cross[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) power[i] = e(k + i), cross[i] = V::set(0);
    for (std::int64_t v = 0; v < count; ++v)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) cross[i] = fma(power[i][v], l[v], cross[i]);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) cross[i] = cross[i] * (V::set(0) - stat(kInverse, k + i));
    this->template add_totals<N>(kDot, k, cross);
  }

  // The gradient over the exponential, from the log of the mixture and the logit - its line's maximum.
  struct Slope {
    V g, h, fixed;  // both factors times -w / Z, and what does not depend on the class
    FEDKERN_INLINE V operator()(V log_mixture, V over) const { return fma(g, log_mixture, fma(h, over, fixed)); }
  };
  FEDKERN_INLINE Slope slope_of(std::int64_t k) const {
    const V w = V::set(0) - stat(kShare, k) * stat(kInverse, k), g = w * factor_[0], h = w * factor_[1];
    return {g, h, fma(g, stat(kDot, k), h * stat(kDrift, k))};
  }

  // w p (g (-log mixture - cross entropy) + h (-log p - entropy))
  void consensus_gradients() {
    const V zero = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      if (tiles_ > 1 || call_.kept.present) {
        fetch_with_exponentials(tile);
        if (!call_.kept.present) find_log_mixture<false>();
      }
      const Line l = single(kU), out = single(kOut);
      const std::int64_t count = vectors_;
      if (call_.kept.present) this->load(call_.kept, 4 * K_ * call_.kept.class_stride, l, T(0));
      for (std::int64_t k = 0; k < K_; ++k) {
        const Slope slope = slope_of(k);
        const V peak = stat(kMaximum, k);
        const Line from = x(k), powers = e(k);
        for (std::int64_t v = 0; v < count; ++v) {
          const V power = powers[v];
          out.set(v, select(power == zero, zero, power * slope(l[v], from[v] - peak)));
        }
        store(call_.teachers_grad, k * call_.teachers_grad.stack_stride, out);
      }
    }
  }

  V anchor_maximum_ = V::set(0), anchor_log_sum_ = V::set(0);

 public:
  using Base::Base;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
