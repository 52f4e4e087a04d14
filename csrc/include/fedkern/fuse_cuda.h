// fuse on CUDA: fuse_concat, fuse_mean and their gradients; device pointers throughout, on a device and a stream of the
// caller's. Maps travel as kernel parameters.
//
//   concat  out[b, start_m + c, p] = act(scale[start_m + c] f_m[b, c, p] + shift[start_m + c])
//   mean    out[b, c, p] = 1/M sum_m act(scale[m C + c] f_m[b, c, p] + shift[m C + c])
#pragma once

#include <cstdint>
#include <vector>

#include "fedkern/types.h"

namespace fedkern::cuda {

// Maps that one launch takes: a concatenation of more is done in turn, a mean of more not at all.
inline constexpr int kMostMaps = 48;

// [B, channels, P] with its strides in elements; absent without data.
struct FeatureMap {
  void* data = nullptr;
  std::int64_t batch = 0, channel = 0, position = 0;
};

// One number for each channel of all maps, in any dtype (fp64 for fp64 maps alone); 1 or 0 where absent.
struct ChannelNumbers {
  const void* data = nullptr;
  DType dtype = DType::f32;
  bool present = false;
};

struct FuseCall {
  DType dtype;  // of all maps
  std::int64_t batch, positions;
  bool relu, mean;
  std::vector<std::int64_t> channels;     // of each map
  std::vector<FeatureMap> features;       // empty where backward does not need them
  ChannelNumbers scale, shift;
  FeatureMap out;                         // forward: the result; backward: where there are no features, the result of a ReLU
};
void fuse_forward(const FuseCall& call, int device, void* stream);

struct FuseBackward {
  FeatureMap grad;
  std::vector<FeatureMap> to_features;  // empty, or one each, absent where not wanted
  Optional<double> to_scale, to_shift;  // [sum of channels], absent where not wanted
  double* partial;                      // workspace: fuse_partials(sum of channels), where one of them is
};
constexpr std::int64_t fuse_partials(std::int64_t channels) { return 2 * (channels > 65536 ? channels : 65536); }
void fuse_backward(const FuseCall& call, const FuseBackward& gradients, int device, void* stream);

}  // namespace fedkern::cuda
