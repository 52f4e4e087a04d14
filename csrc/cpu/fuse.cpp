#include "fedkern/fuse.h"

#include <algorithm>

#include "fedkern/parallel.h"
#include "fuse_rows.h"

namespace fedkern::FEDKERN_ISA {
namespace {

// Elements of a run that is worked on at once, and of the tile in which lines to be streamed are put together.
inline constexpr std::int64_t kRun = 1024, kStreamTile = 2048;
// Positions of interleaved maps that are taken apart at once: their channels stay in L2 while map after map is written.
inline constexpr std::int64_t kSlice = 16;
// Elements of a planar unit of parallel work.
inline constexpr std::int64_t kUnit = 16384;

template <typename T>
T* at(const FuseMap& map, std::int64_t b, std::int64_t c, std::int64_t p) {
  return static_cast<T*>(map.data) + b * map.batch_stride + c * map.channel_stride + p * map.position_stride;
}

// Seconds that `bytes` take on one thread, roughly.
double seconds(double bytes) { return bytes * 1e-10; }

std::int64_t all_channels(const FuseCall& call, const FuseMap* maps) {
  std::int64_t channels = 0;
  for (std::int64_t m = 0; m < call.maps; ++m) channels += maps[m].channels;
  return channels;
}

// Hands out memory run by run from `begin` on, directly or through a tile that is then streamed.
template <typename T>
class Writer {
 public:
  Writer(T* begin, bool stream) : next_(begin), stream_(stream) {}
  ~Writer() { flush(); }
  FEDKERN_INLINE T* room(std::int64_t n) {  // n is at most kRun
    if (!stream_) {
      T* place = next_;
      next_ += n;
      return place;
    }
    if (filled_ + n > kStreamTile) flush();
    T* place = tile_ + filled_;
    filled_ += n;
    return place;
  }

 private:
  FEDKERN_INLINE void flush() {
    if (filled_) stream_row(tile_, filled_, next_);
    next_ += filled_;
    filled_ = 0;
  }
  T* next_;
  bool stream_;
  std::int64_t filled_ = 0;
  alignas(64) T tile_[kStreamTile];
};

template <typename T>
FEDKERN_INLINE void prefetch_row(const T* row, std::int64_t n) {
  for (std::int64_t i = 0; i < n; i += 64 / static_cast<std::int64_t>(sizeof(T))) __builtin_prefetch(row + i);
}

template <typename Body>
FEDKERN_INLINE void for_runs(std::int64_t n, Body&& body) {
  for (std::int64_t i = 0; i < n; i += kRun) body(i, std::min(kRun, n - i));
}

// Planar: body(block, first sample, past it, first channel, past it) for blocks of samples x chunks of channels.
template <typename Body>
void for_planar(const FuseCall& call, std::int64_t channels, double estimate, Body&& body) {
  const std::int64_t samples = fuse_block_samples(call), blocks = fuse_blocks(call);
  const std::int64_t chunk = std::max<std::int64_t>(1, kUnit / std::max<std::int64_t>(1, samples * call.positions));
  const std::int64_t chunks = (channels + chunk - 1) / chunk;
  auto units = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t unit = begin; unit < end; ++unit) {
      const std::int64_t block = unit / chunks, k = unit % chunks * chunk;
      body(block, block * samples, std::min(call.batch, (block + 1) * samples), k, std::min(channels, k + chunk));
    }
    finish_streams();
  };
  parallel_for(blocks * chunks, 1, call.threads, estimate, units);
}

// Interleaved: body(block, sample, first position, past it).
template <typename Body>
void for_interleaved(const FuseCall& call, double estimate, Body&& body) {
  const std::int64_t per_sample = (call.positions + kFuseBlock - 1) / kFuseBlock;
  auto units = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const std::int64_t p = block % per_sample * kFuseBlock;
      body(block, block / per_sample, p, std::min(call.positions, p + kFuseBlock));
    }
    finish_streams();
  };
  parallel_for(fuse_blocks(call), 1, call.threads, estimate, units);
}

// Calls body(m, channel of map m) for the channels [begin, end) of the concatenation.
template <typename Body>
FEDKERN_INLINE void for_channels(const FuseMap* maps, std::int64_t begin, std::int64_t end, Body&& body) {
  std::int64_t m = 0, c = begin;
  while (begin < end && c >= maps[m].channels) c -= maps[m++].channels;
  for (std::int64_t k = begin; k < end; ++k) {
    while (c == maps[m].channels) ++m, c = 0;
    body(k, m, c++);
  }
}

template <bool affine, typename C>
struct Coefficients {
  const C *scale, *shift;
  explicit Coefficients(const FuseCall& call) : scale(static_cast<const C*>(call.scale.data)), shift(static_cast<const C*>(call.shift.data)) {}
  // Of channel k; of the channels from k on.
  FEDKERN_INLINE auto one(std::int64_t k) const {
    if constexpr (affine)
      return OneChannel<C>{Vec<C>::set(scale[k]), Vec<C>::set(shift[k])};
    else
      return (void)k, Unchanged<C>{};
  }
  FEDKERN_INLINE auto each(std::int64_t k) const {
    if constexpr (affine)
      return ChannelEach<C>{scale + k, shift + k};
    else
      return (void)k, Unchanged<C>{};
  }
};

template <typename T, bool relu, bool affine>
void concat(const FuseForward& a) {
  using C = computed_t<T>;
  const FuseCall& call = a.call;
  const Coefficients<affine, C> by(call);
  const double estimate = seconds(2.0 * sizeof(T) * call.batch * call.positions * a.out.channels);
  if (!call.interleaved) {
    for_planar(call, a.out.channels, estimate, [&](std::int64_t, std::int64_t b, std::int64_t end, std::int64_t k0, std::int64_t k1) {
      for (; b < end; ++b) {
        Writer<T> writer(at<T>(a.out, b, k0, 0), call.stream);
        for_channels(a.features, k0, k1, [&](std::int64_t k, std::int64_t m, std::int64_t c) {
          const T* x = at<T>(a.features[m], b, c, 0);
          const auto change = by.one(k);
          for_runs(call.positions, [&](std::int64_t i, std::int64_t n) { affine_row<relu, C>(x + i, n, change, writer.room(n)); });
        });
      }
    });
  } else {
    for_interleaved(call, estimate, [&](std::int64_t, std::int64_t b, std::int64_t p, std::int64_t end) {
      Writer<T> writer(at<T>(a.out, b, 0, p), call.stream);
      for (; p < end; ++p)
        for (std::int64_t m = 0, k = 0; m < call.maps; k += a.features[m++].channels) {
          if (!a.features[m].channels) continue;
          const T* x = at<T>(a.features[m], b, 0, p);
          for_runs(a.features[m].channels,
                   [&](std::int64_t i, std::int64_t n) { affine_row<relu, C>(x + i, n, by.each(k + i), writer.room(n)); });
        }
    });
  }
}

template <typename T, bool relu, bool affine>
void mean(const FuseForward& a) {
  using C = computed_t<T>;
  const FuseCall& call = a.call;
  const Coefficients<affine, C> by(call);
  const C count = static_cast<C>(call.maps);
  const std::int64_t channels = a.out.channels;
  const double estimate = seconds((1.0 + call.maps) * sizeof(T) * call.batch * call.positions * channels);
  if (!call.interleaved) {
    for_planar(call, channels, estimate, [&](std::int64_t, std::int64_t b, std::int64_t end, std::int64_t k0, std::int64_t k1) {
      for (; b < end; ++b) {
        Writer<T> writer(at<T>(a.out, b, k0, 0), call.stream);
        alignas(64) C sum[kRun];
        for (std::int64_t c = k0; c < k1; ++c)
          for_runs(call.positions, [&](std::int64_t i, std::int64_t n) {
            for (std::int64_t m = 0; m < call.maps; ++m)
              add_row<relu, C>(at<T>(a.features[m], b, c, i), n, by.one(m * channels + c), m == 0, sum);
            divide_row(sum, n, count, writer.room(n));
          });
      }
    });
  } else {
    for_interleaved(call, estimate, [&](std::int64_t, std::int64_t b, std::int64_t p, std::int64_t end) {
      Writer<T> writer(at<T>(a.out, b, 0, p), call.stream);
      alignas(64) C sum[kRun];
      for (; p < end; ++p)
        for_runs(channels, [&](std::int64_t i, std::int64_t n) {
          for (std::int64_t m = 0; m < call.maps; ++m)
            add_row<relu, C>(at<T>(a.features[m], b, i, p), n, by.each(m * channels + i), m == 0, sum);
          divide_row(sum, n, count, writer.room(n));
        });
    });
  }
}

// Gradients of one run of n elements: masked, scaled into `out` (may be null) and, where `summed`, handed to `sum(g, i, n)`
// tile by tile.
template <typename C, typename T, typename Affine, typename Scale, typename Sum>
FEDKERN_INLINE void backward_run(const T* grad, const T* y, const Affine& affine, C count, std::int64_t n, T* out,
                                 const Scale& scale, bool summed, const Sum& sum) {
  if (!summed) {
    if (out) passing_scaled_row(grad, y, n, affine(0), count, scale(0), out);
    return;
  }
  alignas(64) C passed[kTile];
  for (std::int64_t i = 0; i < n; i += kTile) {
    const std::int64_t m = std::min(kTile, n - i);
    passing_row(grad + i, y ? y + i : nullptr, m, affine(i), count, passed);
    if (out) scaled_row(passed, m, scale(i), out + i);
    sum(passed, i, m);
  }
}

template <typename C>
struct ScaleOne {
  Vec<C> scale;
  bool some;
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t) const { return some ? x * scale : x; }
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t, std::int64_t) const { return some ? x * scale : x; }
};
template <typename C>
struct ScaleEach {
  const C* scale;
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t i) const { return scale ? x * Vec<C>::load(scale + i) : x; }
  FEDKERN_INLINE Vec<C> operator()(Vec<C> x, std::int64_t i, std::int64_t n) const {
    return scale ? x * Vec<C>::load_partial(scale + i, n) : x;
  }
};

template <typename T, bool affine>
void backward(const FuseBackward& a) {
  using C = computed_t<T>;
  const FuseCall& call = a.call;
  const Coefficients<affine, C> by(call);
  const C count = call.mean ? static_cast<C>(call.maps) : C{1};
  const std::int64_t all = all_channels(call, a.grad_features), blocks = fuse_blocks(call);
  const double estimate = seconds(3.0 * sizeof(T) * call.batch * call.positions * all);
  const bool summed = a.grad_scale.present || a.grad_shift.present, by_out = a.out.present;

  // One run of channel k of the concatenation (from k on, where interleaved), which is channel c of map m.
  auto masked_by = [&](std::int64_t m, std::int64_t c, std::int64_t k, std::int64_t b, std::int64_t p) -> const T* {
    if (!call.relu) return nullptr;
    return by_out ? at<T>(a.out, b, k, p) : at<T>(a.features[m], b, c, p);
  };
  auto input = [&](std::int64_t m, std::int64_t c, std::int64_t b, std::int64_t p) -> const T* {
    return a.grad_scale.present ? at<T>(a.features[m], b, c, p) : nullptr;
  };

  if (!call.interleaved) {
    for_planar(call, all, estimate, [&](std::int64_t block, std::int64_t b, std::int64_t end, std::int64_t k0, std::int64_t k1) {
      double* to_g = summed ? a.partial + block * 2 * all : nullptr;
      if (summed) std::fill(to_g + k0, to_g + k1, 0.0), std::fill(to_g + all + k0, to_g + all + k1, 0.0);
      for (; b < end; ++b)
        for_channels(a.grad_features, k0, k1, [&](std::int64_t k, std::int64_t m, std::int64_t c) {
          const T* grad = at<T>(a.grad, b, call.mean ? c : k, 0);
          const T *y = masked_by(m, c, k, b, 0), *x = input(m, c, b, 0);
          const FuseMap& target = a.grad_features[m];
          Writer<T> writer(target.present ? at<T>(target, b, c, 0) : nullptr, call.stream);
          RunSum run;
          for_runs(call.positions, [&](std::int64_t i, std::int64_t n) {
            const ScaleOne<C> scale{Vec<C>::set(affine ? by.scale[k] : C{1}), affine};
            auto add = [&](const C* g, std::int64_t j, std::int64_t width) {
              run.add(g, x ? x + i + j : nullptr, width);
            };
            T* out = target.present ? writer.room(n) : nullptr;
            auto same_scale = [&](std::int64_t) { return scale; };
            if (by_out)
              backward_run<C>(grad + i, y + i, [](std::int64_t) { return Unchanged<C>{}; }, count, n, out, same_scale, summed, add);
            else
              backward_run<C>(grad + i, y ? y + i : nullptr, [&](std::int64_t) { return by.one(k); }, count, n, out, same_scale, summed, add);
          });
          if (summed) to_g[k] += RunSum::total(run.g), to_g[all + k] += RunSum::total(run.gx);
        });
    });
  } else {
    for_interleaved(call, estimate, [&](std::int64_t block, std::int64_t b, std::int64_t begin, std::int64_t end) {
      double* to_g = summed ? a.partial + block * 2 * all : nullptr;
      if (summed) std::fill_n(to_g, 2 * all, 0.0);
      for (std::int64_t first = begin; first < end; first += kSlice) {
        for (std::int64_t m = 0, k = 0; m < call.maps; k += a.grad_features[m++].channels) {
          const FuseMap& target = a.grad_features[m];
          if (!target.channels) continue;
          Writer<T> writer(target.present ? at<T>(target, b, 0, first) : nullptr, call.stream);
          for (std::int64_t p = first; p < std::min(end, first + kSlice); ++p) {
            const T* grad = at<T>(a.grad, b, call.mean ? 0 : k, p);
            const T *y = masked_by(m, 0, k, b, p), *x = input(m, 0, b, p);
            // Maps take a few lines here and there of every position: what the prefetcher in hardware does not follow.
            prefetch_row(grad + kSlice * a.grad.position_stride, target.channels);
            if (by_out) prefetch_row(y + kSlice * a.out.position_stride, target.channels);
            for_runs(target.channels, [&](std::int64_t i, std::int64_t n) {
              auto add = [&](const C* g, std::int64_t j, std::int64_t width) {
                add_each(g, x ? x + i + j : nullptr, width, to_g + k + i + j, to_g + all + k + i + j);
              };
              auto scale = [&](std::int64_t j) { return ScaleEach<C>{affine ? by.scale + k + i + j : nullptr}; };
              T* out = target.present ? writer.room(n) : nullptr;
              if (by_out)
                backward_run<C>(grad + i, y + i, [](std::int64_t) { return Unchanged<C>{}; }, count, n, out, scale, summed, add);
              else
                backward_run<C>(grad + i, y ? y + i : nullptr, [&](std::int64_t j) { return by.each(k + i + j); }, count, n, out,
                                scale, summed, add);
            });
          }
        }
      }
    });
  }

  const auto add_up = [&](const Optional<double>& sum, const double* partial) {
    if (!sum.present) return;
    std::fill_n(sum.data, all, 0.0);
    for (std::int64_t block = 0; block < blocks; ++block)
      for (std::int64_t k = 0; k < all; ++k) sum.data[k] += partial[block * 2 * all + k];
  };
  add_up(a.grad_shift, a.partial);
  add_up(a.grad_scale, a.partial + all);
}

template <typename T, bool relu, bool affine>
void forward(const FuseForward& a) {
  a.call.mean ? mean<T, relu, affine>(a) : concat<T, relu, affine>(a);
}

void forward_any(const FuseForward& a) {
  with_type(a.call.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.call.scale.present)
      a.call.relu ? forward<T, true, true>(a) : forward<T, false, true>(a);
    else
      a.call.relu ? forward<T, true, false>(a) : forward<T, false, false>(a);
  });
}

void backward_any(const FuseBackward& a) {
  with_type(a.call.dtype, [&](auto type) {
    using T = decltype(type);
    a.call.scale.present ? backward<T, true>(a) : backward<T, false>(a);
  });
}

}  // namespace

const FuseTable fuse_table = {forward_any, backward_any};

}  // namespace fedkern::FEDKERN_ISA
