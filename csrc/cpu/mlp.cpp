#include "fedkern/mlp.h"

#include <algorithm>
#include <cmath>

#include "fedkern/parallel.h"
#include "fedkern/simd_math.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

using V = Vec<float>;
constexpr int kLanes = V::lanes;
// Rows of a block of two vectors each: what the registers hold.
constexpr int kRows = kLanes == 16 ? 12 : 6;
// Terms of a sum that are added before the next ones are read, so that both factors stay in the first cache.
constexpr std::int64_t kTerms = 256;

// c[r, :] = sum over k of a[r, k] b[k, :], where `a` may be transposed, and the rows of b and c have unit stride.
struct Product {
  std::int64_t rows, terms, columns;
  const float* a;
  std::int64_t a_row, a_term;
  const float* b;
  std::int64_t b_row;
  float* c;
  std::int64_t c_row;
  const float* start = nullptr;  // [rows]: added to the sums
  const float* gate = nullptr;   // like c: where it is not above 0, the result is 0
  bool relu = false;
};

template <bool whole>
FEDKERN_INLINE V get(const float* from, std::ptrdiff_t n) {
  return whole ? V::load(from) : V::load_partial(from, n);
}

// Terms [first, last) of a block at row r and column `at`, of which n columns count in a vector that is not whole.
template <int rows, int vectors, bool whole>
FEDKERN_INLINE void add_terms(const Product& p, std::int64_t r, std::int64_t at, std::ptrdiff_t n, std::int64_t first, std::int64_t last) {
  V sum[rows][vectors];
  float* const c = p.c + r * p.c_row + at;
  for (int i = 0; i < rows; ++i)
    for (int u = 0; u < vectors; ++u) {
      const float* const begun = c + i * p.c_row + u * kLanes;
      sum[i][u] = first > 0 ? get<whole>(begun, n) : V::set(p.start ? p.start[r + i] : 0.0f);
    }
  const float* a = p.a + r * p.a_row + first * p.a_term;
  const float* b = p.b + first * p.b_row + at;
  for (std::int64_t k = first; k < last; ++k, a += p.a_term, b += p.b_row) {
    V x[vectors];
    for (int u = 0; u < vectors; ++u) x[u] = get<whole>(b + u * kLanes, n);
    for (int i = 0; i < rows; ++i) {
      const V factor = V::set(a[i * p.a_row]);
      for (int u = 0; u < vectors; ++u) sum[i][u] = fma(factor, x[u], sum[i][u]);
    }
  }
  const V zero = V::set(0);
  for (int i = 0; i < rows; ++i)
    for (int u = 0; u < vectors; ++u) {
      V y = sum[i][u];
      float* const to = c + i * p.c_row + u * kLanes;
      if (last == p.terms && p.relu) y = select(y < zero, zero, y);  // NaN stays
      if (last == p.terms && p.gate) y = select(get<whole>(p.gate + (to - p.c), n) > zero, y, zero);
      if constexpr (whole)
        y.store(to);
      else
        y.store_partial(to, n);
    }
}

template <int vectors, bool whole>
void add_rows(const Product& p, std::int64_t begin, std::int64_t end, std::int64_t at, std::ptrdiff_t n, std::int64_t first, std::int64_t last) {
  std::int64_t r = begin;
  for (; r + kRows <= end; r += kRows) add_terms<kRows, vectors, whole>(p, r, at, n, first, last);
  for (; r + 4 <= end; r += 4) add_terms<4, vectors, whole>(p, r, at, n, first, last);
  for (; r + 2 <= end; r += 2) add_terms<2, vectors, whole>(p, r, at, n, first, last);
  if (r < end) add_terms<1, vectors, whole>(p, r, at, n, first, last);
}

void multiply(const Product& p, int threads) {
  auto some = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t at = 0; at < p.columns;) {
      const std::int64_t left = p.columns - at, vectors = left >= 2 * kLanes ? 2 : 1;
      for (std::int64_t first = 0; first < p.terms; first += kTerms) {
        const std::int64_t last = std::min(first + kTerms, p.terms);
        if (vectors == 2)
          add_rows<2, true>(p, begin, end, at, kLanes, first, last);
        else if (left >= kLanes)
          add_rows<1, true>(p, begin, end, at, kLanes, first, last);
        else
          add_rows<1, false>(p, begin, end, at, left, first, last);
      }
      at += vectors * kLanes;
    }
  };
  parallel_for(p.rows, 4 * kRows, threads, 3e-11 * static_cast<double>(p.rows * p.terms * p.columns), some);
}

// [rows, columns] -> [columns, rows], of so many elements from row to row.
void transpose(const float* from, std::int64_t rows, std::int64_t columns, std::int64_t from_row, float* to, std::int64_t to_row) {
  for (std::int64_t first = 0; first < columns; first += 16)
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = first; c < std::min(first + 16, columns); ++c) to[c * to_row + r] = from[r * from_row + c];
}

// Logits [classes, step] of samples side by side become the gradients of the mean cross-entropy, which is returned. The work of
// [3, step] is lost.
float cross_entropy(float* z, std::int64_t classes, std::int64_t step, const std::int64_t* targets, std::int64_t rows, float* work) {
  float *const own = work, *const largest = work + step, *const sums = work + 2 * step;
  std::int64_t counted = 0;
  for (std::int64_t b = 0; b < rows; ++b)
    if (targets[b] != kMlpIgnored) own[b] = z[targets[b] * step + b], ++counted;
  const V share = V::set(1.0f / static_cast<float>(counted));
  for (std::int64_t at = 0; at < step; at += kLanes) {
    V most = V::load(z + at), sum = V::set(0);
    for (std::int64_t c = 1; c < classes; ++c) most = max(most, V::load(z + c * step + at));  // the second where one is NaN
    for (std::int64_t c = 0; c < classes; ++c) {
      const V power = exp_of_nonpositive(V::load(z + c * step + at) - most);
      power.store(z + c * step + at);
      sum = sum + power;
    }
    most.store(largest + at), sum.store(sums + at);
    const V scale = share / sum;
    for (std::int64_t c = 0; c < classes; ++c) (V::load(z + c * step + at) * scale).store(z + c * step + at);
  }
  double loss = 0;
  for (std::int64_t b = 0; b < step; ++b) {
    if (b < rows && targets[b] != kMlpIgnored) {
      z[targets[b] * step + b] -= first(share);
      loss += std::log(static_cast<double>(sums[b])) + static_cast<double>(largest[b]) - static_cast<double>(own[b]);
    } else {
      for (std::int64_t c = 0; c < classes; ++c) z[c * step + b] = 0;
    }
  }
  return static_cast<float>(loss / static_cast<double>(counted));
}

// Activations are worked on as [features, samples], so that sums over features run beside each other for all samples.
float pass(const MlpPass& a) {
  const std::int64_t step = (a.rows + kLanes - 1) / kLanes * kLanes, count = a.count;
  std::int64_t size = 0, widest = 3;
  for (std::int64_t i = 0; i < count; ++i) {
    size += a.layers[i].in * (i > 0 ? step + a.rows : step);
    widest = std::max(widest, a.layers[i].out);
  }
  const Scratch<float> memory(size + 2 * widest * step);
  const Scratch<float*> places(2 * count);
  float *gradient = memory.get(), *next = gradient + widest * step, *free = next + widest * step;
  float **const across = places.get(), **const along = across + count;  // a layer's inputs: [in, step] and [rows, in]
  for (std::int64_t i = 0; i < count; ++i) {
    across[i] = free, free += a.layers[i].in * step;
    along[i] = i > 0 ? free : const_cast<float*>(a.x);
    if (i > 0) free += a.layers[i].in * a.rows;
  }

  const std::int64_t in = a.layers[0].in;
  transpose(a.x, a.rows, in, in, across[0], step);
  for (std::int64_t k = 0; k < in; ++k) std::fill(across[0] + k * step + a.rows, across[0] + (k + 1) * step, 0.0f);
  for (std::int64_t i = 0; i < count; ++i) {
    const MlpLayer& l = a.layers[i];
    const bool last = i + 1 == count;
    float* const to = last ? gradient : across[i + 1];
    multiply({l.out, l.in, step, l.weight, l.in, 1, across[i], step, to, step, l.bias, nullptr, !last}, a.threads);
    if (!last) transpose(to, l.out, a.rows, step, along[i + 1], l.out);
  }

  const float loss = cross_entropy(gradient, a.layers[count - 1].out, step, a.targets, a.rows, next);
  for (std::int64_t i = count - 1; i >= 0; --i) {
    const MlpLayer& l = a.layers[i];
    multiply({l.out, a.rows, l.in, gradient, step, 1, along[i], l.in, l.weight_gradient, l.in}, a.threads);
    for (std::int64_t o = 0; l.bias_gradient && o < l.out; ++o) {
      float sum = 0;
      for (std::int64_t b = 0; b < a.rows; ++b) sum += gradient[o * step + b];
      l.bias_gradient[o] = sum;
    }
    if (i == 0) break;
    multiply({l.in, l.out, step, l.weight, 1, l.in, gradient, step, next, step, nullptr, across[i]}, a.threads);
    std::swap(gradient, next);
  }
  return loss;
}

}  // namespace

const MlpTable mlp_table = {pass};

}  // namespace fedkern::FEDKERN_ISA
