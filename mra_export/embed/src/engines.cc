#include "engines.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <vector>

#include "cuda_driver.h"
#include "failure.h"

namespace mra::embed {
namespace {

[[noreturn]] void Refuse(const std::string& message) { throw Failure(MRA_ENGINE_ERROR, message); }

// "10.13.3.9" -> numbers.
std::vector<int> Numbers(const std::string& version) {
  std::vector<int> numbers;
  for (size_t start = 0; start <= version.size();) {
    const size_t end = std::min(version.find('.', start), version.size());
    numbers.push_back(std::atoi(version.substr(start, end - start).c_str()));
    start = end + 1;
  }
  return numbers;
}

// As Python prints bytes.
std::string BytesText(const std::string& bytes) {
  const char quote = bytes.find('\'') != std::string::npos && bytes.find('"') == std::string::npos ? '"' : '\'';
  std::string text = std::string("b") + quote;
  for (const char letter : bytes) {
    const auto code = static_cast<unsigned char>(letter);
    char escaped[5];
    std::snprintf(escaped, sizeof escaped, "\\x%02x", code);
    if (letter == '\\' || letter == quote) {
      text += std::string("\\") + letter;
    } else if (letter == '\n' || letter == '\r' || letter == '\t') {
      text += letter == '\n' ? "\\n" : letter == '\r' ? "\\r" : "\\t";
    } else {
      text += code < 0x20 || code >= 0x7f ? std::string(escaped) : std::string(1, letter);
    }
  }
  return text + quote;
}

struct Header {
  std::string backend, version;
};

// Read off real plans: magic (4), 12 bytes, size of the whole (8), version in four parts.
Header ReadHeader(const std::string& path) {
  constexpr size_t kSize = 28;
  const uint64_t size = std::filesystem::file_size(path);
  std::ifstream stream(path, std::ios::binary);
  std::string start(kSize, '\0');
  stream.read(start.data(), kSize);
  start.resize(static_cast<size_t>(stream.gcount()));
  if (start.size() < kSize) {
    Refuse(path + " is truncated: it has " + std::to_string(size) +
           " bytes, less than the header of a plan: build the engine again");
  }
  if (start.compare(1, 3, "trt") != 0) {
    Refuse(path + " is not a TensorRT plan: it begins with " + BytesText(start.substr(0, 8)) + ": build the engine again");
  }
  const bool rtx = start[0] == 'v';
  uint64_t wanted = 0;
  std::memcpy(&wanted, start.data() + 16, sizeof wanted);
  if (rtx && size < wanted) {
    Refuse(path + " is truncated: " + std::to_string(size) + " bytes, its header says " + std::to_string(wanted) +
           ": copy or build the engine again");
  }
  std::vector<std::string> parts;
  for (size_t part = 24; part < kSize; ++part) parts.push_back(std::to_string(static_cast<unsigned char>(start[part])));
  return {rtx ? "tensorrt-rtx" : "tensorrt", Joined(parts, ".")};
}

// The plan and its plugin library are what the manifest says, down to the header.
void CheckFiles(const Bundle& bundle, const EngineEntry& entry, bool allow_embedded_plugin) {
  const std::string path = bundle.File(entry.file), again = Rebuild(bundle, entry);
  const Header header = ReadHeader(path);
  if (header.backend != entry.backend || header.version != entry.builder) {
    Refuse(path + " is a plan of " + header.backend + " " + header.version + ", the manifest says " + entry.backend + " " +
           entry.builder + ": " + again);
  }
  VerifyHash(bundle, entry.file, FileSha256(path));
  if (!entry.plugin) return;
  const Plugin& plugin = *entry.plugin;
  if (plugin.name != kPluginName || plugin.version != kPluginVersion || plugin.space != kPluginNamespace) {
    Refuse(path + " needs plugin " + plugin.name + " version " + Quoted(plugin.version) + ", this package has version " +
           Quoted(kPluginVersion) + ": " + again);
  }
  if (plugin.embedded) {
    if (allow_embedded_plugin) return;
    Refuse(path +
           " brings its own plugin code, which runs when it is loaded: pass allow_embedded_plugin=True if you trust "
           "where it comes from, or build it without --embed-plugin: mra-export engine " +
           bundle.path);
  }
  if (!bundle.Has(plugin.library)) {
    throw Failure(MRA_PLUGIN_LOAD_ERROR,
                  bundle.path + " holds no " + plugin.library + ", which " + entry.file + " needs: " + again);
  }
  VerifyHash(bundle, plugin.library, FileSha256(bundle.File(plugin.library)));
  if (bundle.manifest.files.at(plugin.library).sha256 != plugin.sha256) {
    Refuse(path + " was built with another " + plugin.library + " (sha256 " + plugin.sha256.substr(0, 16) + "...): " + again);
  }
}

// An engine runs in the version that built it; a version-compatible one in later ones of that major version, too.
void CheckVersion(const Bundle& bundle, const EngineEntry& entry, const std::string& installed) {
  const std::vector<int> built = Numbers(entry.builder), here = Numbers(installed);
  const size_t parts = std::min<size_t>({3, built.size(), here.size()});
  if (std::equal(built.begin(), built.begin() + static_cast<std::ptrdiff_t>(parts), here.begin())) return;
  if (entry.version_compatible && built[0] == here[0] && built <= here) return;
  Refuse(bundle.File(entry.file) + " was built by " + entry.backend + " " + entry.builder + ", installed is " + installed + ": " +
         Rebuild(bundle, entry) + ", or install that version");
}

bool Fits(const std::string& here, const std::string& wanted) {
  if (wanted.empty() || wanted.back() != '+') return here == wanted;
  return Numbers(here) >= Numbers(wanted.substr(0, wanted.size() - 1));
}

void CheckGpu(const Bundle& bundle, const EngineEntry& entry, int index) {
  const CudaDriver& driver = CudaDriver::Get();
  const std::string path = bundle.File(entry.file), again = Rebuild(bundle, entry);
  if (driver.gpus.empty()) {
    Refuse(path + " runs on an NVIDIA GPU, and " + driver.why_none + ": use backend 'onnxruntime' here");
  }
  if (static_cast<size_t>(index) >= driver.gpus.size()) {
    Refuse("device_index is " + std::to_string(index) + ", this machine has " + std::to_string(driver.gpus.size()) +
           " GPUs: use 0 to " + std::to_string(driver.gpus.size() - 1));
  }
  const Gpu& here = driver.gpus[static_cast<size_t>(index)];
  const auto fits = [&](const std::string& wanted) { return Fits(here.compute_capability, wanted); };
  if (std::none_of(entry.compute_capabilities.begin(), entry.compute_capabilities.end(), fits)) {
    Refuse(path + " runs on compute capability " + Joined(entry.compute_capabilities) + ", " + here.name + " has " +
           here.compute_capability + ": " + again + " here");
  }
  if (entry.driver && (driver.version.empty() || Numbers(driver.version)[0] < Numbers(*entry.driver)[0])) {
    Refuse(path + " was built where the driver runs CUDA " + *entry.driver + ", here it runs CUDA " +
           (driver.version.empty() ? "None" : driver.version) + ": update the driver, or " + again + " here");
  }
}

}  // namespace

std::string Rebuild(const Bundle& bundle, const EngineEntry& entry) {
  return "mra-export engine " + bundle.path + " --backend " + entry.backend + (entry.plugin ? "" : " --no-plugin");
}

void VerifyHash(const Bundle& bundle, const std::string& name, const std::string& sha256) {
  if (sha256 == bundle.manifest.files.at(name).sha256) return;
  throw Failure(MRA_BUNDLE_ERROR,
                bundle.path + "/" + name + " is altered: its sha256 is not the manifest's: copy the bundle or build it again");
}

EngineEntry ChooseEngine(const Bundle& bundle, const std::optional<std::string>& file, bool allow_embedded_plugin, int device_index,
                         const InstalledVersion& installed) {
  std::vector<EngineEntry> found = bundle.Engines();
  if (found.empty()) Refuse(bundle.path + " holds no engine: mra-export engine " + bundle.path);
  if (file) {
    std::vector<std::string> names;
    for (const EngineEntry& entry : found) names.push_back(entry.file);
    const auto other = [&](const EngineEntry& entry) {
      return entry.file != *file && std::filesystem::path(entry.file).filename() != *file;
    };
    found.erase(std::remove_if(found.begin(), found.end(), other), found.end());
    if (found.empty()) Refuse(bundle.path + " has no engine " + *file + ": it has " + Joined(names));
  }
  std::vector<Failure> reasons;
  for (const EngineEntry& entry : found) {
    try {
      CheckFiles(bundle, entry, allow_embedded_plugin);
      CheckVersion(bundle, entry, installed(entry.backend));
      CheckGpu(bundle, entry, device_index);
      return entry;
    } catch (const Failure& failure) {
      reasons.push_back(failure);
    }
  }
  if (reasons.size() == 1) throw reasons[0];
  std::string all = "none of the engines of " + bundle.path + " fits here.";
  for (const Failure& reason : reasons) all += std::string(" (") + reason.what() + ")";
  Refuse(all);
}

}  // namespace mra::embed
