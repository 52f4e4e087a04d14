#include "fedkern/parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>

namespace fedkern {
namespace {

// Set in a forked child: libgomp's threads do not survive a fork, and a parallel region there would wait for them forever.
std::atomic<bool> forked{false};

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

// Waking and joining a thread takes some 10 µs on an idle machine, a scheduler's time slice (milliseconds) on a busy one.
double parallel_threshold() { return 200e-6; }

void parallel_chunks(std::int64_t count, std::int64_t chunk, int threads, double seconds, ChunkBody body, void* context) {
  if (count <= 0) return;
  const std::int64_t chunks = (count + chunk - 1) / chunk;
  const int team = static_cast<int>(std::min<std::int64_t>(threads, chunks));
  if (team <= 1 || seconds < parallel_threshold() || forked.load(std::memory_order_relaxed)) {
    for (std::int64_t begin = 0; begin < count; begin += chunk) body(context, begin, std::min(begin + chunk, count));
    return;
  }
  std::atomic<std::int64_t> next{0};
#pragma omp parallel num_threads(team)
  for (;;) {
    const std::int64_t begin = next.fetch_add(1, std::memory_order_relaxed) * chunk;
    if (begin >= count) break;
    body(context, begin, std::min(begin + chunk, count));
  }
}

}  // namespace fedkern
