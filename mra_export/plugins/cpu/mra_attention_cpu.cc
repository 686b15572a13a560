// C entry points of the CPU kernel: judges parameters, lays out the workspace, picks the instruction set and cuts the work into
// items.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>

#include "mra_attention_params.h"
#include "mra_attention_problem.h"

namespace mra {
namespace {

constexpr int64_t kMaxWorkers = 1024;
constexpr int64_t kPiecesPerWorker = 16;            // so that a slow thread holds the others up for a sixteenth of its share
constexpr double kWorkerProducts = 2e6;             // multiply-adds below which waking another thread does not pay: some 20 us
constexpr int64_t kGroupBytes = int64_t{24} << 20;  // packed heads that are in flight together: a share of the last-level cache
constexpr size_t kAlignment = 64;

struct Target {
  const char* name;
  const Kernels* kernels;  // nullptr: asked for, but not there
};

bool MachineHas(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (std::strcmp(name, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  // f16c has no name in older compilers; every CPU with AVX2 has it.
  if (std::strcmp(name, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  (void)name;
  return true;
}

Target FindTarget() {
  // Best first.
  const Target targets[] = {
#if defined(__x86_64__)
      {"avx512", &avx512::kKernels},
      {"avx2", &avx2::kKernels},
      {"baseline", &baseline::kKernels},
#elif defined(__aarch64__)
      {"neon", &neon::kKernels},
#else
      {"baseline", &baseline::kKernels},
#endif
  };
  const char* wanted = std::getenv("MRA_ATTENTION_CPU_TARGET");
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const Target& target : targets) {
    if ((any || std::strcmp(wanted, target.name) == 0) && MachineHas(target.name)) return target;
  }
  return {nullptr, nullptr};
}

const Target& ThisTarget() {
  static const Target target = FindTarget();
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

// One head's way through the phases.
struct alignas(kAlignment) HeadProgress {
  std::atomic<int64_t> packed{0};  // chunks
  std::atomic<bool> selected{false};
  std::atomic<int64_t> next_piece{0};
};

struct Plan {
  Problem problem;
  int64_t all_heads;    // B * H
  int64_t group_heads;  // in a group; the last group may have fewer
  int64_t num_workers;
  HeadProgress* progress;  // (group_heads)
  size_t bytes;
};

// Sizes everything from shapes and thread count, and places it in `workspace` unless that is NULL.
MraStatus MakePlan(const MraAttentionParams* params, int32_t num_threads, void* workspace, Plan* plan) {
  const MraStatus status = CheckParams(params);
  if (status != MRA_OK) return status;
  if (num_threads < 1) return MRA_ERROR_THREADS;

  *plan = Plan{};
  Problem& problem = plan->problem;
  problem.params = params;
  const int64_t D = params->head_size;
  const int64_t nb = problem.nb = NumBlocks(*params);
  const int64_t nb8 = problem.nb8 = RoundUp(nb, 8);
  const int64_t nb32 = problem.nb32 = RoundUp(nb, 32);
  const int64_t d8 = problem.d8 = RoundUp(D, 8);
  const int64_t d32 = problem.d32 = RoundUp(D, 32);
  problem.chosen = params->num_blocks < nb * nb ? params->num_blocks : nb * nb;
  plan->all_heads = params->batch * params->num_heads;
  plan->num_workers = num_threads < kMaxWorkers ? num_threads : kMaxWorkers;
  const double products = static_cast<double>(plan->all_heads) * static_cast<double>(problem.chosen) * 2.0 * kBlock * kBlock * D;
  if (plan->num_workers > 1 + products / kWorkerProducts) plan->num_workers = 1 + static_cast<int64_t>(products / kWorkerProducts);

  // Groups of equal size, each within kGroupBytes unless that leaves threads idle.
  const int64_t head_bytes = nb * kBlock * d8 * 8;
  int64_t most = kGroupBytes / head_bytes;
  if (most < plan->num_workers) most = plan->num_workers;
  const int64_t groups = (plan->all_heads + most - 1) / most;
  plan->group_heads = (plan->all_heads + groups - 1) / groups;

  Arena arena(workspace);
  const int64_t heads = plan->group_heads;
  GroupBuffers& group = problem.group;
  group.key_panels = arena.Take<float>(heads, nb, kBlock * d8);
  group.value_rows = arena.Take<float>(heads, nb, kBlock * d8);
  group.value_sum = arena.Take<float>(heads, nb, d32);
  group.query_mean = arena.Take<float>(heads, nb8, D);
  group.key_mean = arena.Take<float>(heads, D, nb32);
  group.logits = arena.Take<float>(heads, nb8, nb32);
  group.row_max = arena.Take<float>(heads, nb8);
  group.real = arena.Take<uint32_t>(heads, nb);
  group.real_count = arena.Take<float>(heads, nb32);
  group.columns = arena.Take<int32_t>(heads, problem.chosen);
  group.row_start = arena.Take<int64_t>(heads, nb + 1);
  plan->progress = arena.Take<HeadProgress>(heads);
  problem.workers = arena.Take<WorkerBuffers>(plan->num_workers);
  for (int64_t n = 0; n < plan->num_workers && arena.fits(); ++n) {
    WorkerBuffers worker;
    worker.keys = arena.Take<uint32_t>(nb8, nb32);
    worker.column_class = arena.Take<int32_t>(nb32);
    worker.row_class = arena.Take<int32_t>(nb32);
    worker.queries = arena.Take<float>(d8, kBlock);
    worker.weights = arena.Take<float>(kChunkBlocks * kBlock, kBlock);
    worker.output = arena.Take<float>(d8, kBlock);
    worker.rows = arena.Take<float>(kBlock, d8);
    worker.low_weights = arena.Take<float>(nb32, kPanel);
    worker.low_rows = arena.Take<float>(kPanel, nb32);
    worker.low_output = arena.Take<float>(kPanel, d32);
    if (workspace) problem.workers[n] = worker;
  }
  if (!arena.fits()) return MRA_ERROR_TOO_LARGE;
  plan->bytes = arena.used();
  return MRA_OK;
}

// The work of one group of heads. There is a single parallel loop and no barrier in it: whoever packs the last chunk of a head
// selects its blocks and starts on its pieces, whose keys and values are still in that core's cache; the others join when they have
// nothing to pack.
struct Group {
  const Problem* problem;
  const Kernels* kernels;
  HeadProgress* progress;  // (heads)
  int64_t chunks;          // of each head
  std::atomic<int64_t> next_chunk{0};

  void TakePieces(int64_t head, int64_t worker) {
    std::atomic<int64_t>& next = progress[head].next_piece;
    while (next.load(std::memory_order_relaxed) < problem->pieces) {
      const int64_t piece = next.fetch_add(1, std::memory_order_relaxed);
      if (piece < problem->pieces) kernels->attend(*problem, head, piece, worker);
    }
  }

  void Work(int64_t worker) {
    for (;;) {
      const int64_t item = next_chunk.fetch_add(1, std::memory_order_relaxed);
      if (item >= problem->heads * chunks) break;
      const int64_t head = item / chunks;
      kernels->pack(*problem, head, item % chunks);
      if (progress[head].packed.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) continue;
      kernels->select(*problem, head, worker);
      progress[head].selected.store(true, std::memory_order_release);
      TakePieces(head, worker);
    }
    // A head that is not selected yet is in the hands of a worker that runs, so this wait ends whatever the number of threads.
    for (int64_t head = 0; head < problem->heads; ++head) {
      while (!progress[head].selected.load(std::memory_order_acquire)) std::this_thread::yield();
      TakePieces(head, worker);
    }
  }
};

void WorkOnGroup(void* group, int64_t worker) { static_cast<Group*>(group)->Work(worker); }

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
  Group group{&problem, kernels, plan.progress, (problem.nb + kPackBlocks - 1) / kPackBlocks};
  for (int64_t first = 0; first < plan.all_heads; first += plan.group_heads) {
    problem.first_head = first;
    problem.heads = plan.all_heads - first < plan.group_heads ? plan.all_heads - first : plan.group_heads;
    const int64_t wanted = (plan.num_workers * kPiecesPerWorker + problem.heads - 1) / problem.heads;
    problem.pieces = context == nullptr ? 0 : plan.num_workers == 1 ? 1 : (wanted < problem.nb ? wanted : problem.nb);
    for (int64_t head = 0; head < problem.heads; ++head) new (&plan.progress[head]) HeadProgress();
    group.next_chunk.store(0, std::memory_order_relaxed);
    if (threads == nullptr || plan.num_workers == 1) {
      WorkOnGroup(&group, 0);
    } else {
      threads->parallel_for(threads->pool, plan.num_workers, WorkOnGroup, &group);
    }
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
