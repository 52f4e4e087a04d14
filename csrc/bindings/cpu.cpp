// fedkern._cpu: the compiled CPU kernels. Imported by fedkern.ops._core.backend after torch, whose OpenMP runtime it uses.
#include <string>

#include "bindings.h"
#include "fedkern/isa.h"
#include "fedkern/parallel.h"

namespace fedkern {

const char* source_hash();
void bind_blend(py::module_&);
void bind_contrast(py::module_&);
void bind_conv(py::module_&);
void bind_distill(py::module_&);
void bind_distill_ensemble(py::module_&);
void bind_aggregate(py::module_&);
void bind_aggregate_order(py::module_&);
void bind_aggregate_distance(py::module_&);
void bind_aggregate_server(py::module_&);
void bind_aggregate_privacy(py::module_&);
void bind_fuse(py::module_&);
void bind_mlp(py::module_&);
void bind_optimise(py::module_&);
void bind_sparse(py::module_&);
void bind_strided(py::module_&);
void bind_tensors(py::module_&);

namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512"};

py::list available() {
  py::list names;
  for (int i = 0; i < 3; ++i)
    if (isa_supported(static_cast<Isa>(i))) names.append(kNames[i]);
  return names;
}

void choose(const std::string& name) {
  for (int i = 0; i < 3; ++i) {
    if (name != kNames[i]) continue;
    if (!isa_supported(static_cast<Isa>(i)))
      throw py::value_error("the CPU ISA level \"" + name + "\" was asked for, but this CPU or this build lacks it; available: " +
                            py::str(", ").attr("join")(available()).cast<std::string>());
    set_isa(static_cast<Isa>(i));
    return;
  }
  throw py::value_error("unknown CPU ISA level \"" + name + "\"; it is one of portable, avx2, avx512");
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  if (available().empty()) throw py::import_error(
        "it was compiled for processors with AVX2, which this one lacks: install fedkern on this machine, or with FEDKERN_ISA=all");
  module.doc() = "Compiled CPU kernels of fedkern; use them through fedkern.ops.";
  module.def("source_hash", source_hash);
  module.def("isa", [] { return kNames[static_cast<int>(active_isa())]; });
  module.def("available_isas", available);
  module.def("set_isa", choose);
  module.def("trust_fork", [] { trust_fork(); });
  module.def("cache_bytes", [] { return cache_bytes(); });
  module.def("set_cache_bytes", [](std::int64_t bytes) { cache_bytes() = bytes; });
  bind_blend(module);
  bind_contrast(module);
  bind_conv(module);
  bind_distill(module);
  bind_distill_ensemble(module);
  bind_aggregate(module);
  bind_aggregate_order(module);
  bind_aggregate_distance(module);
  bind_aggregate_server(module);
  bind_aggregate_privacy(module);
  bind_fuse(module);
  bind_mlp(module);
  bind_optimise(module);
  bind_sparse(module);
  bind_strided(module);
  bind_tensors(module);
}

}  // namespace fedkern
