// Which ISA level serves: chosen once from the CPU, changed by FEDKERN_CPU_ISA or from Python.
#pragma once

namespace fedkern {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2 };

Isa active_isa();
bool isa_supported(Isa isa);  // by this CPU and this build
void set_isa(Isa isa);        // the caller has checked isa_supported

// Declares the per-level tables of one operator and `const Table& operator_kernels()`, which returns the active one.
// The tables are defined in csrc/cpu/<operator>.cpp as fedkern::<level>::<operator>_table, for the levels of the build.
#if defined(FEDKERN_HAS_portable)
#define FEDKERN_PORTABLE(...) __VA_ARGS__
#else
#define FEDKERN_PORTABLE(...)
#endif
#if defined(FEDKERN_HAS_avx2)
#define FEDKERN_AVX2(...) __VA_ARGS__
#else
#define FEDKERN_AVX2(...)
#endif
#if defined(FEDKERN_HAS_avx512)
#define FEDKERN_AVX512(...) __VA_ARGS__
#else
#define FEDKERN_AVX512(...)
#endif
#define FEDKERN_DECLARE_TABLE(Table, operator_name)                                                    \
  namespace portable { extern const Table operator_name##_table; }                                     \
  namespace avx2 { extern const Table operator_name##_table; }                                         \
  namespace avx512 { extern const Table operator_name##_table; }                                       \
  inline const Table& operator_name##_kernels() {                                                      \
    switch (active_isa()) {                                                                            \
      FEDKERN_AVX512(case Isa::avx512: return avx512::operator_name##_table;)                          \
      FEDKERN_AVX2(case Isa::avx2: return avx2::operator_name##_table;)                                \
      FEDKERN_PORTABLE(case Isa::portable: return portable::operator_name##_table;)                    \
      default: __builtin_unreachable(); /* isa_supported */                                            \
    }                                                                                                  \
  }

}  // namespace fedkern
