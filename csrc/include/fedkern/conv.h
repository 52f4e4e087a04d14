// conv: 3x3 convolution with padding 1, or 1x1 without (stride 1 or 2), batch norm (or a bias and group norm), residual, ReLU and
// 2x2 max pooling; and 3x3 or 5x5 convolution (stride 1), bias, ReLU and 2x2 max pooling.
//
// Maps are dense and channels-last, fp32. Samples are worked on in groups of fixed sizes, whose sums are added in order:
// results do not depend on the number of threads. There is no portable level: where it is active, nothing fits.
#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

struct ConvShape {
  std::int64_t batch, height, width, in, out;  // of x; in, out: channels
  std::int64_t stride = 1, kernel = 3;         // kernel: its side
  // What the convolution gives, as a map of its own.
  ConvShape result() const { return {batch, (height + stride - 1) / stride, (width + stride - 1) / stride, out, out}; }
  std::int64_t taps() const { return kernel * kernel; }
  std::int64_t positions() const { return batch * height * width; }
};

struct ConvNorm {
  ConvShape shape;
  const float* x;                                   // [batch, height, width, in]
  const float* weight;                              // of `out`, `in` and taps, at these strides
  std::int64_t weight_out, weight_in, weight_tap;
  double eps;
  bool relu, pool, training;
  int threads;
  std::int64_t groups;  // of a group norm; 0: batch norm
  std::int64_t positions_of_out() const {
    const ConvShape r = shape.result();
    return pool ? r.batch * (r.height / 2) * (r.width / 2) : r.positions();
  }
};

// What a forward pass reads and writes beside; null where it is absent.
struct ConvForward {
  ConvNorm call;
  const float *scale, *shift;  // [out]
  const float* bias;           // [out], of the convolution before a group norm
  float *mean, *variance;      // [out], running ones; read where not training, written where `update`
  const float* residual;       // like y
  double momentum;
  bool update;
  // For the backward pass, with the channels of the shape that is computed:
  float* y;       // [batch, *result, out]: the convolution's result
  float* raw;     // like out, where pool: those of y that the maxima come from
  float* saved;   // [4, out]: mean, 1 / deviation, and a and b of a y + b; of a group norm [batch, 5, out]: means are less the bias, last
                  // is how far a channel's is from its group's
  float* out;     // like y, or of half the height and width
};

struct ConvBackward {
  ConvNorm call;
  const float *grad, *y, *raw, *saved;
  const float* out;        // where a residual was added before the ReLU
  float* to_x;             // null: not wanted, as all that follow
  float* to_weight;        // at the weight's strides
  float *to_scale, *to_shift, *to_bias;
  float* to_residual;
};

struct PoolShape {
  std::int64_t batch, height, width, in, out, kernel, padding;  // as ConvShape's
  // Of the convolution's result, before pooling.
  std::int64_t high() const { return height + 2 * padding - kernel + 1; }
  std::int64_t wide() const { return width + 2 * padding - kernel + 1; }
  std::int64_t windows() const { return high() / 2 * (wide() / 2); }  // of a sample
  std::int64_t taps() const { return kernel * kernel; }
};

// Maps of either layout: channels-last, or planar as PyTorch's contiguous ones.
struct ConvPool {
  PoolShape shape;
  const float* x;
  const float* weight;
  std::int64_t weight_out, weight_in, weight_tap;
  bool x_planar, planar;  // `planar`: the result
  bool relu;
  int threads;
  std::int64_t weight_place(std::int64_t o, std::int64_t i, std::int64_t tap) const { return o * weight_out + i * weight_in + tap * weight_tap; }
  float weight_at(std::int64_t o, std::int64_t i, std::int64_t tap) const { return weight[weight_place(o, i, tap)]; }
};

struct PoolForward {
  ConvPool call;
  const float* bias;  // or null
  float* out;
  std::uint8_t* chosen;  // [batch, windows, out in eights]: the place of the maximum in its window, for the backward pass
};

struct PoolBackward {
  ConvPool call;
  const float* grad;
  const std::uint8_t* chosen;
  float *to_x, *to_weight, *to_bias;  // null: not wanted
};

struct ConvTable {
  // The shape in which a call of this shape is computed: its own, or with channels of zeros behind; batch 0 where PyTorch's own
  // operators are faster; null: everywhere.
  ConvShape (*served)(const ConvShape&);
  // A group norm's own channels are not filled up, only those of x.
  // False where an infinity or NaN is met, which kernels spread further than convolutions do: results are void, running statistics
  // unchanged.
  bool (*forward)(const ConvForward&);
  bool (*backward)(const ConvBackward&);
  // The same of PoolShape.
  bool (*pool_fits)(const PoolShape&);
  bool (*pool_forward)(const PoolForward&);
  bool (*pool_backward)(const PoolBackward&);
};

FEDKERN_DECLARE_TABLE(ConvTable, conv)

}  // namespace fedkern
