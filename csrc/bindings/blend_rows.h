// What blend's bindings for CPU and CUDA share.
#pragma once

#include "bindings.h"
#include "fedkern/blend.h"

namespace fedkern {

// A map that may be absent, its samples `stride` elements apart.
inline Rows optional_rows(const OptionalAddress& address, std::int64_t stride) {
  return {pointer<void>(address.value_or(0)), stride, address.has_value()};
}

}  // namespace fedkern
