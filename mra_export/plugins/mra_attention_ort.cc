// ONNX Runtime adapter: op MraAttention, domain "mra", version 1, on the CPU for float32, float16 and bfloat16, using the session's
// own thread pool. Meaning: docs/operator.md. Built against version 17 of ONNX Runtime's C API, so that 1.17 and everything newer
// loads it.
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "mra_attention.h"
#include "mra_attention_params.h"
#include "onnxruntime_c_api.h"

namespace {

constexpr uint32_t kApiVersion = 17;
constexpr const char* kDomain = "mra";
constexpr const char* kOpName = "MraAttention";
constexpr const char* kInputNames[] = {"query", "key", "value", "mask"};
constexpr size_t kAlignment = 64;

// A failure on its way to the border, where it becomes an OrtStatus.
struct Failure {
  OrtErrorCode code;
  std::string message;
};

[[noreturn]] void Fail(OrtErrorCode code, const std::string& message) { throw Failure{code, message}; }

// Runs body; whatever it throws becomes a status, so that nothing is dropped and no exception leaves the library.
template <class Body>
OrtStatus* AtBorder(const OrtApi& api, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return api.CreateStatus(failure.code, failure.message.c_str());
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "MraAttention: unknown error");
  }
}

void Check(const OrtApi& api, OrtStatus* status) {
  if (status == nullptr) return;
  const Failure failure = {api.GetErrorCode(status), api.GetErrorMessage(status)};
  api.ReleaseStatus(status);
  throw failure;
}

bool Succeeds(const OrtApi& api, OrtStatus* status) {
  if (status != nullptr) api.ReleaseStatus(status);
  return status == nullptr;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text << (axis ? ", " : "") << shape[axis];
  text << ")";
  return text.str();
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Attributes.

class AttributeReader {
 public:
  AttributeReader(const OrtApi& api, const OrtKernelInfo* info) : api_(api), info_(info) {
    size_t size = 0;
    std::string name;
    if (Succeeds(api, api.KernelInfo_GetNodeName(info, nullptr, &size)) && size > 0) {
      name.resize(size);
      Check(api, api.KernelInfo_GetNodeName(info, &name[0], &size));
      name.resize(size - 1);
    }
    node_ = std::string(kOpName) + " node '" + name + "'";
  }

  const std::string& node() const { return node_; }

  // The attribute, or `fallback` where the node has none of that name; without a fallback that is an error, and so is another type.
  int64_t Int(const char* name, const int64_t* fallback) const {
    int64_t value = 0;
    if (Succeeds(api_, api_.KernelInfoGetAttribute_int64(info_, name, &value))) return value;
    return Otherwise(name, "int", fallback);
  }
  float Float(const char* name, const float* fallback) const {
    float value = 0;
    if (Succeeds(api_, api_.KernelInfoGetAttribute_float(info_, name, &value))) return value;
    return Otherwise(name, "float", fallback);
  }
  std::string String(const char* name, const std::string* fallback) const {
    size_t size = 0;
    if (Succeeds(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) {
      std::string value(size, '\0');
      Check(api_, api_.KernelInfoGetAttribute_string(info_, name, &value[0], &size));
      value.resize(size - 1);  // the terminating zero
      return value;
    }
    return Otherwise(name, "string", fallback);
  }

  [[noreturn]] void Refuse(const std::string& what) const { Fail(ORT_INVALID_ARGUMENT, node_ + ": " + what); }

 private:
  template <class T>
  T Otherwise(const char* name, const char* type, const T* fallback) const {
    const char* found = TypeOf(name);
    if (found != nullptr) Refuse(std::string("attribute ") + name + " is of type " + found + ": it must be of type " + type);
    if (fallback == nullptr) Refuse(std::string("attribute ") + name + " (" + type + ") is missing: set it on the node");
    return *fallback;
  }

  // Type of an attribute of that name, or nullptr if there is none. The API has no other way to ask.
  const char* TypeOf(const char* name) const {
    int64_t i = 0;
    float f = 0;
    size_t size = 0;
    if (Succeeds(api_, api_.KernelInfoGetAttribute_int64(info_, name, &i))) return "int";
    if (Succeeds(api_, api_.KernelInfoGetAttribute_float(info_, name, &f))) return "float";
    if (Succeeds(api_, api_.KernelInfoGetAttribute_string(info_, name, nullptr, &size))) return "string";
    size = 0;  // asking for the size of a list of either type succeeds for both
    if (Succeeds(api_, api_.KernelInfoGetAttributeArray_int64(info_, name, nullptr, &size))) return "list";
    return nullptr;
  }

  const OrtApi& api_;
  const OrtKernelInfo* info_;
  std::string node_;
};

int32_t Narrow(const AttributeReader& attributes, const char* name, int64_t value) {
  if (value < INT32_MIN || value > INT32_MAX) {
    attributes.Refuse(std::string(name) + " is " + std::to_string(value) + ": it must fit 32 bits");
  }
  return static_cast<int32_t>(value);
}

// Parameters with everything but the shapes.
MraAttentionParams ReadParams(const AttributeReader& attributes, MraDtype dtype) {
  const int64_t none = 0;
  const std::string full = "full";
  MraAttentionParams params = {};
  params.struct_size = sizeof params;
  params.dtype = dtype;
  params.num_heads = Narrow(attributes, "num_heads", attributes.Int("num_heads", nullptr));
  params.num_blocks = attributes.Int("num_blocks", nullptr);
  params.scale = attributes.Float("scale", nullptr);
  params.initial_prior_first_n_blocks =
      Narrow(attributes, "initial_prior_first_n_blocks", attributes.Int("initial_prior_first_n_blocks", &none));
  params.initial_prior_diagonal_n_blocks =
      Narrow(attributes, "initial_prior_diagonal_n_blocks", attributes.Int("initial_prior_diagonal_n_blocks", &none));
  params.padding_invariant = Narrow(attributes, "padding_invariant", attributes.Int("padding_invariant", &none));
  const std::string mode = attributes.String("approx_mode", &full);
  if (mode != "full" && mode != "sparse") attributes.Refuse("approx_mode is '" + mode + "': use 'full' or 'sparse'");
  params.approx_mode = mode == "full" ? MRA_APPROX_FULL : MRA_APPROX_SPARSE;

  // The kernel's own judgement, on shapes that are surely right: what it refuses now is an attribute.
  MraAttentionParams probe = params;
  probe.batch = 1;
  probe.length = 1;
  probe.head_size = MRA_ATTENTION_MIN_HEAD_SIZE;
  const MraStatus status = mra::CheckParams(&probe);
  if (status != MRA_OK) {
    std::ostringstream text;
    text << mra_status_string(status) << " (num_heads=" << params.num_heads << ", num_blocks=" << params.num_blocks
         << ", scale=" << params.scale << ", initial_prior_first_n_blocks=" << params.initial_prior_first_n_blocks
         << ", initial_prior_diagonal_n_blocks=" << params.initial_prior_diagonal_n_blocks
         << ", padding_invariant=" << params.padding_invariant << ")";
    attributes.Refuse(text.str());
  }
  return params;
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Kernel.

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

class Kernel {
 public:
  Kernel(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) : api_(api) {
    const AttributeReader attributes(api, info);
    node_ = attributes.node();
    params_ = ReadParams(attributes, dtype);
    // ONNX Runtime does not tell the size of the session's pool. Workers beyond it find no work left and cost nothing. Asked once:
    // the system takes a tenth of a short input's time to answer.
    const unsigned cores = std::thread::hardware_concurrency();
    num_threads_ = cores > 0 ? static_cast<int32_t>(cores) : 1;
    Check(api, api.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }
  ~Kernel() {
    if (memory_ != nullptr) api_.ReleaseMemoryInfo(memory_);
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  const OrtApi& api() const { return api_; }

  void Compute(OrtKernelContext* context) const {
    const void* data[4] = {};
    std::vector<int64_t> shapes[4];
    for (size_t index = 0; index < 4; ++index) ReadInput(context, index, &data[index], &shapes[index]);
    MraAttentionParams params = params_;
    CheckShapes(shapes, &params);

    OrtValue* output = nullptr;
    void* out = nullptr;
    Check(api_, api_.KernelContext_GetOutput(context, 0, shapes[0].data(), shapes[0].size(), &output));
    Check(api_, api_.GetTensorMutableData(output, &out));

    size_t bytes = 0;
    CheckKernel(mra_attention_cpu_workspace_size(&params, num_threads_, &bytes), shapes);
    const Workspace workspace(api_, context, memory_, bytes);
    SessionPool pool{api_, context};
    const MraThreads threads = {&pool, num_threads_, SessionPool::ParallelFor};
    const MraStatus status = mra_attention_cpu(&params, data[0], data[1], data[2], static_cast<const int32_t*>(data[3]), out,
                                               workspace.aligned(), bytes, &threads);
    Check(api_, pool.status);
    CheckKernel(status, shapes);
  }

 private:
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

  void ReadInput(OrtKernelContext* context, size_t index, const void** data, std::vector<int64_t>* shape) const {
    const OrtValue* value = nullptr;
    Check(api_, api_.KernelContext_GetInput(context, index, &value));
    if (value == nullptr) Fail(ORT_INVALID_ARGUMENT, node_ + ": " + kInputNames[index] + " is missing: connect this input");
    OrtTensorTypeAndShapeInfo* info = nullptr;
    Check(api_, api_.GetTensorTypeAndShape(value, &info));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api_.ReleaseTensorTypeAndShapeInfo)> release(
        info, api_.ReleaseTensorTypeAndShapeInfo);
    size_t rank = 0;
    Check(api_, api_.GetDimensionsCount(info, &rank));
    shape->resize(rank);
    Check(api_, api_.GetDimensions(info, shape->data(), rank));
    void* start = nullptr;
    Check(api_, api_.GetTensorMutableData(const_cast<OrtValue*>(value), &start));
    *data = start;
  }

  // Refuses shapes outside the contract, naming the tensor; fills in batch, length and head size.
  void CheckShapes(const std::vector<int64_t> (&shapes)[4], MraAttentionParams* params) const {
    const std::vector<int64_t>& query = shapes[0];
    if (query.size() != 3) {
      Fail(ORT_INVALID_ARGUMENT, node_ + ": query has shape " + ShapeText(query) + ": pass (batch, length, num_heads * head_size)");
    }
    for (size_t index = 1; index < 3; ++index) {
      if (shapes[index] != query) {
        Fail(ORT_INVALID_ARGUMENT, node_ + ": " + kInputNames[index] + " has shape " + ShapeText(shapes[index]) + ", query " +
                                       ShapeText(query) + ": pass query, key and value of the same shape");
      }
    }
    const std::vector<int64_t> expected = {query[0], query[1]};
    if (shapes[3] != expected) {
      Fail(ORT_INVALID_ARGUMENT, node_ + ": mask has shape " + ShapeText(shapes[3]) + ", query " + ShapeText(query) +
                                     ": pass a mask of shape " + ShapeText(expected) + ", 1 = real token");
    }
    const int64_t heads = params->num_heads;
    if (query[2] % heads != 0) {
      Fail(ORT_INVALID_ARGUMENT, node_ + ": query has shape " + ShapeText(query) + " and num_heads is " + std::to_string(heads) +
                                     ": the last axis must be a multiple of num_heads");
    }
    const int64_t head_size = query[2] / heads;
    if (head_size < MRA_ATTENTION_MIN_HEAD_SIZE || head_size > MRA_ATTENTION_MAX_HEAD_SIZE) {
      Fail(ORT_INVALID_ARGUMENT, node_ + ": head size is " + std::to_string(head_size) + " (query " + ShapeText(query) + ", " +
                                     std::to_string(heads) + " heads): it must be 8 to 256");
    }
    params->batch = query[0];
    params->length = query[1];
    params->head_size = static_cast<int32_t>(head_size);
  }

  void CheckKernel(MraStatus status, const std::vector<int64_t> (&shapes)[4]) const {
    if (status == MRA_OK) return;
    Fail(ORT_INVALID_ARGUMENT, node_ + ": " + mra_status_string(status) + " (query has shape " + ShapeText(shapes[0]) + ")");
  }

  const OrtApi& api_;
  std::string node_;
  MraAttentionParams params_ = {};
  int32_t num_threads_ = 1;
  OrtMemoryInfo* memory_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------------------
// Registration.

// ONNX Runtime's callbacks get the op back as a pointer to its base.
struct Op : OrtCustomOp {
  MraDtype dtype;
  ONNXTensorElementDataType element;
  const OrtApi* api;

  Op(MraDtype mra_dtype, ONNXTensorElementDataType ort_element, const OrtApi* ort_api)
      : OrtCustomOp{}, dtype(mra_dtype), element(ort_element), api(ort_api) {
    version = kApiVersion;
    GetName = [](const OrtCustomOp*) { return kOpName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 4; };
    GetInputType = [](const OrtCustomOp* op, size_t index) {
      return index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 : static_cast<const Op*>(op)->element;
    };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return static_cast<const Op*>(op)->element; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* ort, const OrtKernelInfo* info, void** kernel) -> OrtStatus* {
      return AtBorder(*ort, [=] { *kernel = new Kernel(*ort, info, static_cast<const Op*>(op)->dtype); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) -> OrtStatus* {
      const Kernel& self = *static_cast<const Kernel*>(kernel);
      return AtBorder(self.api(), [&] { self.Compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    // context has query's shape, symbolic axes included.
    InferOutputShapeFn = [](const OrtCustomOp* op, OrtShapeInferContext* context) -> OrtStatus* {
      const OrtApi& ort = *static_cast<const Op*>(op)->api;
      return AtBorder(ort, [&] {
        OrtTensorTypeAndShapeInfo* query = nullptr;
        Check(ort, ort.ShapeInferContext_GetInputTypeShape(context, 0, &query));
        if (query != nullptr) Check(ort, ort.ShapeInferContext_SetOutputTypeShape(context, 0, query));
      });
    };
  }
};

// What sessions point to for as long as they live: the domain and its ops, one set for each ONNX Runtime in the process. Sessions
// never say when they are done with it, so it is never released.
struct Registration {
  const OrtApi* api;
  Op float32;
  Op float16;
  Op bfloat16;
  OrtCustomOpDomain* domain = nullptr;

  explicit Registration(const OrtApi* ort)
      : api(ort),
        float32(MRA_FLOAT32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ort),
        float16(MRA_FLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, ort),
        bfloat16(MRA_BFLOAT16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, ort) {
    Check(*ort, ort->CreateCustomOpDomain(kDomain, &domain));
    for (Op* op : {&float32, &float16, &bfloat16}) Check(*ort, ort->CustomOpDomain_Add(domain, op));
  }
};

OrtCustomOpDomain* DomainFor(const OrtApi* api) {
  static std::mutex mutex;
  static std::vector<std::unique_ptr<Registration>>& registrations = *new std::vector<std::unique_ptr<Registration>>();
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& registration : registrations) {
    if (registration->api == api) return registration->domain;
  }
  registrations.push_back(std::make_unique<Registration>(api));
  return registrations.back()->domain;
}

}  // namespace

// The entry point that SessionOptions.register_custom_ops_library looks up.
extern "C" MRA_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(kApiVersion);
  if (api == nullptr) {
    // Older than 1.17. Every version has API 1, whose error functions are all that is needed to say so.
    const std::string message = std::string("this library of MraAttention needs ONNX Runtime 1.17 or newer, this is ") +
                                base->GetVersionString() + ": upgrade onnxruntime";
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  return AtBorder(*api, [&] { Check(*api, api->AddCustomOpDomain(options, DomainFor(api))); });
}
