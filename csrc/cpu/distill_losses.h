// The losses themselves: members of Block, included inside the class in distill_block.h.

// One term of KL(P || Q) per class and what its gradients need; P and Q are inputs `p` and `q`.
struct Pair {
  int p, q;
  V inverse_p, inverse_q;  // of the sums of exponentials
  V shift, log_ratio;      // u = (q - p - shift) / T - log_ratio
};

struct Term {
  V p, q, u;
  V value;       // P (e^u - 1 - u)
  V difference;  // Q - P
};

Pair make_pair(int student) const {
  const int p = call_.reverse ? student : 0, q = call_.reverse ? 0 : student;
  const V one = V::set(1);
  return {p, q, one / sum_[p], one / sum_[q], maximum_[q] - maximum_[p], log(sum_[q] / sum_[p])};
}

FEDKERN_INLINE Term term(const Pair& pair, auto part, std::int64_t c) {
  const V x = load(pair.p, part, c), y = load(pair.q, part, c);
  const V p = V::load(exponential(pair.p, c)) * pair.inverse_p, q = V::load(exponential(pair.q, c)) * pair.inverse_q;
  // A class masked in P contributes Q alone; its u may be NaN, so any number that takes the direct form stands for it.
  const Mask<T> present = x > V::set(-kInfinity<T>);
  const V u = select(present, fma((y - x) - pair.shift, inverse_, V::set(0) - pair.log_ratio), V::set(2));
  const Mask<T> small = abs(u) < V::set(small_exponent<T>);
  const V remainder = u * u * exp_remainder(u);
  // P may underflow where Q is exactly 0: the loss is infinite all the same.
  const V floor = select(present, max(V::set(static_cast<T>(1e-37)), p), V::set(0));
  const V difference = q - p;
  return {p, q, u, select(small, p * remainder, fma(V::set(0) - floor, u, difference)),
          select(small, p * (u + remainder), difference)};
}

V divergence() {
  const int inputs = 1 + call_.students;
  find_maximum(inputs);
  find_sums(inputs);
  Pair pairs[kMaxStudents];
  V loss[kMaxStudents], drift[kMaxStudents];
  for (int k = 0; k < call_.students; ++k) {
    pairs[k] = make_pair(k + 1);
    loss[k] = drift[k] = V::set(0);
  }
  const V factor = factor_ * V::set(temperature_);
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    fetch_with_exponentials(tile, inputs);
    for (int k = 0; k < call_.students; ++k) {
      const Pair pair = pairs[k];
      V sum = V::set(0), off = V::set(0);
      if (call_.student_grad[k].data && !call_.reverse) {
        T* const out = target(k + 1);
        const std::int64_t step = step_;
        each([&](auto part, std::int64_t c) {
          const Term t = term(pair, part, c);
          sum = sum + t.value;
          off = off + t.difference;
          part.store(at(out, step, c), t.difference * factor);
        });
        flush(k + 1, out);
      } else {
        each([&](auto part, std::int64_t c) {
          const Term t = term(pair, part, c);
          sum = sum + t.value;
          off = off + t.difference;
        });
      }
      loss[k] = loss[k] + sum;
      drift[k] = drift[k] + off;
    }
  }
  V both = V::set(0);
  for (int k = 0; k < call_.students; ++k) {
    // log_ratio is rounded, which shifts every u by some e: sum (Q - P) shows it as e^e - 1 where it should be 0, and it
    // has added e^e - 1 - e to the loss. That counts where Q ~ P.
    const V e = total(drift[k]);
    loss[k] = max(V::set(0), fma(e * e, V::set(static_cast<T>(-0.5)), total(loss[k])));
    both = both + loss[k];
  }
  const bool to_teacher = call_.teacher_grad.data != nullptr;
  bool to_students = false;
  for (int k = 0; k < call_.students; ++k) to_students |= call_.reverse && call_.student_grad[k].data;
  if (!to_teacher && !to_students) return both;

  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    fetch_with_exponentials(tile, inputs);
    for (int k = 0; k < call_.students; ++k) {
      if (!to_students || !call_.student_grad[k].data) continue;
      const Pair pair = pairs[k];
      const V kl = loss[k];
      T* const out = target(k + 1);
      const std::int64_t step = step_;
      each([&](auto part, std::int64_t c) {
        part.store(at(out, step, c), toward_p(term(pair, part, c), kl) * factor);
      });
      flush(k + 1, out);
    }
    if (!to_teacher) continue;
    T* const out = target(0);
    const std::int64_t step = step_;
    each([&](auto part, std::int64_t c) {
      V sum = V::set(0);
      for (int k = 0; k < call_.students; ++k) {
        const Term t = term(pairs[k], part, c);
        sum = sum + (call_.reverse ? t.difference : toward_p(t, loss[k]));
      }
      part.store(at(out, step, c), sum * factor);
    });
    flush(0, out);
  }
  return both;
}

// The gradient of KL(P || Q) for P's logits, times T. A class without probability has none.
FEDKERN_INLINE V toward_p(const Term& t, V kl) const {
  return select(t.p == V::set(0), t.p, (V::set(0) - t.p) * (t.u + kl));
}

// T = infinity: half the variance of d = teacher - student over the classes unmasked in both.
V limit() {
  V mean[kMaxStudents], count[kMaxStudents], loss = V::set(0);
  for (int k = 0; k < call_.students; ++k) {
    V n = V::set(0), sum = V::set(0), rest = V::set(0);
    scan_differences(k, [&](auto, std::int64_t, V d, Mask<T> masked) {
      n = n + select(masked, V::set(0), V::set(1));
      sum = sum + select(masked, V::set(0), d);
    });
    count[k] = total(n);
    const V rough = total(sum) / count[k];
    // The mean of what is left over corrects the rounding of the first one.
    scan_differences(k, [&](auto, std::int64_t, V d, Mask<T> masked) {
      rest = rest + select(masked, V::set(0), d - rough);
    });
    mean[k] = rough + total(rest) / count[k];
    const V m = mean[k];
    V squares = V::set(0);
    scan_differences(k, [&](auto, std::int64_t, V d, Mask<T> masked) {
      const V rest = select(masked, V::set(0), d - m);
      squares = fma(rest, rest, squares);
    });
    loss = loss + total(squares) * V::set(static_cast<T>(0.5)) / count[k];
  }
  for (int k = 0; k < call_.students; ++k) {
    if (!call_.student_grad[k].data) continue;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      T* const out = target(k + 1);
      const std::int64_t step = step_;
      const V m = mean[k], factor = factor_ / count[k];
      each([&](auto part, std::int64_t c) {
        Mask<T> masked;
        const V d = difference(k, part, c, masked);
        part.store(at(out, step, c), select(masked, V::set(0), (m - d) * factor));
      });
      flush(k + 1, out);
    }
  }
  if (call_.teacher_grad.data) {
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch(tile);
      T* const out = target(0);
      const std::int64_t step = step_;
      each([&](auto part, std::int64_t c) {
        V sum = V::set(0);
        for (int k = 0; k < call_.students; ++k) {
          Mask<T> masked;
          const V d = difference(k, part, c, masked);
          sum = sum + select(masked, V::set(0), (d - mean[k]) * (factor_ / count[k]));
        }
        part.store(at(out, step, c), sum);
      });
      flush(0, out);
    }
  }
  return loss;
}

FEDKERN_INLINE V difference(int k, auto part, std::int64_t c, Mask<T>& masked) const {
  const V t = load(0, part, c), s = load(k + 1, part, c), nothing = V::set(-kInfinity<T>);
  masked = (t == nothing) | (s == nothing);
  return t - s;
}

template <typename F>
FEDKERN_INLINE void scan_differences(int k, F f) {
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    fetch(tile);
    each([&](auto part, std::int64_t c) {
      Mask<T> masked;
      const V d = difference(k, part, c, masked);
      f(part, c, d, masked);
    });
  }
}

// H = log Z + sum P (max - x), both terms >= 0; dH/dx = P ((max - x) - sum P (max - x)).
V entropy() {
  find_maximum(1);
  find_sums(1);
  const V m = maximum_[0], inverse = V::set(1) / sum_[0];
  const auto depth = [&](auto part, std::int64_t c) {
    const V p = V::load(exponential(0, c)) * inverse;
    return p * select(p > V::set(0), m - load(0, part, c), V::set(0));
  };
  V sum = V::set(0);
  for (std::int64_t tile = 0; tile < tiles_; ++tile) {
    fetch_with_exponentials(tile, 1);
    each([&](auto part, std::int64_t c) { sum = sum + depth(part, c); });
  }
  sum = total(sum);
  if (call_.teacher_grad.data) {
    const V factor = factor_;
    for (std::int64_t tile = 0; tile < tiles_; ++tile) {
      fetch_with_exponentials(tile, 1);
      T* const out = target(0);
      const std::int64_t step = step_;
      each([&](auto part, std::int64_t c) {
        const V p = V::load(exponential(0, c)) * inverse;
        part.store(at(out, step, c), (depth(part, c) - p * sum) * factor);
      });
      flush(0, out);
    }
  }
  return log(sum_[0]) + sum;
}
