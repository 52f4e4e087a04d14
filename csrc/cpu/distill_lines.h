// What K teachers' rows are made into: softmax statistics, mixtures.
#pragma once

#include "distill_offsets.h"
#include "distill_shares.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class Lines : public Shares<T, LanesAreRows> {
 protected:
  using Base = Shares<T, LanesAreRows>;
  using typename Base::Line;
  using typename Base::V;
  using Base::any_zero_, Base::call_, Base::capacity_, Base::clear, Base::e, Base::each_pack, Base::factor_;
  using Base::fill, Base::first_, Base::K_;
  using Base::kAnchor, Base::kBehind, Base::kInverse, Base::kLogSum, Base::kLoss, Base::kMaximum, Base::kMixture;
  using Base::kOffset, Base::kPeak, Base::kScaled, Base::kShare, Base::kShift, Base::kStep, Base::kSum, Base::kTogether;
  using Base::lanes, Base::load, Base::loaded_;
  using Base::most, Base::offset, Base::packs, Base::set, Base::share, Base::shares_known_, Base::single, Base::stat;
  using Base::stats, Base::tiles_, Base::total, Base::vectors_, Base::weights_fixed_, Base::x;

 public:
  explicit Lines(const EnsembleCall& call)
      : Base(call), power_(call.limit || call.kind >= EnsembleKind::js ? 1.0 : call.temperature) {
    end_ = K_ + call.student.present;
  }

 protected:
  void set_tile(std::int64_t tile) {
    const std::int64_t all = (call_.classes + kStep - 1) / kStep;
    first_ = tile * capacity_ * kStep;
    vectors_ = all - tile * capacity_ < capacity_ ? all - tile * capacity_ : capacity_;
  }

  // Takes the lines of a tile in: all teachers, and the student where there is one. What is there already stays. Who
  // goes through the teachers in order anyway may leave them waiting until then.
  void fetch(std::int64_t tile, bool may_wait = false) {
    if (tile == loaded_) return;
    loaded_ = tile;
    set_tile(tile);
    if (call_.student.present) this->load_lines(call_.student, 0, K_, 1);
    if (passing_ && !any_zero_ && this->in_place(call_.teachers)) return mix_passing_logits();
    waiting_ = may_wait && !any_zero_ && !mixes_logits_ && this->in_place(call_.teachers);
    if (waiting_) teachers_ = this->start_of(call_.teachers);
    kept_ = !(waiting_ && unkept_);
    if (!waiting_) this->load_lines(call_.teachers, call_.teachers.stack_stride, 0, K_);
    if (call_.by_class) {
      // Of a single tile they stay where they are.
      if (!(weights_fixed_ && shares_known_ && tiles_ == 1)) this->find_class_shares();
      shares_known_ = true;
    } else if (any_zero_) {  // who is not asked may hold anything
      for (std::int64_t k = 0; k < K_; ++k) {
        const Mask<T> skipped = stat(kShare, k) == V::set(0);
        if (!skipped.any()) continue;
        for (std::int64_t v = 0; v < vectors_; ++v) x(k).set(v, select(skipped, V::set(0), x(k)[v]));
        this->find_peak(k);
      }
    }
    if (mixes_logits_) mix_logits();
  }

  // Takes in the next few teachers from k on, where they wait.
  FEDKERN_INLINE void read_waiting(std::int64_t k) const {
    if (!waiting_ || k >= K_) return;
    kept_ ? this->template read_teachers<true>(teachers_, k) : this->template read_teachers<false>(teachers_, k);
  }

  // Takes the teachers' lines in after all.
  void keep_lines() {
    if (!kept_) this->load_lines(call_.teachers, call_.teachers.stack_stride, 0, K_);
    kept_ = true;
  }

  // --- softmax

  // Maximum, sum of exponentials, its inverse and log of lines [begin, end), and the exponentials of the last tile.
  // Without `logs` these are left to find_logs(). With Depth, kLoss grows by the sum of e^-d d, d >= 0 the exponents'
  // distance from the maximum.
  template <bool Depth = false>
  void find_statistics(std::int64_t begin, std::int64_t end, bool as_is, bool logs) {
    const bool in_order = begin == 0 && !as_is;
    fill(kMaximum, begin, end, V::set(kNone<T>));
    fill(kSum, begin, end, V::set(0));
    if (as_is) fill(kMaximum, begin, K_, V::set(0)), set(kMaximum, K_, V::set(kNone<T>));
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile, in_order);
      // First those that are alone: the teachers hide their latencies.
      for (std::int64_t k = begin < K_ ? K_ : begin; k < end; ++k) add_lines<1, Depth>(tile, k, true);
      // A group's exponentials keep the arithmetic busy while the next one is read.
      std::int64_t k = begin;
      read_waiting(k);
      if (in_order)
        for (; k + kTogether <= K_; k += kTogether) {
          read_waiting(k + kTogether);
          add_lines<kTogether, Depth>(tile, k, true);
        }
      for (; k < K_; ++k) add_lines<1, Depth>(tile, k, !as_is);
    }
    each_pack(begin, end, [&](std::int64_t i) { stats(kInverse).set(i, V::set(1) / stats(kSum)[i]); });
    if (as_is) fill(kInverse, begin, K_, V::set(1)), set(kInverse, K_, V::set(1) / stat(kSum, K_));
    if (call_.student.present) {
      const V student = stat(kMaximum, K_);
      each_pack(begin, end, [&](std::int64_t i) {
        const Offsets<T> offsets(stats(kMaximum)[i], student);
        stats(kOffset).set(i, offsets.p), stats(kBehind).set(i, offsets.q), stats(kShift).set(i, offsets.shift);
      });
    }
    if (logs) find_logs(begin, end, as_is);
  }

  void find_logs(std::int64_t begin, std::int64_t end, bool as_is) const {
    each_pack(begin, end, [&](std::int64_t i) { stats(kLogSum).set(i, log(stats(kSum)[i])); });
    if (as_is) fill(kLogSum, begin, K_, V::set(0)), set(kLogSum, K_, log(stat(kSum, K_)));
  }

  // What exponents are taken from: the maximum, or 0 where all classes so far are masked.
  static FEDKERN_INLINE V origin(V peak) { return select(peak == V::set(kNone<T>), V::set(0), peak); }

  // Adds the current tile to the maxima and sums of lines k to k + N - 1, with their exponentials.
  template <int N, bool Depth>
  FEDKERN_INLINE void add_lines(std::int64_t tile, std::int64_t k, bool with_maximum) const {
    V peak[N], sum[N], depth[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) peak[i] = stat(kMaximum, k + i);
    if (with_maximum) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        const V before = peak[i], here = stat(kPeak, k + i);
        peak[i] = tile == 0 ? here : max(before, here);
        set(kMaximum, k + i, peak[i]);
        if (tile > 0) {
          // Of logits: what is nothing as an exponent counts yet where the temperature divides it.
          const V shift = before - origin(peak[i]);
          const V ratio = power_(shift), so_far = stat(kSum, k + i);
          if (Depth) set(kLoss, k + i, ratio * (stat(kLoss, k + i) - so_far * max(V::set(exp_lowest<T>), shift)));
          set(kSum, k + i, ratio * so_far);
        }
      }
    }
    exponentiate<N, Depth>(k, peak, sum, depth);
    this->template add_totals<N>(kSum, k, sum);
    if (Depth) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) depth[i] = V::set(0) - depth[i];
      this->template add_totals<N>(kLoss, k, depth);
    }
  }

  // Exponentials of N lines of the current tile, relative to their `peak`; their sums, with Depth (at T = 1) also
  // weighted by their exponents.
  template <int N, bool Depth>
  FEDKERN_INLINE void exponentiate(std::int64_t k, const V (&peak)[N], V (&sum)[N], V (&depth)[N]) const {
    Line from[N], to[N];
    V start[N];
    const bool elsewhere = !kept_ && k < K_;
    // Many teachers are too many streams for the hardware to follow: the next row is asked for here.
    const std::int64_t ahead = elsewhere ? call_.teachers.row_stride[call_.row_dims - 1] : 0;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      from[i] = elsewhere ? Line{const_cast<T*>(teachers_) + (k + i) * call_.teachers.stack_stride} : x(k + i);
      to[i] = e(k + i);
      start[i] = origin(peak[i]), sum[i] = depth[i] = V::set(0);
    }
    const ScaledExp<T> power = power_;
    const auto add = [&](int i, std::int64_t v, V logits) {
      const V over = logits - start[i], value = power(over);
      to[i].set(v, value);
      sum[i] = sum[i] + value;
      // A masked class has no depth.
      if (Depth) depth[i] = fma(value, max(V::set(exp_lowest<T>), over), depth[i]);
    };
    const std::ptrdiff_t left = elsewhere ? this->classes_here() % lanes : 0;
    const std::int64_t count = left ? vectors_ - 1 : vectors_;
    if (N == 1 && call_.as_is) {  // T = 1
      for (std::int64_t v = 0; v < count; ++v) {
        const V value = exp(from[0][v] - start[0]);
        to[0].set(v, value);
        sum[0] = sum[0] + value;
      }
    } else {
      for (std::int64_t v = 0; v < count; ++v)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          __builtin_prefetch(from[i].data + v * lanes + ahead);
          add(i, v, from[i][v]);
        }
      if (left)
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) add(i, count, V::load_partial(from[i].data + count * lanes, left, kNone<T>));
    }
  }

  template <int N>
  FEDKERN_INLINE void exponentiate(std::int64_t k) const {
    V peak[N], sum[N], depth[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) peak[i] = stat(kMaximum, k + i);
    exponentiate<N, false>(k, peak, sum, depth);
  }

  // Makes a tile and its exponentials present.
  void fetch_with_exponentials(std::int64_t tile) {
    if (tile == loaded_) return;
    fetch(tile);
    std::int64_t k = mixes_logits_ ? K_ : 0;
    if (!call_.as_is)
      for (; k + kTogether <= K_; k += kTogether) exponentiate<kTogether>(k);
    for (; k < end_; ++k) exponentiate<1>(k);
  }

  // The mixture of probabilities, sum of share * p.
  void mix() const {
    const Line out = single(kMixture);
    if (call_.by_class) {
      return mix_each<true>(out);
    }
    for (std::int64_t i = 0; i < packs(K_); ++i) stats(kScaled).set(i, stats(kShare)[i] * stats(kInverse)[i]);
    mix_each<false>(out);
  }
  template <bool ByClass>
  void mix_each(Line out) const {
    in_groups(vectors_, [&](auto size, std::int64_t v) {
      constexpr int N = decltype(size)::value;
      const std::int64_t apart = capacity_ * lanes;
      const T* from = e(0).data + v * lanes;
      V sum[N];
      for (V& x : sum) x = V::set(0);
      for (std::int64_t k = 0; k < K_; ++k, from += apart) {
        const V scale = stat(ByClass ? kInverse : kScaled, k);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          if constexpr (ByClass) {
            const V w = share(k)[v + i];
            sum[i] = select(w == V::set(0), sum[i], fma(w, V::load(from + i * lanes) * scale, sum[i]));
          } else {
            sum[i] = fma(scale, V::load(from + i * lanes), sum[i]);
          }
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) out.set(v + i, sum[i]);
    });
  }

  // f(size, v) for `count` vectors from v = 0 on, at most 8 at once: several sums hide the latency of one.
  template <int N>
  struct Size {
    static constexpr int value = N;
  };
  template <typename F>
  static FEDKERN_INLINE void in_groups(std::int64_t count, F f) {
    std::int64_t v = 0;
    for (; v + 8 <= count; v += 8) f(Size<8>{}, v);
    if (count - v >= 4) f(Size<4>{}, v), v += 4;
    switch (count - v) {
      case 3: return f(Size<3>{}, v);
      case 2: return f(Size<2>{}, v);
      case 1: return f(Size<1>{}, v);
    }
  }

  // The mixture of logits as line K + 1; -inf where a teacher that counts has that. Sums are relative to the first
  // teacher that counts, so that equal teachers are mixed without rounding whatever the student is, and kAnchor is the
  // mixture - the student, which keeps its digits where all of them are near.
  void mix_logits() const {
    const Line rest = single(kAnchor), student = x(K_), base = x(K_ + 1);
    for (std::int64_t v = 0; v < vectors_; ++v) rest.set(v, V::set(0)), base.set(v, V::set(0));
    for (std::int64_t k = K_ - 1; k >= 0; --k) {
      const V fixed = call_.by_class ? V::set(0) : stat(kShare, k);
      const V center = centered_ ? stat(kSum, k) : V::set(0);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        if (centered_) x(k).set(v, x(k)[v] - center);
        const V w = call_.by_class ? share(k)[v] : fixed;
        base.set(v, select(w == V::set(0), base[v], origin(x(k)[v])));
      }
    }
    for (std::int64_t k = 0; k < K_; ++k) {
      const V fixed = call_.by_class ? V::set(0) : stat(kShare, k);
      for (std::int64_t v = 0; v < vectors_; ++v) {
        const V w = call_.by_class ? share(k)[v] : fixed;
        rest.set(v, rest[v] + select(w == V::set(0), w, w * (x(k)[v] - base[v])));
      }
    }
    for (std::int64_t v = 0; v < vectors_; ++v) {
      const V sum = rest[v];
      rest.set(v, sum + (base[v] - origin(student[v])));
      base.set(v, base[v] + sum);
    }
    this->find_peak(K_ + 1);
  }
  // The same where all teachers count and none of them is needed again: straight from memory.
  void mix_passing_logits() const {
    const Stack& source = call_.teachers;
    const std::int64_t step = LanesAreRows ? source.class_stride : lanes, apart = source.stack_stride;
    const std::int64_t ahead = LanesAreRows ? lanes : source.row_stride[call_.row_dims - 1];
    const T* const start = static_cast<const T*>(source.data) + offset(source) + first_ * source.class_stride;
    const Line rest = single(kAnchor), student = x(K_), mixture = x(K_ + 1);
    const std::int64_t whole = LanesAreRows ? vectors_ : this->classes_here() / lanes;
    const auto add = [&](std::int64_t v, V base, V sum) {
      rest.set(v, sum + (base - origin(student[v])));
      mixture.set(v, base + sum);
    };
    in_groups(whole, [&](auto size, std::int64_t v) {
      constexpr int N = decltype(size)::value;
      const T* from = start + v * step;
      V base[N], sum[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) base[i] = origin(V::load(from + i * step)), sum[i] = V::set(0);
      for (std::int64_t k = 0; k < K_; ++k, from += apart) {
        const V w = stat(kShare, k);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          __builtin_prefetch(from + i * step + ahead);
          sum[i] = fma(w, V::load(from + i * step) - base[i], sum[i]);
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) add(v + i, base[i], sum[i]);
    });
    if (whole < vectors_) {
      const std::ptrdiff_t left = this->classes_here() - whole * lanes;
      const T* from = start + whole * lanes;
      const V base = origin(V::load_partial(from, left, kNone<T>));
      V sum = V::set(0);
      for (std::int64_t k = 0; k < K_; ++k, from += apart)
        sum = fma(stat(kShare, k), V::load_partial(from, left, kNone<T>) - base, sum);
      add(whole, base, sum);
    }
    this->find_peak(K_ + 1);
  }
  // A line's logits - the student's.
  FEDKERN_INLINE V over_student(std::int64_t k, std::int64_t v) const {
    const V student = x(K_)[v];
    return k <= K_ ? x(k)[v] - student : single(kAnchor)[v] + (origin(student) - student);
  }
  // The same of rows that may lie far apart, each less its offset; kShift is that of their maxima. A mixture's anchor
  // keeps more digits than its line where the rows are near.
  FEDKERN_INLINE V moved_over_student(std::int64_t k, std::int64_t v) const {
    const V offset = stat(kOffset, k), behind = stat(kBehind, k);
    const V moved = (x(k)[v] - offset) - (x(K_)[v] - behind);
    if (k <= K_) return moved;
    const Mask<T> near = (offset == V::set(0)) & (behind == V::set(0));
    return select(near, over_student(k, v), moved);
  }

  // log(1 + r) with all digits of a small r; r > -1.
  static FEDKERN_INLINE V log1p(V r) {
    const V one = V::set(1), y = one + r;
    return log(max(V::set(kTiny), y)) + (r - (y - one)) / y;
  }
  // The smallest normal number: what log takes, and what a mixture that underflows counts as.
  static constexpr T kTiny = sizeof(T) == 8 ? T(2.2250738585072014e-308) : T(1.17549435e-38);

  const ScaledExp<T> power_;
  std::int64_t end_;  // of the lines that have exponentials
  bool mixes_logits_ = false, centered_ = false;
  bool unkept_ = false, kept_ = true;  // of the teachers only exponentials are needed; whether their lines are there
  bool waiting_ = false;  // the current tile's teachers are read where their exponentials are taken
  const T* teachers_ = nullptr;  // and lie here
  bool passing_ = false;  // mixed logits are all that is needed of the teachers
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
