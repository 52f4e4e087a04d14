// One block of rows of K teachers and a student: workspace, loading and storing, shares, softmax statistics.
//
// A block is one row with its classes across the lanes, or one row per lane (short rows, and rows whose classes lie
// apart). Either way a "line" is one input's run of vectors, copied into the workspace with full vectors only: lanes past
// the last class hold -inf, which no sum notices; lanes past the last row hold a copy of the first row. A statistic of a
// line is a vector too, equal in all lanes where they are classes.
#pragma once

#include <cstdlib>

#include "distill_walk.h"
#include "fedkern/distill_ensemble.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T>
inline constexpr T kNone = -static_cast<T>(__builtin_inf());

// Bytes of logits, exponentials and shares a thread keeps; rows that need more are read again for every pass.
constexpr std::int64_t kWorkspace = 1 << 18;

// A thread's memory for lines and statistics; kept for the next call.
struct Workspace {
  void* data = nullptr;
  std::size_t size = 0;
  ~Workspace() { std::free(data); }
  void* get(std::size_t wanted) {
    wanted = (wanted + 4095) / 4096 * 4096;
    if (wanted > size) {
      std::free(data);
      data = std::aligned_alloc(64, wanted);
      if (!data) std::abort();
      size = wanted;
    }
    return data;
  }
};

template <typename T, bool LanesAreRows>
class Lines {
 protected:
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr std::int64_t kStep = LanesAreRows ? 1 : lanes;  // classes of a vector

  // A line in the workspace.
  struct Line {
    T* data;
    FEDKERN_INLINE V operator[](std::int64_t v) const { return V::load(data + v * lanes); }
    FEDKERN_INLINE void set(std::int64_t v, V x) const { x.store(data + v * lanes); }
  };

 public:
  static std::int64_t width(std::int64_t) { return LanesAreRows ? lanes : 1; }

  explicit Lines(const EnsembleCall& call)
      : call_(call), K_(call.count), scale_(V::set(static_cast<T>(call.scale))) {
    static thread_local Workspace workspace;
    const std::int64_t vectors = (call.classes + kStep - 1) / kStep, heaps = call.by_class ? 3 : 2;
    std::int64_t fit = kWorkspace / static_cast<std::int64_t>(sizeof(V)) / (heaps * K_ + kSingles);
    fit = fit < 1 ? 1 : fit;
    tiles_ = (vectors + fit - 1) / fit;
    capacity_ = (vectors + tiles_ - 1) / tiles_;
    const std::int64_t total = capacity_ * (heaps * K_ + kSingles) + (K_ + 2) * kStats;
    T* next = static_cast<T*>(workspace.get(static_cast<std::size_t>(total) * sizeof(V)));
    const auto take = [&](std::int64_t count) {
      T* const here = next;
      next += count * lanes;
      return here;
    };
    x_ = take(K_ * capacity_), e_ = take(K_ * capacity_), w_ = call.by_class ? take(K_ * capacity_) : nullptr;
    for (Line& line : single_) line.data = take(capacity_);
    for (Line& stat : stat_) stat.data = take(K_ + 2);
    end_ = K_ + (call.student.data != nullptr);
    weights_fixed_ = !call.by_class;
    for (int d = 0; d < call.row_dims && call.weights.data; ++d) weights_fixed_ &= call.weights.row_stride[d] == 0;
  }

  // Chooses the rows that share all but the innermost index.
  void move_to(std::int64_t outer) {
    for (int d = call_.row_dims - 2; d >= 0; --d) {
      index_[d] = outer % call_.row_size[d];
      outer /= call_.row_size[d];
    }
  }

 protected:
  // Lines: those of the teachers are 0 .. K-1, the student's is K, a mixture of logits K + 1. The rest goes by name.
  enum Single { kStudentX, kMixture, kStudentE, kMixtureE, kU, kAnchor, kOut, kDenominator, kSingles };
  enum Stat { kMaximum, kInverse, kLogSum, kSum, kShare, kWeight, kDot, kDrift, kLoss, kStats };
  Line single(Single name) const { return single_[name]; }
  FEDKERN_INLINE Line x(std::int64_t k) const {
    return {k < K_ ? x_ + k * capacity_ * lanes : single_[kStudentX + (k - K_)].data};
  }
  FEDKERN_INLINE Line e(std::int64_t k) const {
    return {k < K_ ? e_ + k * capacity_ * lanes : single_[kStudentE + (k - K_)].data};
  }
  Line share(std::int64_t k) const { return {w_ + k * capacity_ * lanes}; }
  FEDKERN_INLINE V stat(Stat name, std::int64_t k) const { return stat_[name][k]; }
  FEDKERN_INLINE void set(Stat name, std::int64_t k, V value) const { stat_[name].set(k, value); }
  void clear(Stat name) const {
    for (std::int64_t k = 0; k < K_ + 2; ++k) set(name, k, V::set(0));
  }

  // From the vectors of a line to its statistic.
  static FEDKERN_INLINE V total(V sum) { return LanesAreRows ? sum : V::set(reduce_add(sum)); }
  static FEDKERN_INLINE V most(V x) { return LanesAreRows ? x : V::set(reduce_max(x)); }

  std::int64_t offset(const Logits& t) const {
    std::int64_t sum = row_ * t.row_stride[call_.row_dims - 1];
    for (int d = 0; d + 1 < call_.row_dims; ++d) sum += index_[d] * t.row_stride[d];
    return sum;
  }
  std::int64_t offset(const RowValues& t) const {
    std::int64_t sum = row_ * t.row_stride[call_.row_dims - 1];
    for (int d = 0; d + 1 < call_.row_dims; ++d) sum += index_[d] * t.row_stride[d];
    return sum;
  }
  std::int64_t inner_stride(const auto& t) const { return t.row_stride[call_.row_dims - 1]; }

  // --- what is one number per row

  void begin(std::int64_t row, int rows) {
    row_ = row;
    rows_ = rows;
    loaded_ = -1;
    for (int i = 0; i < 2; ++i) factor_[i] = scale_;
    for (int i = 0; i < 2; ++i)
      if (call_.grad_output[i].data) {
        alignas(64) T values[lanes];
        const RowValues& g = call_.grad_output[i];
        const std::int64_t at = offset(g), stride = inner_stride(g);
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
    if (!given.data) {
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
      if (call_.weights.data)
        load(call_.weights, k * call_.weights.stack_stride, out, T(0));
      else
        for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, V::set(1));
      for (std::int64_t v = 0; v < vectors_; ++v) {
        V w = out[v];
        if (call_.mask) {
          w = select(known(k, v), w, zero);
          out.set(v, w);
        }
        sums.set(v, sums[v] + w);
      }
    }
    for (std::int64_t k = 0; k < K_; ++k) {
      const Line out = share(k);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V sum = sums[v];
        out.set(v, select(sum == zero, equal, out[v] / sum));
      }
    }
  }
  // The classes of a vector that the mask leaves teacher k.
  Mask<T> known(std::int64_t k, std::int64_t v) const {
    const std::int64_t c = first_ + v * kStep, stride = call_.mask_stride[1];
    const unsigned char* const mask = call_.mask + k * call_.mask_stride[0] + c * stride;
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
    const std::int64_t at = out.data ? offset(out) : 0, stride = inner_stride(out);
    for (int r = 0; r < rows_; ++r) {
      if (out.data) store_scalar(out.dtype, out.data, at + r * stride, values[r]);
      sums.value[which] += values[r];
    }
  }

  // The gradient of weights of whole rows: kDot - sum of share * kDot over the teachers, times `factor` over the weight.
  // A weight of 0 gets none.
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

  // --- loading and storing

  // Takes the lines of a tile in: all teachers, and the student where there is one. What is there already stays.
  void fetch(std::int64_t tile) {
    if (tile == loaded_) return;
    loaded_ = tile;
    const std::int64_t all = (call_.classes + kStep - 1) / kStep;
    first_ = tile * capacity_ * kStep;
    vectors_ = all - tile * capacity_ < capacity_ ? all - tile * capacity_ : capacity_;
    for (std::int64_t k = 0; k < K_; ++k) load(call_.teachers, k * call_.teachers.stack_stride, x(k), kNone<T>);
    if (call_.student.data) load(call_.student, 0, x(K_), kNone<T>);
    if (call_.by_class) {
      find_class_shares();
    } else if (any_zero_) {  // who is not asked may hold anything
      for (std::int64_t k = 0; k < K_; ++k) {
        const Mask<T> skipped = stat(kShare, k) == V::set(0);
        if (skipped.any())
          for (std::int64_t v = 0; v < vectors_; ++v) x(k).set(v, select(skipped, V::set(0), x(k)[v]));
      }
    }
    if (mixes_logits_) mix_logits();
  }

  std::int64_t classes_here() const {
    const std::int64_t left = call_.classes - first_, tile = vectors_ * kStep;
    return left < tile ? left : tile;
  }

  void load(const Logits& source, std::int64_t shift, Line out, T fill) const {
    const std::int64_t at = shift + offset(source) + first_ * source.class_stride;
    const std::int64_t classes = classes_here(), stride = source.class_stride;
    if constexpr (LanesAreRows) {
      pack<T, true>(source, at, {classes, rows_, inner_stride(source), 0}, out.data);
    } else {
      with_type<T>(source, at, [&](const auto* p) {
        std::int64_t c = 0;
        if (stride == 1) {
          for (; c + lanes <= classes; c += lanes) V::load(p + c).store(out.data + c);
          if (c < classes) V::load_partial(p + c, classes - c, fill).store(out.data + c);
        } else {
          for (; c < classes; ++c) out.data[c] = static_cast<T>(widen(p[c * stride]));
          for (; c % lanes; ++c) out.data[c] = fill;
        }
      });
    }
  }

  void store(const Logits& target, std::int64_t shift, Line in) const {
    const std::int64_t at = shift + offset(target) + first_ * target.class_stride;
    const std::int64_t classes = classes_here(), stride = target.class_stride;
    if constexpr (LanesAreRows) {
      unpack<T, true>(target, at, {classes, rows_, inner_stride(target), 0}, in.data);
    } else {
      with_type<T>(target, at, [&](auto* p) {
        std::int64_t c = 0;
        if (stride == 1) {
          for (; c + lanes <= classes; c += lanes) V::load(in.data + c).store(p + c);
          if (c < classes) V::load(in.data + c).store_partial(p + c, classes - c);
        } else {
          for (; c < classes; ++c) narrow(in.data[c], p[c * stride]);
        }
      });
    }
  }

  // --- softmax

  // Maximum, 1 / sum and log of the sum of exponentials of lines [begin, end), and the exponentials of the last tile.
  void find_statistics(std::int64_t begin, std::int64_t end, V inverse_temperature, bool as_is) {
    for (std::int64_t k = begin; k < end; ++k) {
      set(kMaximum, k, V::set(as_is && k < K_ ? T(0) : kNone<T>));
      set(kInverse, k, V::set(0));
    }
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (std::int64_t k = begin; k < end; ++k) {
        if (!(as_is && k < K_)) {
          const V before = stat(kMaximum, k);
          V peak = x(k)[0];
          for (std::int64_t v = 1; v < vectors_; ++v) peak = max(peak, x(k)[v]);
          peak = max(before, most(peak));
          set(kMaximum, k, peak);
          if (tile > 0)
            set(kInverse, k, stat(kInverse, k) * exp_of_nonpositive((before - origin(peak)) * inverse_temperature));
        }
        set(kInverse, k, stat(kInverse, k) + exponentiate(k, inverse_temperature));
      }
    }
    for (std::int64_t k = begin; k < end; ++k) {
      const V sum = stat(kInverse, k);
      const bool keep = as_is && k < K_;
      set(kLogSum, k, keep ? V::set(0) : log(sum));
      set(kInverse, k, keep ? V::set(1) : V::set(1) / sum);
      set(kSum, k, sum);
    }
  }

  // What exponents are taken from: the maximum, or 0 where all classes so far are masked.
  static FEDKERN_INLINE V origin(V peak) { return select(peak == V::set(kNone<T>), V::set(0), peak); }

  // Exponentials of a line of the current tile; returns their sum.
  FEDKERN_INLINE V exponentiate(std::int64_t k, V inverse_temperature) const {
    const Line from = x(k), to = e(k);
    const V peak = origin(stat(kMaximum, k));
    V sum = V::set(0);
    for (std::int64_t v = 0; v < vectors_; ++v) {
      const V value = exp((from[v] - peak) * inverse_temperature);
      to.set(v, value);
      sum = sum + value;
    }
    return total(sum);
  }

  // Makes a tile and its exponentials present.
  void fetch_with_exponentials(std::int64_t tile, V inverse_temperature) {
    if (tile == loaded_) return;
    fetch(tile);
    for (std::int64_t k = mixes_logits_ ? K_ : 0; k < end_; ++k) exponentiate(k, inverse_temperature);
  }

  // The mixture of probabilities, sum of share * p.
  void mix() const {
    const Line out = single(kMixture);
    if (call_.by_class) {
      for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, V::set(0));
      for (std::int64_t k = 0; k < K_; ++k) {
        const V inverse = stat(kInverse, k);
        for (std::int64_t v = 0; v < vectors_; ++v) {
          const V w = share(k)[v];
          out.set(v, out[v] + select(w == V::set(0), w, w * (e(k)[v] * inverse)));
        }
      }
      return;
    }
    for (std::int64_t k = 0; k < K_; ++k) set(kWeight, k + 1, stat(kShare, k) * stat(kInverse, k));
    std::int64_t v = 0;
    for (; v + 4 <= vectors_; v += 4) {  // four sums at once hide the latency of one
      V sum[4] = {V::set(0), V::set(0), V::set(0), V::set(0)};
      for (std::int64_t k = 0; k < K_; ++k) {
        const V w = stat(kWeight, k + 1);
        for (int i = 0; i < 4; ++i) sum[i] = fma(w, e(k)[v + i], sum[i]);
      }
      for (int i = 0; i < 4; ++i) out.set(v + i, sum[i]);
    }
    for (; v < vectors_; ++v) {
      V sum = V::set(0);
      for (std::int64_t k = 0; k < K_; ++k) sum = fma(stat(kWeight, k + 1), e(k)[v], sum);
      out.set(v, sum);
    }
  }

  // The mixture of logits, sum of share * x, as line K + 1; -inf where a teacher that counts has that.
  void mix_logits() const {
    const Line out = x(K_ + 1);
    for (std::int64_t v = 0; v < vectors_; ++v) out.set(v, V::set(0));
    for (std::int64_t k = 0; k < K_; ++k) {
      const V fixed = call_.by_class ? V::set(0) : stat(kShare, k);
      const V center = centered_ ? stat(kSum, k) : V::set(0);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        if (centered_) x(k).set(v, x(k)[v] - center);
        const V w = call_.by_class ? share(k)[v] : fixed;
        out.set(v, out[v] + select(w == V::set(0), w, w * x(k)[v]));
      }
    }
  }

  // log(1 + r) with all digits of a small r; r > -1.
  static FEDKERN_INLINE V log1p(V r) {
    const V one = V::set(1), y = one + r;
    return log(max(V::set(kTiny), y)) + (r - (y - one)) / y;
  }
  // The smallest normal number: what log takes, and what a mixture that underflows counts as.
  static constexpr T kTiny = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38);

  const EnsembleCall& call_;
  const std::int64_t K_;
  const V scale_;
  V factor_[2];
  std::int64_t tiles_, capacity_, loaded_, first_ = 0, vectors_ = 0;
  std::int64_t row_ = 0, index_[kMaxRowDims] = {};
  int rows_ = 0;
  std::int64_t end_;  // of the lines that have exponentials
  bool mixes_logits_ = false, centered_ = false;
  bool weights_fixed_, shares_known_ = false, any_zero_ = false;

 private:
  T *x_, *e_, *w_;
  Line single_[kSingles], stat_[kStats];
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
