#include "fedkern/strided.h"

#if !defined(FEDKERN_ISA_portable)

#include <algorithm>
#include <atomic>
#include <cmath>

#include "conv_tiles.h"
#include "fedkern/parallel.h"
#include "scratch.h"

#endif

namespace fedkern::FEDKERN_ISA {
namespace {

#if !defined(FEDKERN_ISA_portable)

constexpr std::int64_t kSide = 4, kTaps = kSide * kSide;
// Samples whose products, and taps whose gradients are in registers together, beside one vector or two of channels; floats of a
// group's map times its channels up to which the forward pass was as fast as PyTorch's or faster.
#if defined(FEDKERN_ISA_avx512)
constexpr int kSamples = 8, kGradients = 8;
constexpr std::int64_t kMost = std::int64_t{1} << 24;
#else
constexpr int kSamples = 4, kGradients = 4;
constexpr std::int64_t kMost = std::int64_t{1} << 18;
#endif
// Floats of a part's maps, which stay in L2 beside weights.
constexpr std::int64_t kPart = 65536;

// Channels that a tile makes at a time.
inline std::int64_t block_of(std::int64_t channels) { return channels % (2 * Wide::lanes) ? Wide::lanes : 2 * Wide::lanes; }

// A group's maps of some samples with a column of zeros on either side, [row][sample][column][channel]: samples are at a constant
// distance, and taps of a row lie behind one another.
class Maps {
 public:
  Maps(std::int64_t height, std::int64_t width, std::int64_t channels, std::int64_t samples, int workers)
      : height_(height), width_(width), channels_(channels), data_(height * samples * step(), workers) {}

  std::int64_t step() const { return (width_ + 2) * channels_; }  // floats from one sample to the next
  const float* at(int worker, std::int64_t samples, std::int64_t row, std::int64_t column) const {
    return data_.get(worker) + row * samples * step() + column * channels_;
  }

  // From a group's channels, `all` floats from one position to the next. Returns whether they are finite.
  bool lay_out(const float* from, std::int64_t all, std::int64_t samples, int worker) const {
    Wide zeros = Wide::set(0);
    for (std::int64_t b = 0; b < samples; ++b)
      for (std::int64_t y = 0; y < height_; ++y) {
        float* to = std::fill_n(data_.get(worker) + (y * samples + b) * step(), channels_, 0.0f);
        for (std::int64_t x = 0; x < width_; ++x, from += all)
          for (std::int64_t c = 0; c < channels_; c += Wide::lanes, to += Wide::lanes) {
            const Wide value = Wide::load(from + c);
            zeros = fma(value, Wide::set(0), zeros);
            value.store(to);
          }
        std::fill_n(to, channels_, 0.0f);
      }
    return reduce_add(zeros) == 0;
  }

 private:
  std::int64_t height_, width_, channels_;
  Scratch<float> data_;
};

// Transposes 16 rows of 16 numbers: row i goes to `to + place(i)`.
template <typename Place>
FEDKERN_INLINE bool turn(const float* from, std::int64_t step, float* to, Place&& place) {
  float square[kTaps][kTaps], zeros = 0;
  for (int i = 0; i < kTaps; ++i)
    for (int j = 0; j < kTaps; ++j) square[i][j] = from[i * step + j], zeros += 0 * square[i][j];
  for (int i = 0; i < kTaps; ++i)
    for (int j = 0; j < kTaps; ++j) to[place(i) + j] = square[j][i];
  return zeros == 0;
}

class Strided {
 public:
  Strided(const StridedConv& a, bool to_x, bool to_weight, bool y)
      : a_(a), s_(a.shape), high_(s_.high()), wide_(s_.wide()), weights_(kTaps * s_.in * s_.out), workers_(parallel_workers(s_.groups, 1, a.threads)),
        parts_(std::max<std::int64_t>(1, s_.batch / std::max<std::int64_t>(kSamples, kPart / (s_.height * s_.width * s_.in)))),
        samples_((s_.batch + parts_ - 1) / parts_), maps_(s_.height, s_.width, y || to_weight ? s_.in : 0, samples_, workers_),
        gradients_(high_, wide_, y ? 0 : s_.out, samples_, workers_), packed_(y || to_x ? weights_ : 0, workers_), sums_(to_weight ? weights_ : 0, workers_) {}

  bool forward(float* y) {
    return each_group([&](std::int64_t group, int worker) {
      bool finite = pack(group, packed_.get(worker));
      each_part([&](std::int64_t begin, std::int64_t samples) {
        finite &= maps_.lay_out(of_x(a_.x, group, begin), s_.groups * s_.in, samples, worker);
        convolve(samples, worker, of_y(y, group, begin));
      });
      return finite;
    });
  }

  bool backward(const float* grad, float* to_x, float* to_weight) {
    return each_group([&](std::int64_t group, int worker) {
      bool finite = !to_x || pack_back(group, packed_.get(worker));
      float* const sums = sums_.get(worker);
      if (to_weight) std::fill_n(sums, weights_, 0.0f);
      each_part([&](std::int64_t begin, std::int64_t samples) {
        finite &= gradients_.lay_out(of_y(grad, group, begin), s_.groups * s_.out, samples, worker);
        if (to_x) convolve_back(samples, worker, of_x(to_x, group, begin));
        if (!to_weight) return;
        finite &= maps_.lay_out(of_x(a_.x, group, begin), s_.groups * s_.in, samples, worker);
        add_weights(samples, worker, sums);
      });
      if (to_weight) unpack(sums, to_weight + group * weights_);
      return finite;
    });
  }

 private:
  template <typename T>
  T* of_x(T* x, std::int64_t group, std::int64_t sample) const { return x + sample * s_.height * s_.width * s_.groups * s_.in + group * s_.in; }
  template <typename T>
  T* of_y(T* y, std::int64_t group, std::int64_t sample) const { return y + sample * high_ * wide_ * s_.groups * s_.out + group * s_.out; }

  // Returns whether body(group, worker) did for all.
  template <typename Body>
  bool each_group(Body&& body) {
    std::atomic<bool> finite = true;
    auto work = [&](std::int64_t group, std::int64_t, int worker) {
      if (!body(group, worker)) finite = false;
    };
    parallel_for(s_.groups, 1, a_.threads, 2e-11 * static_cast<double>(s_.groups * s_.batch * high_ * wide_ * weights_), work);
    return finite;
  }

  template <typename Body>
  void each_part(Body&& body) const {
    for (std::int64_t part = 0; part < parts_; ++part) {
      const std::int64_t begin = part * s_.batch / parts_;
      body(begin, (part + 1) * s_.batch / parts_ - begin);
    }
  }

  // [out / block][taps][in][block]
  bool pack(std::int64_t group, float* to) const {
    const std::int64_t block = block_of(s_.out);
    bool finite = true;
    for (std::int64_t o = 0; o < s_.out; o += kTaps)
      for (std::int64_t c = 0; c < s_.in; ++c)
        finite &= turn(a_.weight + group * weights_ + (o * s_.in + c) * kTaps, s_.in * kTaps, to + o / block * block * kTaps * s_.in + o % block + c * block,
                       [&](int tap) { return tap * s_.in * block; });
    return finite;
  }

  // A row of x has two rows of taps, 3 and 1 where it is even and 2 and 0 where it is odd, and so have columns: four convolutions,
  // [in / block][2][2][out][block] each.
  bool pack_back(std::int64_t group, float* to) const {
    const std::int64_t block = block_of(s_.in);
    bool finite = true;
    for (std::int64_t o = 0; o < s_.out; ++o)
      for (std::int64_t c = 0; c < s_.in; c += kTaps)
        finite &= turn(a_.weight + group * weights_ + (o * s_.in + c) * kTaps, kTaps, to + c / block * block * kSide * s_.out + c % block + o * block,
                       [&](int tap) {
                         const int down = tap / 4, across = tap % 4, convolution = 2 - down % 2 * 2 + 1 - across % 2;
                         return convolution * weights_ / 4 + ((1 - down / 2) * 2 + 1 - across / 2) * s_.out * block;
                       });
    return finite;
  }

  // [taps][in][out] -> [out][in][taps]
  void unpack(const float* from, float* to) const {
    for (std::int64_t o = 0; o < s_.out; o += kTaps)
      for (std::int64_t c = 0; c < s_.in; ++c)
        turn(from + c * s_.out + o, s_.in * s_.out, to + (o * s_.in + c) * kTaps, [&](int i) { return i * s_.in * kTaps; });
  }

  // Rows [begin, end) of `maps`, `length` floats of each, times a block of weights, for all samples.
  static void multiply(const Maps& maps, const float* x, std::int64_t samples, int rows, std::int64_t length, const float* weight, std::int64_t block, float* out,
                       std::int64_t out_step) {
    const auto tile = block == Wide::lanes ? product_tile<Wide, kSamples, 1> : product_tile<Wide, kSamples, 2>;
    const std::int64_t step = maps.step();
    for (std::int64_t b = 0; b < samples; b += kSamples) {
      const std::int64_t at = std::min(b, samples - kSamples);  // the last tile may overlap the one before
      tile(x + at * step, samples * step, step, rows, length, weight, out + at * out_step, out_step);
    }
  }

  void convolve(std::int64_t samples, int worker, float* y) const {
    const std::int64_t all = s_.groups * s_.out, block = block_of(s_.out), length = kSide * s_.in;
    for (std::int64_t c = 0; c < s_.out; c += block)
      for (std::int64_t i = 0; i < high_; ++i) {
        const std::int64_t first = std::max<std::int64_t>(0, 1 - 2 * i), rows = std::min(kSide, s_.height + 1 - 2 * i) - first;
        for (std::int64_t j = 0; j < wide_; ++j)
          multiply(maps_, maps_.at(worker, samples, 2 * i - 1 + first, 2 * j), samples, static_cast<int>(rows), length,
                   packed_.get(worker) + c * kTaps * s_.in + first * length * block, block, y + (i * wide_ + j) * all + c, high_ * wide_ * all);
      }
  }

  void convolve_back(std::int64_t samples, int worker, float* x) const {
    const std::int64_t all = s_.groups * s_.in, block = block_of(s_.in), length = 2 * s_.out;
    const float* weight = packed_.get(worker);
    for (const std::int64_t down : {0, 1})
      for (const std::int64_t across : {0, 1})
        for (std::int64_t c = 0; c < s_.in; c += block, weight += block * kSide * s_.out)
          for (std::int64_t i = down; i < s_.height; i += 2) {
            const std::int64_t above = i / 2 - 1 + down, first = above < 0 ? 1 : 0, rows = std::min<std::int64_t>(2, high_ - above) - first;
            for (std::int64_t j = across; j < s_.width; j += 2)
              multiply(gradients_, gradients_.at(worker, samples, above + first, j / 2 + across), samples, static_cast<int>(rows), length,
                       weight + first * length * block, block, x + (i * s_.width + j) * all + c, s_.height * s_.width * all);
          }
  }

  // Adds to the gradient of the weights, [taps][in][out].
  void add_weights(std::int64_t samples, int worker, float* sums) const {
    const std::int64_t block = block_of(s_.out), length = kSide * s_.in;
    const auto tile = block == Wide::lanes ? outer_tile<Wide, kGradients, 1, 1> : outer_tile<Wide, kGradients, 1, 2>;
    for (std::int64_t i = 0; i < high_; ++i)
      for (std::int64_t t = std::max<std::int64_t>(0, 1 - 2 * i); t < std::min(kSide, s_.height + 1 - 2 * i); ++t)
        for (std::int64_t c = 0; c < s_.out; c += block)
          for (std::int64_t k = 0; k < length; k += kGradients)
            tile({maps_.at(worker, samples, 2 * i + t - 1, 0) + k, maps_.step(), 2 * s_.in}, 0, {gradients_.at(worker, samples, i, 1) + c, gradients_.step(), s_.out},
                 samples, wide_, sums + (t * length + k) * s_.out + c, s_.out, 0, false);
  }

  const StridedConv& a_;
  const StridedShape& s_;
  const std::int64_t high_, wide_, weights_;
  const int workers_;
  const std::int64_t parts_, samples_;
  const Maps maps_, gradients_;
  const Scratch<float> packed_, sums_;
};

// Threads share groups, so that one group would have one thread.
bool fits(const StridedShape& s) {
  const bool shape = s.groups > 1 && s.batch >= kSamples && s.height > 1 && s.width > 1 && s.in > 0 && s.out > 0;
  return shape && s.in % kTaps == 0 && s.out % kTaps == 0 && s.height * s.width * s.in * s.in <= kMost;
}

bool forward(const StridedConv& a, float* y) { return Strided(a, false, false, true).forward(y); }

bool backward(const StridedConv& a, const float* grad, float* to_x, float* to_weight) {
  return Strided(a, to_x, to_weight, false).backward(grad, to_x, to_weight);
}

#endif

}  // namespace

#if defined(FEDKERN_ISA_portable)
const StridedTable strided_table = {};
#else
const StridedTable strided_table = {fits, forward, backward};
#endif

}  // namespace fedkern::FEDKERN_ISA
