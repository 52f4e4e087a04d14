// sparse: Kullback-Leibler divergence of softmax rows from teachers that are known at k of C classes.
//
//   loss = T^2 KL(P || Q), Q = softmax(student / T), P = softmax(v / T), where v holds the teacher's values at its k
//   classes. The others have no probability, or equal shares of what exp(v) leaves to 1
//
// Formulas  u = log Q - log P; KL = sum P (e^u - 1 - u) over the classes of P, and Q where P is 0: no term is negative;
//           dKL/dstudent = (Q - P) / T.
// Precision computed in the type of the call, what belongs to the k classes in f64; row losses are summed in f64.
// Order     sums run over fixed chunks in a fixed order: the same bits for any number of threads.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

// One number per row: rows lie `step` elements apart, 0 for one number that all rows share.
struct RowNumbers {
  void* data = nullptr;
  bool present = false;
  DType dtype = DType::f32;
  std::int64_t step = 0;
};

// Rows of which each lies without gaps.
struct ClassRows {
  void* data = nullptr;
  bool present = false;
  DType dtype = DType::f32;
  std::int64_t step = 0;
};

struct SparseCall {
  std::int64_t rows, classes, count;  // count: k, from 1 to classes
  ClassRows student;                  // [rows, classes]; f64 is computed in f64, other types in f32
  ClassRows values;                   // [rows, count], any type
  const std::int64_t* indices;        // [rows, count], without gaps
  bool spreads;                       // the other classes have shares; values are log-probabilities
  RowNumbers weight, grad;
  ClassRows gradient;                 // out, of the student's type
  RowNumbers losses;                  // out: weight * loss of every row
  RowNumbers total;                   // out: scale * sum of weight * loss, one number
  double temperature, scale;          // scale: of the total and of the gradients
  int threads;
};

// A log-probability of 0, rounded.
inline constexpr double kMostLogProbability = 0.01;

struct SparseTable {
  // Whether every row's indices are different classes and log-probabilities are at most kMostLogProbability. Other rows
  // are left out.
  bool (*run)(const SparseCall&);
};

FEDKERN_DECLARE_TABLE(SparseTable, sparse)

}  // namespace fedkern
