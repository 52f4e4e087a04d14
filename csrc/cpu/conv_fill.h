// Calls whose channels no kernel takes: computed with channels of zeros behind theirs, which change nothing in the others.
#pragma once

#include <algorithm>
#include <deque>
#include <vector>

#include "conv_plan.h"
#include "fedkern/parallel.h"
#include "fedkern/simd.h"
#include "scratch.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Channels of a tensor at so many positions: the given ones, and with those of zeros behind.
struct Widths {
  std::int64_t positions, own, wide;
};

// Positions of `from` channels -> of `to` channels: the first of them, or with zeros behind.
inline void refit(const float* x, std::int64_t positions, std::int64_t from, std::int64_t to, float* out, int threads) {
  using V = Vec<float>;
  auto work = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t c = 0; c < to; c += V::lanes)
        V::load_partial(x + p * from + c, std::clamp<std::int64_t>(from - c, 0, V::lanes)).store_partial(out + p * to + c, std::min<std::int64_t>(to - c, V::lanes));
  };
  parallel_for(positions, 1024, threads, seconds(positions * std::max(from, to)), work);
}

// The tensors of a call in a wider shape. What is null stays null; what is wide enough stays where it is.
class Filled {
 public:
  Filled(const ConvNorm& own, const ConvShape& wide)
      : in{own.shape.positions(), own.shape.in, wide.in}, out{own.positions_of_out(), own.shape.out, wide.out}, vector{1, own.shape.out, wide.out}, own_(own),
        wide_(wide) {}

  const Widths in, out, vector;

  // The call itself, its map and its weights.
  ConvNorm call() {
    ConvNorm call = own_;
    call.shape = wide_, call.x = read(own_.x, in);
    call.weight_out = wide_.taps() * wide_.in, call.weight_tap = wide_.in, call.weight_in = 1;
    float* const weight = weight_memory();
    std::fill_n(weight, wide_.out * call.weight_out, 0.0f);
    each_weight([&](std::int64_t at, std::int64_t own) { weight[at] = own_.weight[own]; });
    call.weight = weight;
    return call;
  }

  // What a pass reads.
  template <typename Float>
  Float* read(Float* x, const Widths& w) {
    if (!x || w.own == w.wide) return x;
    float* const wide = memory(w.positions * w.wide);
    refit(x, w.positions, w.own, w.wide, wide, own_.threads);
    return wide;
  }
  // Where a pass writes what finish() takes to x.
  float* written(float* x, const Widths& w) {
    if (!x || w.own == w.wide) return x;
    float* const wide = memory(w.positions * w.wide);
    results_.push_back({wide, x, w});
    return wide;
  }
  // The same for what it also reads.
  float* updated(float* x, const Widths& w) {
    float* const wide = written(x, w);
    if (wide != x) refit(x, w.positions, w.own, w.wide, wide, own_.threads);
    return wide;
  }
  float* written_weight(float* x) {
    if (!x) return nullptr;
    to_weight_ = x;
    return wide_weight_ = weight_memory();
  }

  void finish() const {
    for (const Result& r : results_) refit(r.wide, r.widths.positions, r.widths.wide, r.widths.own, r.to, own_.threads);
    if (to_weight_) each_weight([&](std::int64_t at, std::int64_t own) { to_weight_[own] = wide_weight_[at]; });
  }

 private:
  struct Result {
    const float* wide;
    float* to;
    Widths widths;
  };

  float* memory(std::int64_t count) { return kept_.emplace_back(count).get(); }
  float* weight_memory() { return memory(wide_.out * wide_.taps() * wide_.in); }
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
  float *to_weight_ = nullptr, *wide_weight_ = nullptr;
  std::vector<Result> results_;
  std::deque<Scratch<float>> kept_;
};

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
