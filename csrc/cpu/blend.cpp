#include "fedkern/blend.h"

#include "fedkern/parallel.h"

namespace fedkern::FEDKERN_ISA {
namespace {

void forward(const BlendForward& a) {
  auto rows = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t b = begin; b < end; ++b) {
      const std::int64_t source = a.index ? a.index[b] : b;
      const float weight = static_cast<float>(a.alpha ? a.alpha[b] : a.alpha_value), rest = 1.0f - weight;
      const float* x = static_cast<const float*>(a.foreground) + b * a.foreground_stride;
      const float* y = static_cast<const float*>(a.background) + source * a.background_stride;
      float* out = static_cast<float*>(a.out) + b * a.size;
      for (std::int64_t i = 0; i < a.size; ++i) out[i] = weight * x[i] + rest * y[i];
    }
  };
  parallel_for(a.rows, 1, a.threads, static_cast<double>(a.rows) * static_cast<double>(a.size) * 0.5e-9, rows);
}

}  // namespace

const BlendTable blend_table = {forward};

}  // namespace fedkern::FEDKERN_ISA
