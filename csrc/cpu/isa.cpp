#include "fedkern/isa.h"

#include <atomic>

namespace fedkern {

bool isa_supported(Isa isa) {
  switch (isa) {
#if defined(FEDKERN_HAS_avx512)
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(FEDKERN_HAS_avx2)
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
#if defined(FEDKERN_HAS_portable)
    case Isa::portable: return true;
#endif
    default: return false;
  }
}

namespace {

Isa best() {
  if (isa_supported(Isa::avx512)) return Isa::avx512;
  if (isa_supported(Isa::avx2)) return Isa::avx2;
  return Isa::portable;
}

std::atomic<Isa>& active() {
  static std::atomic<Isa> isa{best()};
  return isa;
}

}  // namespace

Isa active_isa() { return active().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { active().store(isa, std::memory_order_relaxed); }

}  // namespace fedkern
