// What the bindings may ask of the ISA choice.
#pragma once

#include "fedkern/isa.h"

namespace fedkern {

bool isa_supported(Isa isa);
void set_isa(Isa isa);  // the caller has checked isa_supported

}  // namespace fedkern
