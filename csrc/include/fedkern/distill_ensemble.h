// distill_ensemble: losses between the softmax rows of K teachers, and of a student, with gradients.
//
//   probs      T^2 KL(P || Q): P the mixture of the teachers' softmaxes at T, renormalised over classes
//   logits     the same with P the softmax of the mixture of their logits
//   mean       the mean of the K divergences
//   js         generalised Jensen-Shannon divergence H(sum w p) - sum w H(p) = sum w KL(p || mixture)
//   consensus  its two terms: entropy of the mixture, mean of the entropies
//
// Weights   normalised over the teachers for every row and class; 1 / K where they and the mask leave none. A teacher
//           of weight 0 is not looked at, and its weight gets no gradient.
// Formulas  u = log Q - log P; KL = sum P (e^u - 1 - u). Where divergences are small, probabilities are taken relative
//           to an anchor row a: log(P / a) = log1p(sum w (e^v - 1)), v = log p - log a from differences of logits.
//           Where masks or weights by class leave a mixture of probabilities little mass, all are taken over that mass.
// Limit     T = infinity: half the variance over classes of mixture - student, classes finite in all that contribute.
// Memory    the mixture lives in L1; teachers are read once where a row of all of them fits the workspace.
// The rest  layouts, precision and order are those of distill.h.
#pragma once

#include "fedkern/distill.h"

namespace fedkern {

enum class EnsembleKind : int { probs = 0, logits = 1, mean = 2, js = 3, consensus = 4 };

// Logits of K teachers, or their weights.
struct Stack : Logits {
  std::int64_t stack_stride = 0;
};

struct EnsembleCall {
  EnsembleKind kind;
  bool limit;                 // T = infinity
  bool as_is;                 // teachers hold log-probabilities and T = 1: their exponentials, not their softmax
  bool by_class;              // weights differ between classes, or a mask is given
  DType compute;              // f32 or f64
  std::int64_t count;         // of teachers, at least 1
  std::int64_t classes;       // at least 1
  int row_dims;               // at least 1; the last one is the innermost
  std::int64_t row_size[kMaxRowDims];
  double temperature;
  double scale;               // of the totals and of the gradients
  Logits student;             // absent for js and consensus
  Stack teachers, weights;    // weights: absent for equal ones; class_stride 0 unless by_class
  Optional<const unsigned char> mask;  // [count, classes]
  std::int64_t mask_stride[2];
  Logits student_grad;
  Stack teachers_grad;
  Logits kept;                // of `compute`, values per row: 4 * count on CUDA, js and consensus in f32; 4 * count + classes
                              // on the CPU, consensus. Without teachers_grad a call writes there, with it it reads instead of
                              // reducing every row again
  Stack weights_grad;         // of `compute`; a value per class with by_class, else one per row
  RowValues grad_output[2];   // factors of the gradients; the second for the second result of consensus
  RowValues row_loss[2];
  RowValues total[2];         // scale * sum of row_loss
  int threads;
};

struct EnsembleTable {
  void (*run)(const EnsembleCall&);
};

FEDKERN_DECLARE_TABLE(EnsembleTable, distill_ensemble)

}  // namespace fedkern
