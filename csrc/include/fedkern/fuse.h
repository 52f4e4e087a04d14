// fuse: M feature maps [batch, C_m, positions] side by side on the channels, or averaged, each channel through
// scale * x + shift and, if asked, ReLU.
//
// Two orders in memory: planar, where a channel's positions lie side by side, and interleaved (channels-last), where a
// position's channels do; all maps of a call share one. fp32, bf16 and f16 are computed in fp32 and rounded once, fp64 in
// fp64; sums over batch and positions are taken in fp64, in an order that depends on sizes alone.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

// Strides are in elements; that of the order's inner axis is 1.
struct FuseMap {
  void* data;
  std::int64_t channels, batch_stride, channel_stride, position_stride;
  bool present;
};

// What forward and backward share.
struct FuseCall {
  DType dtype;
  std::int64_t maps, batch, positions;
  bool interleaved, relu, mean;
  Optional<const void> scale, shift;  // [sum of C_m] in the type that is computed in; both absent or neither
  bool stream;  // write past the caches: for results that do not fit there
  int threads;
};

struct FuseForward {
  FuseCall call;
  const FuseMap* features;
  FuseMap out;  // dense
};

struct FuseBackward {
  FuseCall call;
  FuseMap grad;
  const FuseMap* features;       // null where neither grad_scale nor a mask needs them
  FuseMap out;                   // with relu and without features: positive where gradient passes; else absent
  const FuseMap* grad_features;  // dense; absent where not wanted
  Optional<double> grad_scale, grad_shift;  // [sum of C_m]; absent where not wanted
  double* partial;  // workspace of the caller, 2 * fuse_blocks(call) * sum of C_m, where a sum is wanted
};

// Sums are taken over blocks of about this many positions, then over the blocks.
inline constexpr std::int64_t kFuseBlock = 256;

// Planar maps: blocks of whole samples. Interleaved ones: blocks within a sample (within the batch, where samples follow
// each other as positions do and the call was made with batch 1).
constexpr std::int64_t fuse_block_samples(const FuseCall& call) {
  return call.positions >= kFuseBlock ? 1 : kFuseBlock / (call.positions > 0 ? call.positions : 1);
}
constexpr std::int64_t fuse_blocks(const FuseCall& call) {
  if (!call.positions) return 0;
  if (call.interleaved) return call.batch * ((call.positions + kFuseBlock - 1) / kFuseBlock);
  return (call.batch + fuse_block_samples(call) - 1) / fuse_block_samples(call);
}

struct FuseTable {
  void (*forward)(const FuseForward&);
  void (*backward)(const FuseBackward&);
};

FEDKERN_DECLARE_TABLE(FuseTable, fuse)

}  // namespace fedkern
