// The losses of a block and their gradients.
#pragma once

#include "distill_block.h"
#include "distill_offsets.h"
#include "distill_walk.h"

namespace fedkern::FEDKERN_ISA {
namespace {

template <typename T, bool LanesAreRows>
class Losses : public Block<T, LanesAreRows> {
  using Base = Block<T, LanesAreRows>;
  using typename Base::Stat;
  using V = Vec<T>;
  static constexpr int lanes = V::lanes;
  using Base::add_total, Base::at, Base::begin, Base::call_, Base::each, Base::exponential, Base::factor_, Base::fetch;
  using Base::fetch_with_exponentials, Base::fill, Base::find_maximum, Base::find_sums, Base::finish, Base::flush;
  using Base::inverse_, Base::lines, Base::load, Base::maximum_, Base::spread, Base::sum_, Base::target;
  using Base::temperature_, Base::sum_each, Base::tiles_;

 public:
  using Base::Base;

  // Does `rows` rows from `row` on along the innermost dimension; adds their weighted losses.
  void run(std::int64_t row, int rows, Sums& sums) {
    begin(row, rows);
    Stat loss;
    switch (call_.kind) {
      case DistillKind::kl: divergence(loss); break;
      case DistillKind::limit: limit(loss); break;
      default: entropy(loss); break;
    }
    sums.value[0] += finish(loss);
  }

 private:
  // --- KL(P || Q), where P and Q are inputs `p` and `q`

  struct Pair {
    int p, q;
    Stat inverse_p, inverse_q;  // of the sums of exponentials
    Stat offset_p, offset_q;    // of the logits: Offsets
    Stat shift, log_ratio;      // u = ((q - offset_q) - (p - offset_p) - shift) / T - log_ratio
    Stat loss, drift;
  };

  // The statistics of a line, in registers.
  struct Line {
    V inverse_p, inverse_q, offset_p, offset_q, shift, log_ratio;
  };
  FEDKERN_INLINE Line statistics(const Pair& pair, int line) const {
    return {spread(pair.inverse_p, line), spread(pair.inverse_q, line), spread(pair.offset_p, line),
            spread(pair.offset_q, line),  spread(pair.shift, line),     spread(pair.log_ratio, line)};
  }

  struct Term {
    V p, u;
    V value;       // P (e^u - 1 - u)
    V difference;  // Q - P
  };

  FEDKERN_INLINE Term term(const Pair& pair, const Line& s, auto part, int line, std::int64_t c) {
    const V x = load(pair.p, part, line, c), y = load(pair.q, part, line, c);
    const V p = V::load(exponential(pair.p, line, c)) * s.inverse_p;
    const V q = V::load(exponential(pair.q, line, c)) * s.inverse_q;
    // A class without probability in P contributes Q alone; its u may be NaN or past all bounds, so a number that takes
    // the direct form stands for it.
    const Mask<T> present = p > V::set(0);
    const V over = ((y - s.offset_q) - (x - s.offset_p)) - s.shift;
    const V u = select(present, fma(over, inverse_, V::set(0) - s.log_ratio), V::set(2));
    const Mask<T> small = abs(u) < V::set(small_exponent<T>);
    const V remainder = u * u * exp_remainder(u);
    const V difference = q - p;
    return {p, u, select(small, p * remainder, fma(V::set(0) - p, u, difference)),
            select(small, p * (u + remainder), difference)};
  }

  // The gradient for P's logits, times T. A class without probability has none.
  static FEDKERN_INLINE V toward_p(const Term& t, V kl) {
    return select(t.p == V::set(0), t.p, (V::set(0) - t.p) * (t.u + kl));
  }

  void make_pair(int student, Pair& pair) const {
    const int p = call_.reverse ? student : 0, q = call_.reverse ? 0 : student;
    pair.p = p;
    pair.q = q;
    const V one = V::set(1), sum_p = V::load(sum_[p].lane), sum_q = V::load(sum_[q].lane);
    (one / sum_p).store(pair.inverse_p.lane);
    (one / sum_q).store(pair.inverse_q.lane);
    const Offsets<T> offsets(V::load(maximum_[p].lane), V::load(maximum_[q].lane));
    offsets.p.store(pair.offset_p.lane);
    offsets.q.store(pair.offset_q.lane);
    offsets.shift.store(pair.shift.lane);
    log(sum_q / sum_p).store(pair.log_ratio.lane);
    fill(pair.loss, 0);
    fill(pair.drift, 0);
  }

  void divergence(Stat& loss) {
    const int inputs = 1 + call_.students;
    find_maximum(inputs);
    find_sums(inputs);
    Pair pairs[kMaxStudents];
    for (int k = 0; k < call_.students; ++k) make_pair(k + 1, pairs[k]);
    (V::load(factor_.lane) * V::set(temperature_)).store(factor_.lane);

    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile, inputs);
      for (int k = 0; k < call_.students; ++k) {
        if (call_.student_grad[k].present && !call_.reverse) {
          const View<T> out = target(k + 1);
          sum_terms(pairs[k], [&](const Term& t, auto part, int line, std::int64_t c, V factor) {
            part.store(at(out, line, c), t.difference * factor);
          });
          flush(k + 1, out);
        } else {
          sum_terms(pairs[k], [](const Term&, auto, int, std::int64_t, V) {});
        }
      }
    }
    V both = V::set(0);
    for (int k = 0; k < call_.students; ++k) {
      // log_ratio is rounded, which shifts every u by some e: sum (Q - P) shows it as e^e - 1 where it should be 0, and
      // it has added e^e - 1 - e to the loss. That counts where Q ~ P.
      const V e = V::load(pairs[k].drift.lane), sum = V::load(pairs[k].loss.lane);
      const V kl = max(V::set(0), fma(e * e, V::set(static_cast<T>(-0.5)), sum));
      kl.store(pairs[k].loss.lane);
      both = both + kl;
    }
    both.store(loss.lane);
    late_gradients(pairs);
  }

  template <typename F>
  FEDKERN_INLINE void sum_terms(Pair& pair, F also) {
    for (int line = 0; line < lines(); ++line) {
      const Line s = statistics(pair, line);
      const V factor = spread(factor_, line);
      V sum[2];
      sum_each(sum, [&](auto part, std::int64_t c, auto& partial) {
        const Term t = term(pair, s, part, line, c);
        partial[0] = partial[0] + t.value;
        partial[1] = partial[1] + t.difference;
        also(t, part, line, c, factor);
      });
      add_total(pair.loss, line, sum[0]);
      add_total(pair.drift, line, sum[1]);
    }
  }

  // Gradients that need the finished divergence (for P) or more than one of them (for the teacher).
  void late_gradients(const Pair* pairs) {
    const bool to_teacher = call_.teacher_grad.present;
    bool to_students = false;
    for (int k = 0; k < call_.students; ++k) to_students |= call_.reverse && call_.student_grad[k].present;
    if (!to_teacher && !to_students) return;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile, 1 + call_.students);
      for (int k = 0; k < call_.students; ++k) {
        if (!to_students || !call_.student_grad[k].present) continue;
        const View<T> out = target(k + 1);
        for (int line = 0; line < lines(); ++line) {
          const Line s = statistics(pairs[k], line);
          const V kl = spread(pairs[k].loss, line), factor = spread(factor_, line);
          each([&](auto part, std::int64_t c) {
            part.store(at(out, line, c), toward_p(term(pairs[k], s, part, line, c), kl) * factor);
          });
        }
        flush(k + 1, out);
      }
      if (!to_teacher) continue;
      const View<T> out = target(0);
      for (int k = 0; k < call_.students; ++k)
        for (int line = 0; line < lines(); ++line) {
          const Line s = statistics(pairs[k], line);
          const V kl = spread(pairs[k].loss, line), factor = spread(factor_, line);
          each([&](auto part, std::int64_t c) {
            const Term t = term(pairs[k], s, part, line, c);
            const V value = (call_.reverse ? t.difference : toward_p(t, kl)) * factor;
            T* const p = at(out, line, c);
            part.store(p, k == 0 ? value : part.load(p, 0) + value);
          });
        }
      flush(0, out);
    }
  }

  // --- T = infinity: half the variance of d = teacher - student over the classes unmasked in both

  FEDKERN_INLINE V difference(int k, auto part, int line, std::int64_t c, Mask<T>& masked) const {
    const V t = load(0, part, line, c), s = load(k + 1, part, line, c), nothing = V::set(-kInfinity<T>);
    masked = (t == nothing) | (s == nothing);
    return t - s;
  }

  // Adds, over the unmasked classes, f(d) to `sums`.
  template <typename F>
  FEDKERN_INLINE void sum_differences(int k, Stat& sums, F f) {
    fill(sums, 0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      for (int line = 0; line < lines(); ++line) {
        V sum[1];
        sum_each(sum, [&](auto part, std::int64_t c, auto& partial) {
          Mask<T> masked;
          const V d = difference(k, part, line, c, masked);
          partial[0] = partial[0] + select(masked, V::set(0), f(d, line));
        });
        add_total(sums, line, sum[0]);
      }
    }
  }

  void limit(Stat& loss) {
    Stat mean[kMaxStudents], count[kMaxStudents], sum;
    fill(loss, 0);
    for (int k = 0; k < call_.students; ++k) {
      sum_differences(k, count[k], [](V, int) { return V::set(1); });
      const V n = V::load(count[k].lane);
      sum_differences(k, sum, [](V d, int) { return d; });
      (V::load(sum.lane) / n).store(mean[k].lane);
      // The mean of what is left over corrects the rounding of the first one.
      sum_differences(k, sum, [&](V d, int line) { return d - spread(mean[k], line); });
      (V::load(mean[k].lane) + bounded<T>(V::load(sum.lane) / n)).store(mean[k].lane);
      sum_differences(k, sum, [&](V d, int line) {
        const V rest = d - spread(mean[k], line);
        return rest * rest;
      });
      (V::load(loss.lane) + V::load(sum.lane) * V::set(static_cast<T>(0.5)) / n).store(loss.lane);
    }
    for (int k = 0; k < call_.students; ++k)
      if (call_.student_grad[k].present) limit_gradient(k + 1, k, k + 1, mean, count, V::set(-1));
    if (call_.teacher_grad.present) limit_gradient(0, 0, call_.students, mean, count, V::set(1));
  }

  // Gradient of input `to`: the sum over students [begin, end) of sign (d - mean) / count.
  void limit_gradient(int to, int begin, int end, const Stat* mean, const Stat* count, V sign) {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      const View<T> out = target(to);
      for (int k = begin; k < end; ++k)
        for (int line = 0; line < lines(); ++line) {
          const V factor = spread(factor_, line) * sign / spread(count[k], line), center = spread(mean[k], line);
          each([&](auto part, std::int64_t c) {
            Mask<T> masked;
            const V d = difference(k, part, line, c, masked);
            const V value = select(masked, V::set(0), (d - center) * factor);
            T* const p = at(out, line, c);
            part.store(p, k == begin ? value : part.load(p, 0) + value);
          });
        }
      flush(to, out);
    }
  }

  // --- H = log Z + sum P (max - x), both terms >= 0; dH/dx = P ((max - x) - sum P (max - x))

  void entropy(Stat& loss) {
    find_maximum(1);
    find_sums(1);
    Stat inverse, depth;
    (V::set(1) / V::load(sum_[0].lane)).store(inverse.lane);
    fill(depth, 0);
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile, 1);
      for (int line = 0; line < lines(); ++line) {
        const V most = spread(maximum_[0], line), scale = spread(inverse, line);
        V sum[1];
        sum_each(sum, [&](auto part, std::int64_t c, auto& partial) {
          partial[0] = partial[0] + below(part, line, c, most, scale);
        });
        add_total(depth, line, sum[0]);
      }
    }
    (log(V::load(sum_[0].lane)) + V::load(depth.lane)).store(loss.lane);
    if (!call_.teacher_grad.present) return;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile, 1);
      const View<T> out = target(0);
      for (int line = 0; line < lines(); ++line) {
        const V most = spread(maximum_[0], line), scale = spread(inverse, line), sum = spread(depth, line);
        const V factor = spread(factor_, line);
        each([&](auto part, std::int64_t c) {
          const V p = V::load(exponential(0, line, c)) * scale;
          part.store(at(out, line, c), (below(part, line, c, most, scale) - p * sum) * factor);
        });
      }
      flush(0, out);
    }
  }

  // P (max - x), and 0 where P is 0.
  FEDKERN_INLINE V below(auto part, int line, std::int64_t c, V most, V scale) {
    const V p = V::load(exponential(0, line, c)) * scale;
    return p * select(p > V::set(0), most - load(0, part, line, c), V::set(0));
  }
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
