// Losses of K teachers whose logits of a row, all together, a block holds in shared memory: the logits are read once, teachers
// are spread over groups of threads, the classes of their mixture over threads.
//
// Rows that nearly agree keep their digits in fp32: log(mixture / a) = log1p(sum w (e^v - 1)) with a an anchor row (the first
// teacher that counts, or the student) and v = log p - log a, from differences of logits.
#pragma once

#include <algorithm>

#include "distill_mixture.cuh"
#include "distill_teachers.cuh"
#include "last_block.cuh"
#include "launch.cuh"

namespace fedkern::cuda {

inline constexpr std::int64_t kMostBlocks = 2048;
static_assert(2 * kMostBlocks < kEnsembleTotals && kMostBlocks < kTicketBlocks);

// What blocks add to the totals, [2, kMostBlocks] of the workspace, and after it the word in which they count how many have done so.
struct Totals {
  double* sums;
  Ticket ticket;
};

// Do the call where it is of that kind: js_div and consensus, losses of a student. False where it is not.
bool distill_tile(const EnsembleCall& a, std::int64_t rows, const Totals& totals, const Queue& queue);
bool distill_student_tile(const EnsembleCall& a, std::int64_t rows, const Totals& totals, const Queue& queue);

namespace {

constexpr int kTileTeachers = 64, kTileClasses = 1024;
constexpr int kLargeTile = 2560, kSmallTile = 512;  // numbers of a row
constexpr int kTileThreads = 416 + 32;
constexpr int kAhead = 10;  // numbers that a thread loads
static_assert(kAhead * kBlock >= kLargeTile);

// A row: p = e^((x - maximum) / T) inverse.
struct Member {
  float share, maximum, inverse, log_sum;

  __device__ __forceinline__ void set(float highest, double sum) {
    maximum = highest, inverse = 1 / static_cast<float>(sum), log_sum = logarithm(static_cast<float>(sum));
  }
  __device__ __forceinline__ float log_p(float x, float inverse_t) const { return (x - maximum) * inverse_t - log_sum; }
  // log p - log a, where `anchor` has the logit a.
  __device__ __forceinline__ float over(const Member& anchor, float x, float a, float inverse_t) const;
};
// As in Pair, of rows that lie far apart one is moved by a multiple of 8.
struct Apart {
  float from, to, top, log_ratio;

  __device__ __forceinline__ Apart(const Member& row, const Member& anchor) {
    const float raw = row.maximum - anchor.maximum, distance = fabsf(raw) < 1e30f ? rintf(raw * 0.125f) * 8 : 0.0f;
    const bool first = fabsf(row.maximum) >= fabsf(anchor.maximum);
    from = first ? distance : 0.0f, to = first ? 0.0f : distance;
    top = (row.maximum - from) - (anchor.maximum + to), log_ratio = row.log_sum - anchor.log_sum;
  }
  __device__ __forceinline__ float over(float x, float a, float inverse_t) const { return (((x - from) - (a + to)) - top) * inverse_t - log_ratio; }
};
__device__ __forceinline__ float Member::over(const Member& anchor, float x, float a, float inverse_t) const { return Apart(*this, anchor).over(x, a, inverse_t); }

// A class of the mixture. log_m: over the anchor's probability where the class is anchored.
struct Mixed {
  float m, log_m;
};
class Mixing {
 public:
  // Where the anchor has next to no probability, the distance to it would take the digits of log p.
  __device__ Mixing(const Member& first, float anchor, bool anchored, float inverse_t)
      : first_(first), anchor_(anchor), inverse_t_(inverse_t), log_a_(anchored ? first.log_p(anchor, inverse_t) : NAN), anchored_(log_a_ > -12), near_(anchored_) {}

  // Gives log p, over the anchor's as log_m.
  __device__ __forceinline__ float add(const Member& teacher, float x, float p) { return add(teacher, {teacher, first_}, x, p); }
  __device__ __forceinline__ float add(const Member& teacher, const Apart& apart, float x, float p) {
    if (teacher.share == 0) return 0;  // it may hold anything
    m_ = fmaf(teacher.share, p, m_);
    if (!anchored_) return teacher.log_p(x, inverse_t_);
    const float d = apart.over(x, anchor_, inverse_t_);
    near_ = near_ && fabsf(d) < small_exponent<float>();
    rest_ = fmaf(teacher.share, fmaf(d * d, exp_remainder(d), d), rest_);
    return d;
  }
  // From the teachers that lanes of a warp have added, `Lanes` of them to a class.
  template <int Lanes>
  __device__ __forceinline__ void gather() {
    float sums[3] = {m_, rest_, near_ ? 0.0f : 1.0f};
    Group<Lanes>::sum_all(sums);
    m_ = sums[0], rest_ = sums[1], near_ = sums[2] == 0;
  }
  __device__ __forceinline__ bool anchored() const { return anchored_; }
  __device__ __forceinline__ Mixed mixed() const { return {m_, near_ ? log1pf(rest_) : log_of(m_) - (anchored_ ? log_a_ : 0.0f)}; }

 private:
  const Member& first_;
  const float anchor_, inverse_t_, log_a_;
  const bool anchored_;
  float m_ = 0, rest_ = 0;
  bool near_;
};

// Writes a row's results and adds them to the totals.
__device__ __forceinline__ void leave(const EnsembleCall& a, const EnsemblePlace& at, const double (&loss)[2], double (&total)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += loss[r];
    if (a.row_loss[r].present) store_value<double>(a.row_loss[r].data, a.row_loss[r].dtype, at.row_loss[r], loss[r]);
  }
}

template <int Numbers>
struct Tile {
  static constexpr int classes = Numbers < kTileClasses ? Numbers : kTileClasses;

  float x[Numbers], power[Numbers];  // [rows, classes]: the teachers', and more; e^((x - maximum) / T)
  Member member[kTileTeachers + 2];
  Mixed mixed[classes];
  double share[kTileTeachers], sums[2][kTileTeachers], dot[kTileTeachers];
  double part[kTileThreads / 32][2];
  double outer[2], weights;  // the sum of the weights
  int first;                 // the first teacher that counts

  // The teachers' logits; their shares and the factors of the gradients, which the last warp reads meanwhile.
  __device__ __forceinline__ void load(const EnsembleCall& a, const EnsemblePlace& at, unsigned reciprocal) {
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x) - 32, lane = thread % 32;
    const int count = static_cast<int>(a.count), length = static_cast<int>(a.classes);
    if (thread < threads) {
      as_stored<void, float>(a.teachers, [&](auto type, std::int64_t stride) {
        const auto* const from = static_cast<const decltype(type)*>(a.teachers.data) + at.teachers;
        // All of a thread's are under way at once.
        float ahead[kAhead];
        int i = thread;
#pragma unroll
        for (float& value : ahead) {
          const int k = static_cast<int>(__umulhi(static_cast<unsigned>(i), reciprocal));
          if (i < count * length) value = widen<float>(from[k * a.teachers.stack_stride + (i - k * length) * stride]);
          i += threads;
        }
        i = thread;
#pragma unroll
        for (const float value : ahead) {
          if (i < count * length) x[i] = value;
          i += threads;
        }
      });
      return;
    }
    const double w[2] = {lane < count ? weight_of(a, at.weights, lane, 0) : 0, lane + 32 < count ? weight_of(a, at.weights, lane + 32, 0) : 0};
    const double sum = Group<32>::sum(w[0] + w[1]);
    int found = 0;
#pragma unroll
    for (int i = 1; i >= 0; --i) {
      const int k = lane + 32 * i;
      const double value = k >= count ? 0.0 : sum == 0 ? 1.0 / count : w[i] / sum;
      const unsigned counts = __ballot_sync(kEveryLane, value > 0);
      if (counts) found = 32 * i + __ffs(static_cast<int>(counts)) - 1;
      if (k < count) share[k] = value, member[k].share = static_cast<float>(value);
    }
    if (lane == 0) first = found, weights = sum, outer[0] = at.factor(a, 0);
    if (lane == 1) outer[1] = at.factor(a, 1);
  }

  // f(k, mine) for rows [begin, end) of the tile, one to a group of threads; all of them come along.
  template <int Lanes, typename F>
  __device__ __forceinline__ void each_row(int begin, int end, F&& f) {
    for (int base = begin; base < end; base += static_cast<int>(blockDim.x) / Lanes) {
      const int k = base + Group<Lanes>::row();
      f(k < end ? k : begin, k < end);
    }
  }
  // Their softmaxes.
  template <int Lanes>
  __device__ __forceinline__ void find_softmaxes(int begin, int end, int length, float inverse_t) {
    using G = Group<Lanes>;
    each_row<Lanes>(begin, end, [&](int k, bool mine) {
      const int stop = mine ? length : 0;
      float highest = -infinity<float>();
      for (int c = G::lane(); c < stop; c += Lanes) highest = x[k * length + c] > highest ? x[k * length + c] : highest;
      highest = G::maximum(highest);
      const float from = Softmax<float>::reference(highest);
      float part = 0;
      for (int c = G::lane(); c < stop; c += Lanes) {
        const float e = exponential((x[k * length + c] - from) * inverse_t);
        power[k * length + c] = e;
        part += e;
      }
      const double sum = G::sum(static_cast<double>(part));
      if (mine && G::lane() == 0) member[k].set(highest, sum);
    });
  }
  __device__ __forceinline__ float probability(int k, int c, int length) const { return power[k * length + c] * member[k].inverse; }

  // The weighted mean over teachers, in a warp.
  __device__ __forceinline__ double mean(const double* of, int count) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    double sum = lane < count ? share[lane] * of[lane] : 0.0;
    if (lane + 32 < count) sum += share[lane + 32] * of[lane + 32];
    return Group<32>::sum(sum);
  }
  // The gradients of the weights, from `dot`, by a warp.
  __device__ __forceinline__ void weight_gradients(const EnsembleCall& a, const EnsemblePlace& at, double factor) const {
    if (!a.weights_grad.present) return;
    const int count = static_cast<int>(a.count);
    const double middle = mean(dot, count);
    for (int k = static_cast<int>(threadIdx.x) % 32; k < count; k += 32)
      store_weight_gradient(a.weights_grad, at.weights_grad + k * a.weights_grad.stack_stride,
                            weights == 0 || share[k] == 0 ? 0.0 : factor * (dot[k] - middle) / weights);
  }
};

__device__ __forceinline__ bool wants_totals(const EnsembleCall& a) { return a.total[0].present || a.total[1].present; }
// What the first thread of each block has of the totals. All threads come along, and the last block adds up what all have.
__device__ __forceinline__ void leave_totals(const EnsembleCall& a, double (&total)[2], const Totals& totals) {
  if (!wants_totals(a)) return;
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) totals.sums[blockIdx.x] = total[0], totals.sums[kMostBlocks + blockIdx.x] = total[1];
    if (!is_last_block(reinterpret_cast<Ticket*>(totals.sums + 2 * kMostBlocks), totals.ticket, gridDim.x) || threadIdx.x >= 32) return;
    const volatile double* const sums = totals.sums;
    total[0] = total[1] = 0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < gridDim.x; i += 32) total[0] += sums[i], total[1] += sums[kMostBlocks + i];
    Group<32>::sum_all(total);
  }
  if (threadIdx.x) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (a.total[r].present) store_value<double>(a.total[r].data, a.total[r].dtype, 0, total[r] * a.scale);
}

// Whether blocks take the call, whose tile has `more` rows besides those of the teachers.
inline bool fits_tile(const EnsembleCall& a, std::int64_t rows, int more, const Queue& queue) {
  // Where positions lie side by side, threads read together only if each has a row: worth more than a block's where there are many.
  const bool outside = a.teachers.class_stride != 1 && rows >= 16 * multiprocessors(queue.device);
  // Many rows of few teachers fill the device with a warp each, without a block's waits.
  const bool fill = rows > 8 * multiprocessors(queue.device) && a.count < 8;
  return !outside && !fill && a.count <= kTileTeachers && a.classes >= 2 && a.classes <= kTileClasses && (a.count + more) * a.classes <= kLargeTile;
}
// run(numbers, lanes, blocks, threads, reciprocal), the first two integral_constants; i / classes is the upper half of i times the
// last. `most`: threads besides the last warp, kBlock at least.
template <typename F>
void run_tile(const EnsembleCall& a, std::int64_t rows, int more, int most, F&& run) {
  const std::int64_t numbers = (a.count + more) * a.classes, lanes = a.classes <= 32 ? 8 : 32;
  const std::int64_t wanted = std::max((a.count + more) * lanes, numbers / 8);
  const int threads = static_cast<int>(std::clamp<std::int64_t>((wanted + 31) / 32 * 32, 64, most)) + 32;
  const auto reciprocal = static_cast<unsigned>((std::int64_t{1} << 32) / a.classes + 1);
  const std::int64_t blocks = std::min(rows, kMostBlocks);
  const auto with_lanes = [&](auto size) {
    lanes == 8 ? run(size, std::integral_constant<int, 8>{}, blocks, threads, reciprocal) : run(size, std::integral_constant<int, 32>{}, blocks, threads, reciprocal);
  };
  numbers <= kSmallTile ? with_lanes(std::integral_constant<int, kSmallTile>{}) : with_lanes(std::integral_constant<int, kLargeTile>{});
}

}  // namespace
}  // namespace fedkern::cuda
