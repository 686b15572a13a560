// mra::Session: open a bundle, run token ids, get tensors. Header-only over the C API of libmra_session, so that no C++ type
// crosses the library's border and any compiler's C++17 goes with it.
//
//   mra::Session session("bundle");
//   std::vector<float> logits = session.Run({{0, 5, 6, 7, 2}, {1, 5}})["logits"].Float32();
//
// Every error is an mra::Error. One session serves any number of threads at once.
#ifndef MRA_SESSION_HPP_
#define MRA_SESSION_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mra_session.h"

namespace mra {

class Error : public std::runtime_error {
 public:
  Error(MraErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  MraErrorKind kind() const { return kind_; }

 private:
  MraErrorKind kind_;
};

// As MraSessionOptions; an empty text is the default.
struct Options {
  std::string backend = "onnxruntime";
  std::string device;
  bool verify_hashes = true;
  bool use_op_library = true;
  int intra_op_threads = 0;
  int device_index = 0;
  std::string engine;
  bool allow_embedded_plugin = false;
  std::string onnxruntime_library;
  std::string tensorrt_library;
};

// Integers with their shape, (batch, length), or (batch, choices, length) for multiple choice. Empty: not given.
struct Ints {
  std::vector<int64_t> values;
  std::vector<int64_t> shape;
};

// One output; valid as long as the Outputs it came from.
struct Tensor {
  std::string name;
  MraElementType type;
  std::vector<int64_t> shape;
  const void* data;  // row-major, of its type
  std::vector<float> Float32() const {
    std::vector<float> values(mra_outputs_elements(outputs, index));
    mra_outputs_copy_float32(outputs, index, values.data());
    return values;
  }
  const MraOutputs* outputs;
  size_t index;
};

class Outputs {
 public:
  explicit Outputs(MraOutputs* outputs) : outputs_(outputs, mra_outputs_free) {}
  size_t size() const { return mra_outputs_count(outputs_.get()); }
  Tensor at(size_t index) const {
    if (index >= size()) throw std::out_of_range("output " + std::to_string(index) + " of " + std::to_string(size()));
    const MraOutputs* outputs = outputs_.get();
    const int64_t* shape = mra_outputs_shape(outputs, index);
    return {mra_outputs_name(outputs, index),
            mra_outputs_type(outputs, index),
            std::vector<int64_t>(shape, shape + mra_outputs_rank(outputs, index)),
            mra_outputs_data(outputs, index),
            outputs,
            index};
  }
  Tensor operator[](const std::string& name) const {
    std::string names;
    for (size_t index = 0; index < size(); ++index) {
      if (name == mra_outputs_name(outputs_.get(), index)) return at(index);
      names += (index ? ", " : "") + std::string(mra_outputs_name(outputs_.get(), index));
    }
    throw Error(MRA_CONTRACT_ERROR, name + " is not an output of this model: it has " + names);
  }

 private:
  std::shared_ptr<MraOutputs> outputs_;
};

struct GoldenRow {
  std::string name, output, status, reason;
  double max_abs, needed, tolerance;
};

class Session {
 public:
  explicit Session(const std::string& bundle, const Options& options = {}) {
    MraSessionOptions plain;
    mra_session_options_init(&plain);
    plain.backend = Text(options.backend);
    plain.device = Text(options.device);
    plain.verify_hashes = options.verify_hashes;
    plain.use_op_library = options.use_op_library;
    plain.intra_op_threads = options.intra_op_threads;
    plain.device_index = options.device_index;
    plain.engine = Text(options.engine);
    plain.allow_embedded_plugin = options.allow_embedded_plugin;
    plain.onnxruntime_library = Text(options.onnxruntime_library);
    plain.tensorrt_library = Text(options.tensorrt_library);
    MraSession* session = nullptr;
    Check(mra_session_open(bundle.c_str(), &plain, &session));
    session_.reset(session);
  }

  Outputs Run(const Ints& input_ids, const Ints& attention_mask = {}, const Ints& token_type_ids = {}) const {
    const std::pair<const char*, const Ints*> given[] = {
        {"input_ids", &input_ids}, {"attention_mask", &attention_mask}, {"token_type_ids", &token_type_ids}};
    MraInput inputs[3];
    for (size_t index = 0; index < 3; ++index) {
      const Ints& ints = *given[index].second;
      size_t elements = 1;
      for (const int64_t size : ints.shape) elements *= static_cast<size_t>(size);
      if (!ints.shape.empty() && elements != ints.values.size()) {
        throw Error(MRA_CONTRACT_ERROR, std::string(given[index].first) + " has " + std::to_string(ints.values.size()) +
                                            " values, its shape " + std::to_string(elements) + ": pass one value for each place");
      }
      const bool left_out = ints.shape.empty() && ints.values.empty();
      // An empty vector may have no data: the library refuses its shape and reads nothing.
      const int64_t* data = ints.values.empty() ? &kNothing : ints.values.data();
      inputs[index] = {given[index].first, left_out ? nullptr : data, ints.shape.data(), ints.shape.size()};
    }
    MraOutputs* outputs = nullptr;
    Check(mra_session_run(session_.get(), inputs, 3, &outputs));
    return Outputs(outputs);
  }

  std::vector<GoldenRow> CompareGolden() const {
    MraGolden* golden = nullptr;
    Check(mra_session_compare_golden(session_.get(), &golden));
    const std::unique_ptr<MraGolden, void (*)(MraGolden*)> owner(golden, mra_golden_free);
    std::vector<GoldenRow> rows;
    for (size_t index = 0; index < mra_golden_count(golden); ++index) {
      const MraGoldenRow& row = *mra_golden_row(golden, index);
      rows.push_back({row.name, row.output, row.status, row.reason, row.max_abs, row.needed, row.tolerance});
    }
    return rows;
  }

  // Throws where an answer is too far from PyTorch's.
  void Validate() const { Check(mra_session_validate(session_.get())); }

  std::string backend() const { return mra_session_backend(session_.get()); }
  std::string device() const { return mra_session_device(session_.get()); }
  std::string task() const { return mra_session_task(session_.get()); }
  std::string manifest() const { return mra_session_manifest(session_.get()); }
  int64_t vocab_size() const { return mra_session_vocab_size(session_.get()); }
  int64_t max_length() const { return mra_session_max_length(session_.get()); }
  const MraSession* get() const { return session_.get(); }

 private:
  static constexpr int64_t kNothing = 0;

  static const char* Text(const std::string& text) { return text.empty() ? nullptr : text.c_str(); }

  static void Check(MraError* error) {
    if (error == nullptr) return;
    const std::unique_ptr<MraError, void (*)(MraError*)> owner(error, mra_error_free);
    throw Error(mra_error_kind(error), mra_error_message(error));
  }

  struct Close {
    void operator()(MraSession* session) const { mra_session_close(session); }
  };
  std::unique_ptr<MraSession, Close> session_;
};

}  // namespace mra

#endif  // MRA_SESSION_HPP_
