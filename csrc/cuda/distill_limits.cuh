// T = infinity: half the variance over classes of teachers - student, of their mixture (logits, probs) or each on its own
// (mean). Sums of squares of logits, in fp64 throughout.
#pragma once

#include "distill_logits.cuh"

namespace fedkern::cuda {

template <typename, int Lanes, typename T>
class LimitRow : MixedRow<double, Lanes, T> {
  using Base = MixedRow<double, Lanes, T>;
  using typename Base::Base::G;
  using typename Base::Part;
  using Base::a_, Base::centered_, Base::exactly, Base::factors_, Base::K_, Base::keep, Base::keep_exactly;

 public:
  static constexpr bool kExact = true, kSure = false;

  __device__ LimitRow(const EnsembleCall& a, const EnsemblePlace& at, double* slot, std::int64_t step) : Base(a, at, slot, step, 1.0) {}

  // Finds the loss, and writes the gradients that are wanted.
  __device__ __forceinline__ bool run(double (&loss)[2]) {
    this->find_shares();
    this->find_factors();
    loss[0] = a_.kind == EnsembleKind::mean ? mean_of_all() : mixture();
    return true;
  }

 private:
  // Of differences over the classes unmasked in both.
  struct Variance {
    double count, mean, half;

    __device__ __forceinline__ double deviation(double x, double y) const { return known(x, y) ? (x - y - mean) / count : 0.0; }
    __device__ __forceinline__ static bool known(double x, double y) { return x != -infinity<double>() && y != -infinity<double>(); }
  };
  // A class alone.
  __device__ __forceinline__ Part part_of(std::int64_t c) const { return {c, a_.classes}; }
  __device__ __forceinline__ double teacher(int k, std::int64_t c) const {
    double x[1];
    this->load_teacher(k, part_of(c), x);
    return x[0];
  }
  __device__ __forceinline__ double student(std::int64_t c) const {
    double x[1];
    this->load_student(part_of(c), x);
    return x[0];
  }
  __device__ __forceinline__ double mixed(std::int64_t c) const {
    double sum[1], z[1];
    this->find_sums(part_of(c), sum), this->mix(part_of(c), sum, z);
    return z[0];
  }

  template <typename F>
  __device__ __forceinline__ Variance variance(F&& logit) const {
    Variance found{};
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const double x = logit(c), y = student(c);
      if (Variance::known(x, y)) found.count += 1, found.mean += x - y;
    }
    found.count = G::sum(found.count), found.mean = G::sum(found.mean) / found.count;
    for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
      const double x = logit(c), y = student(c), rest = x - y - found.mean;
      if (Variance::known(x, y)) found.half += rest * rest;
    }
    found.half = 0.5 * G::sum(found.half) / found.count;
    return found;
  }

  __device__ __forceinline__ double mixture() {
    // To first order in 1/T a softmax is (1 + (x - mean x) / T) / C; the mean matters where weights differ between classes.
    if (a_.kind == EnsembleKind::probs && this->by_class()) find_centers();
    const Variance found = variance([&](std::int64_t c) { return mixed(c); });
    if (a_.student_grad.present)
      for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes)
        this->to_student(part_of(c), {-found.deviation(mixed(c), student(c)) * factors_[0]});
    if (!this->wants_late()) return found.half;
    if (centered_) find_drifts(found);
    this->clear_dots();
    this->each_part([&](const Part& part) {
      double sum[1], z[1], y[1];
      this->find_sums(part, sum), this->load_student(part, y), this->mix(part, sum, z);
      const double g[1] = {found.deviation(z[0], y[0])};
      this->spread(part, sum, z, g);
    });
    this->gather_dots();
    this->weight_gradients(factors_[0]);
    return found.half;
  }

  // The means of the teachers' finite logits, kMaximum; how many there are, kInverse.
  __device__ __forceinline__ void find_centers() {
    for (int k = 0; k < K_; ++k) {
      double sum = 0, count = 0;
      for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
        const double x = teacher(k, c);
        if (x != -infinity<double>()) sum += x, count += 1;
      }
      sum = G::sum(sum), count = G::sum(count);
      keep(kMaximum, k, sum / count), keep(kInverse, k, count);
    }
    this->together();
    centered_ = true;
  }
  // What the centre takes from the gradient of every class.
  __device__ __forceinline__ void find_drifts(const Variance& found) {
    this->clear_dots();
    this->each_part([&](const Part& part) {
      double sum[1], z[1], y[1], share[1];
      this->find_sums(part, sum), this->load_student(part, y), this->mix(part, sum, z);
      const double g = found.deviation(z[0], y[0]);
      for (int k = 0; k < K_; ++k) {
        this->find_shares(k, part, sum, share);
        this->add_dot(k, share[0] * g);
      }
    });
    this->gather_dots();
    for (int k = 0; k < K_; ++k) keep(kLogSum, k, exactly(kDot, k) / this->number(kInverse, k));
    this->together();
  }

  __device__ __forceinline__ double mean_of_all() {
    double loss = 0;
    for (int k = 0; k < K_; ++k) {
      const double w = exactly(kWeight, k);
      if (w == 0) continue;
      const Variance found = variance([&](std::int64_t c) { return teacher(k, c); });
      keep(kMaximum, k, found.mean), keep(kInverse, k, found.count), keep_exactly(kDot, k, found.half);
      loss += w * found.half;
    }
    this->together();
    if (a_.student_grad.present || a_.teachers_grad.present)
      for (std::int64_t c = G::lane(); c < a_.classes; c += Lanes) {
        double toward = 0;
        for (int k = 0; k < K_; ++k) {
          const double w = exactly(kWeight, k);
          const Variance found{this->number(kInverse, k), this->number(kMaximum, k), 0};
          const double value = w == 0 ? 0.0 : w * found.deviation(teacher(k, c), student(c)) * factors_[0];
          if (a_.teachers_grad.present) this->to_teacher(k, part_of(c), {value});
          toward -= value;
        }
        if (a_.student_grad.present) this->to_student(part_of(c), {toward});
      }
    this->weight_gradients(factors_[0]);
    return loss;
  }
};

}  // namespace fedkern::cuda
