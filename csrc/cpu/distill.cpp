#include "fedkern/distill.h"

namespace fedkern::FEDKERN_ISA {

const DistillTable distill_table = {0};

}  // namespace fedkern::FEDKERN_ISA
