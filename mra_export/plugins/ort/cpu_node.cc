// The CPU's kernel of the operator: workspace from ONNX Runtime's CPU arena, threads from the session's pool.
#include <memory>
#include <thread>

#include "mra_attention.h"
#include "node.h"

namespace mra_ort {
namespace {

constexpr size_t kAlignment = 64;

// The session's pool as MraThreads.
struct SessionPool {
  const OrtApi& api;
  const OrtKernelContext* context;
  OrtStatus* status = nullptr;

  struct Loop {
    void (*task)(void* arg, int64_t index);
    void* arg;
  };

  static void RunTask(void* loop, size_t index) {
    static_cast<const Loop*>(loop)->task(static_cast<const Loop*>(loop)->arg, static_cast<int64_t>(index));
  }

  static void ParallelFor(void* self, int64_t count, void (*task)(void* arg, int64_t index), void* arg) {
    SessionPool& pool = *static_cast<SessionPool*>(self);
    if (pool.status != nullptr) return;  // an earlier loop failed, and Compute is about to say so
    Loop loop = {task, arg};
    pool.status = pool.api.KernelContext_ParallelFor(pool.context, RunTask, static_cast<size_t>(count), 0, &loop);
  }
};

class Workspace {
 public:
  Workspace(const OrtApi& api, const OrtKernelContext* context, const OrtMemoryInfo* memory, size_t bytes) : api_(api) {
    Check(api, api.KernelContext_GetAllocator(context, memory, &allocator_));
    OrtStatus* const status = api.AllocatorAlloc(allocator_, bytes + kAlignment, &start_);
    if (status == nullptr && start_ != nullptr) return;
    api.ReleaseAllocator(allocator_);
    Check(api, status);
    Fail(ORT_FAIL, std::string(kOpName) + ": no memory for a workspace of " + std::to_string(bytes) + " bytes");
  }
  ~Workspace() {
    // Neither call can report to anyone here; both only fail on null pointers.
    Succeeds(api_, api_.AllocatorFree(allocator_, start_));
    api_.ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* aligned() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(start_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_ = nullptr;
  void* start_ = nullptr;
};

class CpuNode final : public Node {
 public:
  CpuNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) : Node(api, info, dtype) {
    // ONNX Runtime does not tell the size of the session's pool. Workers beyond it find no work left and cost nothing. Asked once:
    // the system takes a tenth of a short input's time to answer.
    const unsigned cores = std::thread::hardware_concurrency();
    num_threads_ = cores > 0 ? static_cast<int32_t>(cores) : 1;
    Check(api, api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }
  ~CpuNode() override {
    if (memory_ != nullptr) api().ReleaseMemoryInfo(memory_);
  }

  void Compute(OrtKernelContext* context) const override {
    const Call call = Read(context);
    size_t bytes = 0;
    CheckKernel(mra_attention_cpu_workspace_size(&call.params, num_threads_, &bytes), call);
    const Workspace workspace(api(), context, memory_, bytes);
    SessionPool pool{api(), context};
    const MraThreads threads = {&pool, num_threads_, SessionPool::ParallelFor};
    const MraStatus status = mra_attention_cpu(&call.params, call.query, call.key, call.value, call.mask, call.context,
                                               workspace.aligned(), bytes, &threads);
    Check(api(), pool.status);
    CheckKernel(status, call);
  }

 private:
  int32_t num_threads_ = 1;
  OrtMemoryInfo* memory_ = nullptr;
};

}  // namespace

Node* NewCpuNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) { return new CpuNode(api, info, dtype); }

}  // namespace mra_ort
