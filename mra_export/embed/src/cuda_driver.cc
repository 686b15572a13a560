#include "cuda_driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <type_traits>

#include "failure.h"

namespace mra::embed {
namespace {

constexpr int kCapabilityMajor = 75, kCapabilityMinor = 76;  // CUdevice_attribute
constexpr unsigned kNonBlocking = 1;                         // CU_STREAM_NON_BLOCKING

}  // namespace

const CudaDriver& CudaDriver::Get() {
  static const CudaDriver driver;
  return driver;
}

CudaDriver::CudaDriver() {
  why_none = "this machine has no NVIDIA driver (libcuda.so.1)";
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return;
  bool complete = true;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    complete = complete && function != nullptr;
  };
  find(call_.init, "cuInit");
  find(call_.version, "cuDriverGetVersion");
  find(call_.count, "cuDeviceGetCount");
  find(call_.device, "cuDeviceGet");
  find(call_.name, "cuDeviceGetName");
  find(call_.attribute, "cuDeviceGetAttribute");
  find(call_.error_string, "cuGetErrorString");
  find(call_.retain, "cuDevicePrimaryCtxRetain");
  find(call_.set_current, "cuCtxSetCurrent");
  find(call_.allocate, "cuMemAlloc_v2");
  find(call_.free, "cuMemFree_v2");
  find(call_.new_stream, "cuStreamCreate");
  find(call_.free_stream, "cuStreamDestroy_v2");
  find(call_.to_device, "cuMemcpyHtoDAsync_v2");
  find(call_.to_host, "cuMemcpyDtoHAsync_v2");
  find(call_.wait, "cuStreamSynchronize");
  if (!complete) {
    why_none = "the NVIDIA driver is too old";
    return;
  }
  int number = 0;
  if (call_.version(&number) == 0 && number > 0) version = std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
  const int status = call_.init(0);
  why_none = "the NVIDIA driver does not start (cuInit gives error " + std::to_string(status) + ")";
  if (status != 0) return;
  why_none = "the NVIDIA driver finds no GPU";
  int count = 0;
  if (call_.count(&count) != 0) return;
  for (int index = 0; index < count; ++index) {
    int device = 0, major = 0, minor = 0;
    char name[256] = "";
    if (call_.device(&device, index) != 0) continue;
    call_.name(name, static_cast<int>(sizeof name) - 1, device);
    call_.attribute(&major, kCapabilityMajor, device);
    call_.attribute(&minor, kCapabilityMinor, device);
    gpus.push_back({name, std::to_string(major) + "." + std::to_string(minor)});
  }
}

void CudaDriver::Check(int status, const char* what) const {
  if (status == 0) return;
  const char* words = nullptr;
  call_.error_string(status, &words);
  throw Failure(MRA_BACKEND_ERROR, std::string("the NVIDIA driver refused ") + what + " (error " + std::to_string(status) + ": " +
                                       (words == nullptr ? "unknown" : words) +
                                       "): look for free GPU memory, or at the driver's log");
}

void CudaDriver::Use(int device) const {
  // The primary context is retained once and never released: TensorRT's objects and other users of the GPU share it.
  static std::mutex mutex;
  static auto& contexts = *new std::map<int, void*>();
  const std::lock_guard<std::mutex> lock(mutex);
  void*& context = contexts[device];
  if (context == nullptr) Check(call_.retain(&context, device), "its context");
  Check(call_.set_current(context), "its context");
}

CudaDriver::Pointer CudaDriver::Allocate(size_t bytes) const {
  Pointer pointer = 0;
  Check(call_.allocate(&pointer, bytes), "memory");
  return pointer;
}
void CudaDriver::Free(Pointer pointer) const noexcept { call_.free(pointer); }
CudaDriver::Stream CudaDriver::NewStream() const {
  Stream stream = nullptr;
  Check(call_.new_stream(&stream, kNonBlocking), "a stream");
  return stream;
}
void CudaDriver::FreeStream(Stream stream) const noexcept { call_.free_stream(stream); }
void CudaDriver::ToDevice(Pointer to, const void* from, size_t bytes, Stream stream) const {
  Check(call_.to_device(to, from, bytes, stream), "a copy to the GPU");
}
void CudaDriver::ToHost(void* to, Pointer from, size_t bytes, Stream stream) const {
  Check(call_.to_host(to, from, bytes, stream), "a copy from the GPU");
}
void CudaDriver::Wait(Stream stream) const { Check(call_.wait(stream), "the queued work"); }

}  // namespace mra::embed
