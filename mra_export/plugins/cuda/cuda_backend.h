// What the kernels need from CUDA: the toolkit's headers, or the host emulation of tests/emulator when MRA_CUDA_EMULATION is
// defined. The kernels launch through LaunchKernel and take dynamic shared memory through MRA_DYNAMIC_SHARED, so that one source
// serves both.
#ifndef MRA_CUDA_BACKEND_H_
#define MRA_CUDA_BACKEND_H_

#ifdef MRA_CUDA_EMULATION
#include "cuda_emulation.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#define MRA_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace mra {

// Starts kernel(argument) on `blocks` CTAs of `threads` threads. No synchronisation; errors of earlier work are left alone.
template <typename Argument>
cudaError_t LaunchKernel(void (*kernel)(Argument), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                         const Argument& argument) {
  const void* function = reinterpret_cast<const void*>(kernel);
  constexpr size_t kDefaultShared = 48 * 1024;
  if (shared_bytes > kDefaultShared) {
    const cudaError_t error =
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Argument*>(&argument)};
  return cudaLaunchKernel(function, dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)), arguments,
                          shared_bytes, stream);
}

}  // namespace mra

#endif  // MRA_CUDA_EMULATION
#endif  // MRA_CUDA_BACKEND_H_
