// Stands in for libnvinfer: a plugin registry that keeps to what the headers say of IPluginRegistry and records what it is asked.
// Compiled by test_register.py as libnvinfer.so.10 (the headers' own class), as libnvinfer.so.11 with -DSTAND_IN_11, and with
// -DPLUGIN_VERSION="1" as a plugin library. What it does is chosen by the environment variable STAND_IN.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

using namespace nvinfer1;

#ifdef PLUGIN_VERSION

namespace {

class Creator final : public IPluginCreatorV3One {
 public:
  const char* getPluginName() const noexcept override { return "MraAttention"; }
  const char* getPluginVersion() const noexcept override { return PLUGIN_VERSION; }
  const char* getPluginNamespace() const noexcept override { return ""; }
  const PluginFieldCollection* getFieldNames() noexcept override { return nullptr; }
  IPluginV3* createPlugin(const char*, const PluginFieldCollection*, TensorRTPhase) noexcept override { return nullptr; }
};

}  // namespace

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator creator;
  static IPluginCreatorInterface* const creators[] = {&creator};
  count = 1;
  return creators;
}

#else

namespace {

std::string record;  // a line for each call
std::vector<IPluginCreatorInterface*> creators;

bool Does(const char* what) {
  const char* chosen = std::getenv("STAND_IN");
  return chosen != nullptr && std::strcmp(chosen, what) == 0;
}

IPluginCreatorInterface* Find(const char* name, const char* version, const char* space) {
  for (IPluginCreatorInterface* found : creators) {
    const auto* creator = static_cast<IPluginCreatorV3One*>(found);
    if (std::strcmp(creator->getPluginName(), name) == 0 && std::strcmp(creator->getPluginVersion(), version) == 0 &&
        std::strcmp(creator->getPluginNamespace(), space) == 0) {
      return found;
    }
  }
  return nullptr;
}

// "The call will fail and return nullptr if any of the plugins are already registered."
void* Load(const char* path) {
  record += std::string("load ") + path + "\n";
  void* handle = Does("refuse") ? nullptr : dlopen(path, RTLD_LAZY);
  if (handle == nullptr) return nullptr;
  int32_t count = 0;
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  IPluginCreatorInterface* const* brought = reinterpret_cast<GetCreators>(dlsym(handle, "getCreators"))(count);
  for (int32_t i = 0; i < count; ++i) {
    const auto* creator = static_cast<IPluginCreatorV3One*>(brought[i]);
    if (Find(creator->getPluginName(), creator->getPluginVersion(), creator->getPluginNamespace()) != nullptr) {
      dlclose(handle);
      return nullptr;
    }
  }
  creators.insert(creators.end(), brought, brought + count);
  return handle;
}

IPluginCreatorInterface* Get(const char* name, const char* version, const char* space) {
  record += std::string("get ") + name + "\n";
  return Find(name, version, space);
}

#ifdef STAND_IN_11

// IPluginRegistry of TensorRT 11.0's documentation: without the overloads for IPluginV2's creators.
class Base {
 public:
  using PluginLibraryHandle = void*;
  virtual ~Base() noexcept = default;
  virtual void setErrorRecorder(IErrorRecorder*) noexcept = 0;
  virtual IErrorRecorder* getErrorRecorder() const noexcept = 0;
  virtual bool isParentSearchEnabled() const = 0;
  virtual void setParentSearchEnabled(bool) = 0;
  virtual void* loadLibrary(const char*) noexcept = 0;
  virtual void deregisterLibrary(void*) noexcept = 0;
  virtual bool registerCreator(IPluginCreatorInterface&, const char*) noexcept = 0;
  virtual IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept = 0;
  virtual IPluginCreatorInterface* getCreator(const char*, const char*, const char*) noexcept = 0;
  virtual bool deregisterCreator(const IPluginCreatorInterface&) noexcept = 0;
  virtual IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept = 0;
  virtual int32_t releasePluginResource(const char*) noexcept = 0;
  virtual IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept = 0;
};
constexpr int32_t kVersion = 110000;

#else

using Base = IPluginRegistry;
constexpr int32_t kVersion = NV_TENSORRT_VERSION;

#endif

// Everything but loadLibrary and getCreator records that it should not have been called.
class Registry final : public Base {
 public:
#ifndef STAND_IN_11
  bool registerCreator(IPluginCreator&, const char*) noexcept override { return Wrong(); }
  IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return Wrong(), nullptr; }
  IPluginCreator* getPluginCreator(const char*, const char*, const char*) noexcept override { return Wrong(), nullptr; }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return Wrong(); }
#endif
  void setErrorRecorder(IErrorRecorder*) noexcept override { Wrong(); }
  IErrorRecorder* getErrorRecorder() const noexcept override { return Wrong(), nullptr; }
  bool isParentSearchEnabled() const override { return Wrong(); }
  void setParentSearchEnabled(bool) override { Wrong(); }
  PluginLibraryHandle loadLibrary(const char* path) noexcept override { return Load(path); }
  void deregisterLibrary(PluginLibraryHandle) noexcept override { Wrong(); }
  bool registerCreator(IPluginCreatorInterface&, const char*) noexcept override { return Wrong(); }
  IPluginCreatorInterface* const* getAllCreators(int32_t*) const noexcept override { return Wrong(), nullptr; }
  IPluginCreatorInterface* getCreator(const char* name, const char* version, const char* space) noexcept override {
    return Get(name, version, space);
  }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return Wrong(); }
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override { return Wrong(), nullptr; }
  int32_t releasePluginResource(const char*) noexcept override { return Wrong(); }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept override { return Wrong(), nullptr; }

 private:
  static bool Wrong() {
    record += "a method that must not be called\n";
    return false;
  }
};

// The header's getPluginRegistry is noexcept; this one can throw all the same.
extern "C" void* Throwing() asm("getPluginRegistry");
extern "C" __attribute__((visibility("default"))) void* Throwing() {
  static Registry registry;
  if (Does("throw")) throw std::runtime_error("out of luck");
  if (Does("throw a number")) throw 1;
  return Does("no registry") ? nullptr : &registry;
}

}  // namespace

extern "C" {

int32_t getInferLibVersion() noexcept {
  return std::getenv("STAND_IN_VERSION") ? std::atoi(std::getenv("STAND_IN_VERSION")) : kVersion;
}
const char* stand_in_record() { return record.c_str(); }
int32_t stand_in_creators() { return static_cast<int32_t>(creators.size()); }
}

#endif
