// libmra_trt_register: registers the plugin of the libmra_trt.so beside it with TensorRT, for servers that only open plugin
// libraries: Triton's `--backend-config=tensorrt,plugins=` is dlopen(RTLD_NOW | RTLD_LOCAL) and nothing more, LD_PRELOAD likewise.
// Opening this library does what IPluginRegistry::loadLibrary is called for elsewhere. It never ends the process and throws
// nothing: what goes wrong is one line on stderr, and the engine then does not load.
//
// It needs no TensorRT header, so that one build serves TensorRT 10 and 11. Relied on is this much of TensorRT's ABI: the C
// functions getPluginRegistry and getInferLibVersion, and where in IPluginRegistry's vtable (Itanium C++ ABI) loadLibrary and
// getCreator are. Methods are only added at its end within a major version; 11 took out the four that served IPluginV2's creators.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

namespace {

constexpr char kPlugin[] = "libmra_trt.so";
constexpr char kName[] = "MraAttention";  // as in mra_attention_plugin.cu
constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "";

struct TensorRT {
  const char* library;  // its soname: never TensorRT-RTX's, which no server of this kind uses
  int32_t major;
  int load_library, get_creator;  // slots of IPluginRegistry's vtable; its destructor takes two
};
constexpr TensorRT kKnown[] = {{"libnvinfer.so.10", 10, 10, 14}, {"libnvinfer.so.11", 11, 6, 10}};

void Say(const std::string& message) { std::fprintf(stderr, "libmra_trt_register: %s\n", message.c_str()); }

std::string Reason() {
  const char* error = dlerror();
  return error == nullptr ? "no reason given" : error;
}

// Where the library that holds this address is in memory: two libraries of one name differ in it.
Dl_info Owner(const void* address) {
  Dl_info info{};
  if (dladdr(address, &info) == 0) info = {};
  return info;
}

// The method in a slot of the vtable of `object`. The types that its declaration has, but not its noexcept: we may catch.
template <typename Method>
Method Slot(void* object, int slot) {
  return reinterpret_cast<Method>((*static_cast<void***>(object))[slot]);
}

void Register(const TensorRT& tensorrt, void* library) {
  const auto get_registry = reinterpret_cast<void* (*)()>(dlsym(library, "getPluginRegistry"));
  const auto get_version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
  const Dl_info place = Owner(reinterpret_cast<const void*>(get_registry));
  const std::string name = place.dli_fname == nullptr ? tensorrt.library : place.dli_fname;
  if (get_registry == nullptr || get_version == nullptr) {
    Say(name + " has no getPluginRegistry or no getInferLibVersion, so it is not TensorRT: install TensorRT 10 or 11");
    return;
  }
  const int32_t version = get_version();  // TensorRT 10.14.1 is 101401
  if (version / 10000 != tensorrt.major) {
    Say(name + " says that its version is " + std::to_string(version) + ", not TensorRT " + std::to_string(tensorrt.major) +
        ": this library knows TensorRT 10 and 11; build the engine with --embed-plugin");
    return;
  }
  void* registry = get_registry();
  if (registry == nullptr) {
    Say(name + " has no plugin registry: reinstall TensorRT");
    return;
  }

  // Opened here first: the loader's own words say more than a null of loadLibrary, and it stays open whatever TensorRT does.
  const char* own = Owner(reinterpret_cast<const void*>(&Say)).dli_fname;
  const char* slash = own == nullptr ? nullptr : std::strrchr(own, '/');
  const std::string path = slash == nullptr ? kPlugin : std::string(own, slash + 1) + kPlugin;
  void* plugin = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (plugin == nullptr) {
    Say(path + " does not open (" + Reason() + "): put the libmra_trt.so of the engine's bundle beside this library");
    return;
  }
  const void* entry = dlsym(plugin, "getCreators");
  if (entry == nullptr) {
    Say(path + " is no TensorRT plugin library, it has no getCreators: put the libmra_trt.so of the engine's bundle there");
    return;
  }

  const auto load_library = Slot<void* (*)(void*, const char*)>(registry, tensorrt.load_library);
  const auto get_creator = Slot<void* (*)(void*, const char*, const char*, const char*)>(registry, tensorrt.get_creator);
  const bool loaded = load_library(registry, path.c_str()) != nullptr;
  void* creator = get_creator(registry, kName, kVersion, kNamespace);
  const std::string wanted = std::string("plugin ") + kName + " version '" + kVersion + "'";
  if (creator == nullptr) {
    Say(loaded ? path + " brings no " + wanted + ": put the libmra_trt.so of the engine's bundle there"
               : name + " does not take " + path + " (TensorRT's log may say why): build the engine with --embed-plugin");
  } else if (!loaded) {  // loadLibrary refuses what is there already: by this very library it is as asked
    const Dl_info other = Owner(*static_cast<void**>(creator));
    if (other.dli_fbase != Owner(entry).dli_fbase) {
      Say(wanted + " is already there, from " + (other.dli_fname == nullptr ? "an unknown library" : other.dli_fname) + ", so " +
          path + " is not used: if they differ, serve their engines from servers of their own");
    }
  }
}

void RegisterPlugin() {
  bool found = false;
  for (const TensorRT& tensorrt : kKnown) {  // a server may have two of them, by way of two backends
    if (void* library = dlopen(tensorrt.library, RTLD_LAZY | RTLD_NOLOAD)) {
      found = true;
      Register(tensorrt, library);
    }
  }
  if (found) return;
  std::string reasons;
  for (const TensorRT& tensorrt : kKnown) {  // LD_PRELOAD: the backend that needs it comes later, and then gets this one
    if (void* library = dlopen(tensorrt.library, RTLD_LAZY | RTLD_LOCAL)) return Register(tensorrt, library);
    reasons += (reasons.empty() ? "" : "; ") + Reason();
  }
  Say("no TensorRT 10 or 11 (" + reasons + "): put the folder of its libnvinfer.so on LD_LIBRARY_PATH");
}

__attribute__((constructor)) void OnOpen() noexcept {
  try {
    RegisterPlugin();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "libmra_trt_register: TensorRT's registry failed (%s): build the engine with --embed-plugin\n",
                 error.what());
  } catch (...) {
    std::fprintf(stderr, "libmra_trt_register: TensorRT's registry failed: build the engine with --embed-plugin\n");
  }
}

}  // namespace
