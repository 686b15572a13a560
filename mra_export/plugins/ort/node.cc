#include "node.h"

#include <memory>
#include <sstream>

#include "mra_attention_params.h"

namespace mra_ort {
namespace {

constexpr const char* kInputNames[] = {"query", "key", "value", "mask"};

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t axis = 0; axis < shape.size(); ++axis) text << (axis ? ", " : "") << shape[axis];
  text << ")";
  return text.str();
}

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

}  // namespace

Node::Node(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype) : api_(api) {
  const AttributeReader attributes(api, info);
  name_ = attributes.node();
  params_ = ReadParams(attributes, dtype);
}

Call Node::Read(OrtKernelContext* context) const {
  const void* data[4] = {};
  std::vector<int64_t> shapes[4];
  for (size_t index = 0; index < 4; ++index) data[index] = ReadInput(context, index, &shapes[index]);
  Call call = {params_, data[0], data[1], data[2], static_cast<const int32_t*>(data[3]), nullptr, ShapeText(shapes[0])};
  CheckShapes(shapes, &call.params);
  OrtValue* output = nullptr;
  Check(api_, api_.KernelContext_GetOutput(context, 0, shapes[0].data(), shapes[0].size(), &output));
  Check(api_, api_.GetTensorMutableData(output, &call.context));
  return call;
}

void Node::CheckKernel(MraStatus status, const Call& call, const std::string& detail) const {
  if (status == MRA_OK) return;
  // Not ORT_EP_FAIL: on that one, ONNX Runtime's Python class quietly goes on with a session on the CPU.
  const OrtErrorCode code = status == MRA_ERROR_CUDA ? ORT_FAIL : ORT_INVALID_ARGUMENT;
  Fail(code, name_ + ": " + mra_status_string(status) + (detail.empty() ? "" : ": " + detail) + " (query has shape " +
                 call.query_shape + ")");
}

const void* Node::ReadInput(OrtKernelContext* context, size_t index, std::vector<int64_t>* shape) const {
  const OrtValue* value = nullptr;
  Check(api_, api_.KernelContext_GetInput(context, index, &value));
  if (value == nullptr) Fail(ORT_INVALID_ARGUMENT, name_ + ": " + kInputNames[index] + " is missing: connect this input");
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
  return start;
}

// Refuses shapes outside the contract, naming the tensor; fills in batch, length and head size.
void Node::CheckShapes(const std::vector<int64_t> (&shapes)[4], MraAttentionParams* params) const {
  const std::vector<int64_t>& query = shapes[0];
  if (query.size() != 3) {
    Fail(ORT_INVALID_ARGUMENT, name_ + ": query has shape " + ShapeText(query) + ": pass (batch, length, num_heads * head_size)");
  }
  for (size_t index = 1; index < 3; ++index) {
    if (shapes[index] != query) {
      Fail(ORT_INVALID_ARGUMENT, name_ + ": " + kInputNames[index] + " has shape " + ShapeText(shapes[index]) + ", query " +
                                     ShapeText(query) + ": pass query, key and value of the same shape");
    }
  }
  const std::vector<int64_t> expected = {query[0], query[1]};
  if (shapes[3] != expected) {
    Fail(ORT_INVALID_ARGUMENT, name_ + ": mask has shape " + ShapeText(shapes[3]) + ", query " + ShapeText(query) +
                                   ": pass a mask of shape " + ShapeText(expected) + ", 1 = real token");
  }
  const int64_t heads = params->num_heads;
  if (query[2] % heads != 0) {
    Fail(ORT_INVALID_ARGUMENT, name_ + ": query has shape " + ShapeText(query) + " and num_heads is " + std::to_string(heads) +
                                   ": the last axis must be a multiple of num_heads");
  }
  const int64_t head_size = query[2] / heads;
  if (head_size < MRA_ATTENTION_MIN_HEAD_SIZE || head_size > MRA_ATTENTION_MAX_HEAD_SIZE) {
    Fail(ORT_INVALID_ARGUMENT, name_ + ": head size is " + std::to_string(head_size) + " (query " + ShapeText(query) + ", " +
                                   std::to_string(heads) + " heads): it must be 8 to 256");
  }
  params->batch = query[0];
  params->length = query[1];
  params->head_size = static_cast<int32_t>(head_size);
}

}  // namespace mra_ort
