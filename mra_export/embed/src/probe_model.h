// A graph of one MraAttention node without a function body: it loads only where a library really brings the operator.
#ifndef MRA_EMBED_PROBE_MODEL_H_
#define MRA_EMBED_PROBE_MODEL_H_

#include <cstdint>
#include <string>

namespace mra::embed {

// ONNX, serialised. dtype: "fp32", "fp16" or "bf16".
std::string ProbeModel(const std::string& dtype);

}  // namespace mra::embed

#endif  // MRA_EMBED_PROBE_MODEL_H_
