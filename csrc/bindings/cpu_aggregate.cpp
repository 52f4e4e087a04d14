#include "bindings.h"
#include "fedkern/aggregate.h"

namespace fedkern {

void bind_aggregate(py::module_&) {}

}  // namespace fedkern
