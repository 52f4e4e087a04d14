#include "bindings.h"
#include "fedkern/distill.h"

namespace fedkern {

void bind_distill(py::module_&) {}

}  // namespace fedkern
