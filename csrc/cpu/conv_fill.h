// Calls whose channels no kernel takes: computed with channels of zeros behind theirs, which change nothing in the others.
#pragma once

#include <algorithm>
#include <deque>

#include "fedkern/conv.h"
#include "fedkern/parallel.h"
#include "fedkern/simd.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Positions of `from` channels -> of `to` channels: the first of them, or with zeros behind.
inline void refit(const float* x, std::int64_t positions, std::int64_t from, std::int64_t to, float* out, int threads) {
  using V = Vec<float>;
  auto work = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t c = 0; c < to; c += V::lanes)
        V::load_partial(x + p * from + c, std::clamp<std::int64_t>(from - c, 0, V::lanes)).store_partial(out + p * to + c, std::min<std::int64_t>(to - c, V::lanes));
  };
  parallel_for(positions, 1024, threads, 1e-10 * static_cast<double>(positions * std::max(from, to)), work);
}

// The tensors of a call in a wider shape. What is null stays null; what is wide enough stays where it is.
class Filled {
 public:
  Filled(const ConvNorm& own, const ConvShape& wide) : own_(own), wide_(wide) {}

  // The call itself, its map and its weights.
  ConvNorm call() {
    ConvNorm call = own_;
    const ConvShape& s = own_.shape;
    const std::int64_t taps = s.taps();
    float* const weight = memory(wide_.out * taps * wide_.in);
    std::fill_n(weight, wide_.out * taps * wide_.in, 0.0f);
    call.shape = wide_, call.x = map(own_.x, s.positions(), s.in, wide_.in);
    call.weight = weight, call.weight_out = taps * wide_.in, call.weight_tap = wide_.in, call.weight_in = 1;
    each_weight([&](std::int64_t at, std::int64_t own) { weight[at] = own_.weight[own]; });
    return call;
  }

  const float* map(const float* x, std::int64_t positions, std::int64_t from, std::int64_t to) {
    if (!x || from == to) return x;
    float* const wide = memory(positions * to);
    refit(x, positions, from, to, wide, own_.threads);
    return wide;
  }
  float* vector(const float* x) {
    if (!x) return nullptr;
    float* const wide = memory(wide_.out);
    std::fill(std::copy_n(x, own_.shape.out, wide), wide + wide_.out, 0.0f);
    return wide;
  }

  // Memory for a result of positions of `to` channels, of which `from` are wanted at x.
  float* result(float* x, std::int64_t positions, std::int64_t from, std::int64_t to) { return !x || from == to ? x : memory(positions * to); }
  void finish(const float* wide, std::int64_t positions, std::int64_t from, std::int64_t to, float* x) const {
    if (x && wide != x) refit(wide, positions, to, from, x, own_.threads);
  }
  void finish_vector(const float* wide, float* x) const { finish(wide, 1, own_.shape.out, wide_.out, x); }
  void finish_weight(const float* wide, float* x) const {
    if (x) each_weight([&](std::int64_t at, std::int64_t own) { x[own] = wide[at]; });
  }
  float* weight_result(float* x) { return x ? memory(wide_.out * wide_.taps() * wide_.in) : nullptr; }

 private:
  float* memory(std::int64_t count) { return kept_.emplace_back(count).get(); }
  // body(place in the wide weight, place in the given one).
  template <typename Body>
  void each_weight(Body&& body) const {
    const ConvShape& s = own_.shape;
    for (std::int64_t o = 0; o < s.out; ++o)
      for (std::int64_t tap = 0; tap < s.taps(); ++tap)
        for (std::int64_t i = 0; i < s.in; ++i)
          body((o * s.taps() + tap) * wide_.in + i, o * own_.weight_out + tap * own_.weight_tap + i * own_.weight_in);
  }

  const ConvNorm& own_;
  const ConvShape wide_;
  std::deque<Scratch<float>> kept_;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
