#include "fedkern/parallel.h"

#include <fcntl.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>

namespace fedkern {
namespace {

double clock_seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Whether this process was forked and has started no program since (PF_FORKNOEXEC among the kernel's flags of it).
bool forked_before() {
  constexpr unsigned kForkNoExec = 0x40;
  const int file = open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  char text[1024];
  const ssize_t size = read(file, text, sizeof(text) - 1);
  close(file);
  if (size <= 0) return false;
  text[size] = 0;
  const char* const name_end = std::strrchr(text, ')');  // the program's name may hold anything
  unsigned flags = 0;
  return name_end && std::sscanf(name_end + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & kForkNoExec);
}

// True in a forked child: libgomp's threads do not survive a fork, and a parallel region there would wait for them forever.
// Also where the core is loaded after the fork: torch may have used its threads before.
std::atomic<bool> forked{forked_before()};

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

// On a busy machine threads of a region share a core, or the last one is held back long after the work is done. A caller
// that lost time so therefore works alone for a while: for twice as many calls each time, until a try goes well.
std::atomic<int> calls_alone{0};
std::atomic<int> last_penalty{0};
constexpr int kLongestPenalty = 1024;
constexpr double kBearableLoss = 100e-6;  // s; waking and joining the threads of an idle machine takes some 10 µs

bool keep_alone() {
  int left = calls_alone.load(std::memory_order_relaxed);
  while (left > 0)
    if (calls_alone.compare_exchange_weak(left, left - 1, std::memory_order_relaxed)) return true;
  return false;
}

// `lost`: seconds of `elapsed` in which the caller waited for others or for a core.
void judge(double lost, double elapsed) {
  if (lost > kBearableLoss && lost > 0.3 * elapsed) {
    const int penalty = std::min(std::max(1, 2 * last_penalty.load(std::memory_order_relaxed)), kLongestPenalty);
    last_penalty.store(penalty, std::memory_order_relaxed);
    calls_alone.store(penalty, std::memory_order_relaxed);
  } else {
    last_penalty.store(0, std::memory_order_relaxed);
  }
}

}  // namespace

// Waking and joining a thread takes some 10 µs on an idle machine, a scheduler's time slice (milliseconds) on a busy one.
double parallel_threshold() { return 200e-6; }

bool lost_threads() { return forked.load(std::memory_order_relaxed); }

void trust_fork() { forked.store(false, std::memory_order_relaxed); }

void parallel_chunks(std::int64_t count, std::int64_t chunk, int threads, double seconds, ChunkBody body, void* context) {
  if (count <= 0) return;
  const int team = parallel_workers(count, chunk, threads);
  if (team <= 1 || seconds < parallel_threshold() || lost_threads() || keep_alone()) {
    for (std::int64_t begin = 0; begin < count; begin += chunk) body(context, begin, std::min(begin + chunk, count), 0);
    return;
  }
  std::atomic<std::int64_t> next{0};
  std::atomic<int> workers{0};
#if defined(__SSE__)
  // Whether denormal numbers are flushed to zero, and how results are rounded (torch.set_flush_denormal), is the calling thread's
  // choice alone; a chunk may not depend on the thread that takes it.
  const unsigned control = _mm_getcsr();
#endif
  const pthread_t caller = pthread_self();
  const double start = clock_seconds(CLOCK_MONOTONIC), start_on_core = clock_seconds(CLOCK_THREAD_CPUTIME_ID);
  double on_core = 0;
#pragma omp parallel num_threads(team)
  {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();
    _mm_setcsr(control);
#endif
    const int worker = workers.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const std::int64_t begin = next.fetch_add(1, std::memory_order_relaxed) * chunk;
      if (begin >= count) break;
      body(context, begin, std::min(begin + chunk, count), worker);
    }
#if defined(__SSE__)
    _mm_setcsr(before);
#endif
    if (pthread_equal(pthread_self(), caller)) on_core = clock_seconds(CLOCK_THREAD_CPUTIME_ID) - start_on_core;
  }
  const double elapsed = clock_seconds(CLOCK_MONOTONIC) - start;
  judge(elapsed - on_core, elapsed);
}

}  // namespace fedkern
