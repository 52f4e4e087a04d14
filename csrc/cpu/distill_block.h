// One block of rows: how its logits are reached, where its gradients go, and the softmax statistics every loss needs.
//
// Long rows have their classes across the lanes (several rows per block, so that one row's sums across lanes overlap
// with the next row's arithmetic); short rows, and rows whose classes lie apart in memory, have one row per lane. Both
// run the same code: a "line" is a run of vectors with common statistics, which is one row in the first case and all
// rows of the block in the second.
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

// Vectors in memory: lines `line` elements apart, and within a line one vector per class `step` apart where lanes are
// rows (classes are adjacent otherwise).
template <typename T>
struct View {
  T* data;
  std::int64_t line, step;
};

template <typename T, bool LanesAreRows>
class Block {
 protected:
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr std::int64_t kTileClasses = LanesAreRows ? kTile<T> / lanes : kTile<T>;
  static constexpr int kInputs = 1 + kMaxStudents;

  // One number per row of the block.
  struct Stat {
    alignas(64) T lane[lanes];
  };

 public:
  explicit Block(const DistillCall& call)
      : call_(call),
        tiles_((call.classes + kTileClasses - 1) / kTileClasses),
        temperature_(static_cast<T>(call.kind == DistillKind::kl ? call.temperature : 1.0)),
        inverse_(V::set(static_cast<T>(call.kind == DistillKind::kl ? 1.0 / call.temperature : 1.0))) {}

  // Rows of a block: as many as there are lanes, and as fit the buffers.
  static std::int64_t width(std::int64_t classes) {
    if (LanesAreRows) return lanes;
    const std::int64_t fit = kTile<T> / padded(classes);
    return fit < 1 ? 1 : fit < lanes ? fit : lanes;
  }

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

 protected:
  static std::int64_t padded(std::int64_t classes) { return (classes + lanes - 1) / lanes * lanes; }

  const Logits& input(int k) const { return k == 0 ? call_.teacher : call_.student[k - 1]; }
  const Logits& gradient(int k) const { return k == 0 ? call_.teacher_grad : call_.student_grad[k - 1]; }
  std::int64_t inner_stride(const auto& x) const { return x.row_stride[call_.row_dims - 1]; }

  // --- what is one number per row

  void begin(std::int64_t row, int rows) {
    row_ = row;
    rows_ = rows;
    fetched_ = false;
    any_zero_ = false;
    for (int r = 0; r < lanes; ++r) factor_.lane[r] = static_cast<T>(call_.scale);
    if (!call_.weight.present && !call_.grad_output.present) return;
    for (int r = 0; r < rows; ++r) {
      weight_[r] = call_.weight.present ? read(call_.weight, weight_base_, r) : 1.0;
      any_zero_ |= weight_[r] == 0;
      const double outer = call_.grad_output.present ? read(call_.grad_output, grad_output_base_, r) : 1.0;
      factor_.lane[r] = static_cast<T>(outer * weight_[r] * call_.scale);
    }
  }

  // Writes the losses of the block's rows; returns their weighted sum.
  double finish(const Stat& loss) const {
    const double square = static_cast<double>(temperature_) * static_cast<double>(temperature_);
    double sum = 0;
    for (int r = 0; r < rows_; ++r) {
      double raw = static_cast<double>(loss.lane[r]) * square, weighted = raw;
      if (call_.weight.present) {
        raw = weight_[r] == 0 ? 0 : raw;
        weighted = raw * weight_[r];
      }
      if (call_.row_loss.present) write(call_.row_loss, row_loss_base_, r, weighted);
      if (call_.raw_loss.present) write(call_.raw_loss, raw_loss_base_, r, raw);
      sum += weighted;
    }
    return sum;
  }

  double read(const RowValues& values, std::int64_t base, int r) const {
    return load_scalar(values.dtype, values.data, base + (row_ + r) * inner_stride(values));
  }
  void write(const RowValues& values, std::int64_t base, int r, double value) const {
    store_scalar(values.dtype, values.data, base + (row_ + r) * inner_stride(values), value);
  }

  // --- vectors of the current tile

  void begin_tile(std::int64_t tile) {
    first_ = tile * kTileClasses;
    const std::int64_t left = call_.classes - first_;
    classes_ = left < kTileClasses ? left : kTileClasses;
    buffer_line_ = LanesAreRows ? 0 : padded(classes_);
  }

  int lines() const { return LanesAreRows ? 1 : rows_; }

  // f(part, class) for the vectors of a line.
  template <typename F>
  FEDKERN_INLINE void each(F f) const {
    const std::int64_t classes = classes_;
    if constexpr (LanesAreRows) {
      for (std::int64_t c = 0; c < classes; ++c) f(Full<T>{}, c);
    } else {
      std::int64_t c = 0;
      for (; c + lanes <= classes; c += lanes) f(Full<T>{}, c);
      if (c < classes) f(Part<T>{static_cast<std::ptrdiff_t>(classes - c)}, c);
    }
  }

  // The same for sums: f(part, class, partial) adds to partial[0 .. N). Partial sums are short, so that rounding errors
  // do not grow with the number of classes.
  template <int N, typename F>
  FEDKERN_INLINE void sum_each(V (&sums)[N], F f) const {
    constexpr std::int64_t width = LanesAreRows ? 1 : lanes, run = 64 * width;
    for (V& sum : sums) sum = V::set(0);
    std::int64_t c = 0;
    while (c + width <= classes_) {
      const std::int64_t left = classes_ - c, end = c + (left < run ? left / width * width : run);
      V partial[N];
      for (V& sum : partial) sum = V::set(0);
      for (; c < end; c += width) f(Full<T>{}, c, partial);
      for (int i = 0; i < N; ++i) sums[i] = sums[i] + partial[i];
    }
    if constexpr (!LanesAreRows)
      if (c < classes_) f(Part<T>{static_cast<std::ptrdiff_t>(classes_ - c)}, c, sums);
  }

  template <typename P>
  static FEDKERN_INLINE P* at(const View<P>& view, int line, std::int64_t c) {
    return LanesAreRows ? view.data + c * view.step : view.data + line * view.line + c;
  }

  // A statistic as the vector that meets a line's vectors, and back from sums (or maxima) in lanes.
  static FEDKERN_INLINE V spread(const Stat& stat, int line) {
    return LanesAreRows ? V::load(stat.lane) : V::set(stat.lane[line]);
  }
  static FEDKERN_INLINE void add_total(Stat& stat, int line, V sum) {
    if constexpr (LanesAreRows)
      (V::load(stat.lane) + sum).store(stat.lane);
    else
      stat.lane[line] += reduce_add(sum);
  }
  static FEDKERN_INLINE void raise_to(Stat& stat, int line, V most) {
    if constexpr (LanesAreRows) {
      max(V::load(stat.lane), most).store(stat.lane);
    } else {
      const T value = reduce_max(most);
      stat.lane[line] = stat.lane[line] > value ? stat.lane[line] : value;
    }
  }
  static void fill(Stat& stat, T value) { V::set(value).store(stat.lane); }

  Window window(const Logits& x) const { return {classes_, rows_, inner_stride(x), buffer_line_}; }
  std::int64_t position(const Logits& x, std::int64_t base) const {
    return base + row_ * inner_stride(x) + first_ * x.class_stride;
  }
  bool in_place(const Logits& x) const {
    if (x.dtype != kDType<T>) return false;
    return LanesAreRows ? inner_stride(x) == 1 && rows_ == lanes : x.class_stride == 1;
  }

  // Makes the logits of a tile reachable as vectors. Rows that fit one tile are fetched once.
  void fetch(std::int64_t tile) {
    begin_tile(tile);
    if (tiles_ == 1 && fetched_) return;
    fetched_ = true;
    for (int k = 0; k <= call_.students; ++k) {
      const Logits& x = input(k);
      const std::int64_t offset = position(x, input_base_[k]);
      if (in_place(x)) {
        x_[k] = {static_cast<const T*>(x.data) + offset, inner_stride(x), x.class_stride};
      } else {
        pack<T, LanesAreRows>(x, offset, window(x), packed_[k]);
        x_[k] = {packed_[k], buffer_line_, lanes};
      }
    }
  }

  // Where the gradient of input k is to be written, and how it gets home from there.
  View<T> target(int k) {
    const Logits& x = gradient(k);
    if (in_place(x))
      return {static_cast<T*>(x.data) + position(x, gradient_base_[k]), inner_stride(x), x.class_stride};
    return {gradient_buffer_, buffer_line_, lanes};
  }
  void flush(int k, const View<T>& out) {
    if (any_zero_) clear_skipped(out);
    const Logits& x = gradient(k);
    if (out.data == gradient_buffer_)
      unpack<T, LanesAreRows>(x, position(x, gradient_base_[k]), window(x), gradient_buffer_);
  }
  // Rows of weight 0 were computed along with the others, from whatever they hold.
  void clear_skipped(const View<T>& out) const {
    if constexpr (LanesAreRows) {
      T keep[lanes];
      for (int r = 0; r < lanes; ++r) keep[r] = r < rows_ && weight_[r] == 0 ? T(0) : T(1);
      const Mask<T> kept = V::load(keep) > V::set(0);
      each([&](auto, std::int64_t c) { select(kept, V::load(at(out, 0, c)), V::set(0)).store(at(out, 0, c)); });
    } else {
      for (int r = 0; r < rows_; ++r)
        if (weight_[r] == 0) each([&](auto part, std::int64_t c) { part.store(at(out, r, c), V::set(0)); });
    }
  }

  // --- softmax

  FEDKERN_INLINE V load(int k, auto part, int line, std::int64_t c) const {
    return part.load(at(x_[k], line, c), -kInfinity<T>);
  }
  FEDKERN_INLINE T* exponential(int k, int line, std::int64_t c) {
    return at(View<T>{exponential_[k], buffer_line_, lanes}, line, c);
  }

  void find_maximum(int inputs) {
    for (int k = 0; k < inputs; ++k) fill(maximum_[k], -kInfinity<T>);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (int k = 0; k < inputs; ++k)
        for (int line = 0; line < lines(); ++line) {
          V most = V::set(-kInfinity<T>);
          each([&](auto part, std::int64_t c) { most = max(most, load(k, part, line, c)); });
          raise_to(maximum_[k], line, most);
        }
    }
  }

  // exp((x - max) / T) of the tile into the buffer; its sum is added to the statistic where one is given.
  void exponentiate(int k, Stat* sums) {
    const V inverse = inverse_;
    for (int line = 0; line < lines(); ++line) {
      const V most = spread(maximum_[k], line);
      V sum[1];
      sum_each(sum, [&](auto part, std::int64_t c, auto& partial) {
        const V e = exp_of_nonpositive((load(k, part, line, c) - most) * inverse);
        e.store(exponential(k, line, c));
        partial[0] = partial[0] + e;
      });
      if (sums) add_total(*sums, line, sum[0]);
    }
  }

  void find_sums(int inputs) {
    for (int k = 0; k < inputs; ++k) fill(sum_[k], 0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (int k = 0; k < inputs; ++k) exponentiate(k, &sum_[k]);
    }
  }

  void fetch_with_exponentials(std::int64_t tile, int inputs) {
    fetch(tile);
    if (tiles_ > 1)
      for (int k = 0; k < inputs; ++k) exponentiate(k, nullptr);
  }

  const DistillCall& call_;
  const std::int64_t tiles_;
  const T temperature_;
  const V inverse_;
  Stat factor_, maximum_[kInputs], sum_[kInputs];
  std::int64_t input_base_[kInputs], gradient_base_[kInputs];
  std::int64_t weight_base_, grad_output_base_, row_loss_base_, raw_loss_base_;
  std::int64_t row_, first_, classes_, buffer_line_;
  int rows_;
  bool fetched_, any_zero_;
  double weight_[lanes];
  View<const T> x_[kInputs];
  alignas(64) T packed_[kInputs][kTile<T>];
  alignas(64) T exponential_[kInputs][kTile<T>];
  alignas(64) T gradient_buffer_[kTile<T>];
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
