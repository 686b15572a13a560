// NVIDIA's driver, opened at run time: GPUs, memory and streams without a CUDA toolkit, and no crash where there is no GPU.
#ifndef MRA_EMBED_CUDA_DRIVER_H_
#define MRA_EMBED_CUDA_DRIVER_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace mra::embed {

struct Gpu {
  std::string name;
  std::string compute_capability;  // such as "9.0"
};

// The driver API's functions that are used here, by cuda.h's names; its CUdeviceptr and its streams are those of the CUDA runtime.
struct CudaDriver {
  using Pointer = uint64_t;
  using Stream = void*;

  std::vector<Gpu> gpus;  // in CUDA's order; empty without a driver or a GPU
  std::string version;    // the newest CUDA version that the driver runs, such as "13.0"; empty without a driver
  std::string why_none;   // why gpus is empty, for a message

  // Loaded and asked once.
  static const CudaDriver& Get();

  // The calls below throw Failure with `what` and the driver's words where one fails. All need a current context.
  void Use(int device) const;  // makes the device's primary context current on this thread
  Pointer Allocate(size_t bytes) const;
  void Free(Pointer pointer) const noexcept;
  Stream NewStream() const;
  void FreeStream(Stream stream) const noexcept;
  void ToDevice(Pointer to, const void* from, size_t bytes, Stream stream) const;
  void ToHost(void* to, Pointer from, size_t bytes, Stream stream) const;
  void Wait(Stream stream) const;

 private:
  struct Functions {
    int (*init)(unsigned);
    int (*version)(int*);
    int (*count)(int*);
    int (*device)(int*, int);
    int (*name)(char*, int, int);
    int (*attribute)(int*, int, int);
    int (*error_string)(int, const char**);
    int (*retain)(void**, int);
    int (*set_current)(void*);
    int (*allocate)(Pointer*, size_t);
    int (*free)(Pointer);
    int (*new_stream)(Stream*, unsigned);
    int (*free_stream)(Stream);
    int (*to_device)(Pointer, const void*, size_t, Stream);
    int (*to_host)(void*, Pointer, size_t, Stream);
    int (*wait)(Stream);
  };
  CudaDriver();
  void Check(int status, const char* what) const;
  Functions call_ = {};
};

}  // namespace mra::embed

#endif  // MRA_EMBED_CUDA_DRIVER_H_
