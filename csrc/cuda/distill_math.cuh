// The arithmetic of the divergences, per class: as csrc/cpu/distill_losses.h has it for vectors.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace fedkern::cuda {

template <typename C>
__device__ __forceinline__ C infinity() {
  return static_cast<C>(INFINITY);
}

#ifdef __CUDA_ARCH__
__device__ __forceinline__ float power_of_two(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
#else
inline float power_of_two(float x) { return exp2f(x); }
#endif
// 2^(x log2 e), its argument rounded once: a relative error of |x| / 2^24, which counts for nothing where e^x is small. expf
// takes four times the instructions.
__device__ __forceinline__ float exponential(float x) { return power_of_two(x * 1.44269504f); }
// e^(x factor), for a factor that is the same for many: one product for each.
__device__ __forceinline__ float exponential(float x, float factor) { return power_of_two(x * (factor * 1.44269504f)); }
// fp64 is rare: calls keep the kernels small.
static __device__ __noinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ double exponential(double x, double factor) { return exponential(x * factor); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
static __device__ __noinline__ double logarithm(double x) { return log(x); }

// (e^x - 1 - x) / x^2 without cancellation, for |x| <= small_exponent; relative error at most 4 ULP.
template <typename C>
__device__ __forceinline__ C small_exponent() {
  return sizeof(C) == 4 ? C(1) : C(0.5);
}
__device__ __forceinline__ float exp_remainder(float x) {
  float sum = 2.496077649993822e-05f;
  sum = fmaf(sum, x, 0.00020325483637861907f);
  sum = fmaf(sum, x, 0.001389133627526462f);
  sum = fmaf(sum, x, 0.008330930024385452f);
  sum = fmaf(sum, x, 0.04166651517152786f);
  sum = fmaf(sum, x, 0.16666695475578308f);
  return fmaf(sum, x, 0.5f);
}
static __device__ __noinline__ double exp_remainder(double x) {
  double sum = 1.0 / 1307674368000;
  sum = fma(sum, x, 1.0 / 87178291200);
  sum = fma(sum, x, 1.0 / 6227020800);
  sum = fma(sum, x, 1.0 / 479001600);
  sum = fma(sum, x, 1.0 / 39916800);
  sum = fma(sum, x, 1.0 / 3628800);
  sum = fma(sum, x, 1.0 / 362880);
  sum = fma(sum, x, 1.0 / 40320);
  sum = fma(sum, x, 1.0 / 5040);
  sum = fma(sum, x, 1.0 / 720);
  sum = fma(sum, x, 1.0 / 120);
  sum = fma(sum, x, 1.0 / 24);
  sum = fma(sum, x, 1.0 / 6);
  return fma(sum, x, 0.5);
}

// A softmax at temperature 1 / inverse of logits of maximum `maximum`: the running sum of exponentials relative to it.
template <typename C>
struct Softmax {
  C maximum = -infinity<C>();
  double sum = 0;

  // Masked classes alone have no maximum to subtract.
  __device__ static C reference(C maximum) { return maximum == -infinity<C>() ? C(0) : maximum; }

  template <int N>
  __device__ __forceinline__ void add(const C (&x)[N], C inverse) {
    if constexpr (N == 1) {
      if (x[0] == -infinity<C>()) return;
      const bool rises = x[0] > maximum;
      const double e = static_cast<double>(exponential(-fabs(x[0] - maximum), inverse));
      sum = rises ? fma(sum, e, 1.0) : sum + e;
      if (rises) maximum = x[0];
    } else {
      C highest = maximum;
#pragma unroll
      for (int i = 0; i < N; ++i) highest = fmax(highest, x[i]);  // a number where x is NaN
      const C from = reference(highest);
      C part = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) part += exponential(x[i] - from, inverse);
      if (highest > maximum) sum *= static_cast<double>(exponential(maximum - from, inverse));
      sum += static_cast<double>(part);
      maximum = highest;
    }
  }

  // The same over all threads of a group.
  template <typename G>
  __device__ __forceinline__ void gather(C inverse) {
    const C highest = G::maximum(maximum);
    const C factor = maximum == -infinity<C>() ? C(0) : exponential(maximum - highest, inverse);
    sum = G::sum(sum * static_cast<double>(factor));
    maximum = highest;
  }
};

// KL(P || Q), where P and Q are softmaxes; u = log Q - log P.
//
// The difference of nearly equal rows keeps all its digits as it is. That of rows that lie far apart has the digits of their
// distance: the one with the larger maximum is moved by a multiple of 8, which is exact.
template <typename C>
struct Pair {
  C offset_p = 0, offset_q = 0, top_p, top_q;  // what rows are moved by; maxima of the rows as moved
  C inverse_p, inverse_q;                      // of the sums of exponentials
  C log_ratio;                                 // u = ((q - offset_q) - (p - offset_p) - (top_q - top_p)) / T - log_ratio

  __device__ Pair(const Softmax<C>& p, const Softmax<C>& q)
      : Pair(p.maximum, q.maximum, static_cast<C>(1 / p.sum), static_cast<C>(1 / q.sum), logarithm(static_cast<C>(q.sum / p.sum))) {}
  // The same from what was kept of it.
  __device__ Pair(C maximum_p, C maximum_q, C inverse_p, C inverse_q, C log_ratio)
      : inverse_p(inverse_p), inverse_q(inverse_q), log_ratio(log_ratio) {
    const C raw = maximum_q - maximum_p, distance = fabs(raw) < C(1e30) ? rounded(raw * C(0.125)) * C(8) : C(0);
    if (fabs(maximum_p) < fabs(maximum_q))
      offset_q = distance;
    else
      offset_p = -distance;
    top_p = maximum_p - offset_p, top_q = maximum_q - offset_q;
  }

  __device__ __forceinline__ C maximum_p() const { return top_p + offset_p; }
  // How much further from their maxima y lies than x.
  __device__ __forceinline__ C apart(C x, C y) const { return ((y - offset_q) - (x - offset_p)) - (top_q - top_p); }

 private:
  static __device__ __forceinline__ float rounded(float x) { return rintf(x); }
  static __device__ __forceinline__ double rounded(double x) { return rint(x); }
};

template <typename C>
struct Term {
  C p, u;
  C value;       // P (e^u - 1 - u)
  C difference;  // Q - P

  // A class without probability in P contributes Q alone; its u may be NaN or past all bounds, so a number that takes the direct
  // form stands for it.
  __device__ __forceinline__ Term(C p, C q, C ratio) : p(p), u(p > C(0) ? ratio : C(2)) {
    const bool small = fabs(u) < small_exponent<C>();
    const C remainder = u * u * exp_remainder(u);
    difference = q - p;
    value = small ? p * remainder : fma(-p, u, difference);
    difference = small ? p * (u + remainder) : difference;
  }
  // `x` and `y` are P's and Q's logits of a class.
  __device__ __forceinline__ Term(const Pair<C>& pair, C x, C y, C inverse)
      : Term(exponential(x - pair.offset_p - pair.top_p, inverse) * pair.inverse_p,
             exponential(y - pair.offset_q - pair.top_q, inverse) * pair.inverse_q, fma(pair.apart(x, y), inverse, -pair.log_ratio)) {}

  // The gradient for P's logits, times T. A class without probability has none.
  __device__ __forceinline__ C toward_p(C kl) const { return p == C(0) ? p : -p * (u + kl); }
};

// log_ratio is rounded, which shifts every u by some e: sum (Q - P) shows it as e^e - 1 where it should be 0, and it has
// added e^e - 1 - e to the loss. That counts where Q ~ P.
__device__ __forceinline__ double settled(double sum, double drift) {
  const double kl = sum - 0.5 * drift * drift;
  return kl < 0 ? 0 : kl;
}

}  // namespace fedkern::cuda
