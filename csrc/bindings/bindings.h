// What the binding files share. Tensors arrive as they are (exchange.h), checked by fedkern.ops.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <optional>

#include "fedkern/types.h"

namespace fedkern {
namespace py = pybind11;

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Lets other Python threads run during a call that is long enough to be worth the switch.
class ReleaseGil {
 public:
  explicit ReleaseGil(bool worth_it) {
    if (worth_it) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

// Elements below which a call is shorter than handing the interpreter over and back.
inline constexpr std::int64_t kReleaseGilElements = 1 << 16;

// Size of the last-level cache; tests set it to reach both kinds of writing with small results.
inline std::int64_t& cache_bytes() {
  static std::int64_t cache = [] {
#ifdef _SC_LEVEL3_CACHE_SIZE
    const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (bytes > 0) return static_cast<std::int64_t>(bytes);
#endif
    return std::int64_t{32} << 20;
  }();
  return cache;
}

// Whether so many elements do not fit into the last-level cache: results of such calls are written past it.
inline bool past_cache(std::int64_t elements, int dtype) {
  return elements * static_cast<std::int64_t>(item_size(static_cast<DType>(dtype))) > cache_bytes();
}

// The same of what many vectors were read for, which have taken the cache by then. Few cores have the whole of what a server
// or a virtual machine reports: past 32 MB means are a tenth faster so on one that reports 320 (AMD, Zen 4).
inline bool aggregate_past_cache(std::int64_t elements, int dtype) {
  return past_cache(elements, dtype) || elements * static_cast<std::int64_t>(item_size(static_cast<DType>(dtype))) > 32 << 20;
}

}  // namespace fedkern
