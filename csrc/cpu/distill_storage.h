// The memory of a block of rows of K teachers and a student: lines of vectors, statistics, loading and storing.
//
// A block is one row with its classes across the lanes, or one row per lane (short rows, and rows whose classes lie
// apart). Either way a "line" is one input's run of vectors, copied into the workspace with full vectors only: lanes
// past the last class hold -inf, which no sum notices; lanes past the last row hold a copy of the first row. A
// statistic of a line is a vector too where lanes are rows, else one number, spread over all lanes where it meets a
// line.
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
class Storage {
 protected:
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  static constexpr std::int64_t kStep = LanesAreRows ? 1 : lanes;  // classes of a vector
  // Lines worked on at a time: short ones alone would wait for their reductions.
  static constexpr int kTogether = 4;

  // A line in the workspace.
  struct Line {
    T* data;
    FEDKERN_INLINE V operator[](std::int64_t v) const { return V::load(data + v * lanes); }
    FEDKERN_INLINE void set(std::int64_t v, V x) const { x.store(data + v * lanes); }
  };

 public:
  static std::int64_t width(std::int64_t) { return LanesAreRows ? lanes : 1; }

  explicit Storage(const EnsembleCall& call) : call_(call), K_(call.count) {
    static thread_local Workspace workspace;
    const std::int64_t vectors = (call.classes + kStep - 1) / kStep, heaps = call.by_class ? 3 : 2;
    std::int64_t fit = kWorkspace / static_cast<std::int64_t>(sizeof(V)) / (heaps * K_ + kSingles);
    fit = fit < 1 ? 1 : fit;
    tiles_ = (vectors + fit - 1) / fit;
    capacity_ = (vectors + tiles_ - 1) / tiles_;
    const std::int64_t held = LanesAreRows ? K_ + 2 : (K_ + 2 + lanes - 1) / lanes;
    const std::int64_t total = capacity_ * (heaps * K_ + kSingles) + held * kStats;
    T* next = static_cast<T*>(workspace.get(static_cast<std::size_t>(total) * sizeof(V)));
    const auto take = [&](std::int64_t count) {
      T* const here = next;
      next += count * lanes;
      return here;
    };
    x_ = take(K_ * capacity_), e_ = take(K_ * capacity_), w_ = call.by_class ? take(K_ * capacity_) : nullptr;
    for (Line& line : single_) line.data = take(capacity_);
    for (Line& stat : stat_) stat.data = take(held);
    // What is past the teachers counts nothing.
    for (std::int64_t i = 0; i < held; ++i) stat_[kShare].set(i, V::set(0));
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
  enum Stat { kPeak, kMaximum, kInverse, kLogSum, kSum, kShare, kScaled, kWeight, kDot, kDrift, kLoss,
              kOffset, kBehind, kShift, kStats };
  Line single(Single name) const { return single_[name]; }
  FEDKERN_INLINE Line x(std::int64_t k) const {
    return {k < K_ ? x_ + k * capacity_ * lanes : single_[kStudentX + (k - K_)].data};
  }
  FEDKERN_INLINE Line e(std::int64_t k) const {
    return {k < K_ ? e_ + k * capacity_ * lanes : single_[kStudentE + (k - K_)].data};
  }
  Line share(std::int64_t k) const { return {w_ + k * capacity_ * lanes}; }
  FEDKERN_INLINE V stat(Stat name, std::int64_t k) const {
    return LanesAreRows ? stat_[name][k] : V::set(stat_[name].data[k]);
  }
  FEDKERN_INLINE void set(Stat name, std::int64_t k, V value) const {
    if constexpr (LanesAreRows)
      stat_[name].set(k, value);
    else
      stat_[name].data[k] = first(value);
  }
  // Adds the sums of vectors of lines k to k + N - 1 to their statistic; equal lines have equal sums whatever N.
  template <int N>
  FEDKERN_INLINE void add_totals(Stat name, std::int64_t k, const V (&sums)[N]) const {
    if constexpr (LanesAreRows) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) set(name, k + i, stat(name, k + i) + sums[i]);
    } else {
      static_assert(N == 1 || N == kTogether);
      if constexpr (N == 1) {
        T totals[kTogether] = {};
        add_reduced({sums[0], sums[0], sums[0], sums[0]}, totals);
        stat_[name].data[k] += totals[0];
      } else {
        add_reduced(sums, stat_[name].data + k);
      }
    }
  }
  template <int N>
  FEDKERN_INLINE void set_peaks(std::int64_t k, const V (&peaks)[N]) const {
    if constexpr (LanesAreRows || N != kTogether)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) set(kPeak, k + i, most(peaks[i]));
    else
      reduce_max(peaks, stat_[kPeak].data + k);
  }
  // All lines' numbers by the vector: one of each line, or one line to a lane.
  static FEDKERN_INLINE std::int64_t packs(std::int64_t count) {
    return LanesAreRows ? count : (count + lanes - 1) / lanes;
  }
  FEDKERN_INLINE Line stats(Stat name) const { return stat_[name]; }
  // f(pack) for those that hold the numbers of lines [begin, end), and of others in between.
  template <typename F>
  static FEDKERN_INLINE void each_pack(std::int64_t begin, std::int64_t end, F f) {
    for (std::int64_t i = LanesAreRows ? begin : begin / lanes; i < packs(end); ++i) f(i);
  }
  void fill(Stat name, std::int64_t begin, std::int64_t end, V value) const {
    each_pack(begin, end, [&](std::int64_t i) { stats(name).set(i, value); });
  }
  void clear(Stat name) const { fill(name, 0, K_ + 2, V::set(0)); }
  // Sum over the teachers of share * `name`; one of share 0 counts nothing.
  V mean_of(Stat name) const {
    const V zero = V::set(0);
    V sum = zero;
    for (std::int64_t i = 0; i < packs(K_); ++i) {
      const V w = stats(kShare)[i];
      sum = sum + select(w == zero, zero, w * stats(name)[i]);
    }
    return total(sum);
  }

  // From the vectors of a line to its statistic.
  static FEDKERN_INLINE V total(V sum) { return LanesAreRows ? sum : V::set(reduce_add(sum)); }
  static FEDKERN_INLINE V most(V x) { return LanesAreRows ? x : V::set(reduce_max(x)); }

  std::int64_t offset(const auto& t) const {
    std::int64_t sum = row_ * t.row_stride[call_.row_dims - 1];
    for (int d = 0; d + 1 < call_.row_dims; ++d) sum += index_[d] * t.row_stride[d];
    return sum;
  }
  std::int64_t inner_stride(const auto& t) const { return t.row_stride[call_.row_dims - 1]; }

  // --- loading and storing a tile of a line

  std::int64_t classes_here() const {
    const std::int64_t left = call_.classes - first_, tile = vectors_ * kStep;
    return left < tile ? left : tile;
  }

  // The lanes of the tile's last vector that hold classes.
  Mask<T> inside_last() const {
    if constexpr (LanesAreRows) return V::set(0) == V::set(0);
    alignas(64) T index[lanes];
    for (int i = 0; i < lanes; ++i) index[i] = static_cast<T>(i);
    return V::load(index) < V::set(static_cast<T>(classes_here() - (vectors_ - 1) * lanes));
  }

  // Rows whose vectors lie in memory as they are worked on.
  FEDKERN_INLINE bool in_place(const Logits& t) const {
    return t.dtype == kDType<T> && (LanesAreRows ? inner_stride(t) == 1 && rows_ == lanes : t.class_stride == 1);
  }

  void load(const Logits& source, std::int64_t shift, Line out, T fill) const {
    const std::int64_t at = shift + offset(source) + first_ * source.class_stride;
    const std::int64_t classes = classes_here(), stride = source.class_stride;
    if (sizeof(T) == 4 && source.dtype == DType::f64) return load_narrowed(source, at, out, fill);
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

  // Weights may be f64 whatever is computed: rounded one by one, which is rare.
  __attribute__((noinline)) void load_narrowed(const Logits& source, std::int64_t at, Line out, T fill) const {
    const std::int64_t classes = classes_here();
    for (std::int64_t i = 0; i < vectors_ * lanes; ++i) {
      const std::int64_t c = LanesAreRows ? i / lanes : i, r = LanesAreRows && i % lanes < rows_ ? i % lanes : 0;
      const std::int64_t from = at + c * source.class_stride + r * inner_stride(source);
      out.data[i] = c < classes ? static_cast<T>(load_scalar(source.dtype, source.data, from)) : fill;
    }
  }

  const T* start_of(const Logits& source) const {
    return static_cast<const T*>(source.data) + offset(source) + first_ * source.class_stride;
  }

  // Loads the lines of `count` inputs from line k on; kPeak becomes their maxima.
  void load_lines(const Logits& source, std::int64_t apart, std::int64_t k, std::int64_t count) {
    if (in_place(source)) {
      const T* p = start_of(source);
      const std::int64_t end = k + count;
      for (; k + kTogether <= end; k += kTogether, p += kTogether * apart)
        read_lines<kTogether, true>(p, source, apart, k);
      for (; k < end; ++k, p += apart) read_lines<1, true>(p, source, apart, k);
      return;
    }
    for (std::int64_t i = 0; i < count; ++i) {
      load(source, i * apart, x(k + i), kNone<T>);
      find_peak(k + i);
    }
  }
  // The same of the next few teachers, or what is left of them, where they are in place. Without Keep their lines stay
  // where they are.
  template <bool Keep>
  void read_teachers(const T* p, std::int64_t k) const {
    const std::int64_t apart = call_.teachers.stack_stride;
    p += k * apart;
    if (k + kTogether <= K_) return read_lines<kTogether, Keep>(p, call_.teachers, apart, k);
    for (; k < K_; ++k, p += apart) read_lines<1, Keep>(p, call_.teachers, apart, k);
  }
  template <int N, bool Keep>
  FEDKERN_INLINE void read_lines(const T* p, const Logits& source, std::int64_t apart, std::int64_t k) const {
    Line out[N];
    V peak[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) out[i] = x(k + i), peak[i] = V::set(kNone<T>);
    // Many teachers are too many streams for the hardware to follow: the next rows are asked for here.
    const std::int64_t ahead = LanesAreRows ? lanes : source.row_stride[call_.row_dims - 1];
    const std::int64_t step = LanesAreRows ? source.class_stride : lanes, count = vectors_;
    const std::int64_t whole = LanesAreRows ? count : classes_here() / lanes;
    for (std::int64_t v = 0; v < whole; ++v)
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const T* const from = p + i * apart + v * step;
        const V value = V::load(from);
        if (Keep) {
          __builtin_prefetch(from + ahead);
          out[i].set(v, value);
        }
        peak[i] = max(peak[i], value);
      }
    if (whole < count) {
      const std::ptrdiff_t left = classes_here() - whole * lanes;
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V value = V::load_partial(p + i * apart + whole * lanes, left, kNone<T>);
        if (Keep) out[i].set(whole, value);
        peak[i] = max(peak[i], value);
      }
    }
    set_peaks<N>(k, peak);
  }
  void find_peak(std::int64_t k) const {
    const Line from = x(k);
    V peak = from[0];
    for (std::int64_t v = 1; v < vectors_; ++v) peak = max(peak, from[v]);
    set(kPeak, k, most(peak));
  }

  void store(const Logits& target, std::int64_t shift, Line in) const {
    const std::int64_t at = shift + offset(target) + first_ * target.class_stride;
    const std::int64_t classes = classes_here(), stride = target.class_stride;
    if (in_place(target)) {
      T* const p = static_cast<T*>(target.data) + at;
      const std::int64_t step = LanesAreRows ? stride : lanes, whole = LanesAreRows ? vectors_ : classes / lanes;
      for (std::int64_t v = 0; v < whole; ++v) in[v].store(p + v * step);
      if (whole < vectors_) in[whole].store_partial(p + whole * lanes, classes - whole * lanes);
    } else if constexpr (LanesAreRows) {
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

  // --- numbers of all teachers in the memory between a forward and a backward call: the place-th K of a row's

  void keep(int place, Stat name) const {
    const Logits& kept = call_.kept;
    const std::int64_t at = offset(kept) + place * K_ * kept.class_stride;
    if constexpr (LanesAreRows) {
      unpack<T, true>(kept, at, {K_, rows_, inner_stride(kept), 0}, stats(name).data);
    } else {
      T* const p = static_cast<T*>(kept.data) + at;
      for (std::int64_t k = 0; k < K_; ++k) p[k * kept.class_stride] = stats(name).data[k];
    }
  }
  void take_back(int place, Stat name) const {
    const Logits& kept = call_.kept;
    const std::int64_t at = offset(kept) + place * K_ * kept.class_stride;
    if constexpr (LanesAreRows) {
      pack<T, true>(kept, at, {K_, rows_, inner_stride(kept), 0}, stats(name).data);
    } else {
      const T* const p = static_cast<const T*>(kept.data) + at;
      for (std::int64_t k = 0; k < K_; ++k) stats(name).data[k] = p[k * kept.class_stride];
    }
  }

  const EnsembleCall& call_;
  const std::int64_t K_;
  std::int64_t tiles_, capacity_, first_ = 0, vectors_ = 0;
  std::int64_t row_ = 0, index_[kMaxRowDims] = {};
  int rows_ = 0;

 private:
  T *x_, *e_, *w_;
  Line single_[kSingles], stat_[kStats];
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
