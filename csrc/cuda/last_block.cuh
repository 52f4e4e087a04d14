// Which block of a launch is the last to be done. It adds up what the others left, for which a launch of its own would take longer
// than the sum.
//
// Blocks count in a word of the call's workspace that nobody has set to zero. Above the count stands the number of the launch,
// which no other launch has: under another number, whatever the memory held counts for nothing. The last block takes the number
// away, since a recorded launch is played again under the same.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace fedkern::cuda {

using Ticket = unsigned long long;

inline constexpr Ticket kTicketBlocks = 1 << 12;  // more than a launch may count

// A launch's number, 52 bits: multiples of the golden ratio, unlike integers and floating point numbers that memory may hold.
inline Ticket next_ticket() {
  static std::atomic<Ticket> launches{0};
  return ++launches * 0x9e3779b97f4a7c15 / kTicketBlocks * kTicketBlocks;
}

// True in the last of `blocks` blocks to come here, each with all of its threads. What the first thread of each wrote before is
// read through volatile pointers then, past caches that are older.
__device__ __forceinline__ bool is_last_block(Ticket* done, Ticket ticket, unsigned blocks) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    __threadfence();
    Ticket seen = *static_cast<volatile Ticket*>(done);
    while (seen / kTicketBlocks != ticket / kTicketBlocks) {
      const Ticket found = atomicCAS(done, seen, ticket);
      seen = found == seen ? ticket : found;
    }
    last = atomicAdd(done, Ticket{1}) % kTicketBlocks == blocks - 1;
    if (last) *static_cast<volatile Ticket*>(done) = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace fedkern::cuda
