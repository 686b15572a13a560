// One MraAttention node of a session, whatever device it runs on: its attributes, checked, and the checks of each call.
#ifndef MRA_ORT_NODE_H_
#define MRA_ORT_NODE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "border.h"
#include "mra_attention.h"
#include "onnxruntime_c_api.h"

namespace mra_ort {

constexpr const char* kOpName = "MraAttention";

// A call whose inputs fit the contract, with its output made. query, key, value, context: (B, N, H * D); mask: (B, N) int32.
struct Call {
  MraAttentionParams params;
  const void* query;
  const void* key;
  const void* value;
  const int32_t* mask;
  void* context;
  std::string query_shape;  // for messages
};

class Node {
 public:
  // Throws Failure where an attribute is outside the contract.
  Node(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype);
  virtual ~Node() = default;
  Node(const Node&) = delete;
  Node& operator=(const Node&) = delete;

  const OrtApi& api() const { return api_; }

  // Runs the node once. Throws Failure.
  virtual void Compute(OrtKernelContext* context) const = 0;

 protected:
  // Throws Failure where an input is outside the contract.
  Call Read(OrtKernelContext* context) const;
  // Throws Failure unless status is MRA_OK. detail: what else is known, or "".
  void CheckKernel(MraStatus status, const Call& call, const std::string& detail = "") const;
  const std::string& name() const { return name_; }
  void set_float32_mode(int32_t mode) { params_.float32_mode = mode; }

 private:
  const void* ReadInput(OrtKernelContext* context, size_t index, std::vector<int64_t>* shape) const;
  void CheckShapes(const std::vector<int64_t> (&shapes)[4], MraAttentionParams* params) const;

  const OrtApi& api_;
  std::string name_;  // such as "MraAttention node 'layer.0'"
  MraAttentionParams params_ = {};
};

// Its kernel on the CPU, with the session's own thread pool.
Node* NewCpuNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype);

// Its kernel on the GPU, on the stream that ONNX Runtime works on. Only in libraries with CUDA kernels.
Node* NewCudaNode(const OrtApi& api, const OrtKernelInfo* info, MraDtype dtype);

}  // namespace mra_ort

#endif  // MRA_ORT_NODE_H_
