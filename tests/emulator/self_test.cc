// Small kernels, right and wrong ones, that show what the emulation computes and what it catches; and the workspace's layout for
// tests.
#include "cuda_backend.h"
#include "mra_attention_layout.h"

namespace {

constexpr int kThreads = 64;

struct Argument {
  int32_t* out;  // (kThreads)
  int32_t* in;   // (kThreads)
};

// in[] backwards through shared memory.
__global__ void Reverse(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  int32_t* shared = reinterpret_cast<int32_t*>(memory);
  shared[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  a.out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

// The same without the barrier: what is read depends on the order of threads.
__global__ void ReverseWithoutBarrier(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  int32_t* shared = reinterpret_cast<int32_t*>(memory);
  shared[threadIdx.x] = a.in[threadIdx.x];
  a.out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void BarrierInBranch(Argument a) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  a.out[threadIdx.x] = 0;
}

__global__ void BarrierAfterExit(Argument a) {
  if (threadIdx.x == 5) return;
  __syncthreads();
  a.out[threadIdx.x] = 0;
}

__global__ void ShuffleInBranch(Argument a) {
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, a.in[threadIdx.x], 1);
}

__global__ void WritePastShared(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  reinterpret_cast<int32_t*>(memory)[threadIdx.x + 1] = a.in[threadIdx.x];
}

__global__ void ReadPastShared(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  a.out[threadIdx.x] = reinterpret_cast<int32_t*>(memory)[threadIdx.x + 1024];
}

__global__ void ReadPastInput(Argument a) { a.out[threadIdx.x] = a.in[threadIdx.x + 1]; }

__global__ void ReadUninitialisedShared(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  a.out[threadIdx.x] = reinterpret_cast<int32_t*>(memory)[threadIdx.x];
}

// Each lane's in[] through every warp function, summed with weights that tell them apart.
__global__ void WarpFunctions(Argument a) {
  const unsigned all = 0xffffffffu;
  const int x = a.in[threadIdx.x];
  int sum = __shfl_sync(all, x, 7);
  sum += 10 * __shfl_xor_sync(all, x, 4);
  sum += 100 * __shfl_up_sync(all, x, 3);
  sum += 1000 * __shfl_down_sync(all, x, 5);
  sum += 10000 * __popc(__ballot_sync(all, x % 3 == 0));
  sum += 100000 * (__ffs(static_cast<int>(__match_any_sync(all, x % 5))) - 1);
  a.out[threadIdx.x] = sum;
}

// The last of two CTAs to arrive sums what both wrote: in[0] counts arrivals, out[block] is written by the CTA's last thread. The
// barrier is what makes thread 0 arrive after that.
template <bool kBarrier>
__global__ void SumOfBoth(Argument a) {
  if (threadIdx.x == kThreads - 1) a.out[blockIdx.x] = 100 + static_cast<int32_t>(blockIdx.x);
  if (kBarrier) __syncthreads();
  const bool is_last = threadIdx.x == 0 && atomicAdd(&a.in[0], 1) == 1;
  __syncthreads();
  if (is_last) a.out[2] = a.out[0] + a.out[1];
}

struct Named {
  const char* name;
  void (*kernel)(Argument);
};
constexpr Named kKernels[] = {{"Reverse", Reverse},
                              {"ReverseWithoutBarrier", ReverseWithoutBarrier},
                              {"BarrierInBranch", BarrierInBranch},
                              {"BarrierAfterExit", BarrierAfterExit},
                              {"ShuffleInBranch", ShuffleInBranch},
                              {"WritePastShared", WritePastShared},
                              {"ReadPastShared", ReadPastShared},
                              {"ReadPastInput", ReadPastInput},
                              {"ReadUninitialisedShared", ReadUninitialisedShared},
                              {"WarpFunctions", WarpFunctions},
                              {"SumOfBoth", SumOfBoth<true>},
                              {"SumOfBothWithoutBarrier", SumOfBoth<false>}};

}  // namespace

extern "C" {

// Runs one of the kernels above with `shared_bytes` of shared memory. The emulated cudaError_t, or -1 for an unknown name.
int mra_emulation_self_test(const char* name, int32_t* out, int32_t* in, int64_t blocks, size_t shared_bytes) {
  for (const Named& n : kKernels) {
    if (strcmp(n.name, name) == 0) return mra::LaunchKernel(n.kernel, blocks, kThreads, shared_bytes, nullptr, Argument{out, in});
  }
  return -1;
}

// Offset and size in bytes of each section of the CUDA workspace; returns their number, or minus the status.
int mra_emulation_workspace_sections(const MraAttentionParams* params, uint64_t* numbers) {
  mra::Layout l;
  const MraStatus status = mra::MakeLayout(params, &l);
  if (status != MRA_OK) return -static_cast<int>(status);
  const mra::Section sections[] = {l.real,      l.query_mean, l.key_mean, l.value_sum, l.logit,    l.row_max,
                                   l.row_start, l.column,     l.excluded, l.work,      l.arrivals, l.partial};
  int count = 0;
  for (const mra::Section& section : sections) {
    numbers[2 * count] = section.offset;
    numbers[2 * count + 1] = section.bytes;
    ++count;
  }
  return count;
}
}
