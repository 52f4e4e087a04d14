#include "fedkern/conv.h"

#if !defined(FEDKERN_ISA_portable)

#include <atomic>
#include <cmath>
#include <optional>

#include "conv_batch.h"
#include "conv_fill.h"
#include "conv_norm.h"
#include "conv_pool.h"
#include "fedkern/parallel.h"

#endif

namespace fedkern::FEDKERN_ISA {
namespace {

#if !defined(FEDKERN_ISA_portable)

// What a forward pass saved of a sample: of a batch norm, of all.
template <typename Pass>
auto saved_of(const Pass& a, std::int64_t n) {
  return a.saved + (a.call.groups ? 5 * a.call.shape.out * n : 0);
}

// --- forward

class Forward {
 public:
  explicit Forward(const ConvForward& a)
      : a_(a), plan_(a.call.shape), s_(plan_.shape), r_(plan_.result), workers_(parallel_workers(plan_.pieces, 1, a.call.threads)),
        kept_(a.y || a.call.training), packed_(plan_.weights()), whole_(a.y || !kept_ ? 0 : r_.positions() * s_.out),
        border_(plan_.group * plan_.in_map, workers_), tiles_(Convolution::tiles(plan_, s_.in), workers_), products_(Convolution::products(plan_, s_.out), workers_),
        map_(kept_ ? 0 : plan_.group * plan_.out_floats(), workers_), totals_(2 * s_.out * plan_.pieces), shift_(s_.out, workers_) {
    pack(a.call, packed_.get());
    for (int w = 0; w < workers_; ++w) std::fill_n(border_.get(w), plan_.group * plan_.in_map, 0.0f);
  }

  bool run() {
    // Products of weights with the border's zeros would be NaN.
    if (!plan_.winograd && !all_finite(packed_.get(), plan_.weights())) return false;
    const Convolution convolution(plan_, s_.in, s_.out, packed_.get());
    std::fill_n(totals_.get(), 2 * s_.out * plan_.pieces, 0.0);
    if (a_.call.training) {
      begin(convolution);
    } else if (!a_.call.groups) {
      for (std::int64_t c = 0; c < s_.out; ++c) save(a_.saved, c, static_cast<double>(a_.mean[c]), static_cast<double>(a_.variance[c]));
    }
    auto work = [&](std::int64_t piece, std::int64_t end, int worker) {
      for (; piece < end; ++piece) {
        const std::int64_t last = std::min((piece + 1) * plan_.piece, s_.batch);
        for (std::int64_t n = piece * plan_.piece + (a_.call.training && !piece ? plan_.group : 0); n < last; n += plan_.group)
          group(convolution, n, std::min(plan_.group, last - n), worker, totals_.get() + 2 * s_.out * piece);
      }
    };
    parallel_for(plan_.pieces, 1, a_.call.threads, seconds(plan_, 1), work);
    if (a_.call.training && !finish_statistics()) return false;
    if (!kept_ || a_.call.groups) return finite_;
    auto rest = [&](std::int64_t begin, std::int64_t end) { finish(y() + begin * plan_.out_floats(), begin, end - begin); };
    parallel_for(s_.batch, plan_.piece, a_.call.threads, seconds(r_.positions() * s_.out), rest);
    return finite_;
  }

 private:
  float* y() const { return a_.y ? a_.y : whole_.get(); }

  template <typename Done>
  FEDKERN_INLINE void convolve(const Convolution& convolution, std::int64_t n, std::int64_t samples, int worker, float* to, Done&& done) {
    const std::int64_t size = plan_.in_floats();
    for (std::int64_t i = 0; i < samples; ++i) {
      const float* const map = lay_out(a_.call.x + (n + i) * size, plan_, border_.get(worker) + i * plan_.in_map);
      if (!plan_.winograd) convolution.direct(map, to + i * plan_.out_floats(), done);
    }
    if (!plan_.winograd) return;
    float* const tiles = tiles_.get(worker);
    plan_.bands([&](const Band& band) {
      const std::int64_t count = band.tiles();
      for (std::int64_t i = 0; i < samples; ++i)
        transform_map(border_.get(worker) + i * plan_.in_map, plan_.in_row, band, s_.in, tiles + i * count * s_.in, plane_of(samples * count, s_.in));
      const auto each = [&](const float* at, std::int64_t c) { done(at, band.positions(), c); };
      if (!convolution.winograd(tiles, samples, band, products_.get(worker), to, each)) finite_ = false;
    });
  }

  // The first group: its means are what all sums are taken from, or a mean far from zero would cancel all digits.
  void begin(const Convolution& convolution) {
    convolve(convolution, 0, plan_.group, 0, y(), nothing);
    sum(y(), plan_.group * r_.height * r_.width, shift_.get(), totals_.get());
  }

  // The sums of add_statistics(), from means that a first pass finds.
  void sum(const float* y, std::int64_t positions, float* shift, double* total) const {
    const std::int64_t C = s_.out;
    std::fill_n(shift, C, 0.0f);
    for (const bool again : {false, true}) {
      std::fill_n(total, 2 * C, 0.0);
      for (std::int64_t i = 0; i < positions; i += stretch(C))
        by_lanes(C, [&](auto v) { add_statistics<decltype(v)>(y + i * C, std::min(stretch(C), positions - i), C, C, shift, total, total + C); });
      if (!again)
        for (std::int64_t c = 0; c < C; ++c) shift[c] = static_cast<float>(total[c] / static_cast<double>(positions));
    }
  }

  // A sample's group norm, while its convolution, at `from`, is in cache.
  void group_norm(const float* from, std::int64_t n, int worker, double* total) {
    const std::int64_t C = s_.out, each = C / a_.call.groups, positions = r_.height * r_.width;
    float *const shift = shift_.get(worker), *const saved = saved_of(a_, n);
    sum(from, positions, shift, total);
    for (std::int64_t first = 0; first < C; first += each) {
      double mean = 0, variance = 0;
      for (std::int64_t c = first; c < first + each; ++c) {
        const double off = total[c] / static_cast<double>(positions);
        total[C + c] = total[C + c] / static_cast<double>(positions) - off * off;
        total[c] = static_cast<double>(shift[c]) + off + bias(c);
        mean += total[c] / static_cast<double>(each);
      }
      for (std::int64_t c = first; c < first + each; ++c) variance += (total[C + c] + (total[c] - mean) * (total[c] - mean)) / static_cast<double>(each);
      if (!std::isfinite(variance)) finite_ = false;
      for (std::int64_t c = first; c < first + each; ++c) {
        save(saved, c, mean - bias(c), std::max(variance, 0.0));
        saved[4 * C + c] = static_cast<float>(total[c] - mean);
      }
    }
    finish(from, n, 1);
  }

  double bias(std::int64_t c) const { return a_.bias ? static_cast<double>(a_.bias[c]) : 0; }

  void group(const Convolution& convolution, std::int64_t n, std::int64_t samples, int worker, double* total) {
    float* const to = kept_ ? y() + n * plan_.out_floats() : map_.get(worker);
    if (!a_.call.training) {
      convolve(convolution, n, samples, worker, to, nothing);
      if (a_.call.groups)
        for (std::int64_t i = 0; i < samples; ++i) group_norm(to + i * plan_.out_floats(), n + i, worker, total);
      else if (!kept_)
        finish(to, n, samples);
      return;
    }
    const std::int64_t block = block_of(s_.out);
    convolve(convolution, n, samples, worker, to, [&](const float* at, std::int64_t positions, std::int64_t c) {
      by_lanes(s_.out, [&](auto v) { add_statistics<decltype(v)>(at, positions, s_.out, block, shift_.get() + c, total + c, total + s_.out + c); });
    });
  }

  void save(float* saved, std::int64_t c, double mean, double variance) const {
    const double inverse = 1 / std::sqrt(variance + a_.call.eps), scale = static_cast<double>(a_.scale[c]) * inverse;
    saved[c] = static_cast<float>(mean);
    saved[s_.out + c] = static_cast<float>(inverse);
    saved[2 * s_.out + c] = static_cast<float>(scale);
    saved[3 * s_.out + c] = static_cast<float>(static_cast<double>(a_.shift[c]) - mean * scale);
  }

  bool finish_statistics() {
    const double count = static_cast<double>(r_.positions()), m = a_.momentum;
    add_pieces(totals_.get(), 2 * s_.out, plan_.pieces);
    if (!finite_ || !all_finite(totals_, 2 * s_.out)) return false;
    for (std::int64_t c = 0; c < s_.out; ++c) {
      const double off = totals_.get()[c] / count, mean = static_cast<double>(shift_.get()[c]) + off;
      const double spread = totals_.get()[s_.out + c] / count - off * off, variance = spread < 0 ? 0 : spread;  // NaN stays
      save(a_.saved, c, mean, variance);
      if (!a_.update) continue;
      a_.mean[c] = static_cast<float>((1 - m) * static_cast<double>(a_.mean[c]) + m * mean);
      a_.variance[c] = static_cast<float>((1 - m) * static_cast<double>(a_.variance[c]) + m * variance * (count / (count - 1)));
    }
    return true;
  }

  // Samples [n, n + samples), whose convolution is at `from`.
  void finish(const float* from, std::int64_t n, std::int64_t samples) {
    const float *a = saved_of(a_, n) + 2 * s_.out, *b = a + s_.out;
    by_lanes(s_.out, [&](auto v) {
      using V = decltype(v);
      if (a_.call.pool) {
        const std::int64_t pooled = r_.height / 2 * (r_.width / 2) * s_.out;
        const auto pass = a_.call.relu ? normalise_and_pool<true, V> : normalise_and_pool<false, V>;
        for (std::int64_t i = 0; i < samples; ++i)
          pass(from + i * plan_.out_floats(), r_, a, b, a_.raw ? a_.raw + (n + i) * pooled : nullptr, a_.out + (n + i) * pooled);
      } else {
        const std::int64_t at = n * plan_.out_floats();
        const auto pass = a_.call.relu ? normalise<true, V> : normalise<false, V>;
        pass(from, a_.residual ? a_.residual + at : nullptr, samples * r_.height * r_.width, s_.out, a, b, a_.out + at);
      }
    });
  }

  const ConvForward& a_;
  const ConvPlan plan_;
  const ConvShape &s_, &r_;
  const int workers_;
  const bool kept_;  // the whole convolution is there before it is normalised
  const Scratch<float> packed_, whole_, border_, tiles_, products_, map_;
  const Scratch<double> totals_;
  const Scratch<float> shift_;
  std::atomic<bool> finite_ = true;
};

// --- backward

class Backward {
  // Floats of such sums; more only where each thread needs one of its own.
  static constexpr std::int64_t kHeld = std::int64_t{1} << 22;

 public:
  explicit Backward(const ConvBackward& a)
      : a_(a), plan_(a.call.shape), s_(plan_.shape), r_(plan_.result), workers_(parallel_workers(plan_.pieces, 1, a.call.threads)), back_(rounded_up(s_.in)),
        weight_size_(plan_.winograd ? kPlanes * s_.in * s_.out : plan_.weights()),
        held_(a.to_weight ? std::clamp<std::int64_t>(kHeld / weight_size_, workers_, plan_.pieces) : plan_.pieces),
        in_border_(plan_.group * plan_.in_map, workers_), out_border_(plan_.group * plan_.out_map, workers_),
        tiles_(Convolution::tiles(plan_, std::max(s_.in, s_.out)), workers_), gradient_tiles_(Convolution::tiles(plan_, s_.out), workers_),
        products_(Convolution::products(plan_, s_.in), workers_), few_(back_ == s_.in ? 0 : s_.height * s_.width * back_, workers_),
        weights_(a.to_weight ? weight_size_ * std::min(held_ + 1, plan_.pieces) : 0), coefficients_(2 * s_.out, a.call.groups ? workers_ : 1),
        totals_(sums() * plan_.pieces), sample_(2 * s_.out, workers_) {
    for (int w = 0; w < workers_; ++w) {
      std::fill_n(in_border_.get(w), plan_.group * plan_.in_map, 0.0f);
      std::fill_n(out_border_.get(w), plan_.group * plan_.out_map, 0.0f);
    }
  }

  bool run() {
    if (!a_.call.groups && !reduce_all()) return false;
    if (a_.call.groups || a_.to_x || a_.to_weight || a_.to_residual) convolve();
    if (a_.call.groups) finish_vectors();
    if (a_.to_weight) finish_weights();
    return finite_;
  }

 private:
  std::int64_t sums() const { return (a_.call.groups ? 3 : 2) * s_.out; }  // of a piece: to_shift, products, to_bias

  // Both sums of the norm's gradient over samples [begin, end).
  void reduce_samples(std::int64_t begin, std::int64_t end, const Coefficients& k, double* total) const {
    const std::int64_t C = s_.out, positions = a_.call.positions_of_out() / s_.batch, at = begin * positions * C;
    const float* const y = a_.call.pool ? a_.raw : a_.y;
    std::fill_n(total, 2 * C, 0.0);
    by_lanes(C, [&](auto v) {
      const auto pass = a_.call.relu ? reduce<true, decltype(v)> : reduce<false, decltype(v)>;
      pass(a_.grad + at, y + at, a_.out ? a_.out + at : nullptr, (end - begin) * positions, C, k, total, total + C);
    });
  }

  // What the sums of a whole batch make of y in a batch norm's gradient.
  bool reduce_all() {
    const std::int64_t C = s_.out;
    auto work = [&](std::int64_t begin, std::int64_t end) {
      reduce_samples(begin, end, coefficients(begin, 0), totals_.get() + 2 * C * (begin / plan_.piece));
    };
    parallel_for(s_.batch, plan_.piece, a_.call.threads, seconds(a_.call.positions_of_out() * C), work);
    add_pieces(totals_.get(), 2 * C, plan_.pieces);
    if (!all_finite(totals_, 2 * C) || !all_finite(a_.saved, 4 * C)) return false;
    const double count = static_cast<double>(r_.positions());
    for (std::int64_t c = 0; c < C; ++c) {
      const double sum = totals_.get()[c], products = totals_.get()[C + c];
      const double mean = static_cast<double>(a_.saved[c]), inverse = static_cast<double>(a_.saved[C + c]), scale = static_cast<double>(a_.saved[2 * C + c]);
      if (a_.to_shift) a_.to_shift[c] = static_cast<float>(sum);
      if (a_.to_scale) a_.to_scale[c] = static_cast<float>(products * inverse);
      const double slope = a_.call.training ? -scale * products * inverse * inverse / count : 0;
      coefficients_.get()[c] = static_cast<float>(slope);
      coefficients_.get()[C + c] = static_cast<float>(a_.call.training ? -scale * sum / count - slope * mean : 0);
    }
    return true;
  }

  // The same of a sample in a group norm's, while the sample is in cache; adds its sums to those of its piece.
  void reduce_sample(std::int64_t n, int worker, double* total) {
    const std::int64_t C = s_.out, each = C / a_.call.groups;
    const double positions = static_cast<double>(r_.height * r_.width), count = static_cast<double>(each) * positions;
    const float* const saved = saved_of(a_, n);
    double* const sum = sample_.get(worker);
    float* const slopes = coefficients_.get(worker);
    reduce_samples(n, n + 1, coefficients(n, worker), sum);
    if (!all_finite(sample_, 2 * C, worker) || !all_finite(saved, 5 * C)) finite_ = false;
    for (std::int64_t first = 0; first < C; first += each) {
      double of_sums = 0, of_products = 0;
      for (std::int64_t c = first; c < first + each; ++c) {
        const double scale = static_cast<double>(saved[2 * C + c]);
        of_sums += scale * sum[c] / count, of_products += scale * sum[C + c] / count;
      }
      const double inverse = static_cast<double>(saved[C + first]), slope = -inverse * inverse * of_products;
      for (std::int64_t c = first; c < first + each; ++c) {
        slopes[c] = static_cast<float>(slope);
        slopes[C + c] = static_cast<float>(-of_sums - slope * static_cast<double>(saved[c]));
        total[c] += sum[c], total[C + c] += sum[C + c] * inverse;
        total[2 * C + c] += static_cast<double>(saved[2 * C + c]) * sum[c] + positions * (slope * static_cast<double>(saved[4 * C + c]) - of_sums);
      }
    }
  }

  void finish_vectors() {
    const std::int64_t C = s_.out;
    add_pieces(totals_.get(), 3 * C, plan_.pieces);
    for (std::int64_t c = 0; c < C; ++c) {
      if (a_.to_shift) a_.to_shift[c] = static_cast<float>(totals_.get()[c]);
      if (a_.to_scale) a_.to_scale[c] = static_cast<float>(totals_.get()[C + c]);
      if (a_.to_bias) a_.to_bias[c] = static_cast<float>(totals_.get()[2 * C + c]);
    }
  }

  Coefficients coefficients(std::int64_t n, int worker) const {
    const std::int64_t C = s_.out;
    const float *const saved = saved_of(a_, n), *const slopes = coefficients_.get(a_.call.groups ? worker : 0);
    return {saved, saved + 2 * C, saved + 3 * C, slopes, slopes + C};
  }

  void convolve() {
    std::optional<Scratch<float>> packed;
    std::optional<Convolution> back;
    if (a_.to_x) {
      packed.emplace(s_.taps() * back_ * s_.out);
      pack_back(a_.call, packed->get());
      back.emplace(plan_, s_.out, back_, packed->get());
      if (plan_.winograd) packed.reset();  // transformed by now
    }
    for (std::int64_t first = 0; first < plan_.pieces; first += held_) {
      const std::int64_t count = std::min(held_, plan_.pieces - first), behind = first ? 1 : 0;  // the sum of those before
      auto work = [&](std::int64_t i, std::int64_t end, int worker) {
        for (; i < end; ++i) {
          const std::int64_t begin = (first + i) * plan_.piece, last = std::min(begin + plan_.piece, s_.batch);
          float* const weights = weights_.get() + weight_size_ * (behind + i);
          double* const total = totals_.get() + sums() * (first + i);
          if (a_.call.groups) std::fill_n(total, sums(), 0.0);
          for (std::int64_t n = begin; n < last; n += plan_.group) group(back, n, std::min(plan_.group, last - n), worker, weights, total, n == begin);
        }
      };
      parallel_for(count, 1, a_.call.threads, seconds(plan_, 2) * static_cast<double>(count) / static_cast<double>(plan_.pieces), work);
      if (a_.to_weight) add_pieces(weights_.get(), weight_size_, behind + count);
    }
  }

  void group(const std::optional<Convolution>& back, std::int64_t n, std::int64_t samples, int worker, float* weights, double* total, bool first) {
    float *const maps = in_border_.get(worker), *const gradients = out_border_.get(worker);
    const float* map = maps;
    for (std::int64_t i = 0; i < samples; ++i) {
      if (a_.call.groups) reduce_sample(n + i, worker, total);
      spread_sample(n + i, worker, gradients + i * plan_.out_map);
      if (a_.to_weight) map = lay_out(a_.call.x + (n + i) * plan_.in_floats(), plan_, maps + i * plan_.in_map);
    }
    float* const to_x = a_.to_x ? a_.to_x + n * plan_.in_floats() : nullptr;
    if (plan_.winograd)
      plan_.bands([&](const Band& band) {
        this->band(back, band, samples, worker, to_x, weights, first);
        first = false;
      });
    else
      sample(back, map, worker, to_x, weights, first);
  }

  void sample(const std::optional<Convolution>& back, const float* map, int worker, float* to_x, float* weights, bool first) {
    const float* const gradient = out_border_.get(worker);
    if (a_.to_weight) add_taps(map, plan_.in_row, gradient + plan_.out_row + s_.out, plan_.out_row, s_, weights, first);
    if (!to_x) return;
    float* const eight = few_.get(worker);
    back->direct_back(gradient, back_ == s_.in ? to_x : eight);
    if (back_ != s_.in)
      for (std::int64_t p = 0; p < s_.height * s_.width; ++p) std::copy_n(eight + p * back_, s_.in, to_x + p * s_.in);
  }

  void band(const std::optional<Convolution>& back, const Band& band, std::int64_t samples, int worker, float* to_x, float* weights, bool first) {
    float *const tiles = tiles_.get(worker), *const gradient_tiles = gradient_tiles_.get(worker);
    const std::int64_t each = band.tiles(), count = samples * each;
    if (a_.to_weight) {
      for (std::int64_t i = 0; i < samples; ++i) {
        transform_map(in_border_.get(worker) + i * plan_.in_map, plan_.in_row, band, s_.in, tiles + i * each * s_.in, plane_of(count, s_.in));
        transform_gradient(out_border_.get(worker) + i * plan_.out_map, plan_.out_row, band, s_.out, gradient_tiles + i * each * s_.out, plane_of(count, s_.out));
      }
      add_outer(tiles, gradient_tiles, count, s_, weights, first);
    }
    if (!to_x) return;
    for (std::int64_t i = 0; i < samples; ++i)
      transform_map(out_border_.get(worker) + i * plan_.out_map, plan_.out_row, band, s_.out, tiles + i * each * s_.out, plane_of(count, s_.out));
    if (!back->winograd(tiles, samples, band, products_.get(worker), to_x, nothing)) finite_ = false;
  }

  void spread_sample(std::int64_t n, int worker, float* d) {
    const std::int64_t at = n * plan_.out_floats(), pooled = r_.height / 2 * (r_.width / 2) * s_.out;
    const Coefficients k = coefficients(n, worker);
    by_lanes(s_.out, [&](auto v) {
      using V = decltype(v);
      if (a_.call.pool)
        (a_.call.relu ? spread_pooled<true, V> : spread_pooled<false, V>)(a_.grad + n * pooled, a_.y + at, a_.raw + n * pooled, r_, k, d, plan_.out_row);
      else
        (a_.call.relu ? spread<true, V> : spread<false, V>)(a_.grad + at, a_.y + at, a_.out ? a_.out + at : nullptr, r_, k, d, plan_.out_row,
                                                           a_.to_residual ? a_.to_residual + at : nullptr);
    });
  }

  // Lays the sum of the pieces out as the weights are.
  void finish_weights() {
    float* const sum = weights_.get();
    if (plan_.winograd) transform_weights_back(sum, s_.in * s_.out);
    unpack(sum, a_.call, a_.to_weight);
  }

  const ConvBackward& a_;
  const ConvPlan plan_;
  const ConvShape &s_, &r_;
  const int workers_;
  const std::int64_t back_, weight_size_;
  const std::int64_t held_;  // pieces whose sums of weights are in memory at a time: added up in the same order, however many
  const Scratch<float> in_border_, out_border_, tiles_, gradient_tiles_, products_, few_, weights_, coefficients_;
  const Scratch<double> totals_, sample_;
  std::atomic<bool> finite_ = true;
};

// Where PyTorch's own operators (oneDNN) are faster, or not slower: many channels that few tiles share, since transformed weights
// leave the caches then, and channels that neither tiles of Winograd nor constants of the direct kernels fit. Blocks of
// weights of one tap stay in L1 up to 256 channels.
bool fits(const ConvShape& s) {
  if (s.kernel == 1) return s.in % 8 == 0 && s.out % 8 == 0 && s.in <= 256 && s.result().width >= kLeastWidth;
  if (s.stride == 2) {
    const bool is_tiled = (s.in == 8 || s.in % 16 == 0) && s.out % 16 == 0;
    return is_tiled && s.in <= 32 && s.out <= 64 && s.width / 2 >= kLeastWidth;
  }
  if (s.in % 16 == 0 && s.out % 16 == 0) return 512 * s.batch * Band{0, s.height, s.width}.tiles() >= s.in * s.out;
  if (s.out % 8 || s.width < kLeastWidth || s.height < 2) return false;
  return s.in == 1 || s.in == 3 || ((s.in == 8 || s.in == 16) && s.out <= 32);
}

// Channels of zeros may cost half as much again as the given ones.
ConvShape served(const ConvShape& s) {
  for (const std::int64_t unit : {8, 16}) {
    const auto filled = [&](std::int64_t channels) { return (channels + unit - 1) / unit * unit; };
    ConvShape wide = s;
    wide.in = s.in == 1 || s.in == 3 ? s.in : filled(s.in), wide.out = filled(s.out);
    if (2 * wide.in * wide.out <= 3 * s.in * s.out && fits(wide)) return wide;
  }
  return {};
}

bool forward(const ConvForward& a) {
  const ConvShape &own = a.call.shape, wide = served(own);
  if (wide.in == own.in && wide.out == own.out) return Forward(a).run();
  Filled f(a.call, wide);
  ConvForward b = a;
  b.call = f.call(), b.scale = f.read(a.scale, f.vector), b.shift = f.read(a.shift, f.vector);
  b.mean = a.update ? f.updated(a.mean, f.vector) : f.read(a.mean, f.vector);
  b.variance = a.update ? f.updated(a.variance, f.vector) : f.read(a.variance, f.vector);
  b.residual = f.read(a.residual, f.out), b.out = f.written(a.out, f.out);
  if (!Forward(b).run()) return false;
  f.finish();
  return true;
}

bool backward(const ConvBackward& a) {
  const ConvShape &own = a.call.shape, wide = served(own);
  if (wide.in == own.in && wide.out == own.out) return Backward(a).run();
  Filled f(a.call, wide);
  ConvBackward b = a;
  b.call = f.call(), b.grad = f.read(a.grad, f.out), b.out = f.read(a.out, f.out);
  b.to_x = f.written(a.to_x, f.in), b.to_weight = f.written_weight(a.to_weight), b.to_residual = f.written(a.to_residual, f.out);
  b.to_scale = f.written(a.to_scale, f.vector), b.to_shift = f.written(a.to_shift, f.vector);
  if (!Backward(b).run()) return false;
  f.finish();
  return true;
}

#endif

}  // namespace

#if defined(FEDKERN_ISA_portable)
const ConvTable conv_table = {};
#else
const ConvTable conv_table = {served, forward, backward, pool_fits, [](const PoolForward& a) { return PoolingForward(a).run(); },
                              [](const PoolBackward& a) { return PoolingBackward(a).run(); }};
#endif

}  // namespace fedkern::FEDKERN_ISA
