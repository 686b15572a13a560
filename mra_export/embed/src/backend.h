// What runs a bundle's graph. Backends are made once and serve any number of threads.
#ifndef MRA_EMBED_BACKEND_H_
#define MRA_EMBED_BACKEND_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "inputs.h"
#include "mra_session.h"

namespace mra::embed {

struct Output {
  std::string name;
  MraElementType type;
  std::vector<int64_t> shape;
  size_t elements;
  std::shared_ptr<const void> data;  // row-major, host memory
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::vector<Output> Run(Prepared inputs) const = 0;
  // Why inputs of this shape are not taken, or nothing: an engine takes the shapes it was built for.
  virtual std::optional<std::string> Refuses(const std::vector<int64_t>& /*shape*/) const { return {}; }
};

struct BackendOptions {
  std::string device;
  bool use_op_library, allow_embedded_plugin;
  int intra_op_threads, device_index;
  std::optional<std::string> engine;
  std::string onnxruntime_library, tensorrt_library;  // empty: to be looked for
};

std::unique_ptr<Backend> MakeOnnxRuntime(const Bundle& bundle, const BackendOptions& options);
std::unique_ptr<Backend> MakeTensorRt(const Bundle& bundle, const BackendOptions& options);

}  // namespace mra::embed

#endif  // MRA_EMBED_BACKEND_H_
