// Plays ONNX Runtime for the tests: an OrtApi with the functions that the adapter calls, whose device memory is the host's and
// whose stream is a number. Linked with the adapter and the emulated kernels, and called through ctypes by test_ort_cuda.py. With
// the adapter as a library of its own (host_reload), it loads and unloads that.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <map>
#include <string>
#include <vector>

#include "mra_attention.h"
#include "onnxruntime_c_api.h"

extern "C" cudaError_t cudaGetLastError() { return cudaErrorLaunchFailure; }
extern "C" const char* cudaGetErrorString(cudaError_t) { return "the text of the CUDA error"; }

struct OrtStatus {
  OrtErrorCode code;
  std::string text;
};
struct OrtMemoryInfo {};
struct OrtCustomOpDomain {
  std::vector<const OrtCustomOp*> ops;
};
struct OrtSessionOptions {
  std::vector<OrtCustomOpDomain*> domains;
};
struct OrtTensorTypeAndShapeInfo {
  std::vector<int64_t> shape;
};
struct OrtValue {
  void* data;
  std::vector<int64_t> shape;
};
struct OrtKernelInfo {};
struct OrtKernelContext {
  OrtValue inputs[4];
  OrtValue output;
  void* stream;
};

namespace {

OrtMemoryInfo device_memory;
std::string events;  // what the adapter asked of ONNX Runtime, in order
int domains_alive = 0;
const char* version = "1.31.0";
std::map<std::string, int64_t> ints;
bool out_of_memory = false;

OrtStatus* Error(const char* text) { return new OrtStatus{ORT_FAIL, text}; }

struct Allocator : OrtAllocator {
  std::map<void*, size_t> blocks;
} allocator;

void* Allocate(size_t bytes, const char* how) {
  events += std::string(how) + " ";
  if (out_of_memory) return nullptr;
  // Off by 16, so that the adapter has to align it, and with sentinels on both sides.
  char* start = static_cast<char*>(aligned_alloc(64, (bytes + 64 + 64 + 63) / 64 * 64));
  memset(start, 0xA5, bytes + 128);
  memset(start + 16, 0xFF, bytes);
  allocator.blocks[start + 16] = bytes;
  return start + 16;
}

void Free(void* block) {
  const size_t bytes = allocator.blocks.at(block);
  const unsigned char* inside = static_cast<unsigned char*>(block);
  for (int n = 1; n <= 16; ++n) {
    if (inside[-n] != 0xA5 || inside[bytes + static_cast<size_t>(n) - 1] != 0xA5) events += "OVERRUN ";
  }
  allocator.blocks.erase(block);
  free(static_cast<char*>(block) - 16);
  events += "free ";
}

OrtApi MakeApi() {
  OrtApi api;
  memset(static_cast<void*>(&api), 0, sizeof api);  // whatever else the adapter calls crashes
  api.CreateStatus = [](OrtErrorCode code, const char* text) NO_EXCEPTION { return new OrtStatus{code, text}; };
  api.GetErrorCode = [](const OrtStatus* status) NO_EXCEPTION { return status->code; };
  api.GetErrorMessage = [](const OrtStatus* status) NO_EXCEPTION { return status->text.c_str(); };
  api.ReleaseStatus = [](OrtStatus* status) NO_EXCEPTION { delete status; };
  api.CreateCustomOpDomain = [](const char*, OrtCustomOpDomain** out) NO_EXCEPTION -> OrtStatus* {
    *out = new OrtCustomOpDomain;
    ++domains_alive;
    return nullptr;
  };
  api.ReleaseCustomOpDomain = [](OrtCustomOpDomain* domain) NO_EXCEPTION {
    delete domain;
    --domains_alive;
  };
  api.CustomOpDomain_Add = [](OrtCustomOpDomain* domain, const OrtCustomOp* op) NO_EXCEPTION -> OrtStatus* {
    domain->ops.push_back(op);
    return nullptr;
  };
  api.AddCustomOpDomain = [](OrtSessionOptions* options, OrtCustomOpDomain* domain) NO_EXCEPTION -> OrtStatus* {
    options->domains.push_back(domain);
    return nullptr;
  };
  api.KernelInfo_GetNodeName = [](const OrtKernelInfo*, char* out, size_t* size) NO_EXCEPTION -> OrtStatus* {
    *size = 5;
    if (out != nullptr) memcpy(out, "fake", 5);
    return nullptr;
  };
  api.KernelInfoGetAttribute_int64 = [](const OrtKernelInfo*, const char* name, int64_t* out) NO_EXCEPTION -> OrtStatus* {
    if (ints.count(name) == 0) return Error("no such attribute");
    *out = ints[name];
    return nullptr;
  };
  api.KernelInfoGetAttribute_float = [](const OrtKernelInfo*, const char* name, float* out) NO_EXCEPTION -> OrtStatus* {
    if (strcmp(name, "scale") != 0) return Error("no such attribute");
    *out = 0.25f;
    return nullptr;
  };
  api.KernelInfoGetAttribute_string = [](const OrtKernelInfo*, const char*, char*, size_t*)
                                          NO_EXCEPTION { return Error("no such attribute"); };
  api.KernelInfoGetAttributeArray_int64 = [](const OrtKernelInfo*, const char*, int64_t*, size_t*)
                                              NO_EXCEPTION { return Error("no such attribute"); };
  api.KernelInfoGetAllocator = [](const OrtKernelInfo*, OrtMemType type, OrtAllocator** out) NO_EXCEPTION -> OrtStatus* {
    if (type != OrtMemTypeDefault) return Error("not the device's memory");
    events += "allocator ";
    *out = &allocator;
    return nullptr;
  };
  api.ReleaseAllocator = [](OrtAllocator*) NO_EXCEPTION { events += "released "; };
  api.AllocatorGetInfo = [](const OrtAllocator*, const OrtMemoryInfo** out) NO_EXCEPTION -> OrtStatus* {
    *out = &device_memory;
    return nullptr;
  };
  api.AllocatorAlloc = [](OrtAllocator*, size_t bytes, void** out) NO_EXCEPTION -> OrtStatus* {
    *out = Allocate(bytes, "alloc");
    return nullptr;
  };
  api.AllocatorFree = [](OrtAllocator*, void* block) NO_EXCEPTION -> OrtStatus* {
    Free(block);
    return nullptr;
  };
  api.KernelContext_GetScratchBuffer = [](const OrtKernelContext*, const OrtMemoryInfo* memory, size_t bytes, void** out)
                                           NO_EXCEPTION -> OrtStatus* {
    if (memory != &device_memory) return Error("not the device's memory");
    *out = Allocate(bytes, "scratch");
    return nullptr;
  };
  api.KernelContext_GetGPUComputeStream = [](const OrtKernelContext* context, void** out) NO_EXCEPTION -> OrtStatus* {
    events += "stream ";
    *out = context->stream;
    return nullptr;
  };
  api.KernelContext_GetInput = [](const OrtKernelContext* context, size_t index, const OrtValue** out) NO_EXCEPTION -> OrtStatus* {
    *out = &context->inputs[index];
    return nullptr;
  };
  api.KernelContext_GetOutput = [](OrtKernelContext* context, size_t, const int64_t* shape, size_t rank, OrtValue** out)
                                    NO_EXCEPTION -> OrtStatus* {
    context->output.shape.assign(shape, shape + rank);
    *out = &context->output;
    return nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** out) NO_EXCEPTION -> OrtStatus* {
    *out = value->data;
    return nullptr;
  };
  api.GetTensorTypeAndShape = [](const OrtValue* value, OrtTensorTypeAndShapeInfo** out) NO_EXCEPTION -> OrtStatus* {
    *out = new OrtTensorTypeAndShapeInfo{value->shape};
    return nullptr;
  };
  api.ReleaseTensorTypeAndShapeInfo = [](OrtTensorTypeAndShapeInfo* info) NO_EXCEPTION { delete info; };
  api.GetDimensionsCount = [](const OrtTensorTypeAndShapeInfo* info, size_t* out) NO_EXCEPTION -> OrtStatus* {
    *out = info->shape.size();
    return nullptr;
  };
  api.GetDimensions = [](const OrtTensorTypeAndShapeInfo* info, int64_t* out, size_t rank) NO_EXCEPTION -> OrtStatus* {
    memcpy(out, info->shape.data(), rank * sizeof *out);
    return nullptr;
  };
  return api;
}

const OrtApi api = MakeApi();
const OrtApiBase base = {[](uint32_t) NO_EXCEPTION { return &api; }, []() NO_EXCEPTION { return version; }};

std::string message;

// "" for a status that is none.
const char* Text(OrtStatus* status) {
  message = status == nullptr ? "" : status->text;
  delete status;
  return message.c_str();
}

}  // namespace

extern "C" {

OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base);

void host_out_of_memory(int yes) { out_of_memory = yes != 0; }

const char* host_take_events() {
  message = events;
  events.clear();
  return message.c_str();
}

// Runs the op on contiguous float32 tensors: query, key, value and context (batch, length, hidden), mask (batch, length) int32.
const char* host_run(void** tensors, int64_t batch, int64_t length, int64_t hidden, int64_t heads, int64_t blocks, void* stream) {
  OrtSessionOptions options;
  OrtStatus* status = RegisterCustomOps(&options, &base);
  if (status != nullptr) return Text(status);
  const OrtCustomOp* op = options.domains[0]->ops[0];
  ints = {{"num_heads", heads}, {"num_blocks", blocks}};
  void* node = nullptr;
  status = op->CreateKernelV2(op, &api, nullptr, &node);
  if (status != nullptr) return Text(status);
  const std::vector<int64_t> shape = {batch, length, hidden};
  OrtKernelContext context = {
      {{tensors[0], shape}, {tensors[1], shape}, {tensors[2], shape}, {tensors[3], {batch, length}}}, {tensors[4], {}}, stream};
  status = op->KernelComputeV2(node, &context);
  op->KernelDestroy(node);
  return Text(status);
}

// Loads the adapter's library, registers its ops in two sessions and unloads it, `times` times. Returns what went wrong; counts[0]:
// the domains that are left, counts[1]: the ops of a domain.
const char* host_reload(const char* library, int times, int* counts) {
  const int before = domains_alive;
  for (int n = 0; n < times; ++n) {
    void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) return dlerror();
    auto* const entry = reinterpret_cast<decltype(&RegisterCustomOps)>(dlsym(handle, "RegisterCustomOps"));
    OrtSessionOptions one, two;
    for (OrtSessionOptions* options : {&one, &two}) {
      OrtStatus* const status = entry(options, &base);
      if (status != nullptr) return Text(status);
    }
    if (one.domains != two.domains) return "two sessions got domains of their own";
    counts[1] = static_cast<int>(one.domains[0]->ops.size());
    dlclose(handle);
    if (dlopen(library, RTLD_NOW | RTLD_NOLOAD) != nullptr) return "the library stays loaded";
  }
  counts[0] = domains_alive - before;
  return "";
}

// What creating the GPU's op of the adapter's library says under an ONNX Runtime of this version.
const char* host_create_on_gpu(const char* library, const char* its_version) {
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) return dlerror();
  auto* const entry = reinterpret_cast<decltype(&RegisterCustomOps)>(dlsym(handle, "RegisterCustomOps"));
  version = its_version;
  OrtSessionOptions options;
  OrtStatus* status = entry(&options, &base);
  version = "1.31.0";
  if (status != nullptr) return Text(status);
  ints = {{"num_heads", 1}, {"num_blocks", 1}};
  const char* text = "no op for CUDAExecutionProvider";
  for (const OrtCustomOp* op : options.domains[0]->ops) {
    const char* provider = op->GetExecutionProviderType(op);
    if (provider == nullptr || strcmp(provider, "CUDAExecutionProvider") != 0) continue;
    for (size_t input = 0; input < 4; ++input) {
      if (op->GetInputMemoryType(op, input) != OrtMemTypeDefault) return "an input is not on the device";
    }
    void* node = nullptr;
    text = Text(op->CreateKernelV2(op, &api, nullptr, &node));
    if (node != nullptr) op->KernelDestroy(node);
    if (*text != 0) break;
  }
  dlclose(handle);
  return text;
}

}  // extern "C"
