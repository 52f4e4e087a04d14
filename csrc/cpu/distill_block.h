// The arithmetic of one block: one row with its classes across the lanes, or one row per lane. Both run the same code;
// they differ in how a vector is found (Block::at) and in whether sums go across lanes (Block::total, Block::most).
#pragma once

#include "distill_memory.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

// A full vector, or the end of a row.
template <typename T>
struct Full {
  FEDKERN_INLINE Vec<T> load(const T* p, T) const { return Vec<T>::load(p); }
  FEDKERN_INLINE void store(T* p, Vec<T> v) const { v.store(p); }
};
template <typename T>
struct Part {
  std::ptrdiff_t n;
  FEDKERN_INLINE Vec<T> load(const T* p, T fill) const { return Vec<T>::load_partial(p, n, fill); }
  FEDKERN_INLINE void store(T* p, Vec<T> v) const { v.store_partial(p, n); }
};

template <typename T, bool LanesAreRows>
class Block {
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr std::int64_t kTileClasses = LanesAreRows ? kTile<T> / lanes : kTile<T>;
  static constexpr int kInputs = 1 + kMaxStudents;

 public:
  explicit Block(const DistillCall& call)
      : call_(call),
        tiles_((call.classes + kTileClasses - 1) / kTileClasses),
        temperature_(static_cast<T>(call.kind == DistillKind::kl ? call.temperature : 1.0)),
        inverse_(V::set(static_cast<T>(call.kind == DistillKind::kl ? 1.0 / call.temperature : 1.0))) {}

  // Chooses the rows that share all but the innermost index.
  void move_to(std::int64_t outer) {
    std::int64_t index[kMaxRowDims] = {};
    for (int d = call_.row_dims - 2; d >= 0; --d) {
      index[d] = outer % call_.row_size[d];
      outer /= call_.row_size[d];
    }
    const auto offset = [&](const auto& tensor) {
      std::int64_t sum = 0;
      for (int d = 0; d + 1 < call_.row_dims; ++d) sum += index[d] * tensor.row_stride[d];
      return sum;
    };
    for (int k = 0; k <= call_.students; ++k) {
      input_base_[k] = offset(input(k));
      gradient_base_[k] = offset(gradient(k));
    }
    weight_base_ = offset(call_.weight);
    grad_output_base_ = offset(call_.grad_output);
    row_loss_base_ = offset(call_.row_loss);
    raw_loss_base_ = offset(call_.raw_loss);
  }

  // Does `rows` rows from `row` on along the innermost dimension; returns the sum of their weighted losses.
  double run(std::int64_t row, int rows) {
    row_ = row;
    rows_ = rows;
    fetched_ = false;
    any_zero_ = false;
    T factor[lanes] = {};
    for (int r = 0; r < rows; ++r) {
      weight_[r] = call_.weight.data ? read(call_.weight, weight_base_, r) : 1.0;
      any_zero_ |= weight_[r] == 0;
      const double outer = call_.grad_output.data ? read(call_.grad_output, grad_output_base_, r) : 1.0;
      factor[r] = static_cast<T>(outer * weight_[r] * call_.scale);
    }
    if constexpr (!LanesAreRows) {
      if (any_zero_) return write_zero_row();
    } else if (any_zero_) {
      T keep[lanes];
      for (int r = 0; r < lanes; ++r) keep[r] = r < rows && weight_[r] == 0 ? T(0) : T(1);
      keep_ = V::load(keep) > V::set(0);
    }
    factor_ = LanesAreRows ? V::load(factor) : V::set(factor[0]);

    V loss;
    switch (call_.kind) {
      case DistillKind::kl: loss = divergence(); break;
      case DistillKind::limit: loss = limit(); break;
      default: loss = entropy(); break;
    }
    loss = max(V::set(0), loss);  // a NaN stays
    T value[lanes];
    loss.store(value);
    double sum = 0;
    for (int r = 0; r < rows; ++r) sum += write_loss(r, static_cast<double>(value[r]) * temperature_ * temperature_);
    return sum;
  }

 private:
  const Logits& input(int k) const { return k == 0 ? call_.teacher : call_.student[k - 1]; }
  const Logits& gradient(int k) const { return k == 0 ? call_.teacher_grad : call_.student_grad[k - 1]; }
  std::int64_t inner_stride(const Logits& x) const { return x.row_stride[call_.row_dims - 1]; }

  double read(const RowValues& values, std::int64_t base, int r) const {
    return load_scalar(values.dtype, values.data, base + (row_ + r) * values.row_stride[call_.row_dims - 1]);
  }

  double write_loss(int r, double loss) const {
    const bool skipped = weight_[r] == 0;
    const double weighted = skipped ? 0 : loss * weight_[r];
    const auto write = [&](const RowValues& values, std::int64_t base, double value) {
      if (values.data)
        store_scalar(values.dtype, values.data, base + (row_ + r) * values.row_stride[call_.row_dims - 1], value);
    };
    write(call_.row_loss, row_loss_base_, weighted);
    write(call_.raw_loss, raw_loss_base_, skipped ? 0 : loss);
    return weighted;
  }

  double write_zero_row() {
    factor_ = V::set(0);
    for (int k = 0; k <= call_.students; ++k) {
      if (!gradient(k).data) continue;
      for (std::int64_t tile = 0; tile < tiles_; ++tile) {
        begin_tile(tile);
        T* const out = target(k);
        each([&](auto part, std::int64_t i) { part.store(at(out, step_, i), V::set(0)); });
        flush(k, out);
      }
    }
    return write_loss(0, 0);
  }

  // --- vectors of the current tile

  void begin_tile(std::int64_t tile) {
    first_ = tile * kTileClasses;
    const std::int64_t left = call_.classes - first_;
    classes_ = left < kTileClasses ? left : kTileClasses;
  }

  template <typename F>
  FEDKERN_INLINE void each(F f) const {
    if constexpr (LanesAreRows) {
      for (std::int64_t c = 0; c < classes_; ++c) f(Full<T>{}, c);
    } else {
      std::int64_t c = 0;
      for (; c + lanes <= classes_; c += lanes) f(Full<T>{}, c);
      if (c < classes_) f(Part<T>{static_cast<std::ptrdiff_t>(classes_ - c)}, c);
    }
  }

  // Where the vector of class c (or of classes from c on) is.
  template <typename P>
  static FEDKERN_INLINE P* at(P* p, std::int64_t step, std::int64_t c) {
    return LanesAreRows ? p + c * step : p + c;
  }
  static FEDKERN_INLINE V total(V x) { return LanesAreRows ? x : V::set(reduce_add(x)); }
  static FEDKERN_INLINE V most(V x) { return LanesAreRows ? x : V::set(reduce_max(x)); }

  Window window(const Logits& x) const { return {classes_, rows_, inner_stride(x)}; }
  std::int64_t position(const Logits& x, std::int64_t base) const {
    return base + row_ * inner_stride(x) + first_ * x.class_stride;
  }
  bool in_place(const Logits& x) const {
    if (x.dtype != kDType<T>) return false;
    return LanesAreRows ? inner_stride(x) == 1 && rows_ == lanes : x.class_stride == 1;
  }

  // Makes the logits of a tile reachable as vectors. A row that fits one tile is fetched once.
  void fetch(std::int64_t tile) {
    begin_tile(tile);
    if (tiles_ == 1 && fetched_) return;
    fetched_ = true;
    for (int k = 0; k <= call_.students; ++k) {
      const Logits& x = input(k);
      const std::int64_t offset = position(x, input_base_[k]);
      if (in_place(x)) {
        x_[k] = static_cast<const T*>(x.data) + offset;
        x_step_[k] = x.class_stride;
      } else {
        pack<T, LanesAreRows>(x, offset, window(x), packed_[k]);
        x_[k] = packed_[k];
        x_step_[k] = lanes;
      }
    }
  }

  // Where the gradient of input k is to be written (vectors `step_` apart), and how it gets home from there.
  T* target(int k) {
    const Logits& x = gradient(k);
    if (in_place(x)) {
      step_ = x.class_stride;
      return static_cast<T*>(x.data) + position(x, gradient_base_[k]);
    }
    step_ = lanes;
    return gradient_buffer_;
  }
  void flush(int k, T* out) {
    if constexpr (LanesAreRows) {
      if (any_zero_)
        for (std::int64_t c = 0; c < classes_; ++c)
          select(keep_, V::load(out + c * step_), V::set(0)).store(out + c * step_);
    }
    const Logits& x = gradient(k);
    if (out == gradient_buffer_) unpack<T, LanesAreRows>(x, position(x, gradient_base_[k]), window(x), out);
  }

  // --- softmax

  V load(int k, auto part, std::int64_t c) const { return part.load(at(x_[k], x_step_[k], c), -kInfinity<T>); }
  T* exponential(int k, std::int64_t c) { return at(exponential_[k], lanes, c); }

  void find_maximum(int inputs) {
    for (int k = 0; k < inputs; ++k) maximum_[k] = V::set(-kInfinity<T>);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (int k = 0; k < inputs; ++k) {
        V m = maximum_[k];
        each([&](auto part, std::int64_t c) { m = max(m, load(k, part, c)); });
        maximum_[k] = m;
      }
    }
    for (int k = 0; k < inputs; ++k) maximum_[k] = most(maximum_[k]);
  }

  // exp((x - max) / T) of the tile into the buffer; returns the sum in lanes.
  V exponentiate(int k) {
    const V m = maximum_[k], inverse = inverse_;
    V sum = V::set(0);
    each([&](auto part, std::int64_t c) {
      const V e = exp((load(k, part, c) - m) * inverse);
      e.store(exponential(k, c));
      sum = sum + e;
    });
    return sum;
  }

  void find_sums(int inputs) {
    for (int k = 0; k < inputs; ++k) sum_[k] = V::set(0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (int k = 0; k < inputs; ++k) sum_[k] = sum_[k] + exponentiate(k);
    }
    for (int k = 0; k < inputs; ++k) sum_[k] = total(sum_[k]);
  }

  void fetch_with_exponentials(std::int64_t tile, int inputs) {
    fetch(tile);
    if (tiles_ > 1)
      for (int k = 0; k < inputs; ++k) exponentiate(k);
  }

#include "distill_losses.h"

  const DistillCall& call_;
  const std::int64_t tiles_;
  const T temperature_;
  const V inverse_;
  V factor_, maximum_[kInputs], sum_[kInputs];
  Mask<T> keep_;
  std::int64_t input_base_[kInputs], gradient_base_[kInputs];
  std::int64_t weight_base_, grad_output_base_, row_loss_base_, raw_loss_base_;
  std::int64_t row_, first_, classes_, step_, x_step_[kInputs];
  int rows_;
  bool fetched_, any_zero_;
  double weight_[lanes];
  const T* x_[kInputs];
  alignas(64) T packed_[kInputs][kTile<T>];
  alignas(64) T exponential_[kInputs][kTile<T>];
  alignas(64) T gradient_buffer_[kTile<T>];
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
