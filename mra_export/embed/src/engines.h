// Does an engine fit this machine? Asked before TensorRT sees a byte of it, as mra_export/engine_checks.py and profiles.py do.
#ifndef MRA_EMBED_ENGINES_H_
#define MRA_EMBED_ENGINES_H_

#include <functional>
#include <optional>
#include <string>

#include "bundle.h"

namespace mra::embed {

constexpr const char* kPluginName = "MraAttention";  // PLUGIN_NAME, PLUGIN_VERSION and PLUGIN_NAMESPACE of contract.py
constexpr const char* kPluginVersion = "1";
constexpr const char* kPluginNamespace = "";

// "tensorrt" or "tensorrt-rtx" -> the version of the library here, four parts. Throws Failure where there is none.
using InstalledVersion = std::function<std::string(const std::string& backend)>;

// The first of the bundle's engines that fits here, or the one of that name (with or without its folder). Throws Failure with what
// does not fit and the command that rebuilds it; where there are several engines, with that of each.
EngineEntry ChooseEngine(const Bundle& bundle, const std::optional<std::string>& file, bool allow_embedded_plugin, int device_index,
                         const InstalledVersion& installed);

// The command that builds this engine again.
std::string Rebuild(const Bundle& bundle, const EngineEntry& entry);

// Refuses a file of the bundle whose hash is not the manifest's.
void VerifyHash(const Bundle& bundle, const std::string& name, const std::string& sha256);

}  // namespace mra::embed

#endif  // MRA_EMBED_ENGINES_H_
