#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

struct DistillTable {
  int placeholder;
};

FEDKERN_DECLARE_TABLE(DistillTable, distill)

}  // namespace fedkern
