// Convolution, bias, ReLU and 2x2 max pooling without a norm.
//
// Behind the pooling a gradient is zero in three places of four, and in more behind the ReLU. Products of the backward pass run over
// lists of what is left: the same sums with a quarter of the products.
#pragma once

#include <array>
#include <atomic>
#include <optional>
#include <utility>

#include "conv_batch.h"
#include "conv_norm.h"
#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

constexpr std::uint8_t kDead = 255;  // a window behind whose maximum the ReLU is zero

// A sample's map with its border, channels-last, and behind it as much as vectors reach over its end.
struct Bordered {
  std::int64_t row, edge, floats;
  explicit Bordered(const PoolShape& s)
      : row((s.width + 2 * s.padding) * s.in), edge(s.padding * (row + s.in)), floats((s.height + 2 * s.padding) * row + s.kernel * s.in + 12 * Wide::lanes) {}
};

// Rows of a sample, planar or channels-last, from where its map is inside a border, and back.
inline void lay_rows(const float* x, const PoolShape& s, bool planar, std::int64_t row, float* to) {
  for (std::int64_t y = 0; y < s.height; ++y, to += row)
    if (!planar || s.in == 1)
      std::memcpy(to, x + y * s.width * s.in, s.width * s.in * sizeof(float));
    else
      for (std::int64_t c = 0; c < s.in; ++c)
        for (std::int64_t j = 0; j < s.width; ++j) to[j * s.in + c] = x[(c * s.height + y) * s.width + j];
}
inline void take_rows(const float* from, const PoolShape& s, bool planar, std::int64_t row, float* x) {
  for (std::int64_t y = 0; y < s.height; ++y, from += row)
    if (!planar || s.in == 1)
      std::memcpy(x + y * s.width * s.in, from, s.width * s.in * sizeof(float));
    else
      for (std::int64_t c = 0; c < s.in; ++c)
        for (std::int64_t j = 0; j < s.width; ++j) x[(c * s.height + y) * s.width + j] = from[j * s.in + c];
}

// Positions p of `from`, anywhere in a map, times N vectors of channels, over `rows` rows of taps; `more`: added to what is there.
template <typename V, int P, int N>
__attribute__((noinline)) void places_tile(const float* map, const std::int32_t* from, std::int64_t row, std::int64_t rows, std::int64_t length, const float* weight,
                                           float* y, std::int64_t step, bool more) {
  const float* x[P];
  V sum[P][N];
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p) {
    x[p] = map + from[p];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[p][n] = more ? V::load(y + p * step + n * V::lanes) : V::set(0);
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t k = 0; k < length; ++k, weight += N * V::lanes) {
      V w[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) w[n] = V::load(weight + n * V::lanes);
#pragma GCC unroll 12
      for (int p = 0; p < P; ++p) {
        const V value = V::set(x[p][k]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) sum[p][n] = fma(value, w[n], sum[p][n]);
      }
    }
#pragma GCC unroll 12
    for (int p = 0; p < P; ++p) x[p] += row;
  }
#pragma GCC unroll 12
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) sum[p][n].store(y + p * step + n * V::lanes);
}

// A sample's convolution with packed weights: of as many rows of taps at a time as stay in L1.
template <typename V, int P, int N>
void convolve_places(const PoolShape& s, const float* map, std::int64_t row, const std::int32_t* from, const float* packed, float* y) {
  const std::int64_t channels = rounded_up(s.out), block = N * V::lanes, length = s.kernel * s.in, positions = s.high() * s.wide();
  const std::int64_t some = std::clamp<std::int64_t>(5120 / (length * block), 1, s.kernel);
  for (std::int64_t c = 0; c < channels; c += block)
    for (std::int64_t r = 0; r < s.kernel; r += some) {
      const std::int64_t rows = std::min(some, s.kernel - r);
      std::int64_t p = 0;
      for (; p + P <= positions; p += P) places_tile<V, P, N>(map + r * row, from + p, row, rows, length, packed, y + p * channels + c, channels, r > 0);
      for (; p < positions; ++p) places_tile<V, 1, N>(map + r * row, from + p, row, rows, length, packed, y + p * channels + c, channels, r > 0);
      packed += rows * length * block;
    }
}

// The maxima of windows, with bias and ReLU, and which of the four each is: the first of equal values, and NaN more than any number.
template <bool relu, typename V>
void pool(const float* y, const PoolShape& s, const float* bias, float* out, std::uint8_t* chosen) {
  const std::int64_t C = rounded_up(s.out), row = s.wide() * C;
  for (std::int64_t i = 0; i + 1 < s.high(); i += 2)
    for (std::int64_t j = 0; j + 1 < s.wide(); j += 2, out += C, chosen += C) {
      const float* const at = y + i * row + j * C;
      for (std::int64_t c = 0; c < C; c += V::lanes) {
        const V b = V::load(bias + c), rest[3] = {V::load(at + C + c) + b, V::load(at + row + c) + b, V::load(at + row + C + c) + b};
        V most = V::load(at + c) + b, index = V::set(0);
#pragma GCC unroll 3
        for (int k = 0; k < 3; ++k) {
          const auto more = (rest[k] > most) | !(rest[k] == rest[k]);
          most = select(more, rest[k], most), index = select(more, V::set(static_cast<float>(k + 1)), index);
        }
        const V z = rectified<relu>(most);
        if constexpr (relu) index = select(z == V::set(0), V::set(kDead), index);
        z.store(out + c);
        store_bytes(index, chosen + c);
      }
    }
}

// What both passes know of a call.
struct PoolPlan {
  const PoolShape s;
  const ConvPlan plan;  // how the batch is divided; all of it where Winograd's kernels serve
  const Bordered map;
  const std::int64_t channels, windows;
  const bool winograd;
  explicit PoolPlan(const PoolShape& s)
      : s(s), plan({s.batch, s.height, s.width, s.in, s.out}), map(s), channels(rounded_up(s.out)), windows(s.windows()),
        winograd(s.kernel == 3 && s.padding == 1 && plan.winograd) {}
  double seconds(int products) const { return products * 2e-11 * static_cast<double>(s.batch * s.high() * s.wide() * s.taps() * s.in * s.out); }
};

class PoolingForward {
 public:
  explicit PoolingForward(const PoolForward& a)
      : a_(a), p_(a.call.shape), s_(p_.s), workers_(parallel_workers(p_.plan.pieces, 1, a.call.threads)), group_(p_.winograd ? p_.plan.group : 1),
        map_floats_(p_.winograd ? p_.plan.in_map : p_.map.floats), packed_(s_.taps() * s_.in * p_.channels), bias_(p_.channels),
        maps_(group_ * map_floats_, workers_), y_(group_ * s_.high() * s_.wide() * p_.channels, workers_), few_(p_.windows * p_.channels, workers_),
        tiles_(p_.winograd ? Convolution::tiles(p_.plan, s_.in) : 0, workers_), products_(p_.winograd ? Convolution::products(p_.plan, s_.out) : 0, workers_),
        from_(s_.high() * s_.wide()) {
    pack_filled();
    std::fill_n(bias_.get(), p_.channels, 0.0f);
    if (a.bias) std::copy_n(a.bias, s_.out, bias_.get());
    for (int w = 0; w < workers_; ++w) std::fill_n(maps_.get(w), group_ * map_floats_, 0.0f);
    for (std::int64_t i = 0; i < s_.high(); ++i)
      for (std::int64_t j = 0; j < s_.wide(); ++j) from_.get()[i * s_.wide() + j] = static_cast<std::int32_t>(i * p_.map.row + j * s_.in);
  }

  bool run() {
    if (!all_finite(packed_.get(), s_.taps() * s_.in * p_.channels)) return false;
    std::optional<Convolution> convolution;
    if (p_.winograd) convolution.emplace(p_.plan, s_.in, s_.out, packed_.get());
    auto work = [&](std::int64_t piece, std::int64_t end, int worker) {
      for (; piece < end; ++piece) {
        const std::int64_t last = std::min((piece + 1) * p_.plan.piece, s_.batch);
        for (std::int64_t n = piece * p_.plan.piece; n < last; n += group_) group(convolution, n, std::min(group_, last - n), worker);
      }
    };
    parallel_for(p_.plan.pieces, 1, a_.call.threads, p_.seconds(1), work);
    return finite_;
  }

 private:
  void pack_filled() {
    const std::int64_t block = block_of(p_.channels);
    float* to = packed_.get();
    for (std::int64_t first = 0; first < p_.channels; first += block)
      for (std::int64_t tap = 0; tap < s_.taps(); ++tap)
        for (std::int64_t i = 0; i < s_.in; ++i, to += block)
          for (std::int64_t c = 0; c < block; ++c) to[c] = first + c < s_.out ? a_.call.weight_at(first + c, i, tap) : 0.0f;
  }

  void group(const std::optional<Convolution>& convolution, std::int64_t n, std::int64_t samples, int worker) {
    const std::int64_t floats = s_.height * s_.width * s_.in;
    float *const map = maps_.get(worker), *const y = y_.get(worker);
    const std::int64_t row = p_.winograd ? p_.plan.in_row : p_.map.row, edge = p_.winograd ? row + s_.in : p_.map.edge;
    for (std::int64_t i = 0; i < samples; ++i) {
      if (!all_finite(a_.call.x + (n + i) * floats, floats)) finite_ = false;
      lay_rows(a_.call.x + (n + i) * floats, s_, a_.call.x_planar, row, map + i * map_floats_ + edge);
    }
    if (p_.winograd) {
      p_.plan.bands([&](const Band& band) {
        const std::int64_t count = band.tiles();
        for (std::int64_t i = 0; i < samples; ++i)
          transform_map(map + i * map_floats_, row, band, s_.in, tiles_.get(worker) + i * count * s_.in, plane_of(samples * count, s_.in));
        if (!convolution->winograd(tiles_.get(worker), samples, band, products_.get(worker), y, nothing)) finite_ = false;
      });
    } else {
#if defined(FEDKERN_ISA_avx512)
      const auto convolve = block_of(p_.channels) == 2 * Wide::lanes ? convolve_places<Wide, 8, 2> : p_.channels % Wide::lanes ? convolve_places<Half, 8, 1> : convolve_places<Wide, 8, 1>;
#else
      const auto convolve = block_of(p_.channels) == 2 * Wide::lanes ? convolve_places<Wide, 6, 2> : convolve_places<Wide, 8, 1>;
#endif
      convolve(s_, map, row, from_.get(), packed_.get(), y);
    }
    for (std::int64_t i = 0; i < samples; ++i) finish(y + i * s_.high() * s_.wide() * p_.channels, n + i, worker);
  }

  void finish(const float* y, std::int64_t n, int worker) {
    const std::int64_t C = p_.channels, windows = p_.windows;
    float* const out = a_.out + n * windows * s_.out;
    const bool direct = !a_.call.planar && C == s_.out;
    float* const to = direct ? out : few_.get(worker);
    by_lanes(C, [&](auto v) {
      using V = decltype(v);
      (a_.call.relu ? pool<true, V> : pool<false, V>)(y, s_, bias_.get(), to, a_.chosen + n * windows * C);
    });
    if (direct) return;
    if (a_.call.planar)
      for (std::int64_t c = 0; c < s_.out; ++c)
        for (std::int64_t p = 0; p < windows; ++p) out[c * windows + p] = to[p * C + c];
    else
      for (std::int64_t p = 0; p < windows; ++p) std::copy_n(to + p * C, s_.out, out + p * s_.out);
  }

  const PoolForward& a_;
  const PoolPlan p_;
  const PoolShape& s_;
  const int workers_;
  const std::int64_t group_, map_floats_;
  const Scratch<float> packed_, bias_, maps_, y_, few_, tiles_, products_;
  const Scratch<std::int32_t> from_;
  std::atomic<bool> finite_ = true;
};

// --- backward

// A gradient that is not zero: where in a map its taps begin, or whose channel it is.
struct Left {
  std::int32_t at;
  float g;
};

// R rows of N vectors at each gradient's place, times it: added to `sum`.
template <int R, int N>
void gather(const float* x, std::int64_t row, const Left* left, std::int64_t count, float* sum, std::int64_t sum_row) {
  Wide all[R][N];
  const auto each = [&](auto&& body) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 12
      for (int n = 0; n < N; ++n) body(r, n);
  };
  each([&](int r, int n) { all[r][n] = Wide::set(0); });
  for (std::int64_t i = 0; i < count; ++i) {
    const float* const at = x + left[i].at;
    const Wide g = Wide::set(left[i].g);
    each([&](int r, int n) { all[r][n] = fma(g, Wide::load(at + r * row + n * Wide::lanes), all[r][n]); });
  }
  each([&](int r, int n) {
    float* const to = sum + r * sum_row + n * Wide::lanes;
    (Wide::load(to) + all[r][n]).store(to);
  });
}

// N vectors of a row of taps of each gradient's channel, times it: added to a place of a map.
template <int N>
void scatter(const float* weight, const Left* left, std::int64_t count, float* to) {
  Wide all[N];
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) all[n] = Wide::load(to + n * Wide::lanes);
  for (std::int64_t i = 0; i < count; ++i) {
    const float* const at = weight + left[i].at * (N * Wide::lanes);
    const Wide g = Wide::set(left[i].g);
#pragma GCC unroll 12
    for (int n = 0; n < N; ++n) all[n] = fma(g, Wide::load(at + n * Wide::lanes), all[n]);
  }
#pragma GCC unroll 12
  for (int n = 0; n < N; ++n) all[n].store(to + n * Wide::lanes);
}

constexpr int kHeldVectors = 12, kMostRows = 5;  // sums that registers hold; rows of taps
using Gather = void (*)(const float*, std::int64_t, const Left*, std::int64_t, float*, std::int64_t);
using Scatter = void (*)(const float*, const Left*, std::int64_t, float*);
template <int R, int N>
constexpr Gather gather_or_none() {
  if constexpr (R * N <= kHeldVectors)
    return gather<R, N>;
  else
    return nullptr;
}
template <int... I>
constexpr std::array<Gather, sizeof...(I)> gathers(std::integer_sequence<int, I...>) {
  return {gather_or_none<1 + I / kHeldVectors, 1 + I % kHeldVectors>()...};
}
template <int... I>
constexpr std::array<Scatter, sizeof...(I)> scatters(std::integer_sequence<int, I...>) {
  return {scatter<1 + I>...};
}
// Of 1 + (index / kHeldVectors) rows of 1 + (index % kHeldVectors) vectors.
constexpr auto kGathers = gathers(std::make_integer_sequence<int, kMostRows * kHeldVectors>{});
constexpr auto kScatters = scatters(std::make_integer_sequence<int, kHeldVectors>{});

class PoolingBackward {
  static constexpr std::int64_t kFewWindows = 64;            // in fewer of them lists would be short
  static constexpr std::int64_t kHeld = std::int64_t{1} << 22;  // floats of all pieces' sums

 public:
  explicit PoolingBackward(const PoolBackward& a)
      : a_(a), p_(a.call.shape), s_(p_.s), vectors_((s_.kernel * s_.in + Wide::lanes - 1) / Wide::lanes), parts_((vectors_ + kHeldVectors - 1) / kHeldVectors),
        each_((vectors_ + parts_ - 1) / parts_), wide_(parts_ * each_ * Wide::lanes), sum_floats_(s_.kernel * p_.channels * wide_),
        piece_(std::max(p_.plan.piece, (s_.batch * sum_floats_ + kHeld - 1) / kHeld)), pieces_((s_.batch + piece_ - 1) / piece_),
        group_(std::clamp<std::int64_t>(kFewWindows / p_.windows, 1, piece_)), all_(group_ * p_.windows),
        workers_(parallel_workers(pieces_, 1, a.call.threads)), maps_(group_ * p_.map.floats, workers_),
        to_maps_(a.to_x ? group_ * p_.map.floats : 0, workers_), weights_(a.to_x ? sum_floats_ : 0), sums_(sum_floats_ * pieces_),
        by_channel_(p_.channels * all_, workers_), by_place_(a.to_x ? 4 * all_ * p_.channels : 0, workers_), channel_counts_(p_.channels, workers_),
        place_counts_(4 * all_, workers_), places_(4 * all_), biases_(p_.channels * pieces_) {
    for (int w = 0; w < workers_; ++w) std::fill_n(maps_.get(w), group_ * p_.map.floats, 0.0f);
    const std::int64_t across = s_.wide() / 2;
    for (std::int64_t q = 0; q < all_; ++q)
      for (int d = 0; d < 4; ++d) {
        const std::int64_t p = q % p_.windows;
        places_.get()[4 * q + d] =
            static_cast<std::int32_t>(q / p_.windows * p_.map.floats + (p / across * 2 + d / 2) * p_.map.row + (p % across * 2 + d % 2) * s_.in);
      }
    if (a.to_x) lay_weights();
  }

  bool run() {
    std::fill_n(sums_.get(), sum_floats_ * pieces_, 0.0f), std::fill_n(biases_.get(), p_.channels * pieces_, 0.0);
    auto work = [&](std::int64_t piece, std::int64_t end, int worker) {
      for (; piece < end; ++piece) {
        const std::int64_t last = std::min((piece + 1) * piece_, s_.batch);
        for (std::int64_t n = piece * piece_; n < last; n += group_) group(n, std::min(group_, last - n), piece, worker);
      }
    };
    parallel_for(pieces_, 1, a_.call.threads, p_.seconds(1), work);
    add_pieces(biases_.get(), p_.channels, pieces_);
    if (!all_finite(biases_, p_.channels)) return false;
    if (a_.to_bias)
      for (std::int64_t c = 0; c < s_.out; ++c) a_.to_bias[c] = static_cast<float>(biases_.get()[c]);
    if (!a_.to_weight) return true;
    add_pieces(sums_.get(), sum_floats_, pieces_);
    for (std::int64_t o = 0; o < s_.out; ++o)
      for (std::int64_t tap = 0; tap < s_.taps(); ++tap)
        for (std::int64_t i = 0; i < s_.in; ++i)
          a_.to_weight[a_.call.weight_place(o, i, tap)] = sums_.get()[(tap / s_.kernel * p_.channels + o) * wide_ + tap % s_.kernel * s_.in + i];
    return true;
  }

 private:
  // [rows of taps][parts][channels][vectors of a part].
  void lay_weights() {
    const std::int64_t floats = each_ * Wide::lanes;
    std::fill_n(weights_.get(), sum_floats_, 0.0f);
    for (std::int64_t o = 0; o < s_.out; ++o)
      for (std::int64_t tap = 0; tap < s_.taps(); ++tap)
        for (std::int64_t i = 0; i < s_.in; ++i) {
          const std::int64_t f = tap % s_.kernel * s_.in + i;
          weights_.get()[((tap / s_.kernel * parts_ + f / floats) * p_.channels + o) * floats + f % floats] = a_.call.weight_at(o, i, tap);
        }
  }

  void group(std::int64_t n, std::int64_t samples, std::int64_t piece, int worker) {
    const std::int64_t floats = s_.height * s_.width * s_.in;
    std::fill_n(channel_counts_.get(worker), p_.channels, 0), std::fill_n(place_counts_.get(worker), 4 * all_, 0);
    for (std::int64_t i = 0; i < samples; ++i) {
      list(n + i, i * p_.windows, worker, biases_.get() + piece * p_.channels);
      if (a_.to_weight) lay_rows(a_.call.x + (n + i) * floats, s_, a_.call.x_planar, p_.map.row, maps_.get(worker) + i * p_.map.floats + p_.map.edge);
    }
    if (a_.to_weight) add_weights(sums_.get() + piece * sum_floats_, worker);
    if (!a_.to_x) return;
    float* const map = to_maps_.get(worker);
    std::fill_n(map, samples * p_.map.floats, 0.0f);
    lead_back(samples, map, worker);
    for (std::int64_t i = 0; i < samples; ++i) take_rows(map + i * p_.map.floats + p_.map.edge, s_, a_.call.x_planar, p_.map.row, a_.to_x + (n + i) * floats);
  }

  // A sample's gradients, by channel and by place: in the same order from maps of either layout.
  void list(std::int64_t n, std::int64_t first, int worker, double* bias) {
    const std::int64_t C = p_.channels, windows = p_.windows;
    const float* const grad = a_.grad + n * windows * s_.out;
    const std::uint8_t* const chosen = a_.chosen + n * windows * C;
    std::int32_t *const in_channel = channel_counts_.get(worker), *const in_place = place_counts_.get(worker);
    Left *const by_channel = by_channel_.get(worker), *const by_place = by_place_.get(worker);
    const std::int32_t* const places = places_.get() + 4 * first;
    // Without branches, which would be guesses: what is dead is written where the next one goes.
    const auto add = [&](std::int64_t p, std::int64_t c, float g) {
      const std::uint8_t d = chosen[p * C + c];
      const bool live = d != kDead;
      const std::int64_t at = 4 * p + (d & 3), place = 4 * first + at;
      bias[c] += live ? static_cast<double>(g) : 0.0;
      by_channel[c * all_ + in_channel[c]] = {places[at], g}, in_channel[c] += live;
      if (a_.to_x) by_place[place * C + in_place[place]] = {static_cast<std::int32_t>(c), g}, in_place[place] += live;
    };
    if (a_.call.planar)
      for (std::int64_t c = 0; c < s_.out; ++c)
        for (std::int64_t p = 0; p < windows; ++p) add(p, c, grad[c * windows + p]);
    else
      for (std::int64_t p = 0; p < windows; ++p)
        for (std::int64_t c = 0; c < s_.out; ++c) add(p, c, grad[p * s_.out + c]);
  }

  void add_weights(float* sum, int worker) {
    const std::int64_t most = std::clamp<std::int64_t>(kHeldVectors / each_, 1, s_.kernel), C = p_.channels;
    for (std::int64_t r = 0; r < s_.kernel; r += most) {
      const std::int64_t rows = std::min(most, s_.kernel - r);
      const Gather take = kGathers[static_cast<std::size_t>((rows - 1) * kHeldVectors + each_ - 1)];
      for (std::int64_t part = 0; part < parts_; ++part) {
        const std::int64_t at = part * each_ * Wide::lanes;
        for (std::int64_t c = 0; c < s_.out; ++c)
          take(maps_.get(worker) + r * p_.map.row + at, p_.map.row, by_channel_.get(worker) + c * all_, channel_counts_.get(worker)[c], sum + (r * C + c) * wide_ + at,
               C * wide_);
      }
    }
  }

  void lead_back(std::int64_t samples, float* map, int worker) {
    const Scatter put = kScatters[static_cast<std::size_t>(each_ - 1)];
    const std::int32_t* const counts = place_counts_.get(worker);
    const std::int64_t floats = each_ * Wide::lanes;
    for (std::int64_t r = 0; r < s_.kernel; ++r)
      for (std::int64_t part = 0; part < parts_; ++part) {
        const float* const weight = weights_.get() + (r * parts_ + part) * p_.channels * floats;
        for (std::int64_t p = 0; p < 4 * samples * p_.windows; ++p)
          if (counts[p]) put(weight, by_place_.get(worker) + p * p_.channels, counts[p], map + places_.get()[p] + r * p_.map.row + part * floats);
      }
  }

  const PoolBackward& a_;
  const PoolPlan p_;
  const PoolShape& s_;
  const std::int64_t vectors_, parts_, each_, wide_;  // of a row of taps; equal parts of them; vectors and floats of a part, and of all
  const std::int64_t sum_floats_, piece_, pieces_, group_, all_;
  const int workers_;
  const Scratch<float> maps_, to_maps_, weights_, sums_;
  const Scratch<Left> by_channel_, by_place_;
  const Scratch<std::int32_t> channel_counts_, place_counts_, places_;
  const Scratch<double> biases_;
};

// Many channels that few positions share are left to PyTorch's operators (oneDNN), and lists that leave the caches.
inline bool pool_fits(const PoolShape& s) {
  const bool any = std::min({s.batch, s.in, s.out}) > 0 && (s.kernel == 3 || s.kernel == 5) && (s.padding == 0 || s.padding == s.kernel / 2) && s.high() > 1 && s.wide() > 1;
  return any && s.in <= 256 && s.windows() * rounded_up(s.out) <= 32768 && 512 * s.batch * s.windows() >= s.in * s.out;
}

}  // namespace
}  // namespace fedkern::FEDKERN_ISA
