// ONNX Runtime through its C API, in the words of mra_export/backends/onnx_runtime.py. Version 17 of the API, so that 1.17 and
// everything newer will do.
#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

#include "backend.h"
#include "failure.h"
#include "onnxruntime_c_api.h"
#include "probe_model.h"
#include "shared_library.h"

namespace mra::embed {
namespace {

constexpr uint32_t kApiVersion = 17;
constexpr const char* kLibraryVariable = "MRA_ONNXRUNTIME_LIBRARY";
constexpr const char* kCuda = "CUDAExecutionProvider";
constexpr const char* kBf16Refused =
    "ONNX Runtime's CPU provider has no bfloat16 MatMul: run this bundle with backend 'torch' or on a GPU (CUDA, TensorRT), "
    "or export again with --dtype fp32";
// Its warnings are about its own optimiser: float16 constants that it cannot fold on a CPU.
constexpr OrtLoggingLevel kErrorsOnly = ORT_LOGGING_LEVEL_ERROR, kFatalOnly = ORT_LOGGING_LEVEL_FATAL;
// Its SkipLayerNormalization is slower on a CPU than what it replaces (docs/onnxruntime.md).
constexpr const char* kSlowerFusions = "SkipLayerNormFusion";

[[noreturn]] void Refuse(const std::string& message) { throw Failure(MRA_BACKEND_ERROR, message); }

// A status on its way to the place that knows what failed.
struct OrtFailure {
  std::string words;  // the first line, as ONNX Runtime's Python package prints it
};

// One loaded libonnxruntime with its environment, made at the first session and shared by all.
class Api {
 public:
  static std::shared_ptr<const Api> Load(const std::string& path) {
    static std::mutex mutex;
    static auto& known = *new std::map<std::string, std::shared_ptr<const Api>>();  // as the library, until the process ends
    const std::lock_guard<std::mutex> lock(mutex);
    const char* variable = std::getenv(kLibraryVariable);
    std::shared_ptr<const Api>& api = known[path.empty() && variable != nullptr ? variable : path];
    if (api == nullptr) api.reset(new Api(path));
    return api;
  }

  const OrtApi* operator->() const { return api_; }
  const std::string& version() const { return version_; }
  const OrtEnv* env() const { return env_; }

  void Check(OrtStatus* status) const {
    if (status == nullptr) return;
    static const char* const kCodes[] = {
        "SUCCESS",          "FAIL",         "INVALID_ARGUMENT", "NO_SUCHFILE",   "NO_MODEL", "ENGINE_ERROR", "RUNTIME_EXCEPTION",
        "INVALID_PROTOBUF", "MODEL_LOADED", "NOT_IMPLEMENTED",  "INVALID_GRAPH", "EP_FAIL"};
    const size_t code = api_->GetErrorCode(status);
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    const std::string name = code < sizeof kCodes / sizeof *kCodes ? kCodes[code] : "UNKNOWN";
    throw OrtFailure{"[ONNXRuntimeError] : " + std::to_string(code) + " : " + name + " : " + message.substr(0, message.find('\n'))};
  }

  std::vector<std::string> Providers() const {
    char** names = nullptr;
    int count = 0;
    Check(api_->GetAvailableProviders(&names, &count));
    std::vector<std::string> providers(names, names + count);
    Check(api_->ReleaseAvailableProviders(names, count));
    return providers;
  }

 private:
  explicit Api(const std::string& path)
      : library_(
            path, kLibraryVariable, {"libonnxruntime.so.1", "libonnxruntime.so"}, MRA_BACKEND_ERROR,
            "backend is 'onnxruntime', but onnxruntime is not installed",
            "install ONNX Runtime, or point MRA_ONNXRUNTIME_LIBRARY at its libonnxruntime.so; `mra-export doctor` shows the one "
            "of a Python installation") {
    const auto base = library_.Find<const OrtApiBase* (*)()>("OrtGetApiBase");
    if (base == nullptr) Refuse("the library given for ONNX Runtime has no OrtGetApiBase: pass the path of libonnxruntime.so");
    version_ = base()->GetVersionString();
    api_ = base()->GetApi(kApiVersion);
    if (api_ == nullptr) Refuse("ONNX Runtime " + version_ + " is too old: install 1.17 or newer");
    try {
      OrtEnv* env = nullptr;
      Check(api_->CreateEnv(kErrorsOnly, "mra_session", &env));
      env_ = env;
    } catch (const OrtFailure& failure) {
      Refuse("ONNX Runtime " + version_ + " does not start: " + failure.words);
    }
  }

  SharedLibrary library_;
  const OrtApi* api_ = nullptr;
  const OrtEnv* env_ = nullptr;
  std::string version_;
};

using ApiPointer = std::shared_ptr<const Api>;

template <class Object>
std::shared_ptr<Object> Owned(Object* object, void (*release)(Object*)) {
  return std::shared_ptr<Object>(object, release);
}

struct Settings {
  ApiPointer api;
  std::string device;
  int device_index;
  int intra_op_threads;
  std::string library;  // empty: none
};

std::shared_ptr<OrtSessionOptions> SessionOptions(const Settings& settings) {
  const Api& api = *settings.api;
  OrtSessionOptions* made = nullptr;
  api.Check(api->CreateSessionOptions(&made));
  const auto options = Owned(made, api->ReleaseSessionOptions);
  api.Check(api->SetSessionLogSeverityLevel(made, kErrorsOnly));
  if (settings.intra_op_threads > 0) api.Check(api->SetIntraOpNumThreads(made, settings.intra_op_threads));
  if (settings.device == "cpu") {
    api.Check(api->AddSessionConfigEntry(made, "optimization.disable_specified_optimizers", kSlowerFusions));
  }
  if (!settings.library.empty()) {
    try {
      api.Check(api->RegisterCustomOpsLibrary_V2(made, settings.library.c_str()));
    } catch (const OrtFailure& failure) {
      throw Failure(MRA_PLUGIN_LOAD_ERROR, settings.library + " does not load into ONNX Runtime " + api.version() + ": " +
                                               failure.words +
                                               ". Export again on this machine, or pass use_op_library=False "
                                               "(slower, same answer)");
    }
  }
  if (settings.device == "cuda") {
    try {
      OrtCUDAProviderOptionsV2* cuda = nullptr;
      api.Check(api->CreateCUDAProviderOptions(&cuda));
      const auto owner = Owned(cuda, api->ReleaseCUDAProviderOptions);
      const std::string index = std::to_string(settings.device_index);
      const char* keys[] = {"device_id", "use_tf32"};
      const char* values[] = {index.c_str(), "0"};  // a float32 model's products are float32, as on the CPU
      api.Check(api->UpdateCUDAProviderOptions(cuda, keys, values, 2));
      api.Check(api->SessionOptionsAppendExecutionProvider_CUDA_V2(made, cuda));
    } catch (const OrtFailure& failure) {
      Refuse("ONNX Runtime " + api.version() + " could not start its " + kCuda + ": check the driver and CUDA libraries (" +
             failure.words + ")");
    }
  }
  return options;
}

// Makes sure that the library really brings the operator for this dtype and device: one that registers nothing would leave the
// function body to run, right but slow, and nobody told.
void ProbeLibrary(const Settings& settings, const std::string& dtype) {
  const Api& api = *settings.api;
  const auto options = SessionOptions(settings);
  const std::string model = ProbeModel(dtype);
  try {
    api.Check(api->SetSessionLogSeverityLevel(options.get(), kFatalOnly));
    if (settings.device == "cuda") {
      api.Check(api->AddSessionConfigEntry(options.get(), "session.disable_cpu_ep_fallback", "1"));
    }
    OrtSession* session = nullptr;
    api.Check(api->CreateSessionFromArray(api.env(), model.data(), model.size(), options.get(), &session));
    api->ReleaseSession(session);
  } catch (const OrtFailure& failure) {
    throw Failure(MRA_PLUGIN_LOAD_ERROR,
                  settings.library + " loads, but brings no mra.MraAttention for " + dtype + " on " + settings.device +
                      " to ONNX Runtime " + api.version() + ": " + failure.words +
                      ". Export again with this mra-export, or pass use_op_library=False (slower, same answer)");
  }
}

class OnnxRuntime : public Backend {
 public:
  OnnxRuntime(const Settings& settings, const std::string& model) : api_(settings.api) {
    const Api& api = *api_;
    const auto options = SessionOptions(settings);
    try {
      OrtSession* session = nullptr;
      api.Check(api->CreateSession(api.env(), model.c_str(), options.get(), &session));
      session_ = Owned(session, api->ReleaseSession);
      OrtAllocator* allocator = nullptr;
      api.Check(api->GetAllocatorWithDefaultOptions(&allocator));
      size_t count = 0;
      api.Check(api->SessionGetOutputCount(session, &count));
      for (size_t index = 0; index < count; ++index) {
        char* name = nullptr;
        api.Check(api->SessionGetOutputName(session, index, allocator, &name));
        outputs_.emplace_back(name);
        api.Check(api->AllocatorFree(allocator, name));
      }
      OrtMemoryInfo* memory = nullptr;
      api.Check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
      memory_ = Owned(memory, api->ReleaseMemoryInfo);
    } catch (const OrtFailure& failure) {
      Refuse("ONNX Runtime " + api.version() + " cannot load the graph: " + failure.words);
    }
  }

  std::vector<Output> Run(Prepared inputs) const override {
    try {
      return Answer(&inputs);
    } catch (const OrtFailure& failure) {
      Refuse("ONNX Runtime " + api_->version() + " failed to run the graph: " + failure.words);
    }
  }

 private:
  std::vector<Output> Answer(Prepared* inputs) const {
    const Api& api = *api_;
    std::vector<std::shared_ptr<OrtValue>> owners;
    std::vector<const OrtValue*> values;
    std::vector<const char*> names, wanted;
    for (size_t index = 0; index < inputs->names.size(); ++index) {
      std::vector<int64_t>& data = inputs->values[index];
      OrtValue* value = nullptr;
      api.Check(api->CreateTensorWithDataAsOrtValue(memory_.get(), data.data(), data.size() * sizeof data[0], inputs->shape.data(),
                                                    inputs->shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, &value));
      owners.push_back(Owned(value, api->ReleaseValue));
      values.push_back(value);
      names.push_back(inputs->names[index].c_str());
    }
    for (const std::string& name : outputs_) wanted.push_back(name.c_str());
    std::vector<OrtValue*> answers(wanted.size(), nullptr);
    api.Check(api->Run(session_.get(), nullptr, names.data(), values.data(), values.size(), wanted.data(), wanted.size(),
                       answers.data()));
    std::vector<std::shared_ptr<OrtValue>> owned;  // all of them, before anything can throw
    for (OrtValue* answer : answers) owned.push_back(Owned(answer, api->ReleaseValue));
    std::vector<Output> outputs;
    for (size_t index = 0; index < owned.size(); ++index) outputs.push_back(Read(outputs_[index], owned[index]));
    return outputs;
  }

  Output Read(const std::string& name, const std::shared_ptr<OrtValue>& value) const {
    const Api& api = *api_;
    OrtTensorTypeAndShapeInfo* info = nullptr;
    api.Check(api->GetTensorTypeAndShape(value.get(), &info));
    const auto owner = Owned(info, api->ReleaseTensorTypeAndShapeInfo);
    ONNXTensorElementDataType type;
    size_t rank = 0, elements = 0;
    api.Check(api->GetTensorElementType(info, &type));
    api.Check(api->GetDimensionsCount(info, &rank));
    api.Check(api->GetTensorShapeElementCount(info, &elements));
    std::vector<int64_t> shape(rank);
    api.Check(api->GetDimensions(info, shape.data(), rank));
    void* data = nullptr;
    api.Check(api->GetTensorMutableData(value.get(), &data));
    return {name, ElementType(name, type), shape, elements, std::shared_ptr<const void>(value, data)};
  }

  static MraElementType ElementType(const std::string& name, ONNXTensorElementDataType type) {
    switch (type) {
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
        return MRA_ELEMENT_FLOAT32;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        return MRA_ELEMENT_FLOAT16;
      case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
        return MRA_ELEMENT_BFLOAT16;
      default:
        Refuse("output " + name + " has ONNX element type " + std::to_string(type) + ": a bundle's outputs are 1, 10 or 16");
    }
  }

  ApiPointer api_;
  std::shared_ptr<OrtSession> session_;
  std::shared_ptr<OrtMemoryInfo> memory_;
  std::vector<std::string> outputs_;
};

void CheckDevice(const Api& api, const std::string& dtype, const std::string& device) {
  std::vector<std::string> providers;
  try {
    providers = api.Providers();
  } catch (const OrtFailure& failure) {
    Refuse("ONNX Runtime " + api.version() + " does not say what it has: " + failure.words);
  }
  if (device == "cuda" && std::find(providers.begin(), providers.end(), kCuda) == providers.end()) {
    Refuse("onnxruntime " + api.version() + " here has no " + kCuda + " (it has " + Joined(providers) +
           "): install onnxruntime-gpu, or use device 'cpu'");
  }
  if (device == "cpu" && dtype == "bf16") Refuse(kBf16Refused);
}

}  // namespace

std::unique_ptr<Backend> MakeOnnxRuntime(const Bundle& bundle, const BackendOptions& options) {
  const std::string dtype = FloatDtype(bundle.manifest.dtype);
  Settings settings = {Api::Load(options.onnxruntime_library), options.device, options.device_index, options.intra_op_threads, ""};
  if (options.device == "cuda" && bundle.manifest.dtype == "int8") {
    Refuse("an int8 bundle's graph is for CPUs: use device 'cpu', or export with --dtype fp16 for a GPU");
  }
  if (options.use_op_library) {
    if (!bundle.Has(kOpLibrary)) {
      Refuse(bundle.path + " holds no op library (" + kOpLibrary + "): export it again where `mra-export doctor` shows ort_ops, " +
             "or pass use_op_library=False (slower, same answer)");
    }
    settings.library = bundle.File(kOpLibrary);
  }
  CheckDevice(*settings.api, dtype, options.device);
  if (!settings.library.empty()) {
    try {
      ProbeLibrary(settings, dtype);
    } catch (const OrtFailure& failure) {
      Refuse("ONNX Runtime " + settings.api->version() + " takes no options: " + failure.words);
    }
  }
  return std::make_unique<OnnxRuntime>(settings, bundle.File(kModel));
}

}  // namespace mra::embed
