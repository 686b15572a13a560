// A bundle on disk: manifest.json read and checked as mra_export/bundle.py does it, in the same order and with the same words.
#ifndef MRA_EMBED_BUNDLE_H_
#define MRA_EMBED_BUNDLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "profiles.h"

namespace mra::embed {

constexpr int kSchemaVersion = 1;
constexpr int kContractVersion = 1;  // CONTRACT_VERSION of mra_export/contract.py
constexpr const char* kManifest = "manifest.json";
constexpr const char* kModel = "model.onnx";
constexpr const char* kOpLibrary = "lib/libmra_ort.so";
constexpr const char* kGolden = "golden.npz";

// A graph input or output. axes: a number, or the name of one that may change per call.
struct TensorInfo {
  std::string name;
  std::string dtype;
  std::vector<std::variant<int64_t, std::string>> axes;
};

struct FileEntry {
  std::string sha256;
  uint64_t size;
};

struct Plugin {
  std::string name, version, space, library, sha256;
  bool embedded;
};

// One row of the manifest's engines, as mra_export/plan.py has it.
struct EngineEntry {
  std::string file, backend, builder, dtype;
  std::vector<Profile> profiles;
  std::optional<Plugin> plugin;
  std::vector<std::string> compute_capabilities;
  std::optional<std::string> driver;
  bool version_compatible;
};

struct Manifest {
  std::string text;  // the file, whole
  std::string task, dtype;
  int64_t max_length, vocab_size, type_vocab_size;
  bool padding_invariant;
  std::vector<TensorInfo> inputs, outputs;
  std::map<std::string, FileEntry> files;
  std::vector<std::string> file_order;
};

struct Bundle {
  std::string path;
  Manifest manifest;

  // Reads the manifest and checks every file that it lists. Throws Failure.
  static Bundle Load(const std::string& path, bool verify_hashes);

  bool Has(const std::string& name) const { return manifest.files.count(name) > 0; }
  std::string File(const std::string& name) const;  // its path. Throws Failure where the manifest lists none of that name.
  std::vector<EngineEntry> Engines() const;         // Throws Failure where the manifest's rows are not ours.
};

std::string FileSha256(const std::string& path);
std::string ReadFile(const std::string& path);

// Python's "fp32" for "int8", else itself: the dtype of a bundle's float tensors.
std::string FloatDtype(const std::string& precision);

}  // namespace mra::embed

#endif  // MRA_EMBED_BUNDLE_H_
