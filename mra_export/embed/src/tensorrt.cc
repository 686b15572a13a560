// TensorRT and TensorRT-RTX: a bundle's engine on an NVIDIA GPU, in the words of mra_export/backends/tensorrt.py. The library is
// opened at run time; only its headers are needed to build. Without them (MRA_WITH_TENSORRT is 0) an engine is still chosen and
// checked, so that whoever asks hears first what is wrong with the bundle.
#include <algorithm>
#include <map>
#include <mutex>

#include "backend.h"
#include "cuda_driver.h"
#include "engines.h"
#include "failure.h"
#include "profiles.h"
#include "sha256.h"
#include "shared_library.h"

#if MRA_WITH_TENSORRT
#include <NvInferRuntime.h>
#endif

namespace mra::embed {
namespace {

[[noreturn]] void Refuse(const std::string& message) { throw Failure(MRA_ENGINE_ERROR, message); }

[[noreturn]] void RefuseUnknown(const std::string& backend) {
  Refuse("the engine is of backend " + Quoted(backend) + ": this package knows tensorrt, tensorrt-rtx");
}

#if MRA_WITH_TENSORRT

// One loaded library of the two.
class Library {
 public:
  Library(const std::string& backend, const std::string& path)
      : library_(path, "MRA_TENSORRT_LIBRARY",
                 backend == "tensorrt-rtx" ? std::vector<std::string>{"libtensorrt_rtx.so.1"}
                                           : std::vector<std::string>{"libnvinfer.so.10", "libnvinfer.so.11"},
                 MRA_ENGINE_ERROR, backend + " is not installed",
                 "install it, or point MRA_TENSORRT_LIBRARY at its " +
                     std::string(backend == "tensorrt-rtx" ? "libtensorrt_rtx.so.1" : "libnvinfer.so.10")) {
    create = Need<void* (*)(void*, int32_t)>("createInferRuntime_INTERNAL");
    const auto number = Need<int32_t (*)()>("getInferLibVersion");
    const auto build = library_.Find<int32_t (*)()>("getInferLibBuildVersion");
    // Four parts where the library tells the last one; (major * 100 + minor) * 100 + patch.
    const int32_t all = number();
    version = std::to_string(all / 10000) + "." + std::to_string(all / 100 % 100) + "." + std::to_string(all % 100) +
              (build == nullptr ? "" : "." + std::to_string(build()));
    if (all / 10000 != NV_TENSORRT_MAJOR) {  // the headers' classes are that version's, and no other's
      Refuse("this libmra_session was built with the headers of TensorRT " + std::to_string(NV_TENSORRT_MAJOR) + "." +
             std::to_string(NV_TENSORRT_MINOR) + ", installed is " + backend + " " + version +
             ": build it with the headers of that version (TENSORRT_ROOT), or use backend 'onnxruntime'");
    }
  }

  void* (*create)(void* logger, int32_t version);
  std::string version;

 private:
  template <class Function>
  Function Need(const char* name) const {
    const auto function = library_.template Find<Function>(name);
    if (function == nullptr)
      Refuse(std::string("the TensorRT library has no ") + name + ": install TensorRT 10, 11 or TensorRT-RTX");
    return function;
  }

  SharedLibrary library_;
};

// Keeps what TensorRT says is wrong, for the message of what fails next.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      problems_.emplace_back(text);
    } catch (...) {  // no memory for a message about an error: the error itself is still reported
    }
  }
  std::string Reasons() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t kept = std::min<size_t>(problems_.size(), 3);
    return Joined({problems_.end() - static_cast<std::ptrdiff_t>(kept), problems_.end()}, "; ");
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> problems_;
};

// Device memory that grows with what it must hold.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() {
    if (pointer_ != 0) CudaDriver::Get().Free(pointer_);
  }
  CudaDriver::Pointer Hold(size_t bytes) {
    if (bytes > bytes_) {
      if (pointer_ != 0) CudaDriver::Get().Free(pointer_);
      pointer_ = bytes_ = 0;
      pointer_ = CudaDriver::Get().Allocate(bytes);
      bytes_ = bytes;
    }
    return pointer_;
  }

 private:
  CudaDriver::Pointer pointer_ = 0;
  size_t bytes_ = 0;
};

// An execution context with its stream and buffers, which serves one call at a time.
struct Slot {
  explicit Slot(nvinfer1::IExecutionContext* made) : context(made), stream(CudaDriver::Get().NewStream()) {}
  Slot(const Slot&) = delete;
  Slot& operator=(const Slot&) = delete;
  ~Slot() {
    context.reset();
    buffers.clear();
    CudaDriver::Get().FreeStream(stream);
  }
  std::unique_ptr<nvinfer1::IExecutionContext> context;
  CudaDriver::Stream stream;
  std::map<std::string, DeviceBuffer> buffers;  // by tensor name
};

class TensorRt : public Backend {
 public:
  TensorRt(const Bundle& bundle, const EngineEntry& entry, const BackendOptions& options, std::shared_ptr<Library> library)
      : bundle_(bundle), entry_(entry), device_(options.device_index), library_(std::move(library)) {
    CudaDriver::Get().Use(device_);
    runtime_.reset(static_cast<nvinfer1::IRuntime*>(library_->create(&logger_, NV_TENSORRT_VERSION)));
    if (runtime_ == nullptr) Fail("it does not start");
    Deserialize(options.allow_embedded_plugin);
    for (int32_t index = 0; index < engine_->getNbIOTensors(); ++index) {
      const char* name = engine_->getIOTensorName(index);
      (engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT ? inputs_ : outputs_).emplace_back(name);
    }
  }

  ~TensorRt() override {
    try {
      CudaDriver::Get().Use(device_);
    } catch (const Failure&) {  // the driver is gone, and with it what is freed below
    }
    free_.clear();
  }

  std::optional<std::string> Refuses(const std::vector<int64_t>& shape) const override {
    try {
      PickProfile(entry_.profiles, shape);
      return {};
    } catch (const Failure& failure) {
      return failure.what();
    }
  }

  std::vector<Output> Run(Prepared inputs) const override {
    const auto [profile, shape] = PickProfile(entry_.profiles, inputs.shape);
    CudaDriver::Get().Use(device_);
    std::unique_ptr<Slot> slot = Take();
    std::vector<Output> outputs = Execute(slot.get(), profile, shape, inputs);
    const std::lock_guard<std::mutex> lock(mutex_);  // a slot whose call failed is not used again
    free_.push_back(std::move(slot));
    return outputs;
  }

 private:
  std::unique_ptr<Slot> Take() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<Slot> slot = std::move(free_.back());
      free_.pop_back();
      return slot;
    }
    nvinfer1::IExecutionContext* context = engine_->createExecutionContext();
    if (context == nullptr) Fail("there may be too little GPU memory for another execution context");
    return std::make_unique<Slot>(context);
  }

  std::vector<Output> Execute(Slot* slot, int profile, const std::vector<int64_t>& shape, const Prepared& inputs) const {
    const CudaDriver& driver = CudaDriver::Get();
    nvinfer1::IExecutionContext& context = *slot->context;
    const auto stream = static_cast<cudaStream_t>(slot->stream);
    if (context.getOptimizationProfile() != profile && !context.setOptimizationProfileAsync(profile, stream)) {
      Fail("it refuses profile " + std::to_string(profile));
    }
    nvinfer1::Dims dims = {};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    std::vector<std::vector<int64_t>> padded;  // in use until the stream is done
    padded.reserve(inputs_.size());
    for (const std::string& name : inputs_) {
      const auto found = std::find(inputs.names.begin(), inputs.names.end(), name);
      if (found == inputs.names.end()) Fail("it wants an input " + name);
      padded.push_back(Padded(inputs.values[static_cast<size_t>(found - inputs.names.begin())], inputs.shape, shape));
      const std::vector<int64_t>& values = padded.back();
      const size_t bytes = values.size() * sizeof values[0];
      const CudaDriver::Pointer pointer = slot->buffers[name].Hold(bytes);
      driver.ToDevice(pointer, values.data(), bytes, slot->stream);
      if (!context.setInputShape(name.c_str(), dims)) Fail("it refuses " + name + " of shape " + ByX(shape));
      context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(pointer));
    }
    const size_t item = entry_.dtype == "fp32" ? 4 : 2;
    std::vector<Output> outputs;
    for (const std::string& name : outputs_) {
      const nvinfer1::Dims given = context.getTensorShape(name.c_str());
      const std::vector<int64_t> has(given.d, given.d + given.nbDims);
      const Output output = {name, Type(), has, static_cast<size_t>(Volume(has)), nullptr};
      const CudaDriver::Pointer pointer = slot->buffers[name].Hold(output.elements * item);
      context.setTensorAddress(name.c_str(), reinterpret_cast<void*>(pointer));
      outputs.push_back(output);
    }
    if (!context.enqueueV3(stream)) Fail("shape " + ByX(shape));
    for (Output& output : outputs) {
      const std::shared_ptr<char> host(new char[output.elements * item], std::default_delete<char[]>());
      driver.ToHost(host.get(), slot->buffers[output.name].Hold(0), output.elements * item, slot->stream);
      output.data = host;
    }
    driver.Wait(slot->stream);
    for (Output& output : outputs) Cut(inputs.shape, item, &output);
    return outputs;
  }

  MraElementType Type() const {
    return entry_.dtype == "fp16" ? MRA_ELEMENT_FLOAT16 : entry_.dtype == "bf16" ? MRA_ELEMENT_BFLOAT16 : MRA_ELEMENT_FLOAT32;
  }

  // Zeros at the end of each axis: mask 0, so the operator ignores what was added.
  static std::vector<int64_t> Padded(const std::vector<int64_t>& values, const std::vector<int64_t>& from,
                                     const std::vector<int64_t>& to) {
    if (from == to) return values;
    std::vector<int64_t> padded(static_cast<size_t>(Volume(to)), 0);
    CopyCommon(values.data(), from, padded.data(), to, sizeof values[0]);
    return padded;
  }

  // Keeps the part of an output that belongs to inputs of shape `asked`.
  void Cut(const std::vector<int64_t>& asked, size_t item, Output* output) const {
    const auto tensor = std::find_if(bundle_.manifest.outputs.begin(), bundle_.manifest.outputs.end(),
                                     [&](const TensorInfo& info) { return info.name == output->name; });
    if (tensor == bundle_.manifest.outputs.end()) Fail("it has an output " + output->name + " that the manifest lacks");
    std::vector<int64_t> wanted = output->shape;
    const auto& input_axes = bundle_.manifest.inputs.at(0).axes;
    for (size_t axis = 0; axis < wanted.size() && axis < tensor->axes.size(); ++axis) {
      for (size_t input = 0; input < input_axes.size(); ++input) {
        if (tensor->axes[axis] == input_axes[input]) wanted[axis] = asked[input];
      }
    }
    if (wanted == output->shape) return;
    const auto elements = static_cast<size_t>(Volume(wanted));
    const std::shared_ptr<char> kept(new char[elements * item], std::default_delete<char[]>());
    CopyCommon(output->data.get(), output->shape, kept.get(), wanted, item);
    *output = {output->name, output->type, wanted, elements, kept};
  }

  void Deserialize(bool allow_embedded_plugin) {
    const std::string data = ReadFile(bundle_.File(entry_.file));
    Sha256 digest;
    digest.Update(data.data(), data.size());
    VerifyHash(bundle_, entry_.file, digest.HexDigest());  // these very bytes, not what the file held a moment ago
    const bool embedded = entry_.plugin && entry_.plugin->embedded && allow_embedded_plugin;
    runtime_->setEngineHostCodeAllowed(embedded);
    if (entry_.plugin && !embedded) RegisterPlugin(*entry_.plugin);
    engine_.reset(runtime_->deserializeCudaEngine(data.data(), data.size()));
    if (engine_ == nullptr) Fail("it does not load");
  }

  void RegisterPlugin(const Plugin& plugin) {
    static std::mutex mutex;
    static auto& loaded = *new std::map<std::string, std::string>();  // backend -> sha256: a second library would be ignored
    const std::lock_guard<std::mutex> lock(mutex);
    const std::string path = bundle_.File(plugin.library), before = loaded.emplace(entry_.backend, plugin.sha256).first->second;
    if (before != plugin.sha256) {
      Refuse(bundle_.File(entry_.file) + " needs the plugin library with sha256 " + plugin.sha256.substr(0, 16) +
             "..., this process already loaded the one with " + before.substr(0, 16) +
             "...: load the two bundles in processes of their own, or " + Rebuild(bundle_, entry_));
    }
    nvinfer1::IPluginRegistry& registry = runtime_->getPluginRegistry();
    const std::string name = std::string(kPluginName) + " version '" + kPluginVersion + "', namespace '" + kPluginNamespace + "'";
    if (HasCreator(registry)) return;  // loaded before: a second load would be refused
    if (registry.loadLibrary(path.c_str()) == nullptr) {
      const std::string reasons = logger_.Reasons();
      throw Failure(MRA_PLUGIN_LOAD_ERROR, path + " does not load as a TensorRT plugin library: " +
                                               (reasons.empty() ? "TensorRT gives no reason" : reasons));
    }
    if (!HasCreator(registry)) {
      throw Failure(MRA_PLUGIN_LOAD_ERROR, path + " brings no plugin " + name + ": build it with this mra-export");
    }
  }

  // Not getCreator: that logs an error where there is none.
  static bool HasCreator(nvinfer1::IPluginRegistry& registry) {
    int32_t count = 0;
    nvinfer1::IPluginCreatorInterface* const* creators = registry.getAllCreators(&count);
    for (int32_t index = 0; index < count; ++index) {
      const nvinfer1::InterfaceInfo info = creators[index]->getInterfaceInfo();
      if (std::string(info.kind) != "PLUGIN CREATOR_V3ONE") continue;
      const auto* creator = static_cast<const nvinfer1::v_1_0::IPluginCreatorV3One*>(creators[index]);
      if (std::string(creator->getPluginName()) == kPluginName && std::string(creator->getPluginVersion()) == kPluginVersion &&
          std::string(creator->getPluginNamespace()) == kPluginNamespace) {
        return true;
      }
    }
    return false;
  }

  [[noreturn]] void Fail(const std::string& what) const {
    const std::string reasons = logger_.Reasons();
    Refuse(entry_.file + " failed in " + entry_.backend + " " + library_->version + ": " + what +
           (reasons.empty() ? "" : " (" + reasons + ")") + ". Build it again here: " + Rebuild(bundle_, entry_));
  }

  Bundle bundle_;
  EngineEntry entry_;
  int device_;
  std::shared_ptr<Library> library_;
  Logger logger_;  // outlives what was made with it
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::vector<std::string> inputs_, outputs_;  // without inputs that no node of the graph reads
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Slot>> free_;
};

#endif  // MRA_WITH_TENSORRT

}  // namespace

std::unique_ptr<Backend> MakeTensorRt(const Bundle& bundle, const BackendOptions& options) {
#if MRA_WITH_TENSORRT
  std::shared_ptr<Library> library;
  const auto version = [&](const std::string& backend) {
    if (backend != "tensorrt" && backend != "tensorrt-rtx") RefuseUnknown(backend);
    library = std::make_shared<Library>(backend, options.tensorrt_library);
    return library->version;
  };
  const EngineEntry entry = ChooseEngine(bundle, options.engine, options.allow_embedded_plugin, options.device_index, version);
  return std::make_unique<TensorRt>(bundle, entry, options, library);
#else
  const auto version = [](const std::string& backend) -> std::string {
    if (backend != "tensorrt" && backend != "tensorrt-rtx") RefuseUnknown(backend);
    Refuse(
        "backend 'tensorrt' is not in this libmra_session: build it where TensorRT's headers are (TENSORRT_ROOT), or use backend "
        "'onnxruntime'");
  };
  ChooseEngine(bundle, options.engine, options.allow_embedded_plugin, options.device_index, version);
  return nullptr;  // not reached: no version is installed
#endif
}

}  // namespace mra::embed
