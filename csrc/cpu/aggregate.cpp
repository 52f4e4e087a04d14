#include "fedkern/aggregate.h"

namespace fedkern::FEDKERN_ISA {

const AggregateTable aggregate_table = {0};

}  // namespace fedkern::FEDKERN_ISA
