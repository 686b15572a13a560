// Plays TensorRT for the tests: linked with the plugin into one host library, called through ctypes by test_plugin.py.
#include <NvInferRuntime.h>
#include <stdint.h>

#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& num_creators);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

std::string messages;
int32_t library_version = 0;

// ILogger and ILoggerFinder as TensorRT 10 lays them out (Base empty) and as TensorRT 11 does (their methods after those of
// IVersionedInterface), whatever the headers at hand say.
struct Unversioned {};
struct Versioned : IVersionedInterface {
  InterfaceInfo getInterfaceInfo() const noexcept override { return {"test", 1, 0}; }
};

template <typename Base>
struct TestLogger final : Base {
  virtual void log(ILogger::Severity severity, const char* message) noexcept {
    messages += std::to_string(static_cast<int>(severity)) + " " + message + "\n";
  }
};

enum Finds { kNothing, kLogger, kThrows };
Finds finds = kLogger;

template <typename Base>
struct TestFinder final : Base {
  virtual TestLogger<Base>* findLogger() {
    if (finds == kThrows) throw std::string("no logger");
    return finds == kLogger ? &logger : nullptr;
  }
  TestLogger<Base> logger;
};

TestFinder<Unversioned> finder;
TestFinder<Versioned> versioned_finder;

// An extent of a shape expression: a constant, or symbolic if below 0.
class Extent final : public IDimensionExpr {
 public:
  explicit Extent(int64_t value) : body_(value) { mImpl = &body_; }

 private:
  class Body final : public apiv::VDimensionExpr {
   public:
    explicit Body(int64_t value) : value_(value) {}
    bool isConstant() const override { return value_ >= 0; }
    int64_t getConstantValue() const override { return value_; }
    bool isSizeTensor() const override { return false; }

   private:
    int64_t value_;
  };
  Body body_;
};

class ExprBuilder final : public IExprBuilder {};

Dims MakeDims(int32_t count, const int64_t* extents) {
  Dims dims{};
  dims.nbDims = count;
  for (int32_t i = 0; i < count; ++i) dims.d[i] = extents[i];
  return dims;
}

template <typename Capability>
Capability* Get(void* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}
IPluginV3OneBuild* Build(void* plugin) { return Get<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD); }
IPluginV3OneRuntime* Runtime(void* plugin) { return Get<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME); }

IPluginCreatorV3One* Creator() {
  int32_t count = 0;
  IPluginCreatorInterface* const* creators = getCreators(count);
  return count == 1 ? static_cast<IPluginCreatorV3One*>(creators[0]) : nullptr;
}

}  // namespace

// One tensor of the layer, as test_plugin.py's Tensor: extents now (-1 = dynamic) and at the ends of the profile.
struct Tensor {
  int32_t type;
  int32_t format;
  int32_t rank;
  int64_t extents[8], smallest[8], largest[8];
};

namespace {

DynamicPluginTensorDesc Dynamic(const Tensor& tensor) {
  DynamicPluginTensorDesc desc{};
  desc.desc.dims = MakeDims(tensor.rank, tensor.extents);
  desc.desc.type = static_cast<DataType>(tensor.type);
  desc.desc.format = static_cast<TensorFormat>(tensor.format);
  desc.min = MakeDims(tensor.rank, tensor.smallest);
  desc.opt = MakeDims(tensor.rank, tensor.largest);
  desc.max = MakeDims(tensor.rank, tensor.largest);
  return desc;
}

std::vector<DynamicPluginTensorDesc> Dynamic(const Tensor* tensors, int32_t count) {
  std::vector<DynamicPluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) descs.push_back(Dynamic(tensors[i]));
  return descs;
}

std::vector<PluginTensorDesc> Static(const Tensor* tensors, int32_t count) {
  std::vector<PluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) descs.push_back(Dynamic(tensors[i]).desc);
  return descs;
}

}  // namespace

extern "C" {

// What the plugin asks the library that called setLoggerFinder.
int32_t getInferLibVersion() noexcept { return library_version; }
cudaError_t cudaGetLastError() { return cudaErrorLaunchFailure; }
const char* cudaGetErrorString(cudaError_t) { return "the text of the CUDA error"; }

// version 0: no finder.
void driver_set_logger(int32_t version, int32_t versioned, int32_t what_it_finds) {
  library_version = version;
  finds = static_cast<Finds>(what_it_finds);
  void* chosen = versioned ? static_cast<void*>(&versioned_finder) : &finder;
  setLoggerFinder(version == 0 ? nullptr : static_cast<ILoggerFinder*>(chosen));
}

// Copies out and forgets what was logged, a line "severity text" each.
void driver_take_messages(char* text, int32_t size) {
  std::strncpy(text, messages.c_str(), static_cast<size_t>(size) - 1);
  messages.clear();
}

const PluginFieldCollection* driver_field_names() { return Creator()->getFieldNames(); }
const char* driver_creator_name() { return Creator()->getPluginName(); }
const char* driver_creator_version() { return Creator()->getPluginVersion(); }
const char* driver_creator_namespace() { return Creator()->getPluginNamespace(); }

void* driver_create(const PluginFieldCollection* fields, int32_t phase) {
  return Creator()->createPlugin("layer", fields, static_cast<TensorRTPhase>(phase));
}
void* driver_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }
void* driver_attach(void* plugin) { return Runtime(plugin)->attachToContext(nullptr); }
void driver_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }
const PluginFieldCollection* driver_serialized(void* plugin) { return Runtime(plugin)->getFieldsToSerialize(); }
int32_t driver_has_capability(void* plugin, int32_t type) {
  return static_cast<IPluginV3*>(plugin)->getCapabilityInterface(static_cast<PluginCapabilityType>(type)) != nullptr;
}

const char* driver_name(void* plugin) { return Get<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginName(); }
const char* driver_version(void* plugin) { return Get<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginVersion(); }
const char* driver_namespace(void* plugin) {
  return Get<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginNamespace();
}

int32_t driver_num_outputs(void* plugin) { return Build(plugin)->getNbOutputs(); }

int32_t driver_output_type(void* plugin, const Tensor* inputs, int32_t num_inputs, int32_t num_outputs, int32_t* output) {
  std::vector<DataType> types;
  for (int32_t i = 0; i < num_inputs; ++i) types.push_back(static_cast<DataType>(inputs[i].type));
  DataType type = DataType::kUINT8;
  const int32_t status = Build(plugin)->getOutputDataTypes(&type, num_outputs, types.data(), num_inputs);
  *output = static_cast<int32_t>(type);
  return status;
}

// axes[i]: the axis of query whose very expression is output extent i, or -1.
int32_t driver_output_shape(void* plugin, const Tensor* inputs, int32_t num_inputs, int32_t num_outputs, int32_t* rank,
                            int32_t* axes) {
  std::vector<DimsExprs> shapes(static_cast<size_t>(num_inputs));
  std::deque<Extent> extents;  // expressions point into themselves: they must not move
  for (int32_t i = 0; i < num_inputs; ++i) {
    shapes[i].nbDims = inputs[i].rank;
    for (int32_t axis = 0; axis < inputs[i].rank; ++axis) shapes[i].d[axis] = &extents.emplace_back(inputs[i].extents[axis]);
  }
  DimsExprs output{};
  ExprBuilder builder;
  const int32_t status = Build(plugin)->getOutputShapes(shapes.data(), num_inputs, nullptr, 0, &output, num_outputs, builder);
  *rank = output.nbDims;
  for (int32_t i = 0; i < output.nbDims; ++i) {
    axes[i] = -1;
    for (int32_t axis = 0; axis < shapes[0].nbDims; ++axis) {
      if (output.d[i] == shapes[0].d[axis]) axes[i] = axis;
    }
  }
  return status;
}

int32_t driver_supports(void* plugin, int32_t position, const Tensor* tensors, int32_t num_inputs, int32_t num_outputs) {
  return Build(plugin)->supportsFormatCombination(position, Dynamic(tensors, num_inputs + num_outputs).data(), num_inputs,
                                                  num_outputs);
}

int32_t driver_configure(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs) {
  return Build(plugin)->configurePlugin(Dynamic(inputs, num_inputs).data(), num_inputs, Dynamic(outputs, num_outputs).data(),
                                        num_outputs);
}

size_t driver_workspace(void* plugin, const Tensor* inputs, const Tensor* output) {
  return Build(plugin)->getWorkspaceSize(Dynamic(inputs, 4).data(), 4, Dynamic(output, 1).data(), 1);
}

int32_t driver_shape_change(void* plugin, const Tensor* inputs, int32_t num_inputs, const Tensor* outputs, int32_t num_outputs) {
  return Runtime(plugin)->onShapeChange(Static(inputs, num_inputs).data(), num_inputs, Static(outputs, num_outputs).data(),
                                        num_outputs);
}

int32_t driver_enqueue(void* plugin, const Tensor* inputs, const Tensor* output, const void* const* data, void* context,
                       void* workspace) {
  return Runtime(plugin)->enqueue(Static(inputs, 4).data(), Static(output, 1).data(), data, &context, workspace, nullptr);
}

}  // extern "C"
