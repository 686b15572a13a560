// What the TensorRT headers and the plugin need of CUDA's header, so that the plugin compiles for the host where no CUDA is
// installed.
#ifndef MRA_TESTS_CUDA_RUNTIME_API_H_
#define MRA_TESTS_CUDA_RUNTIME_API_H_

typedef struct CUstream_st* cudaStream_t;
typedef struct CUevent_st* cudaEvent_t;
enum cudaError_t { cudaErrorLaunchFailure = 719 };

// Defined by plugin_driver.cc.
extern "C" cudaError_t cudaGetLastError();
extern "C" const char* cudaGetErrorString(cudaError_t error);

#endif  // MRA_TESTS_CUDA_RUNTIME_API_H_
