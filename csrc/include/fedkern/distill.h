// distill: Kullback-Leibler divergences and entropies of softmax rows, with gradients, in one pass over the logits.
//
// One row is the vector of C class logits of one sample (and position). All of these come from the same call:
//
//   kl       loss = T^2 KL(P || Q), P = softmax(p / T), Q = softmax(q / T), summed over the pairs (teacher, student[k]);
//            p is the teacher and q the student, or the other way round with `reverse`
//   limit    the same for T = infinity: half the variance over classes of teacher - student, classes unmasked in both
//   entropy  loss = H(softmax(teacher))
//
// Formulas  u = log Q - log P; KL = sum P (e^u - 1 - u), whose terms are all >= 0 and do not cancel where P ~ Q;
//           dKL/dq = (Q - P) / T, dKL/dp = -P (u + KL) / T.
// Layout    any strides, negative ones and 0 included for inputs; gradients may not overlap.
// Precision computed in f32 (f64 where any tensor is f64), row losses summed in f64.
// Memory    every input is read once and every gradient written once while a row fits the cache.
// Order     sums run over fixed chunks in a fixed order: the same bits for any number of threads.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

enum class DistillKind : int { kl = 0, limit = 1, entropy = 2 };

inline constexpr int kMaxRowDims = 8;
inline constexpr int kMaxStudents = 2;

// One value per row and class.
struct Logits {
  void* data = nullptr;
  bool present = false;
  DType dtype = DType::f32;
  std::int64_t class_stride = 0;
  std::int64_t row_stride[kMaxRowDims] = {};
};

// One value per row, or one for all with strides of 0.
struct RowValues {
  void* data = nullptr;
  bool present = false;
  DType dtype = DType::f32;
  std::int64_t row_stride[kMaxRowDims] = {};
};

struct DistillCall {
  DistillKind kind;
  DType compute;                     // f32 or f64
  std::int64_t classes;              // at least 1
  int row_dims;                      // at least 1; the last one is the innermost
  std::int64_t row_size[kMaxRowDims];
  double temperature;                // read for kl alone
  bool reverse;
  double scale;                      // of the total and of the gradients: 1, or 1 / rows for a mean
  int students;
  Logits teacher, student[kMaxStudents];
  Logits teacher_grad, student_grad[kMaxStudents];
  RowValues weight;                  // rows of weight 0 are not looked at
  RowValues grad_output;             // factor of the gradients
  RowValues row_loss;                // out: weight * loss
  RowValues raw_loss;                // out: loss, and 0 where the weight is 0
  RowValues total;                   // out: scale * sum of row_loss
  Optional<void> kept;               // of `compute`, kept_numbers() for each row; kl and entropy on CUDA alone: without
                                     // gradients it writes there, with them it reads instead of reducing every row again
  int threads;
};

// What a row's gradients need of the row as a whole: a maximum and a normaliser of each softmax, and what was summed.
constexpr int kept_numbers(const DistillCall& call) { return call.students ? 2 + 4 * call.students : 3; }

struct DistillTable {
  void (*run)(const DistillCall&);
  // f32 or f64: the exponentials the kernels use; the second of x / temperature for x <= 0.
  void (*exp)(DType, std::int64_t count, const void* in, void* out);
  void (*scaled_exp)(DType, std::int64_t count, const void* in, void* out, double temperature);
};

FEDKERN_DECLARE_TABLE(DistillTable, distill)

}  // namespace fedkern
