// What K teachers count in a row, what gradients are multiplied by, and what leaves a block: one number per row.
#pragma once

#include "distill_storage.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class Shares : public Storage<T, LanesAreRows> {
 protected:
  using Base = Storage<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::V;
  using Base::call_, Base::first_, Base::inner_stride, Base::K_, Base::kDenominator, Base::kDot, Base::kShare;
  using Base::kStep, Base::kWeight, Base::lanes, Base::load, Base::offset, Base::row_, Base::rows_, Base::set;
  using Base::share, Base::single, Base::stat, Base::vectors_;

 public:
  explicit Shares(const EnsembleCall& call) : Base(call), scale_(V::set(static_cast<T>(call.scale))) {
    weights_fixed_ = true;
    for (int d = 0; d < call.row_dims && call.weights.present; ++d) weights_fixed_ &= call.weights.row_stride[d] == 0;
  }

 protected:
  void begin(std::int64_t row, int rows) {
    row_ = row;
    rows_ = rows;
    loaded_ = -1;
    for (int i = 0; i < 2; ++i) factor_[i] = scale_;
    for (int i = 0; i < 2; ++i)
      if (call_.grad_output[i].present) {
        alignas(64) T values[lanes];
        const RowValues& g = call_.grad_output[i];
        const std::int64_t at = offset(g), stride = inner_stride(g);
        if (stride == 0) {
          factor_[i] = V::set(static_cast<T>(call_.scale * load_scalar(g.dtype, g.data, at)));
          continue;
        }
        for (int r = 0; r < lanes; ++r)
          values[r] = static_cast<T>(call_.scale * load_scalar(g.dtype, g.data, at + (r < rows ? r : 0) * stride));
        factor_[i] = V::load(values);
      }
    if (!call_.by_class && !(weights_fixed_ && shares_known_)) find_shares();
  }

  // Weights of whole rows, normalised: kShare; what they were divided by: kWeight of line 0.
  void find_shares() {
    shares_known_ = true;
    any_zero_ = false;
    const V equal = V::set(static_cast<T>(1.0 / static_cast<double>(K_)));
    const Stack& given = call_.weights;
    if (!given.present) {
      for (std::int64_t k = 0; k < K_; ++k) set(kShare, k, equal);
      return;
    }
    V sum = V::set(0);
    const std::int64_t base = offset(given), stride = inner_stride(given);
    for (std::int64_t k = 0; k < K_; ++k) {
      const std::int64_t at = base + k * given.stack_stride;
      V w = V::set(static_cast<T>(load_scalar(given.dtype, given.data, at)));
      if (stride != 0) {
        alignas(64) T values[lanes];
        for (int r = 0; r < lanes; ++r)
          values[r] = static_cast<T>(load_scalar(given.dtype, given.data, at + (r < rows_ ? r : 0) * stride));
        w = V::load(values);
      }
      set(kShare, k, w);
      sum = sum + w;
    }
    const Mask<T> none = sum == V::set(0);
    set(kWeight, 0, sum);
    for (std::int64_t k = 0; k < K_; ++k) {
      const V w = select(none, equal, stat(kShare, k) / sum);
      any_zero_ |= (w == V::set(0)).any();
      set(kShare, k, w);
    }
  }

  // Weights of every class in the current tile, normalised.
  void find_class_shares() {
    const V zero = V::set(0), equal = V::set(static_cast<T>(1.0 / static_cast<double>(K_)));
    const Line sums = single(kDenominator);
    for (std::int64_t v = 0; v < vectors_; ++v) sums.set(v, zero);
    for (std::int64_t k = 0; k < K_; ++k) {
      const Line out = share(k);
      if (call_.weights.present)
        load(call_.weights, k * call_.weights.stack_stride, out, T(0));
      else
        for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, V::set(1));
      for (std::int64_t v = 0; v < vectors_; ++v) {
        V w = out[v];
        if (call_.mask.present) {
          w = select(known(k, v), w, zero);
          out.set(v, w);
        }
        sums.set(v, sums[v] + w);
      }
    }
    // Of probabilities nobody has a share behind the last class: who counts nowhere may hold NaN, also there.
    const bool probs = call_.kind == EnsembleKind::probs && !call_.limit;
    const V last = probs ? select(this->inside_last(), equal, zero) : equal;
    for (std::int64_t k = 0; k < K_; ++k) {
      const Line out = share(k);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V sum = sums[v];
        out.set(v, select(sum == zero, v + 1 < vectors_ ? equal : last, out[v] / sum));
      }
    }
  }
  // The classes of a vector that the mask leaves teacher k.
  Mask<T> known(std::int64_t k, std::int64_t v) const {
    const std::int64_t c = first_ + v * kStep, stride = call_.mask_stride[1];
    const unsigned char* const mask = call_.mask.data + k * call_.mask_stride[0] + c * stride;
    if constexpr (LanesAreRows) return V::set(static_cast<T>(*mask)) > V::set(0);
    alignas(64) T values[lanes] = {};
    if (stride == 1 && c + lanes <= call_.classes)
      for (int i = 0; i < lanes; ++i) values[i] = static_cast<T>(mask[i]);
    else
      for (int i = 0; i < lanes && c + i < call_.classes; ++i) values[i] = static_cast<T>(mask[i * stride]);
    return V::load(values) > V::set(0);
  }

  // Writes the results of the block's rows and adds their sum.
  void finish(int which, V loss, Sums& sums) const {
    alignas(64) T values[lanes];
    loss.store(values);
    const RowValues& out = call_.row_loss[which];
    const std::int64_t at = out.present ? offset(out) : 0, stride = inner_stride(out);
    if (out.present)
      for (int r = 0; r < rows_; ++r) store_scalar(out.dtype, out.data, at + r * stride, values[r]);
    double part[4] = {0, 0, 0, 0};  // four sums at once hide the latency of one
    for (int r = 0; r < rows_; ++r) part[r % 4] += values[r];
    sums.value[which] += (part[0] + part[1]) + (part[2] + part[3]);
  }

  // The gradient of weights of whole rows: kDot - sum of share * kDot over the teachers, times `factor` over the
  // weight. A weight of 0 gets none.
  void store_weight_gradients(V factor) const {
    const Stack& out = call_.weights_grad;
    const V zero = V::set(0), sum = stat(kWeight, 0);
    const Mask<T> none = sum == zero;
    V mean = zero;
    for (std::int64_t k = 0; k < K_; ++k)
      mean = mean + select(stat(kShare, k) == zero, zero, stat(kShare, k) * stat(kDot, k));
    const std::int64_t base = offset(out), stride = inner_stride(out);
    for (std::int64_t k = 0; k < K_; ++k) {
      const Mask<T> nothing = none | (stat(kShare, k) == zero);
      alignas(64) T values[lanes];
      select(nothing, zero, (stat(kDot, k) - mean) * factor / sum).store(values);
      for (int r = 0; r < rows_; ++r) static_cast<T*>(out.data)[base + k * out.stack_stride + r * stride] = values[r];
    }
  }

  const V scale_;
  V factor_[2];
  std::int64_t loaded_;  // the tile whose lines are there, or -1
  bool weights_fixed_, shares_known_ = false, any_zero_ = false;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
