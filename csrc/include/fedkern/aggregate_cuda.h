// aggregate on CUDA: device pointers throughout, on a device and a stream of the caller's. Sums are taken in fp64, in an
// order that sizes, alignment and the device fix. Lists of vectors travel as kernel parameters: nothing is copied to the device, so
// that every call may be captured in a graph.
#pragma once

#include <vector>

#include "fedkern/aggregate_server.h"

namespace fedkern::cuda {

// Vectors that one launch takes; more are done in turn, or not at all where that is said.
inline constexpr int kTable = 128;
// Vectors whose values at one place can be sorted, or whose distances taken.
inline constexpr int kMostSorted = 64;
// fp64 numbers of a workspace that serves server_step, distances and norms.
inline constexpr std::int64_t kAggregateWorkspace = 1 << 18;

// M vectors of P elements: rows of a matrix, or (`first` absent) one by one.
struct Uploads {
  DType dtype;
  std::int64_t size, count;
  Optional<const void> first;
  std::int64_t row_stride, stride;  // in elements
  std::vector<const void*> each;
};

// One weight each, on the host or, where `device` is present, there; `total` is their sum, if on the host.
struct UploadWeights {
  std::vector<double> host;
  Optional<const double> device;
  double total;
};

struct Place {
  int device;
  void* stream;
};

// sums = start (or 0) + sum_m weight_m x_m, or, with `out`, that over the sum of the weights. `sums` is a workspace [P] where
// there are more than kTable vectors.
struct MeanCall {
  Optional<const double> start;
  double* sums;
  Optional<void> out;
  DType out_dtype;
};
void weighted_mean(const Uploads& x, const UploadWeights& weights, const MeanCall& call, const Place& place);

void exact_add(DType dtype, std::int64_t size, const void* x, std::int64_t stride, double weight, const ExactState& state, const Place& place);
void exact_mean(DType out_dtype, std::int64_t size, const ExactState& state, double total, void* out, const Place& place);

// See fedkern/ops/_aggregate/server_step.py. At most kTable vectors; global of their dtype; all of unit stride.
struct ServerStep {
  ServerRule rule;
  double learning_rate, beta1, beta2, tau;
  const void* global;
  Optional<void> first, second;  // absent where the rule has none
  DType first_dtype, second_dtype;
  void* out;
  DType out_dtype;
  double *norms, *cosines, *workspace;  // [M]; null where nobody asks for them
};
void server_step(const Uploads& x, const UploadWeights& weights, const ServerStep& call, const Place& place);

// out[m] = |x_m - point|^2; point [P] fp64; 0 where absent.
void squared_distances_to(const Uploads& x, const Optional<const double>& point, double* out, double* workspace, const Place& place);
// out [M, M]; with `root` the distances themselves; at most kMostSorted vectors.
void squared_distances(const Uploads& x, bool root, double* out, double* workspace, const Place& place);

// The shares [M] of the mean that Krum takes; at most kMostSorted vectors.
void krum_shares(const Uploads& x, int byzantine, int keep, double* shares, double* workspace, const Place& place);

// The shares [M] of the geometric median; weights [M] on the device; iterations > 0; at most kMostSorted vectors.
void geometric_shares(const Uploads& x, const double* weights, std::int64_t iterations, double tolerance, double smoothing, double* shares,
                      double* workspace, const Place& place);

// The (weighted) mean of the values at places [low, high) of every coordinate's order, in the vectors' dtype; with `median`
// the mean of the lower and upper weighted median instead. At most kMostSorted vectors; weights (may be null) not with fp64.
void sorted_mean(const Uploads& x, const UploadWeights* weights, int low, int high, bool median, void* out, const Place& place);

// out_m = factors[m] x_m + deviation * normal(seed, offset + m P + j), see fedkern/ops/_aggregate/reference.py. `out` is written, of
// the vectors' dtype and unit stride.
void scale_and_noise(const Uploads& x, const double* factors, double deviation, std::uint64_t seed, std::uint64_t offset, const Uploads& out,
                     const Place& place);

}  // namespace fedkern::cuda
