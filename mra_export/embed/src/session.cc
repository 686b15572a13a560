// The C border: every failure becomes an MraError, and nothing that is thrown leaves the library.
#include <algorithm>
#include <cstring>
#include <exception>
#include <new>
#include <string>

#include "backend.h"
#include "bundle.h"
#include "failure.h"
#include "golden.h"
#include "inputs.h"
#include "mra_session.h"

struct MraError {
  MraErrorKind kind;
  std::string message;
};

struct MraSession {
  mra::embed::Bundle bundle;
  std::string backend, device;
  std::unique_ptr<mra::embed::Backend> running;
};

struct MraOutputs {
  std::vector<mra::embed::Output> outputs;
};

struct MraGolden {
  std::vector<mra::embed::GoldenResult> results;
  std::vector<MraGoldenRow> rows;
};

namespace {

using mra::embed::BackendOptions;
using mra::embed::Bundle;
using mra::embed::Failure;
using mra::embed::GoldenResult;

MraError* NoMemory() {
  static MraError error = {MRA_INTERNAL_ERROR, "there is not enough memory: use a smaller batch or length"};
  return &error;
}

// Whoever binds the library decodes UTF-8; a path, or a parser that quotes what it read, may hold any bytes.
std::string Utf8(const char* text) {
  std::string valid;
  while (*text != '\0') {
    const auto first = static_cast<unsigned char>(*text);
    const size_t size = first < 0x80                    ? 1
                        : first >= 0xc2 && first < 0xe0 ? 2
                        : first >= 0xe0 && first < 0xf0 ? 3
                        : first < 0xf5 && first >= 0xf0 ? 4
                                                        : 0;
    size_t length = size > 0 ? 1 : 0;
    while (length > 0 && length < size && (static_cast<unsigned char>(text[length]) & 0xc0) == 0x80) ++length;
    const unsigned char second = size > 1 ? static_cast<unsigned char>(text[1]) : 0;
    const bool overlong = (first == 0xe0 && second < 0xa0) || (first == 0xf0 && second < 0x90);
    const bool outside = (first == 0xed && second > 0x9f) || (first == 0xf4 && second > 0x8f);  // surrogates; above U+10FFFF
    if (length == 0 || length != size || overlong || outside) {
      valid += '?';
      ++text;
    } else {
      valid.append(text, size);
      text += size;
    }
  }
  return valid;
}

MraError* MakeError(MraErrorKind kind, const char* message) noexcept {
  try {
    return new MraError{kind, Utf8(message)};
  } catch (...) {
    return NoMemory();
  }
}

template <class Body>
MraError* AtBorder(Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Failure& failure) {
    return MakeError(failure.kind, failure.what());
  } catch (const std::bad_alloc&) {
    return NoMemory();
  } catch (const std::exception& error) {
    return MakeError(MRA_INTERNAL_ERROR, error.what());
  } catch (...) {
    return MakeError(MRA_INTERNAL_ERROR, "unknown error");
  }
}

void RefuseNull(const void* pointer, const char* name) {
  if (pointer == nullptr) throw Failure(MRA_CONTRACT_ERROR, std::string(name) + " is NULL: pass a pointer");
}

void CheckChoice(const char* name, const std::string& value, const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) != allowed.end()) return;
  throw Failure(MRA_BACKEND_ERROR,
                std::string(name) + " is " + mra::embed::Quoted(value) + ": use one of " + mra::embed::Joined(allowed));
}

std::string TextOr(const char* text, const char* otherwise) { return text == nullptr || *text == '\0' ? otherwise : text; }

MraSession* Open(const char* path, const MraSessionOptions& options) {
  const std::string backend = TextOr(options.backend, "onnxruntime");
  CheckChoice("backend", backend, {"onnxruntime", "tensorrt"});
  const bool tensorrt = backend == "tensorrt";
  const std::string device = TextOr(options.device, tensorrt ? "cuda" : "cpu");
  CheckChoice("device", device, {"cpu", "cuda"});
  const auto refuse = [](const std::string& message) { throw Failure(MRA_CONTRACT_ERROR, message); };
  if (options.intra_op_threads < 0) {
    refuse("intra_op_threads is " + std::to_string(options.intra_op_threads) + ": it must be 1 or more");
  }
  if (options.device_index < 0) refuse("device_index is " + std::to_string(options.device_index) + ": it must be 0 or more");
  const std::string engine = TextOr(options.engine, "");
  if (!tensorrt && (!engine.empty() || options.allow_embedded_plugin)) {
    refuse("engine and allow_embedded_plugin are for backend 'tensorrt'");
  }
  Bundle bundle = Bundle::Load(path, options.verify_hashes != 0);
  if (tensorrt && (!options.use_op_library || options.intra_op_threads != 0)) {
    refuse(
        "use_op_library and intra_op_threads are not for backend 'tensorrt': `mra-export engine --no-plugin` builds an "
        "engine without the operator's library");
  }
  if (tensorrt && device != "cuda") {
    throw Failure(MRA_BACKEND_ERROR, "device is 'cpu': backend 'tensorrt' runs on device 'cuda' only");
  }
  BackendOptions chosen = {device,
                           options.use_op_library != 0,
                           options.allow_embedded_plugin != 0,
                           options.intra_op_threads,
                           options.device_index,
                           {},
                           TextOr(options.onnxruntime_library, ""),
                           TextOr(options.tensorrt_library, "")};
  if (!engine.empty()) chosen.engine = engine;
  auto running = tensorrt ? mra::embed::MakeTensorRt(bundle, chosen) : mra::embed::MakeOnnxRuntime(bundle, chosen);
  return new MraSession{std::move(bundle), backend, device, std::move(running)};
}

const mra::embed::Output& At(const MraOutputs* outputs, size_t index) { return outputs->outputs[index]; }

}  // namespace

extern "C" {

MraErrorKind mra_error_kind(const MraError* error) { return error->kind; }
const char* mra_error_message(const MraError* error) { return error->message.c_str(); }
void mra_error_free(MraError* error) {
  if (error != NoMemory()) delete error;
}

int32_t mra_session_contract_version(void) { return mra::embed::kContractVersion; }

void mra_session_options_init(MraSessionOptions* options) {
  *options = {};
  options->struct_size = sizeof *options;
  options->verify_hashes = 1;
  options->use_op_library = 1;
}

MraError* mra_session_open(const char* bundle, const MraSessionOptions* options, MraSession** session) {
  return AtBorder([&] {
    RefuseNull(session, "session");
    *session = nullptr;
    RefuseNull(bundle, "bundle");
    MraSessionOptions chosen;
    mra_session_options_init(&chosen);
    if (options != nullptr) {
      if (options->struct_size != sizeof chosen) {
        throw Failure(MRA_CONTRACT_ERROR, "struct_size is " + std::to_string(options->struct_size) + ", this library's is " +
                                              std::to_string(sizeof chosen) +
                                              ": call mra_session_options_init, and build with the header of this version");
      }
      chosen = *options;
    }
    *session = Open(bundle, chosen);
  });
}

void mra_session_close(MraSession* session) { delete session; }

const char* mra_session_backend(const MraSession* session) { return session->backend.c_str(); }
const char* mra_session_device(const MraSession* session) { return session->device.c_str(); }
const char* mra_session_task(const MraSession* session) { return session->bundle.manifest.task.c_str(); }
const char* mra_session_manifest(const MraSession* session) { return session->bundle.manifest.text.c_str(); }
int64_t mra_session_vocab_size(const MraSession* session) { return session->bundle.manifest.vocab_size; }
int64_t mra_session_max_length(const MraSession* session) { return session->bundle.manifest.max_length; }

MraError* mra_session_run(const MraSession* session, const MraInput* inputs, size_t count, MraOutputs** outputs) {
  return AtBorder([&] {
    RefuseNull(outputs, "outputs");
    *outputs = nullptr;
    RefuseNull(session, "session");
    if (count > 0) RefuseNull(inputs, "inputs");
    *outputs = new MraOutputs{session->running->Run(mra::embed::Prepare(session->bundle.manifest, inputs, count))};
  });
}

size_t mra_outputs_count(const MraOutputs* outputs) { return outputs->outputs.size(); }
const char* mra_outputs_name(const MraOutputs* outputs, size_t index) { return At(outputs, index).name.c_str(); }
MraElementType mra_outputs_type(const MraOutputs* outputs, size_t index) { return At(outputs, index).type; }
size_t mra_outputs_rank(const MraOutputs* outputs, size_t index) { return At(outputs, index).shape.size(); }
const int64_t* mra_outputs_shape(const MraOutputs* outputs, size_t index) { return At(outputs, index).shape.data(); }
size_t mra_outputs_elements(const MraOutputs* outputs, size_t index) { return At(outputs, index).elements; }
const void* mra_outputs_data(const MraOutputs* outputs, size_t index) { return At(outputs, index).data.get(); }
void mra_outputs_copy_float32(const MraOutputs* outputs, size_t index, float* values) {
  const mra::embed::Output& output = At(outputs, index);
  for (size_t place = 0; place < output.elements; ++place) values[place] = mra::embed::ToFloat32(output, place);
}
void mra_outputs_free(MraOutputs* outputs) { delete outputs; }

MraError* mra_session_compare_golden(const MraSession* session, MraGolden** golden) {
  return AtBorder([&] {
    RefuseNull(golden, "golden");
    *golden = nullptr;
    RefuseNull(session, "session");
    auto made = std::make_unique<MraGolden>();
    made->results = mra::embed::CompareGolden(session->bundle, *session->running);
    for (const GoldenResult& row : made->results) {
      made->rows.push_back(
          {row.name.c_str(), row.output.c_str(), row.status.c_str(), row.reason.c_str(), row.max_abs, row.needed, row.tolerance});
    }
    *golden = made.release();
  });
}
size_t mra_golden_count(const MraGolden* golden) { return golden->rows.size(); }
const MraGoldenRow* mra_golden_row(const MraGolden* golden, size_t index) { return &golden->rows[index]; }
void mra_golden_free(MraGolden* golden) { delete golden; }

MraError* mra_session_validate(const MraSession* session) {
  return AtBorder([&] {
    RefuseNull(session, "session");
    for (const GoldenResult& row : mra::embed::CompareGolden(session->bundle, *session->running)) {
      if (row.status != "fail") continue;
      throw Failure(MRA_PARITY_ERROR, session->bundle.path + ": " + session->backend + " on " + session->device +
                                          " differs from PyTorch in " + row.output + ", " + row.name + ": " + row.reason);
    }
  });
}

}  // extern "C"
