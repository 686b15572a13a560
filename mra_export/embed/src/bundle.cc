#include "bundle.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <system_error>

#include "failure.h"
#include "sha256.h"

namespace mra::embed {
namespace {

using Json = nlohmann::ordered_json;
namespace fs = std::filesystem;

constexpr const char* kRequired[] = {kModel, "config.json", kGolden};
const std::vector<std::string> kPrecisions = {"fp32", "fp16", "bf16", "int8"};
const std::vector<std::string> kAttributes = {
    "num_heads",        "num_blocks", "scale", "approx_mode", "initial_prior_first_n_blocks", "initial_prior_diagonal_n_blocks",
    "padding_invariant"};

[[noreturn]] void Refuse(const std::string& message) { throw Failure(MRA_BUNDLE_ERROR, message); }

// What is wrong with a value, before the path of the file is put in front.
struct Invalid {
  std::string where, what;
};

// As Python prints it.
std::string Repr(const Json& value) {
  if (value.is_null()) return "None";
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (value.is_string()) return Quoted(value.get<std::string>());
  std::vector<std::string> parts;
  if (value.is_array()) {
    for (const Json& entry : value) parts.push_back(Repr(entry));
    return "[" + Joined(parts) + "]";
  }
  if (value.is_object()) {
    for (const auto& [key, entry] : value.items()) parts.push_back(Quoted(key) + ": " + Repr(entry));
    return "{" + Joined(parts) + "}";
  }
  return value.dump();
}

// Reads one JSON object whose every field must be known: the words are those of the Python runtime's validator.
class Fields {
 public:
  Fields(const Json& object, const std::string& where, const std::string& kind) : object_(object), where_(where) {
    if (!object.is_object()) throw Invalid{where, "Input should be a valid dictionary or instance of " + kind};
  }

  std::string At(const std::string& name) const { return where_.empty() ? name : where_ + "." + name; }

  const Json& Any(const char* name) {
    known_.push_back(name);
    const auto found = object_.find(name);
    if (found == object_.end()) throw Invalid{At(name), "Field required"};
    return *found;
  }
  const Json* Optional(const char* name) {
    known_.push_back(name);
    const auto found = object_.find(name);
    return found == object_.end() ? nullptr : &*found;
  }
  std::string String(const char* name) { return AsString(Any(name), At(name)); }
  int64_t Int(const char* name) {
    const Json& value = Any(name);
    if (value.is_string()) throw Invalid{At(name), "Input should be a valid integer, unable to parse string as an integer"};
    if (!value.is_number_integer()) throw Invalid{At(name), "Input should be a valid integer"};
    return value.get<int64_t>();
  }
  bool Bool(const char* name) {
    const Json& value = Any(name);
    if (value.is_string()) throw Invalid{At(name), "Input should be a valid boolean, unable to interpret input"};
    if (!value.is_boolean()) throw Invalid{At(name), "Input should be a valid boolean"};
    return value.get<bool>();
  }
  const Json& List(const char* name) { return AsList(Any(name), At(name)); }
  const Json& Dictionary(const char* name) {
    const Json& value = Any(name);
    if (!value.is_object()) throw Invalid{At(name), "Input should be a valid dictionary"};
    return value;
  }
  void NoMore() const {
    for (const auto& [name, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), name) == known_.end()) {
        throw Invalid{At(name), "Extra inputs are not permitted"};
      }
    }
  }

  static std::string AsString(const Json& value, const std::string& where) {
    if (!value.is_string()) throw Invalid{where, "Input should be a valid string"};
    return value.get<std::string>();
  }
  static const Json& AsList(const Json& value, const std::string& where) {
    if (!value.is_array()) throw Invalid{where, "Input should be a valid list"};
    return value;
  }

 private:
  const Json& object_;
  std::string where_;
  std::vector<std::string> known_;
};

std::vector<TensorInfo> Tensors(const Json& list, const std::string& where) {
  std::vector<TensorInfo> tensors;
  for (size_t index = 0; index < list.size(); ++index) {
    Fields fields(list[index], where + "." + std::to_string(index), "Tensor");
    TensorInfo tensor = {fields.String("name"), fields.String("dtype"), {}};
    const Json& axes = fields.List("axes");
    for (size_t axis = 0; axis < axes.size(); ++axis) {
      if (axes[axis].is_number_integer()) {
        tensor.axes.emplace_back(axes[axis].get<int64_t>());
      } else {
        tensor.axes.emplace_back(Fields::AsString(axes[axis], fields.At("axes") + "." + std::to_string(axis) + ".str"));
      }
    }
    fields.NoMore();
    tensors.push_back(tensor);
  }
  return tensors;
}

// The operator's attributes, which mra_export/contract.py's Attributes refuses or takes.
void CheckAttributes(const Json& attributes) {
  const auto refuse = [](const std::string& what) { throw Invalid{"attributes", "Value error, " + what}; };
  bool same = attributes.size() == kAttributes.size();
  for (const std::string& name : kAttributes) same = same && attributes.contains(name);
  if (!same) refuse("the operator's attributes are " + Joined(kAttributes));
  const auto at_least = [&](const char* name, int least) {
    const Json& value = attributes[name];
    if (!value.is_number() || value.get<double>() < least) {
      refuse(std::string(name) + " is " + Repr(value) + ": it must be " + std::to_string(least) + " or more");
    }
  };
  at_least("num_heads", 1);
  at_least("num_blocks", 1);
  at_least("initial_prior_first_n_blocks", 0);
  at_least("initial_prior_diagonal_n_blocks", 0);
  const Json& mode = attributes["approx_mode"];
  if (mode != "full" && mode != "sparse") refuse("approx_mode is " + Repr(mode) + ": use one of full, sparse");
  const Json& scale = attributes["scale"];
  if (!scale.is_number() || !(scale.get<double>() > 0) || std::isinf(scale.get<double>())) {
    refuse("scale is " + Repr(scale) + ": it must be positive and finite");
  }
}

// A relative POSIX path in its shortest form that leads to no place outside.
bool StaysInside(const std::string& name) {
  if (name.empty() || name == "." || name == kManifest || name.front() == '/' || name.back() == '/') return false;
  if (name.find_first_of("\\:") != std::string::npos || name.find("//") != std::string::npos) return false;
  for (const fs::path& part : fs::path(name)) {
    if (part == ".." || part == ".") return false;
  }
  return true;
}

bool IsSha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

void ReadFiles(const Json& files, Manifest* manifest) {
  for (const auto& [name, entry] : files.items()) {
    Fields fields(entry, "files." + name, "FileEntry");
    const std::string sha256 = fields.String("sha256");
    if (!IsSha256(sha256)) throw Invalid{fields.At("sha256"), "String should match pattern '^[0-9a-f]{64}$'"};
    const int64_t size = fields.Int("size");
    if (size < 0) throw Invalid{fields.At("size"), "Input should be greater than or equal to 0"};
    fields.NoMore();
    manifest->files[name] = {sha256, static_cast<uint64_t>(size)};
    manifest->file_order.push_back(name);
  }
  for (const std::string& name : manifest->file_order) {
    if (!StaysInside(name)) throw Invalid{"files", "Value error, file name " + Quoted(name) + " does not stay inside the bundle"};
  }
}

Manifest Validated(const Json& raw) {
  Manifest manifest;
  Fields fields(raw, "", "Manifest");
  fields.Optional("schema_version"), fields.Optional("contract_version");  // checked before
  Fields model(fields.Any("model"), "model", "ModelInfo");
  model.String("architecture"), model.String("model_type");
  for (const char* name : {"hidden_size", "num_hidden_layers", "num_attention_heads"}) model.Int(name);
  manifest.max_length = model.Int("max_position_embeddings");
  manifest.vocab_size = model.Int("vocab_size");
  manifest.type_vocab_size = model.Int("type_vocab_size");
  model.Int("num_labels");
  model.NoMore();
  manifest.task = fields.String("task");
  manifest.dtype = fields.String("dtype");
  if (std::find(kPrecisions.begin(), kPrecisions.end(), manifest.dtype) == kPrecisions.end()) {
    throw Invalid{"dtype", "Value error, use one of " + Joined(kPrecisions)};
  }
  fields.Int("opset");
  manifest.padding_invariant = fields.Bool("padding_invariant");
  CheckAttributes(fields.Dictionary("attributes"));
  manifest.inputs = Tensors(fields.List("inputs"), "inputs");
  manifest.outputs = Tensors(fields.List("outputs"), "outputs");
  ReadFiles(fields.Dictionary("files"), &manifest);
  for (const auto& [name, version] : fields.Dictionary("versions").items()) Fields::AsString(version, "versions." + name);
  fields.String("source");
  const Json* parity = fields.Optional("parity");
  if (parity != nullptr && !parity->is_null()) Fields::AsList(*parity, "parity");
  const Json* engines = fields.Optional("engines");
  if (engines != nullptr) {
    Fields::AsList(*engines, "engines");
    for (size_t index = 0; index < engines->size(); ++index) {
      if (!(*engines)[index].is_object()) throw Invalid{"engines." + std::to_string(index), "Input should be a valid dictionary"};
    }
  }
  const Json* quantization = fields.Optional("quantization");
  if (quantization != nullptr && !quantization->is_null()) Fields(*quantization, "quantization", "Quantization");
  fields.NoMore();
  return manifest;
}

void CheckVersion(const std::string& path, const Json& raw, const char* name, int known) {
  const auto entry = raw.find(name);
  const Json found = entry == raw.end() ? Json() : *entry;
  if (found.is_number() && found == known) return;
  if (found.is_number_integer() && found > known) {
    Refuse(path + " has " + name + " " + Repr(found) + ", this package knows " + std::to_string(known) +
           ": install a newer mra-export, or export the bundle again");
  }
  Refuse(path + " has " + name + " " + Repr(found) + ", this package needs " + std::to_string(known) +
         ": export the bundle again with this package");
}

Manifest ReadManifest(const std::string& folder) {
  const std::string path = folder + "/" + kManifest;
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) Refuse(folder + " is not a folder: pass the folder that mra-export export wrote");
  if (!fs::exists(path, ignored)) {
    Refuse(folder + " has no " + kManifest + ", so it is not a complete bundle: export it again");
  }
  std::string text;
  Json raw;
  try {
    text = ReadFile(path);
    raw = Json::parse(text);
  } catch (const std::exception& error) {
    Refuse(path + " cannot be read (" + error.what() + "): export the bundle again");
  }
  if (!raw.is_object()) Refuse(path + " is not a JSON object: export the bundle again");
  CheckVersion(path, raw, "schema_version", kSchemaVersion);
  CheckVersion(path, raw, "contract_version", kContractVersion);
  try {
    Manifest manifest = Validated(raw);
    manifest.text = text;
    for (const char* name : kRequired) {
      if (manifest.files.count(name) == 0) Refuse(path + " does not list " + name + ": export the bundle again");
    }
    return manifest;
  } catch (const Invalid& invalid) {
    Refuse(path + ": " + invalid.where + ": " + invalid.what + ": export the bundle again");
  }
}

void CheckFile(const std::string& folder, const std::string& name, const FileEntry& entry, bool verify_hash) {
  const std::string path = folder + "/" + name;
  std::error_code error;
  if (!fs::is_regular_file(path, error)) {
    Refuse(name + " is missing from " + path.substr(0, path.rfind('/')) + ": export or copy the bundle again");
  }
  const uint64_t size = fs::file_size(path);
  if (size != entry.size) {
    Refuse(path + " is " + (size < entry.size ? "truncated" : "altered") + ": " + std::to_string(size) +
           " bytes, the manifest says " + std::to_string(entry.size) + ": export or copy the bundle again");
  }
  if (verify_hash && FileSha256(path) != entry.sha256) {
    Refuse(path + " is altered: its sha256 is not the manifest's: export or copy the bundle again");
  }
}

// As Python's Path prints it: no empty and no "." parts, no slash at the end.
std::string PathText(const std::string& path) {
  std::string text = path.rfind('/', 0) == 0 ? "/" : "";
  size_t start = 0;
  while (start <= path.size()) {
    const size_t end = std::min(path.find('/', start), path.size());
    const std::string part = path.substr(start, end - start);
    if (!part.empty() && part != ".") text += (text.empty() || text.back() == '/' ? "" : "/") + part;
    start = end + 1;
  }
  return text.empty() ? "." : text;
}

std::vector<int64_t> Shape(const Json& list, const std::string& where) {
  std::vector<int64_t> shape;
  Fields::AsList(list, where);
  for (size_t axis = 0; axis < list.size(); ++axis) {
    if (!list[axis].is_number_integer()) throw Invalid{where + "." + std::to_string(axis), "Input should be a valid integer"};
    shape.push_back(list[axis].get<int64_t>());
  }
  return shape;
}

EngineEntry Engine(const Json& row) {
  EngineEntry entry = {};
  Fields fields(row, "", "EngineEntry");
  entry.file = fields.String("file");
  entry.backend = fields.String("backend");
  entry.builder = fields.String("builder");
  entry.dtype = fields.String("dtype");
  const Json& profiles = fields.List("profiles");
  for (size_t index = 0; index < profiles.size(); ++index) {
    const std::string at = "profiles." + std::to_string(index);
    if (!profiles[index].is_object() || profiles[index].empty()) throw Invalid{at, "Input should be a valid dictionary"};
    const auto first = profiles[index].begin();  // every input has the same shapes
    Fields shapes(first.value(), at + "." + first.key(), "Profile");
    const auto shape = [&](const char* kind) { return Shape(shapes.Any(kind), shapes.At(kind)); };
    entry.profiles.push_back({shape("min"), shape("opt"), shape("max")});
  }
  fields.Int("plugin_layers");
  const Json& plugin = fields.Any("plugin");
  if (!plugin.is_null()) {
    Fields of(plugin, "plugin", "Plugin");
    entry.plugin = Plugin{of.String("name"),    of.String("version"), of.String("namespace"),
                          of.String("library"), of.String("sha256"),  of.Bool("embedded")};
    of.NoMore();
  }
  const Json& capabilities = fields.List("compute_capabilities");
  for (size_t index = 0; index < capabilities.size(); ++index) {
    entry.compute_capabilities.push_back(Fields::AsString(capabilities[index], "compute_capabilities." + std::to_string(index)));
  }
  const Json& driver = fields.Any("driver");
  if (!driver.is_null()) entry.driver = Fields::AsString(driver, "driver");
  const Json& options = fields.Dictionary("options");
  entry.version_compatible = options.contains("version_compatible") && options["version_compatible"] == true;
  fields.NoMore();
  return entry;
}

}  // namespace

Bundle Bundle::Load(const std::string& path, bool verify_hashes) {
  const std::string folder = PathText(path);
  Bundle bundle = {folder, ReadManifest(folder)};
  for (const std::string& name : bundle.manifest.file_order) {
    CheckFile(folder, name, bundle.manifest.files.at(name), verify_hashes);
  }
  return bundle;
}

std::string Bundle::File(const std::string& name) const {
  if (Has(name)) return path + "/" + name;
  std::vector<std::string> names;
  for (const auto& [known, entry] : manifest.files) names.push_back(known);
  Refuse(path + " has no file " + name + ": it has " + Joined(names));
}

std::vector<EngineEntry> Bundle::Engines() const {
  std::vector<EngineEntry> engines;
  const Json raw = Json::parse(manifest.text);
  const auto rows = raw.find("engines");
  if (rows == raw.end()) return engines;
  try {
    for (const Json& row : *rows) engines.push_back(Engine(row));
  } catch (const Invalid& invalid) {
    Refuse(path + ": manifest.json, engines: " + invalid.where + ": " + invalid.what + ": build the engine again");
  }
  return engines;
}

std::string FileSha256(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) Refuse(path + " cannot be read (" + std::strerror(errno) + "): check its permissions");
  Sha256 digest;
  const size_t chunk = size_t{1} << 20;
  const std::unique_ptr<char[]> buffer(new char[chunk]);
  while (stream) {
    stream.read(buffer.get(), static_cast<std::streamsize>(chunk));
    digest.Update(buffer.get(), static_cast<size_t>(stream.gcount()));
  }
  if (stream.bad()) Refuse(path + " cannot be read (" + std::strerror(errno) + "): copy the bundle again");
  return digest.HexDigest();
}

std::string ReadFile(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) Refuse(path + " cannot be read (" + std::strerror(errno) + "): check its permissions");
  std::string text(static_cast<size_t>(fs::file_size(path)), '\0');
  stream.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(stream.gcount()));
  return text;
}

std::string FloatDtype(const std::string& precision) { return precision == "int8" ? "fp32" : precision; }

}  // namespace mra::embed
