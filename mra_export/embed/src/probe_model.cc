#include "probe_model.h"

#include <cstring>

namespace mra::embed {
namespace {

// Protocol buffers' wire format, as far as this one message needs it. Field numbers are onnx.proto's.
std::string Varint(uint64_t value) {
  std::string bytes;
  for (; value >= 0x80; value >>= 7) bytes += static_cast<char>(value | 0x80);
  return bytes + static_cast<char>(value);
}
std::string Field(int number, uint64_t value) { return Varint(static_cast<uint64_t>(number) << 3) + Varint(value); }
std::string Field(int number, const std::string& bytes) {
  return Varint(static_cast<uint64_t>(number) << 3 | 2) + Varint(bytes.size()) + bytes;
}
std::string Field(int number, float value) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  return Varint(static_cast<uint64_t>(number) << 3 | 5) + std::string(bytes, sizeof value);
}

std::string Dimension(const char* name) { return Field(1, Field(2, std::string(name))); }
std::string Dimension(uint64_t size) { return Field(1, Field(1, size)); }

// ValueInfoProto: name, type.tensor_type.elem_type and shape.
std::string Value(const char* name, uint64_t element, const std::string& dimensions) {
  return Field(1, std::string(name)) + Field(2, Field(1, Field(1, element) + Field(2, dimensions)));
}

std::string Opset(const char* domain, uint64_t version) { return Field(1, std::string(domain)) + Field(2, version); }

std::string IntAttribute(const char* name, uint64_t value) {
  return Field(5, Field(1, std::string(name)) + Field(3, value) + Field(20, uint64_t{2}));
}

}  // namespace

std::string ProbeModel(const std::string& dtype) {
  const uint64_t element = dtype == "fp32" ? 1 : dtype == "fp16" ? 10 : 16, int32 = 6;
  const std::string rows = Dimension("b") + Dimension("n"), tensor = rows + Dimension(32);
  std::string node;
  for (const char* input : {"query", "key", "value", "mask"}) node += Field(1, std::string(input));
  node += Field(2, std::string("context")) + Field(4, std::string("MraAttention"));
  node += IntAttribute("num_heads", 1) + IntAttribute("num_blocks", 1);
  node += Field(5, Field(1, std::string("scale")) + Field(2, 1.0f) + Field(20, uint64_t{1}));
  node += Field(7, std::string("mra"));
  std::string graph = Field(1, node) + Field(2, std::string("probe"));
  for (const char* input : {"query", "key", "value"}) graph += Field(11, Value(input, element, tensor));
  graph += Field(11, Value("mask", int32, rows)) + Field(12, Value("context", element, tensor));
  return Field(1, uint64_t{8}) + Field(7, graph) + Field(8, Opset("", 18)) + Field(8, Opset("mra", 1));
}

}  // namespace mra::embed
