// One way to use more than one thread: chunks of a fixed size, taken from a counter.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fedkern {

// Runs body(context, begin, end, worker) over [0, count) in chunks of `chunk` (the last may be shorter) on at most `threads`
// threads of the OpenMP pool that torch brought into the process.
//
// Chunk boundaries depend on `chunk` alone, so results that are written per chunk are the same for any thread count.
// Threads take chunks as they come: on a busy machine a thread that the system holds back costs one chunk, not its share.
// `worker`, from 0 to parallel_workers() - 1, is another for each thread: memory that a thread works in is allocated before, one
// piece a worker, since an exception cannot leave the threads (std::bad_alloc in one of them would end the process).
// `seconds` is the caller's estimate of the whole work on one thread: below parallel_threshold() everything runs on the
// caller, since waking a second thread costs more, and on a loaded machine thousands of times more. Where a try with
// several threads lost much time to waiting, the next calls run on the caller too.
using ChunkBody = void (*)(void* context, std::int64_t begin, std::int64_t end, int worker);
void parallel_chunks(std::int64_t count, std::int64_t chunk, int threads, double seconds, ChunkBody body, void* context);

// Most threads that share the chunks.
inline int parallel_workers(std::int64_t count, std::int64_t chunk, int threads) {
  return static_cast<int>(std::clamp<std::int64_t>((count + chunk - 1) / chunk, 1, std::max(threads, 1)));
}

// The same for a callable, which may leave out the worker; it runs on several threads at once and may not throw.
template <typename Callable>
void parallel_for(std::int64_t count, std::int64_t chunk, int threads, double seconds, Callable& callable) {
  parallel_chunks(
      count, chunk, threads, seconds,
      [](void* context, std::int64_t begin, std::int64_t end, [[maybe_unused]] int worker) {
        auto& body = *static_cast<Callable*>(context);
        if constexpr (std::is_invocable_v<Callable&, std::int64_t, std::int64_t, int>)
          body(begin, end, worker);
        else
          body(begin, end);
      },
      &callable);
}

double parallel_threshold();

// Whether this process was forked, so that the threads of its parent's pool are missing: torch would wait for them.
bool lost_threads();

// Says that this process, though forked, may use threads: its parent had never used OpenMP's.
void trust_fork();

// Elements of a chunk of flat vectors: shorter ones where vectors are short, which otherwise are one thread's last chunk
// while the others wait.
inline std::int64_t vector_chunk(std::int64_t size) { return size < (std::int64_t{1} << 20) ? 8192 : 65536; }

}  // namespace fedkern
