// A library opened at run time. It stays open until the process ends: runtimes leave threads and callbacks behind.
#ifndef MRA_EMBED_SHARED_LIBRARY_H_
#define MRA_EMBED_SHARED_LIBRARY_H_

#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "failure.h"

namespace mra::embed {

class SharedLibrary {
 public:
  // The library at `path`, or where that is empty at $variable, or else the first of `names` that the system's loader finds.
  // Throws Failure of `kind`: `missing`, the loader's words, then the fix.
  SharedLibrary(const std::string& path, const char* variable, const std::vector<std::string>& names, MraErrorKind kind,
                const std::string& missing, const std::string& fix) {
    std::vector<std::string> candidates = names;
    const char* value = std::getenv(variable);
    if (value != nullptr && *value != '\0') candidates = {value};
    if (!path.empty()) candidates = {path};
    std::string reason;
    for (const std::string& candidate : candidates) {
      handle_ = dlopen(candidate.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (handle_ != nullptr) return;
      const char* error = dlerror();
      reason += (reason.empty() ? "" : "; ") + std::string(error == nullptr ? "no reason given" : error);
    }
    throw Failure(kind, missing + " (" + reason + "): " + fix);
  }

  template <class Function>
  Function Find(const char* name) const {
    return reinterpret_cast<Function>(dlsym(handle_, name));
  }

 private:
  void* handle_ = nullptr;
};

}  // namespace mra::embed

#endif  // MRA_EMBED_SHARED_LIBRARY_H_
