// ensemble_kl of few numbers per row: by blocks, as distill_tile.cuh has it.
#include "distill_tile.cuh"

namespace fedkern::cuda {
namespace {

// Logits of a student that a thread has under way.
constexpr int kStudentAhead = 4;

template <EnsembleKind Kind, int Numbers, int Lanes>
__global__ void __launch_bounds__(kBlock + 32, 2)
    student_kernel(const __grid_constant__ EnsembleCall a, std::int64_t rows, unsigned reciprocal, const Totals totals) {
  using G = Group<Lanes>;
  constexpr bool kLogits = Kind == EnsembleKind::logits, kMean = Kind == EnsembleKind::mean;
  __shared__ Tile<Numbers> tile;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int count = static_cast<int>(a.count), classes = static_cast<int>(a.classes);
  // Rows of the tile after the teachers': the student's, the mixture's.
  float* const student = tile.x + count * classes;
  float* const mixture = student + classes;
  const float inverse_t = static_cast<float>(1 / a.temperature);
  const bool late = a.teachers_grad.present || a.weights_grad.present;
  double total[2] = {};
#pragma unroll 1
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const EnsemblePlace at(a, row, false);
    as_stored<void, float>(a.student, [&](auto type, std::int64_t stride) {
      const auto* const from = static_cast<const decltype(type)*>(a.student.data) + at.student;
      decltype(type) y[kStudentAhead];
#pragma unroll
      for (int i = 0; i < kStudentAhead; ++i)
        if (thread + i * threads < classes) y[i] = from[(thread + i * threads) * stride];
      tile.load(a, at, reciprocal);
#pragma unroll
      for (int i = 0; i < kStudentAhead; ++i)
        if (thread + i * threads < classes) student[thread + i * threads] = widen<float>(y[i]);
      for (int c = thread + kStudentAhead * threads; c < classes; c += threads) student[c] = widen<float>(from[c * stride]);
    });
    __syncthreads();
    if constexpr (kLogits) {
      for (int c = thread; c < classes; c += threads) {
        float z = 0;
        bool masked = false;
#pragma unroll 4
        for (int k = 0; k < count; ++k) {
          const float x = tile.x[k * classes + c], w = tile.member[k].share;
          z = fmaf(w, w == 0 ? 0.0f : x, z), masked = masked || (w > 0 && x == -infinity<float>());
        }
        mixture[c] = masked ? -infinity<float>() : z;
      }
      __syncthreads();
    }
    tile.template find_softmaxes<Lanes>(kLogits ? count : 0, count + 1 + kLogits, classes, inverse_t);
    __syncthreads();
    const Member own = tile.member[count];
    const double scale = tile.outer[0] * a.scale * a.temperature;
    const float factor = static_cast<float>(scale);
    // What a class of P, whose probability is p, lacks of the student's: log Q - log P.
    const auto mixed = [&](int c) {
      if constexpr (kLogits) {
        return Mixed{tile.probability(count + 1, c, classes), -tile.member[count + 1].over(own, mixture[c], student[c], inverse_t)};
      } else {
        Mixing mixing(own, student[c], true, inverse_t);
#pragma unroll 4
        for (int k = 0; k < count; ++k) mixing.add(tile.member[k], tile.x[k * classes + c], tile.probability(k, c, classes));
        Mixed result = mixing.mixed();
        result.log_m = mixing.anchored() ? -result.log_m : own.log_p(student[c], inverse_t) - result.log_m;
        return result;
      }
    };
    double sums[2] = {};
    const auto leave_student = [&](int c, float value) {
      as_stored<void, float>(a.student_grad, [&](auto type, std::int64_t stride) {
        static_cast<decltype(type)*>(a.student_grad.data)[at.student_grad + c * stride] = narrow<decltype(type)>(value * factor);
      });
    };
    if (!kMean || a.student_grad.present) {
      for (int c = thread; c < classes; c += threads) {
        const float q = tile.probability(count, c, classes);
        float toward = 0;
        if constexpr (kMean) {
#pragma unroll 4
          for (int k = 0; k < count; ++k) {
            const Member teacher = tile.member[k];
            const float u = -teacher.over(own, tile.x[k * classes + c], student[c], inverse_t);
            const float value = Term<float>(tile.probability(k, c, classes), q, u).difference;
            toward = teacher.share == 0 ? toward : fmaf(teacher.share, value, toward);
          }
        } else {
          const Mixed m = mixed(c);
          const Term<float> term(m.m, q, m.log_m);
          sums[0] += static_cast<double>(term.value), sums[1] += static_cast<double>(term.difference);
          toward = term.difference;
          if (late) tile.mixed[c] = m;
        }
        if (a.student_grad.present) leave_student(c, toward);
      }
    }
    double kl = 0;
    if constexpr (!kMean) {
      Group<32>::sum_all(sums);
      if (thread % 32 == 0) tile.part[thread / 32][0] = sums[0], tile.part[thread / 32][1] = sums[1];
      __syncthreads();
      double value = 0, drift = 0;
      for (int warp = 0; warp < threads / 32; ++warp) value += tile.part[warp][0], drift += tile.part[warp][1];
      kl = settled(value, drift);
    }
    const bool wants_loss = a.row_loss[0].present || a.total[0].present;
    if (late || (kMean && wants_loss))
      tile.template each_row<Lanes>(0, count, [&](int k, bool mine) {
        const Member teacher = tile.member[k];
        const int stop = mine && teacher.share != 0 ? classes : 0;
        // The derivative toward p of a class or, of logits, toward the mixed logit.
        const auto center = [&](int c) {
          const Mixed m = tile.mixed[c];
          const float value = m.m > 0 ? -(m.log_m + static_cast<float>(kl)) : 0.0f;
          return kLogits && m.m != 0 ? m.m * value : value;
        };
        const auto ratio = [&](int c) { return -teacher.over(own, tile.x[k * classes + c], student[c], inverse_t); };
        double found[2] = {};
        for (int c = G::lane(); c < stop; c += Lanes) {
          if constexpr (kMean) {
            const Term<float> term(tile.probability(k, c, classes), tile.probability(count, c, classes), ratio(c));
            found[0] += static_cast<double>(term.value), found[1] += static_cast<double>(term.difference);
          } else if constexpr (kLogits) {
            const float g = center(c);
            found[0] += static_cast<double>(g == 0 ? 0.0f : g * (tile.x[k * classes + c] - mixture[c]));
          } else {
            const float p = tile.probability(k, c, classes);
            found[0] += static_cast<double>(p == 0 ? p : p * center(c));
          }
        }
        G::sum_all(found);
        const double dot = kMean ? settled(found[0], found[1]) : found[0];
        if (!mine) return;
        if (G::lane() == 0) tile.dot[k] = stop ? dot : 0.0;
        if (!a.teachers_grad.present) return;
        as_stored<void, float>(a.teachers_grad, [&](auto type, std::int64_t stride) {
          auto* const to = static_cast<decltype(type)*>(a.teachers_grad.data) + at.teachers_grad + k * a.teachers_grad.stack_stride;
          for (int c = G::lane(); c < classes; c += Lanes) {
            float value = 0;
            if (stop && kLogits) {
              value = center(c);
            } else if (stop) {
              const float p = tile.probability(k, c, classes);
              if (p != 0) value = kMean ? -p * (ratio(c) + static_cast<float>(dot)) : p * (center(c) - static_cast<float>(dot));
            }
            to[c * stride] = narrow<decltype(type)>(value == 0 ? value : teacher.share * value * factor);
          }
        });
      });
    __syncthreads();
    if (thread < 32) {
      const double loss = kMean && wants_loss ? tile.mean(tile.dot, count) : kl;
      const double found[2] = {loss * a.temperature * a.temperature, 0};
      if (thread == 0) leave(a, at, found, total);
      tile.weight_gradients(a, at, kLogits ? scale : scale * a.temperature);
    }
    if (row + gridDim.x < rows) __syncthreads();
  }
  leave_totals(a, total, totals);
}

template <EnsembleKind Kind>
void run(const EnsembleCall& a, std::int64_t rows, const Totals& totals, const Queue& queue) {
  run_tile(a, rows, 2, kBlock, [&](auto numbers, auto lanes, std::int64_t blocks, int threads, unsigned reciprocal) {
    launch("distill_student_tile", student_kernel<Kind, numbers.value, lanes.value>, blocks, threads, queue, a, rows, reciprocal, totals);
  });
}

}  // namespace

bool distill_student_tile(const EnsembleCall& a, std::int64_t rows, const Totals& totals, const Queue& queue) {
  if (a.kind > EnsembleKind::mean || a.compute == DType::f64 || a.limit || a.as_is || a.by_class || !rows || !fits_tile(a, rows, 2, queue)) return false;
  switch (a.kind) {
    case EnsembleKind::probs: run<EnsembleKind::probs>(a, rows, totals, queue); break;
    case EnsembleKind::logits: run<EnsembleKind::logits>(a, rows, totals, queue); break;
    default: run<EnsembleKind::mean>(a, rows, totals, queue);
  }
  return true;
}

}  // namespace fedkern::cuda
