// ONNX Runtime adapter: op MraAttention, domain "mra", version 1, for float32, float16 and bfloat16, on the CPU and, where the
// library has CUDA kernels, on CUDAExecutionProvider. Meaning: docs/operator.md. Built against version 17 of ONNX Runtime's C API,
// so that 1.17 and everything newer loads it; on CUDA it needs 1.18.
#include <cstdint>
#include <mutex>
#include <string>

#include "mra_attention.h"
#include "onnxruntime_c_api.h"
#include "ort/border.h"
#include "ort/node.h"

namespace {

using mra_ort::AtBorder;
using mra_ort::Check;
using mra_ort::Fail;
using mra_ort::Node;

constexpr uint32_t kApiVersion = 17;
constexpr const char* kDomain = "mra";

using NewNode = Node* (*)(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype);

struct Device {
  const char* provider;  // NULL: the CPU
  NewNode new_node;
};

#if defined(MRA_CUDA_EMULATION)  // the tests' build: its device memory is the host's, so the CPU's provider runs the GPU's op
constexpr Device kDevices[] = {{nullptr, mra_ort::NewCudaNode}};
#elif defined(MRA_BUILD_CUDA)
constexpr Device kDevices[] = {{nullptr, mra_ort::NewCpuNode}, {"CUDAExecutionProvider", mra_ort::NewCudaNode}};
#else
constexpr Device kDevices[] = {{nullptr, mra_ort::NewCpuNode}};
#endif

constexpr struct {
  MraDtype dtype;
  ONNXTensorElementDataType element;
} kTypes[] = {{MRA_FLOAT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT},
              {MRA_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16},
              {MRA_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}};

// The operator for one device and type. ONNX Runtime's callbacks get it back as a pointer to its base.
struct Op : OrtCustomOp {
  const OrtApi* api;
  Device device;
  MraDtype dtype;
  ONNXTensorElementDataType element;
};

const Op& Self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

Op MakeOp(const OrtApi* api, const Device& device, MraDtype dtype, ONNXTensorElementDataType element) {
  Op op = {};
  op.api = api;
  op.device = device;
  op.dtype = dtype;
  op.element = element;
  op.version = kApiVersion;
  op.GetName = [](const OrtCustomOp*) { return mra_ort::kOpName; };
  op.GetExecutionProviderType = [](const OrtCustomOp* self) { return Self(self).device.provider; };
  op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 4; };
  op.GetInputType = [](const OrtCustomOp* self, size_t index) {
    return index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : Self(self).element;
  };
  op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const OrtCustomOp* self, size_t) { return Self(self).element; };
  op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
  op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };  // the device's, the mask's too
  op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
  op.GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op.GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op.CreateKernelV2 = [](const OrtCustomOp* self, const OrtApi* ort, const OrtKernelInfo* info, void** node) -> OrtStatus* {
    return AtBorder(*ort, [=] { *node = Self(self).device.new_node(*ort, info, Self(self).dtype); });
  };
  op.KernelComputeV2 = [](void* node, OrtKernelContext* context) -> OrtStatus* {
    const Node& self = *static_cast<const Node*>(node);
    return AtBorder(self.api(), [&] { self.Compute(context); });
  };
  op.KernelDestroy = [](void* node) { delete static_cast<Node*>(node); };
  // context has query's shape, symbolic axes included.
  op.InferOutputShapeFn = [](const OrtCustomOp* self, OrtShapeInferContext* context) -> OrtStatus* {
    const OrtApi& ort = *Self(self).api;
    return AtBorder(ort, [&] {
      OrtTensorTypeAndShapeInfo* query = nullptr;
      Check(ort, ort.ShapeInferContext_GetInputTypeShape(context, 0, &query));
      if (query != nullptr) Check(ort, ort.ShapeInferContext_SetOutputTypeShape(context, 0, query));
    });
  };
  return op;
}

Node* RefuseOld(const OrtApi&, const OrtKernelInfo*, MraDtype) {
  Fail(ORT_NOT_IMPLEMENTED, "MraAttention on a GPU needs ONNX Runtime 1.18 or newer, this is 1.17: upgrade onnxruntime-gpu");
}

// What sessions point to for as long as they live: the domain and its ops, one set for each ONNX Runtime in the process. A session
// may be released after the destructors of static objects have run, so this memory has none; the domain, which only the making of a
// session reads, goes when the library is unloaded.
struct Registration {
  const OrtApi* api;
  OrtCustomOpDomain* domain;
  Op ops[sizeof kDevices / sizeof *kDevices][sizeof kTypes / sizeof *kTypes];
};

constexpr int kMostRuntimes = 8;
Registration registrations[kMostRuntimes];

struct Unloading {
  ~Unloading() {
    for (const Registration& registration : registrations) {
      if (registration.domain != nullptr) registration.api->ReleaseCustomOpDomain(registration.domain);
    }
  }
} unloading;

// on_gpu: whether this ONNX Runtime has what the GPU's kernel needs of it.
OrtCustomOpDomain* DomainFor(const OrtApi* api, bool on_gpu) {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  for (Registration& registration : registrations) {
    if (registration.api == api) return registration.domain;
    if (registration.api != nullptr) continue;
    OrtCustomOpDomain* domain = nullptr;
    Check(*api, api->CreateCustomOpDomain(kDomain, &domain));
    registration.domain = domain;
    for (size_t device = 0; device < sizeof kDevices / sizeof *kDevices; ++device) {
      for (size_t type = 0; type < sizeof kTypes / sizeof *kTypes; ++type) {
        Op& op = registration.ops[device][type];
        op = MakeOp(api, kDevices[device], kTypes[type].dtype, kTypes[type].element);
        if (op.device.provider != nullptr && !on_gpu) op.device.new_node = RefuseOld;
        Check(*api, api->CustomOpDomain_Add(domain, &op));
      }
    }
    registration.api = api;
    return domain;
  }
  Fail(ORT_FAIL, "more than " + std::to_string(kMostRuntimes) + " ONNX Runtimes in one process use this library of MraAttention");
}

}  // namespace

// The entry point that SessionOptions.register_custom_ops_library looks up.
extern "C" MRA_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const std::string version = base->GetVersionString();
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    // Older than 1.17. Every version has API 1, whose error functions are all that is needed to say so.
    const std::string message =
        "this library of MraAttention needs ONNX Runtime 1.17 or newer, this is " + version + ": upgrade onnxruntime";
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  // Not GetApi(18), which writes to stderr where it is not there.
  return AtBorder(*api, [&] { Check(*api, api->AddCustomOpDomain(options, DomainFor(api, version.rfind("1.17.", 0) != 0))); });
}
