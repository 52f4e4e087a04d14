// aggregate: vectors scaled, and counter-based normal noise added to them.
//
// Place e of a stream takes word (e >> 4) & 3 of counter 16 (e >> 6) + (e & 15) of Philox4x32-10 under the 64-bit key `seed`
// (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so that 64 places are 16 counters and a vector
// register holds one word of many counters. Words 0 and 1, and 2 and 3, make two normal numbers each (Box and Muller, 1958):
//   u = (float(word 0) + 1/2) / 2^32, t = float(signed word 1) / 2^31; sqrt(-2 ln u) {cos, sin}(pi t).
// Where word 0 or 2 is below 2^12, the same word w of the counter plus 2^64, used for nothing else, refines it:
//   u = (float(2^32 word + w) + 1/2) / 2^64.
// No fused operations, so every ISA level gives the same bits.
#pragma once

#include "fedkern/aggregate.h"

namespace fedkern {

struct ScaleAndNoise {
  DType dtype;
  std::int64_t count, size;
  const void* const* vectors;  // of unit stride
  const double* factors;       // [count]
  double deviation;            // of the noise; 0: none is generated
  std::uint64_t seed, offset;  // element j of vector m takes place offset + m * size + j
  void* out;                   // [count, size]
  int threads;
};

struct AggregatePrivacyTable {
  void (*scale_and_noise)(const ScaleAndNoise&);
};

FEDKERN_DECLARE_TABLE(AggregatePrivacyTable, aggregate_privacy)

}  // namespace fedkern
