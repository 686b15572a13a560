// The GPU's kernel of the operator. Everything is queued on the stream that ONNX Runtime hands over: nothing waits, nothing is
// copied, and no memory but ONNX Runtime's own is used, so a call may be part of a CUDA graph that the session captures.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <string>

#include "mra_attention.h"
#include "mra_attention_params.h"
#include "node.h"

namespace mra_ort {
namespace {

constexpr size_t kAlignment = 64;

// Device memory of the session's arena, for work on `stream`. Given back as soon as the work is queued: the arena knows by the
// stream who may have it next, as for the scratch memory of ONNX Runtime's own kernels. That is what KernelContext_GetScratchBuffer
// is for; an allocation without its stream could go to another stream while it is still in use.
class Workspace {
 public:
  Workspace(const OrtApi& api, const OrtKernelContext* context, OrtAllocator* allocator, void* stream, size_t bytes)
      : api_(api), allocator_(allocator) {
    const OrtMemoryInfo* memory = nullptr;
    Check(api, api.AllocatorGetInfo(allocator, &memory));
    if (stream != nullptr) {
      Check(api, api.KernelContext_GetScratchBuffer(context, memory, bytes + kAlignment, &start_));
    } else {  // the default stream, the only one of its session
      Check(api, api.AllocatorAlloc(allocator, bytes + kAlignment, &start_));
    }
    if (start_ == nullptr) {
      Fail(ORT_FAIL, std::string(kOpName) + ": no device memory for a workspace of " + std::to_string(bytes) + " bytes");
    }
  }
  ~Workspace() { Succeeds(api_, api_.AllocatorFree(allocator_, start_)); }  // fails on null pointers only
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  void* aligned() const {
    const uintptr_t address = reinterpret_cast<uintptr_t>(start_);
    return reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment);
  }

 private:
  const OrtApi& api_;
  OrtAllocator* allocator_;
  void* start_ = nullptr;
};

class CudaNode final : public Node {
 public:
  CudaNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) : Node(api, info, dtype) {
    const int32_t mode = mra::Float32ModeFromEnvironment();
    if (mode < 0) {
      Fail(ORT_INVALID_ARGUMENT, name() + ": the environment variable MRA_ATTENTION_FLOAT32 is '" +
                                     std::getenv("MRA_ATTENTION_FLOAT32") + "': set it to fma or tf32x3, or unset it");
    }
    set_float32_mode(mode);
    // Of the provider that runs the node, and so with its device, whatever ONNX Runtime calls it.
    Check(api, api.KernelInfoGetAllocator(info, OrtMemTypeDefault, &allocator_));
  }
  ~CudaNode() override {
    if (allocator_ != nullptr) api().ReleaseAllocator(allocator_);
  }

  void Compute(OrtKernelContext* context) const override {
    const Call call = Read(context);
    void* stream = nullptr;
    Check(api(), api().KernelContext_GetGPUComputeStream(context, &stream));
    size_t bytes = 0;
    CheckKernel(mra_attention_cuda_workspace_size(&call.params, &bytes), call);
    const Workspace workspace(api(), context, allocator_, stream, bytes);
    const MraStatus status = mra_attention_cuda(&call.params, call.query, call.key, call.value, call.mask, call.context,
                                                workspace.aligned(), bytes, stream);
    CheckKernel(status, call, status == MRA_ERROR_CUDA ? cudaGetErrorString(cudaGetLastError()) : "");
  }

 private:
  OrtAllocator* allocator_ = nullptr;
};

}  // namespace

Node* NewCudaNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) { return new CudaNode(api, info, dtype); }

}  // namespace mra_ort
