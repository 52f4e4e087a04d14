#pragma once

#include "fedkern/isa.h"
#include "fedkern/types.h"

namespace fedkern {

struct AggregateTable {
  int placeholder;
};

FEDKERN_DECLARE_TABLE(AggregateTable, aggregate)

}  // namespace fedkern
