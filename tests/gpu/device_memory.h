// Device memory for the programs of this folder, exactly as large as asked for. With MRA_CUDA_EMULATION it is the host's.
#ifndef MRA_TESTS_GPU_DEVICE_MEMORY_H_
#define MRA_TESTS_GPU_DEVICE_MEMORY_H_

#ifndef MRA_CUDA_EMULATION
#include <cuda_runtime_api.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace mra_test {

[[noreturn]] inline void Die(const char* what, const char* why) {
  std::fprintf(stderr, "FAIL %s: %s\n", what, why);
  std::exit(1);
}

#ifdef MRA_CUDA_EMULATION

using Stream = void*;
inline Stream NewStream() { return nullptr; }
inline void DeleteStream(Stream) {}
inline void Synchronize() {}
inline void* Allocate(size_t bytes) {
  void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(memory, 0xff, bytes);  // NaN in every format: what nobody wrote must not be read
  return memory;
}
inline void Free(void* memory) { std::free(memory); }
inline void Upload(void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
inline void Download(void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }

#else

inline void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Die(what, cudaGetErrorString(error));
}

using Stream = cudaStream_t;
inline Stream NewStream() {
  cudaStream_t stream = nullptr;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  return stream;
}
inline void DeleteStream(Stream stream) { Check(cudaStreamDestroy(stream), "cudaStreamDestroy"); }
inline void Synchronize() { Check(cudaDeviceSynchronize(), "the kernels"); }
// Nothing is written: compute-sanitizer's initcheck then reports whatever is read before it was written.
inline void* Allocate(size_t bytes) {
  void* memory = nullptr;
  Check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
inline void Free(void* memory) { Check(cudaFree(memory), "cudaFree"); }
inline void Upload(void* device, const void* host, size_t bytes) {
  Check(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "copy to the device");
}
inline void Download(void* host, const void* device, size_t bytes) {
  Check(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "copy from the device");
}

#endif

// One allocation. Move-only.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes), memory_(Allocate(bytes)) {}
  template <typename T>
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size() * sizeof(T)) {
    Upload(memory_, host.data(), bytes_);
  }
  Buffer(Buffer&& other) noexcept : bytes_(other.bytes_), memory_(other.memory_) { other.memory_ = nullptr; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    if (memory_ != nullptr) Free(memory_);
  }

  size_t bytes() const { return bytes_; }
  void* get() const { return memory_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }
  template <typename T>
  std::vector<T> Read() const {
    std::vector<T> host(bytes_ / sizeof(T));
    Download(host.data(), memory_, bytes_);
    return host;
  }

 private:
  size_t bytes_;
  void* memory_;
};

}  // namespace mra_test

#endif  // MRA_TESTS_GPU_DEVICE_MEMORY_H_
