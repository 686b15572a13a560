// TensorRT plugin MraAttention, version "1", namespace "": an IPluginV3 around mra_attention_cuda. The operator: docs/operator.md.
//
// The library exports getCreators and setLoggerFinder and nothing else; TensorRT registers the creator when it loads the library
// (IPluginRegistry::loadLibrary; tensorrt/mra_attention_register.cc calls that in servers that do not). It never calls into
// TensorRT itself, so one build serves TensorRT 10, 11 and TensorRT-RTX.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <atomic>
#include <cinttypes>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <new>

#include "mra_attention.h"
#include "mra_attention_params.h"

namespace mra {

// TensorRT 11 and TensorRT-RTX 1.5 made ILoggerFinder and ILogger versioned interfaces, which moved their methods within the
// vtable. This library serves whichever TensorRT loads it, so it knows both layouts and does not call those of the header it was
// built with.
struct Unversioned {};

template <typename Base>
struct Logger : Base {
  virtual void log(nvinfer1::ILogger::Severity severity, const char* message) noexcept = 0;
};

template <typename Base>
struct LoggerFinder : Base {
  virtual Logger<Base>* findLogger() = 0;
};

}  // namespace mra

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr char kName[] = "MraAttention";
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "";
constexpr char kModeNames[][7] = {"full", "sparse"};  // by MraApproxMode

enum Input { kQuery, kKey, kValue, kMask, kNumInputs };
constexpr const char* kInputNames[] = {"query", "key", "value", "mask"};

// The plugin's fields are the operator's attributes, in the order of contract.py's Attributes.
enum FieldIndex { kNumHeads, kNumBlocks, kScale, kApproxMode, kFirstBlocks, kDiagonalBlocks, kPaddingInvariant, kNumFields };
constexpr const char* kFieldNames[] = {
    "num_heads",        "num_blocks", "scale", "approx_mode", "initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks",
    "padding_invariant"};
constexpr PluginFieldType kFieldTypes[] = {PluginFieldType::kINT32, PluginFieldType::kINT64, PluginFieldType::kFLOAT32,
                                           PluginFieldType::kCHAR,  PluginFieldType::kINT32, PluginFieldType::kINT32,
                                           PluginFieldType::kINT32};

// ---- Messages

// False if TensorRT has no logger at this moment.
template <typename Base>
bool LogThrough(void* finder, const char* message) noexcept {
  try {
    mra::Logger<Base>* logger = static_cast<mra::LoggerFinder<Base>*>(finder)->findLogger();
    if (logger != nullptr) logger->log(nvinfer1::ILogger::Severity::kERROR, message);
    return logger != nullptr;
  } catch (...) {  // findLogger may throw, and nothing may be thrown across TensorRT's border
    return false;
  }
}

// version: as getInferLibVersion gives it. TensorRT 10.14.1 is 101401, TensorRT-RTX 1.7.1 is 10701.
bool HasVersionedLogger(int32_t version) noexcept {
  const bool rtx = version < 100000;
  return rtx ? version >= 10500 : version >= 110000;
}

// The version of the TensorRT that made this finder: that of the library with its vtable, for several TensorRTs may be loaded.
int32_t VersionOfLibraryWith(const nvinfer1::ILoggerFinder* finder) noexcept {
  int32_t version = NV_TENSORRT_VERSION;
  Dl_info owner{};
  if (finder == nullptr || dladdr(*reinterpret_cast<void* const*>(finder), &owner) == 0) return version;
  if (void* library = dlopen(owner.dli_fname, RTLD_LAZY | RTLD_NOLOAD)) {
    if (void* get_version = dlsym(library, "getInferLibVersion")) version = reinterpret_cast<int32_t (*)()>(get_version)();
    dlclose(library);
  }
  return version;
}

// Set when TensorRT loads this library, read on error paths only.
std::atomic<void*> logger_finder{nullptr};
std::atomic<bool (*)(void*, const char*) noexcept> log_through{nullptr};

// One line in TensorRT's error log; on stderr where there is no logger, so that no message is lost.
__attribute__((format(printf, 1, 2))) void LogError(const char* format, ...) noexcept {
  char message[512];
  const int prefix = std::snprintf(message, sizeof(message), "%s plugin: ", kName);
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message + prefix, sizeof(message) - static_cast<size_t>(prefix), format, arguments);
  va_end(arguments);
  void* finder = logger_finder.load();
  if (finder == nullptr || !log_through.load()(finder, message)) std::fprintf(stderr, "%s\n", message);
}

// A shape as "(2, 128, -1)", for a message.
struct ShapeText {
  char text[128];
  explicit ShapeText(const Dims& dims) noexcept {
    size_t used = static_cast<size_t>(std::snprintf(text, sizeof(text), "("));
    for (int32_t i = 0; i < dims.nbDims && i < Dims::MAX_DIMS && used < sizeof(text); ++i) {
      used +=
          static_cast<size_t>(std::snprintf(text + used, sizeof(text) - used, i ? ", %" PRId64 : "%" PRId64, int64_t{dims.d[i]}));
    }
    if (used < sizeof(text)) std::snprintf(text + used, sizeof(text) - used, ")");
  }
};

const char* TypeName(DataType type) noexcept {
  switch (type) {
    case DataType::kFLOAT:
      return "float32";
    case DataType::kHALF:
      return "float16";
    case DataType::kBF16:
      return "bfloat16";
    case DataType::kINT32:
      return "int32";
    case DataType::kINT64:
      return "int64";
    case DataType::kBOOL:
      return "bool";
    default:
      return "a type the operator does not know";
  }
}

// ---- Types and shapes: the rules of contract.py's check_shapes

// The MraDtype of an operand type T, or -1.
int32_t Dtype(DataType type) noexcept {
  switch (type) {
    case DataType::kFLOAT:
      return MRA_FLOAT32;
    case DataType::kHALF:
      return MRA_FLOAT16;
    case DataType::kBF16:
      return MRA_BFLOAT16;
    default:
      return -1;
  }
}

bool CheckCounts(int32_t inputs, int32_t outputs) noexcept {
  if (inputs == kNumInputs && outputs == 1) return true;
  LogError("the layer has %d inputs and %d outputs: pass query, key, value, mask and take one context", inputs, outputs);
  return false;
}

// types: of the four inputs.
bool CheckTypes(const DataType* types) noexcept {
  if (Dtype(types[kQuery]) < 0) {
    LogError("query is %s: use float32, float16 or bfloat16", TypeName(types[kQuery]));
    return false;
  }
  for (const int input : {kKey, kValue}) {
    if (types[input] != types[kQuery]) {
      LogError("%s is %s, query %s: pass query, key and value of one type", kInputNames[input], TypeName(types[input]),
               TypeName(types[kQuery]));
      return false;
    }
  }
  if (types[kMask] != DataType::kINT32) {
    LogError("mask is %s: cast it to int32, 1 = real token, 0 = padding", TypeName(types[kMask]));
    return false;
  }
  return true;
}

// shapes: of the four inputs; an extent below 0 is not known yet and fits anything.
bool CheckShapes(const Dims* shapes, int32_t num_heads) noexcept {
  const auto differ = [](int64_t a, int64_t b) { return a >= 0 && b >= 0 && a != b; };
  const Dims& query = shapes[kQuery];
  if (query.nbDims != 3) {
    LogError("query has shape %s: pass (batch, length, num_heads * head_size)", ShapeText(query).text);
    return false;
  }
  for (const int input : {kKey, kValue}) {
    const Dims& shape = shapes[input];
    if (shape.nbDims != 3 || differ(shape.d[0], query.d[0]) || differ(shape.d[1], query.d[1]) || differ(shape.d[2], query.d[2])) {
      LogError("%s has shape %s, query %s: pass query, key and value of the same shape", kInputNames[input], ShapeText(shape).text,
               ShapeText(query).text);
      return false;
    }
  }
  const Dims& mask = shapes[kMask];
  if (mask.nbDims != 2 || differ(mask.d[0], query.d[0]) || differ(mask.d[1], query.d[1])) {
    LogError("mask has shape %s, query %s: pass a mask of shape (batch, length), 1 = real token", ShapeText(mask).text,
             ShapeText(query).text);
    return false;
  }
  if (query.d[0] == 0 || query.d[1] == 0) {
    LogError("query has shape %s: batch and length must be 1 or more", ShapeText(query).text);
    return false;
  }
  const int64_t hidden = query.d[2];
  if (hidden < 0) return true;
  if (hidden % num_heads != 0) {
    LogError("query's last axis is %" PRId64 ", num_heads %d: it must be a multiple of num_heads", hidden, num_heads);
    return false;
  }
  const int64_t head_size = hidden / num_heads;
  if (head_size < MRA_ATTENTION_MIN_HEAD_SIZE || head_size > MRA_ATTENTION_MAX_HEAD_SIZE) {
    LogError("head size is %" PRId64 " (%" PRId64 " / %d heads): it must be %d to %d", head_size, hidden, num_heads,
             MRA_ATTENTION_MIN_HEAD_SIZE, MRA_ATTENTION_MAX_HEAD_SIZE);
    return false;
  }
  return true;
}

// ---- The plugin

// Holds the operator's attributes and nothing else: after construction no method changes it, so one object may serve any number of
// execution contexts and threads.
class MraAttentionPlugin final : public nvinfer1::IPluginV3,
                                 public nvinfer1::IPluginV3OneCore,
                                 public nvinfer1::IPluginV3OneBuild,
                                 public nvinfer1::IPluginV3OneRuntime {
 public:
  // attributes: dtype, batch, length and head_size are not used; they come with each call.
  explicit MraAttentionPlugin(const MraAttentionParams& attributes) noexcept : attributes_(attributes) {
    const char* mode = kModeNames[attributes_.approx_mode];
    const void* const values[kNumFields] = {&attributes_.num_heads,
                                            &attributes_.num_blocks,
                                            &attributes_.scale,
                                            mode,
                                            &attributes_.initial_prior_first_n_blocks,
                                            &attributes_.initial_prior_diagonal_n_blocks,
                                            &attributes_.padding_invariant};
    for (int i = 0; i < kNumFields; ++i) {
      fields_[i] = {kFieldNames[i], values[i], kFieldTypes[i], i == kApproxMode ? static_cast<int32_t>(std::strlen(mode)) : 1};
    }
  }

  MraAttentionPlugin(const MraAttentionPlugin&) = delete;  // fields_ points into the object
  MraAttentionPlugin& operator=(const MraAttentionPlugin&) = delete;

  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE:
        return static_cast<nvinfer1::IPluginV3OneCore*>(this);
      case nvinfer1::PluginCapabilityType::kBUILD:
        return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME:
        return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    LogError("TensorRT asks for capability %d, which this plugin does not know: rebuild it with newer headers",
             static_cast<int>(type));
    return nullptr;
  }

  nvinfer1::IPluginV3* clone() noexcept override {
    nvinfer1::IPluginV3* copy = new (std::nothrow) MraAttentionPlugin(attributes_);
    if (copy == nullptr) LogError("out of memory: the plugin could not be copied");
    return copy;
  }

  // Core

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // Build

  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* output_types, int32_t num_outputs, const DataType* input_types,
                             int32_t num_inputs) const noexcept override {
    if (!CheckCounts(num_inputs, num_outputs) || !CheckTypes(input_types)) return -1;
    output_types[0] = input_types[kQuery];
    return 0;
  }

  int32_t getOutputShapes(const nvinfer1::DimsExprs* inputs, int32_t num_inputs, const nvinfer1::DimsExprs*, int32_t,
                          nvinfer1::DimsExprs* outputs, int32_t num_outputs, nvinfer1::IExprBuilder&) noexcept override {
    if (!CheckCounts(num_inputs, num_outputs)) return -1;
    Dims shapes[kNumInputs];
    for (int input = 0; input < kNumInputs; ++input) {
      shapes[input].nbDims = inputs[input].nbDims;
      for (int32_t axis = 0; axis < inputs[input].nbDims; ++axis) {
        const nvinfer1::IDimensionExpr* extent = inputs[input].d[axis];
        shapes[input].d[axis] = extent->isConstant() ? extent->getConstantValue() : -1;
      }
    }
    if (!CheckShapes(shapes, attributes_.num_heads)) return -1;
    outputs[0] = inputs[kQuery];
    return 0;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* tensors, int32_t num_inputs,
                                 int32_t num_outputs) noexcept override {
    if (!CheckCounts(num_inputs, num_outputs)) return false;
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == kMask) return tensor.type == DataType::kINT32;
    return position == kQuery ? Dtype(tensor.type) >= 0 : tensor.type == tensors[kQuery].desc.type;
  }

  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc*, int32_t num_outputs) noexcept override {
    if (!CheckCounts(num_inputs, num_outputs)) return -1;
    DataType types[kNumInputs];
    Dims smallest[kNumInputs], largest[kNumInputs];
    for (int input = 0; input < kNumInputs; ++input) {
      types[input] = inputs[input].desc.type;
      smallest[input] = inputs[input].min;
      largest[input] = inputs[input].max;
    }
    size_t bytes = 0;
    const bool fits = CheckTypes(types) && CheckShapes(smallest, attributes_.num_heads) &&
                      CheckShapes(largest, attributes_.num_heads) &&
                      WorkspaceSize(Params(largest[kQuery], types[kQuery]), largest[kQuery], &bytes);
    return fits ? 0 : -1;
  }

  // The workspace never shrinks when batch or length grow, so that of the profile's largest shape covers the others.
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* inputs, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    const Dims& largest = inputs[kQuery].max;
    size_t bytes = 0;
    // configurePlugin has refused what cannot be sized; a size that no device has keeps a caller who ignored that from running it.
    return WorkspaceSize(Params(largest, inputs[kQuery].desc.type), largest, &bytes) ? bytes : std::numeric_limits<size_t>::max();
  }

  // Runtime

  int32_t onShapeChange(const PluginTensorDesc* inputs, int32_t num_inputs, const PluginTensorDesc*,
                        int32_t num_outputs) noexcept override {
    return CheckCounts(num_inputs, num_outputs) && CheckInputs(inputs) ? 0 : -1;
  }

  int32_t enqueue(const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
                  void* workspace, cudaStream_t stream) noexcept override {
    if (!CheckInputs(input_descs)) return -1;
    const Dims& query = input_descs[kQuery].dims;
    const MraAttentionParams params = Params(query, input_descs[kQuery].type);
    size_t bytes = 0;
    if (!WorkspaceSize(params, query, &bytes)) return -1;
    const MraStatus status = mra_attention_cuda(&params, inputs[kQuery], inputs[kKey], inputs[kValue],
                                                static_cast<const int32_t*>(inputs[kMask]), outputs[0], workspace, bytes, stream);
    if (status == MRA_OK) return 0;
    LogError("enqueue failed for query of shape %s: %s%s%s", ShapeText(query).text, mra_status_string(status),
             status == MRA_ERROR_CUDA ? ": " : "", status == MRA_ERROR_CUDA ? cudaGetErrorString(cudaGetLastError()) : "");
    return -1;
  }

  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  // query: (B, N, H * D), all extents known.
  MraAttentionParams Params(const Dims& query, DataType type) const noexcept {
    MraAttentionParams params = attributes_;
    params.dtype = Dtype(type);
    params.batch = query.d[0];
    params.length = query.d[1];
    params.head_size = static_cast<int32_t>(query.d[2] / params.num_heads);
    return params;
  }

  bool CheckInputs(const PluginTensorDesc* inputs) const noexcept {
    DataType types[kNumInputs];
    Dims shapes[kNumInputs];
    for (int input = 0; input < kNumInputs; ++input) {
      types[input] = inputs[input].type;
      shapes[input] = inputs[input].dims;
    }
    return CheckTypes(types) && CheckShapes(shapes, attributes_.num_heads);
  }

  static bool WorkspaceSize(const MraAttentionParams& params, const Dims& query, size_t* bytes) noexcept {
    const MraStatus status = mra_attention_cuda_workspace_size(&params, bytes);
    if (status == MRA_OK) return true;
    LogError("query has shape %s: %s", ShapeText(query).text, mra_status_string(status));
    return false;
  }

  const MraAttentionParams attributes_;
  PluginField fields_[kNumFields];
  const PluginFieldCollection collection_{kNumFields, fields_};
};

// ---- The creator

// Any integer type holds an integer attribute: the ONNX parser passes the type that getFieldNames declares, Python callers either.
bool ReadInteger(const PluginField& field, int64_t lowest, int64_t highest, int64_t* value) noexcept {
  if ((field.type != PluginFieldType::kINT32 && field.type != PluginFieldType::kINT64) || field.length != 1 ||
      field.data == nullptr) {
    LogError("field %s has type %d and length %d: pass one int32 or int64", field.name, static_cast<int>(field.type), field.length);
    return false;
  }
  if (field.type == PluginFieldType::kINT32) {
    int32_t narrow = 0;
    std::memcpy(&narrow, field.data, sizeof(narrow));
    *value = narrow;
  } else {
    std::memcpy(value, field.data, sizeof(*value));
  }
  if (*value >= lowest && *value <= highest) return true;
  LogError("field %s is %" PRId64 ": it must be %" PRId64 " to %" PRId64, field.name, *value, lowest, highest);
  return false;
}

bool ReadInteger(const PluginField& field, int32_t lowest, int32_t highest, int32_t* value) noexcept {
  int64_t wide = 0;
  if (!ReadInteger(field, int64_t{lowest}, int64_t{highest}, &wide)) return false;
  *value = static_cast<int32_t>(wide);
  return true;
}

bool ReadScale(const PluginField& field, float* scale) noexcept {
  if (field.type != PluginFieldType::kFLOAT32 || field.length != 1 || field.data == nullptr) {
    LogError("field %s has type %d and length %d: pass one float32", field.name, static_cast<int>(field.type), field.length);
    return false;
  }
  std::memcpy(scale, field.data, sizeof(*scale));
  if (*scale > 0.0f && std::isfinite(*scale)) return true;
  LogError("field %s is %g: it must be positive and finite, 1 / sqrt(head_size)", field.name, static_cast<double>(*scale));
  return false;
}

bool ReadApproxMode(const PluginField& field, int32_t* mode) noexcept {
  if (field.type != PluginFieldType::kCHAR || field.length < 1 || field.data == nullptr) {
    LogError("field %s has type %d and length %d: pass characters, full or sparse", field.name, static_cast<int>(field.type),
             field.length);
    return false;
  }
  const char* text = static_cast<const char*>(field.data);
  const size_t length = strnlen(text, static_cast<size_t>(field.length));  // with or without its closing NUL
  for (const int32_t known : {MRA_APPROX_FULL, MRA_APPROX_SPARSE}) {
    if (length == std::strlen(kModeNames[known]) && std::memcmp(text, kModeNames[known], length) == 0) {
      *mode = known;
      return true;
    }
  }
  LogError("field %s is '%.*s': use full or sparse", field.name, static_cast<int>(length < 64 ? length : 64), text);
  return false;
}

class MraAttentionPluginCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  MraAttentionPluginCreator() noexcept {
    for (int i = 0; i < kNumFields; ++i) fields_[i] = {kFieldNames[i], nullptr, kFieldTypes[i], 1};
  }

  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV3* createPlugin(const char*, const PluginFieldCollection* collection,
                                    nvinfer1::TensorRTPhase) noexcept override {
    MraAttentionParams attributes{};
    if (!Read(collection, &attributes)) return nullptr;
    attributes.float32_mode = mra::Float32ModeFromEnvironment();
    if (attributes.float32_mode < 0) {
      LogError("the environment variable MRA_ATTENTION_FLOAT32 is %s: set it to fma or tf32x3, or unset it",
               std::getenv("MRA_ATTENTION_FLOAT32"));
      return nullptr;
    }
    nvinfer1::IPluginV3* plugin = new (std::nothrow) MraAttentionPlugin(attributes);
    if (plugin == nullptr) LogError("out of memory: the plugin could not be created");
    return plugin;
  }

 private:
  static bool Read(const PluginFieldCollection* collection, MraAttentionParams* attributes) noexcept {
    if (collection == nullptr || collection->nbFields < 0 || (collection->nbFields > 0 && collection->fields == nullptr)) {
      LogError("the field collection is empty: pass num_heads, num_blocks and scale at least");
      return false;
    }
    attributes->struct_size = sizeof(MraAttentionParams);
    attributes->approx_mode = MRA_APPROX_FULL;

    bool seen[kNumFields] = {};
    for (int32_t i = 0; i < collection->nbFields; ++i) {
      const PluginField& field = collection->fields[i];
      const int index = Find(field.name);
      if (index < 0) {
        LogError(
            "field %s is unknown: the operator's attributes are num_heads, num_blocks, scale, approx_mode, "
            "initial_prior_first_n_blocks, initial_prior_diagonal_n_blocks, padding_invariant",
            field.name == nullptr ? "without a name" : field.name);
        return false;
      }
      if (seen[index]) {
        LogError("field %s is given twice: pass it once", field.name);
        return false;
      }
      seen[index] = true;
      if (!ReadField(index, field, attributes)) return false;
    }
    for (const int required : {kNumHeads, kNumBlocks, kScale}) {
      if (!seen[required]) {
        LogError("field %s is missing: it is required", kFieldNames[required]);
        return false;
      }
    }
    return true;
  }

  static int Find(const char* name) noexcept {
    for (int index = 0; name != nullptr && index < kNumFields; ++index) {
      if (std::strcmp(name, kFieldNames[index]) == 0) return index;
    }
    return -1;
  }

  static bool ReadField(int index, const PluginField& field, MraAttentionParams* attributes) noexcept {
    switch (index) {
      case kNumHeads:
        return ReadInteger(field, 1, INT32_MAX, &attributes->num_heads);
      case kNumBlocks:
        return ReadInteger(field, 1, INT64_MAX, &attributes->num_blocks);
      case kScale:
        return ReadScale(field, &attributes->scale);
      case kApproxMode:
        return ReadApproxMode(field, &attributes->approx_mode);
      case kFirstBlocks:
        return ReadInteger(field, 0, INT32_MAX, &attributes->initial_prior_first_n_blocks);
      case kDiagonalBlocks:
        return ReadInteger(field, 0, INT32_MAX, &attributes->initial_prior_diagonal_n_blocks);
      default:
        return ReadInteger(field, 0, 1, &attributes->padding_invariant);
    }
  }

  PluginField fields_[kNumFields];
  const PluginFieldCollection collection_{kNumFields, fields_};
};

}  // namespace

// What IPluginRegistry::loadLibrary looks up.
extern "C" {

MRA_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& num_creators) {
  static MraAttentionPluginCreator creator;
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
  num_creators = 1;
  return creators;
}

MRA_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  log_through.store(HasVersionedLogger(VersionOfLibraryWith(finder)) ? LogThrough<nvinfer1::IVersionedInterface>
                                                                     : LogThrough<mra::Unversioned>);
  logger_finder.store(finder);
}

}  // extern "C"
