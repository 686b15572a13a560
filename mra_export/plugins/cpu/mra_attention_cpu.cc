// C entry points of the CPU kernel: judges parameters, lays out the workspace, picks the instruction set and cuts the work into
// items.
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>

#include "hwy/cache_control.h"
#include "mra_attention_params.h"
#include "mra_attention_problem.h"

namespace mra {
namespace {

constexpr int64_t kMaxWorkers = 1024;
constexpr int64_t kPiecesPerWorker = 16;  // so that a slow thread holds the others up for a sixteenth of its share
constexpr double kWorkerProducts = 2e6;   // multiply-adds below which waking another thread does not pay: some 20 us
constexpr int64_t kSpins = 4096;          // some 50 us, longer than any wait between threads that all run
constexpr size_t kAlignment = 64;

const CpuTarget& ThisTarget() {
  static const CpuTarget target = FindCpuTarget(std::getenv("MRA_ATTENTION_CPU_TARGET"));
  return target;
}

int64_t RoundUp(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Hands out 64-byte aligned arrays from one piece of memory, or only counts them when there is none.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class T>
  T* Take(int64_t count, int64_t size = 1, int64_t more = 1) {
    size_t bytes = 0;
    fits_ &= !__builtin_mul_overflow(static_cast<size_t>(count), static_cast<size_t>(size), &bytes) &&
             !__builtin_mul_overflow(bytes, static_cast<size_t>(more), &bytes) &&
             !__builtin_mul_overflow(bytes, sizeof(T), &bytes) && bytes < SIZE_MAX / 4 &&
             !__builtin_add_overflow(used_, bytes + kAlignment - 1, &bytes) && bytes < SIZE_MAX / 2;
    if (!fits_) return nullptr;
    T* array = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ = bytes / kAlignment * kAlignment;
    return array;
  }

  bool fits() const { return fits_; }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
  bool fits_ = true;
};

struct Plan {
  Problem problem;
  int64_t own_heads;  // heads that one worker does alone, of all B * H; the rest are shared
  int64_t num_workers;
  Bundle* own;                     // (num_workers): one head each
  Bundle shared;                   // the last heads
  std::atomic<int64_t>* selected;  // (shared.heads): 1 where selected
  size_t bytes;
};

BundleBuffers TakeBuffers(Arena* arena, const Problem& problem, int64_t heads) {
  BundleBuffers buffers;
  const int64_t nb = problem.nb;
  buffers.queries = arena->Take<float>(heads, nb, kBlock * problem.d16);
  buffers.keys = arena->Take<float>(heads, nb, kBlock * problem.d16);
  buffers.values = arena->Take<float>(heads, nb, kBlock * problem.d16);
  buffers.value_sum = arena->Take<float>(heads, nb, problem.d32);
  buffers.query_mean = arena->Take<float>(heads, problem.nb8, problem.d16);
  buffers.key_mean = arena->Take<float>(heads, problem.nb8, problem.d16);
  buffers.logits = arena->Take<float>(heads, problem.nb8, problem.nb32);
  buffers.row_max = arena->Take<float>(heads, problem.nb8);
  buffers.real = arena->Take<uint32_t>(heads, nb);
  buffers.real_count = arena->Take<float>(heads, problem.nb32);
  buffers.columns = arena->Take<int32_t>(heads, problem.chosen);
  buffers.row_start = arena->Take<int64_t>(heads, nb + 1);
  return buffers;
}

// Sizes everything from shapes and thread count, and places it in `workspace` unless that is NULL.
MraStatus MakePlan(const MraAttentionParams* params, int32_t num_threads, void* workspace, Plan* plan) {
  const MraStatus status = CheckParams(params);
  if (status != MRA_OK) return status;
  if (num_threads < 1) return MRA_ERROR_THREADS;

  *plan = Plan{};
  Problem& problem = plan->problem;
  problem.params = params;
  const int64_t nb = problem.nb = NumBlocks(*params);
  const int64_t nb8 = problem.nb8 = RoundUp(nb, 8);
  const int64_t nb32 = problem.nb32 = RoundUp(nb, 32);
  const int64_t d16 = problem.d16 = RoundUp(params->head_size, 16);
  const int64_t d32 = problem.d32 = RoundUp(params->head_size, 32);
  problem.chosen = params->num_blocks < nb * nb ? params->num_blocks : nb * nb;
  const int64_t all_heads = params->batch * params->num_heads;
  plan->num_workers = num_threads < kMaxWorkers ? num_threads : kMaxWorkers;
  const double products = static_cast<double>(all_heads) * static_cast<double>(problem.chosen) * 2.0 * kBlock * kBlock *
                          static_cast<double>(params->head_size);
  if (plan->num_workers > 1 + products / kWorkerProducts) plan->num_workers = 1 + static_cast<int64_t>(products / kWorkerProducts);

  // The last heads are shared, as many as there are workers, so that all end together.
  const int64_t workers = plan->num_workers;
  plan->own_heads = workers == 1 ? all_heads : all_heads > workers ? all_heads - workers : 0;
  Bundle& shared = plan->shared;
  shared.first_head = plan->own_heads;
  shared.heads = all_heads - plan->own_heads;
  const int64_t wanted = shared.heads > 0 ? (workers * kPiecesPerWorker + shared.heads - 1) / shared.heads : 1;
  shared.pieces = wanted < nb ? wanted : nb;

  Arena arena(workspace);
  plan->own = arena.Take<Bundle>(plan->num_workers);
  plan->selected = arena.Take<std::atomic<int64_t>>(shared.heads);
  if (shared.heads > 0) shared.buffers = TakeBuffers(&arena, problem, shared.heads);
  for (int64_t n = 0; n < plan->num_workers && plan->own_heads > 0 && arena.fits(); ++n) {
    const BundleBuffers buffers = TakeBuffers(&arena, problem, 1);
    if (workspace) plan->own[n] = {buffers, 0, 1, 1};
  }
  problem.workers = arena.Take<WorkerBuffers>(plan->num_workers);
  for (int64_t n = 0; n < plan->num_workers && arena.fits(); ++n) {
    WorkerBuffers worker;
    worker.key_mean = arena.Take<float>(d16, nb32);
    worker.keys = arena.Take<uint32_t>(nb8 + 1, nb32);  // and a row more: whole vectors are stored
    worker.column_class = arena.Take<int32_t>(nb32);
    worker.row_class = arena.Take<int32_t>(nb32);
    worker.weights = arena.Take<float>(kChunkBlocks * kBlock, kBlock);
    worker.output = arena.Take<float>(d16, kBlock);
    worker.rows = arena.Take<float>(kBlock, d16);
    worker.low_weights = arena.Take<float>(8, nb32);
    worker.low_output = arena.Take<float>(8, d32);
    worker.planes = arena.Take<uint16_t>(3, kChunkBlocks * kBlock, kBlock);
    if (workspace) problem.workers[n] = worker;
  }
  if (!arena.fits()) return MRA_ERROR_TOO_LARGE;
  plan->bytes = arena.used();
  return MRA_OK;
}

// Until `counter` has reached `value`. What is waited for is always in the hands of a worker that runs, see below.
void WaitFor(const std::atomic<int64_t>& counter, int64_t value) {
  for (int64_t tries = 0; counter.load(std::memory_order_acquire) < value; ++tries) {
    if (tries < kSpins) {
      hwy::Pause();
    } else {
      std::this_thread::yield();  // more threads than cores
    }
  }
}

// All the work of a call, in one parallel loop without barriers. First each worker takes whole heads, whose packed inputs so stay
// in its core's own cache: cores may be far apart. Then all share the last heads, whose items stand in one order: the chunks to be
// packed, the heads to be selected, the pieces to be attended. Workers take the next item each, and wait, rarely, until what it
// needs is there. An item needs earlier ones only, which other workers have taken already, so the wait ends whatever the number of
// threads.
struct Work {
  const Plan* plan;
  const Kernels* kernels;
  int64_t chunks;  // of each bundle
  std::atomic<int64_t> next_head{0};
  std::atomic<int64_t> next_item{0};
  std::atomic<int64_t> packed{0};  // chunks of the shared heads

  void Run(int64_t worker) {
    RunOwn(worker);
    RunShared(worker);
  }

  void RunOwn(int64_t worker) {
    const Problem& problem = plan->problem;
    for (;;) {
      const int64_t head = next_head.fetch_add(1, std::memory_order_relaxed);
      if (head >= plan->own_heads) return;
      Bundle own = plan->own[worker];
      own.first_head = head;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) kernels->pack(problem, own, chunk, worker);
      kernels->select(problem, own, 0, worker);
      if (problem.context != nullptr) kernels->attend(problem, own, 0, 0, worker);
    }
  }

  void RunShared(int64_t worker) {
    const Problem& problem = plan->problem;
    const Bundle& shared = plan->shared;
    if (shared.heads == 0) return;
    const int64_t pieces = problem.context != nullptr ? shared.pieces : 0;
    for (;;) {
      int64_t item = next_item.fetch_add(1, std::memory_order_relaxed);
      if (item >= chunks + shared.heads * (1 + pieces)) return;
      if (item < chunks) {
        kernels->pack(problem, shared, item, worker);
        packed.fetch_add(1, std::memory_order_release);
        continue;
      }
      item -= chunks;
      if (item < shared.heads) {
        WaitFor(packed, chunks);
        kernels->select(problem, shared, item, worker);
        plan->selected[item].store(1, std::memory_order_release);
        continue;
      }
      item -= shared.heads;
      WaitFor(plan->selected[item / pieces], 1);
      kernels->attend(problem, shared, item / pieces, item % pieces, worker);
    }
  }
};

void RunWorker(void* work, int64_t worker) { static_cast<Work*>(work)->Run(worker); }

// Everything after the pointers were checked. context NULL: selection only.
MraStatus Run(const MraAttentionParams* params, const void* query, const void* key, const void* value, const int32_t* mask,
              void* context, uint8_t* blocks, float* score, void* workspace, size_t workspace_bytes, const MraThreads* threads) {
  if (threads != nullptr && threads->parallel_for == nullptr) return MRA_ERROR_THREADS;
  if (reinterpret_cast<uintptr_t>(workspace) % kAlignment != 0) return MRA_ERROR_WORKSPACE;
  const int32_t num_threads = threads ? threads->num_threads : 1;
  Plan plan;
  MraStatus status = MakePlan(params, num_threads, nullptr, &plan);
  if (status != MRA_OK) return status;
  if (workspace_bytes < plan.bytes) return MRA_ERROR_WORKSPACE;
  const Kernels* kernels = ThisTarget().kernels;
  if (kernels == nullptr) return MRA_ERROR_CPU_TARGET;
  status = MakePlan(params, num_threads, workspace, &plan);
  if (status != MRA_OK) return status;

  Problem& problem = plan.problem;
  problem.query = query;
  problem.key = key;
  problem.value = value;
  problem.mask = mask;
  problem.context = context;
  problem.blocks = blocks;
  problem.score = score;
  for (int64_t head = 0; head < plan.shared.heads; ++head) new (&plan.selected[head]) std::atomic<int64_t>(0);
  Work work{&plan, kernels, (problem.nb + kPackBlocks - 1) / kPackBlocks};
  if (threads == nullptr || plan.num_workers == 1) {
    RunWorker(&work, 0);
  } else {
    threads->parallel_for(threads->pool, plan.num_workers, RunWorker, &work);
  }
  return MRA_OK;
}

}  // namespace
}  // namespace mra

extern "C" {

const char* mra_attention_cpu_target(void) { return mra::ThisTarget().name; }

MraStatus mra_attention_cpu_workspace_size(const MraAttentionParams* params, int32_t num_threads, size_t* bytes) {
  if (bytes == nullptr) return MRA_ERROR_NULL_POINTER;
  mra::Plan plan;
  const MraStatus status = mra::MakePlan(params, num_threads, nullptr, &plan);
  *bytes = status == MRA_OK ? plan.bytes : 0;
  return status;
}

MraStatus mra_attention_cpu(const MraAttentionParams* params, const void* query, const void* key, const void* value,
                            const int32_t* mask, void* context, void* workspace, size_t workspace_bytes,
                            const MraThreads* threads) {
  if (!params || !query || !key || !value || !mask || !context || !workspace) return MRA_ERROR_NULL_POINTER;
  return mra::Run(params, query, key, value, mask, context, nullptr, nullptr, workspace, workspace_bytes, threads);
}

MraStatus mra_attention_cpu_selection(const MraAttentionParams* params, const void* query, const void* key, const int32_t* mask,
                                      uint8_t* blocks, float* score, void* workspace, size_t workspace_bytes,
                                      const MraThreads* threads) {
  if (!params || !query || !key || !mask || !blocks || !workspace) return MRA_ERROR_NULL_POINTER;
  return mra::Run(params, query, key, nullptr, mask, nullptr, blocks, score, workspace, workspace_bytes, threads);
}

}  // extern "C"
