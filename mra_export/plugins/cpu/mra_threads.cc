#include "mra_threads.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

namespace {

struct Loop {
  std::atomic<int64_t> next;
  int64_t count;
  void (*task)(void* arg, int64_t index);
  void* arg;
};

void Drain(void* data) {
  Loop& loop = *static_cast<Loop*>(data);
  for (;;) {
    const int64_t index = loop.next.fetch_add(1, std::memory_order_relaxed);
    if (index >= loop.count) return;
    loop.task(loop.arg, index);
  }
}

}  // namespace

extern "C" {

void mra_parallel_for_openmp(void* pool, int64_t count, void (*task)(void* arg, int64_t index), void* arg) {
  const MraOpenMPPool* openmp = static_cast<const MraOpenMPPool*>(pool);
  Loop loop = {{0}, count, task, arg};
  // Always the pool's own size: an OpenMP runtime ends and restarts threads when the size changes from call to call.
  openmp->gomp_parallel(Drain, &loop, openmp->num_threads, 0);
}

void mra_parallel_for_std(void* pool, int64_t count, void (*task)(void* arg, int64_t index), void* arg) {
  const int64_t most = *static_cast<const int32_t*>(pool);
  Loop loop = {{0}, count, task, arg};
  std::vector<std::thread> threads;
  try {
    for (int64_t n = 1; n < (count < most ? count : most); ++n) threads.emplace_back(Drain, &loop);
  } catch (const std::exception&) {
    // No more threads to be had: those that started, and this one, do all the work.
  }
  Drain(&loop);
  for (std::thread& thread : threads) thread.join();
}

}  // extern "C"
