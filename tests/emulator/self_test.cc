// Small kernels, right and wrong ones, that show what the emulation computes and what it catches; and the workspace's layout for
// tests.
#include "cuda_backend.h"
#include "mra_attention_layout.h"
#include "mra_attention_ptx.cuh"

namespace {

constexpr int kThreads = 64;

struct Argument {
  int32_t* out;  // (kThreads), or a row of several words for each thread
  int32_t* in;   // likewise
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

// Sum and unsigned maximum of a warp's numbers, some of them negative; the CTA's maximum and sum by atomics.
__global__ void Reductions(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  unsigned* largest = reinterpret_cast<unsigned*>(memory);
  int* total = reinterpret_cast<int*>(memory + 4);
  if (threadIdx.x == 0) *largest = 5u, *total = 0;
  __syncthreads();
  const int x = a.in[threadIdx.x] % 32 - 16;
  const int sum = __reduce_add_sync(0xffffffffu, x);
  const unsigned maximum = __reduce_max_sync(0xffffffffu, static_cast<unsigned>(x));
  atomicMax(largest, static_cast<unsigned>(a.in[threadIdx.x]));
  atomicAdd(total, x);
  __syncthreads();
  const int results[] = {sum, static_cast<int>(maximum), static_cast<int>(*largest), *total, __clz(x)};
  a.out[threadIdx.x] = results[threadIdx.x % 5];
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

// in: per thread 4 words for shared memory, then the byte of it that the thread's row starts at; out: per thread LoadMatrix4's
// words.
template <bool kTransposed>
__global__ void LoadMatrix(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  const int32_t* in = a.in + 5 * threadIdx.x;
  for (int n = 0; n < 4; ++n) reinterpret_cast<int32_t*>(memory)[4 * threadIdx.x + n] = in[n];
  __syncthreads();
  uint32_t r[4];
  if (kTransposed) {
    mra::LoadMatrix4Transposed(r, memory + in[4]);
  } else {
    mra::LoadMatrix4(r, memory + in[4]);
  }
  for (int n = 0; n < 4; ++n) a.out[4 * threadIdx.x + n] = static_cast<int32_t>(r[n]);
}

// in: per thread the words of A (4), of B (2) and the floats of C (4); out: the new C.
template <typename T>
__global__ void Multiply(Argument argument) {
  const int32_t* in = argument.in + 10 * threadIdx.x;
  uint32_t a[4];
  float c[4];
  for (int n = 0; n < 4; ++n) a[n] = static_cast<uint32_t>(in[n]);
  for (int n = 0; n < 4; ++n) c[n] = __uint_as_float(static_cast<uint32_t>(in[6 + n]));
  const uint32_t b0 = static_cast<uint32_t>(in[4]), b1 = static_cast<uint32_t>(in[5]);
  if constexpr (sizeof(T) == 2) {
    mra::MultiplyTile<T>(c, a, b0, b1);
  } else {
    mra::MultiplyTileTf32(c, a, b0, b1);
  }
  for (int n = 0; n < 4; ++n) argument.out[4 * threadIdx.x + n] = static_cast<int32_t>(__float_as_uint(c[n]));
}

// Half of each warp multiplies in one branch, half in another.
__global__ void MultiplyInBranch(Argument a) {
  const uint32_t x[4] = {};
  float c[4] = {};
  if (threadIdx.x % 32 < 16) {
    mra::MultiplyTile<__half>(c, x, 0u, 0u);
  } else {
    mra::MultiplyTile<__half>(c, x, 0u, 0u);
  }
  a.out[threadIdx.x] = static_cast<int32_t>(c[0]);
}

__global__ void LoadMatrixWithoutALane(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  uint32_t r[4] = {};
  if (threadIdx.x != 3) mra::LoadMatrix4(r, memory);
  a.out[threadIdx.x] = static_cast<int32_t>(r[0]);
}

// Every thread copies its 4 words of in[] and reads those of the thread at the mirrored place.
__global__ void CopyAsync(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  int32_t* shared = reinterpret_cast<int32_t*>(memory);
  mra::CopyAsync16(shared + 4 * threadIdx.x, a.in + 4 * threadIdx.x, true);
  mra::CopyAsyncCommit();
  mra::CopyAsyncWait<0>();
  __syncthreads();
  for (int n = 0; n < 4; ++n) a.out[4 * threadIdx.x + n] = shared[4 * (kThreads - 1 - threadIdx.x) + n];
}

// out: per thread the first word of two groups of copies: before any wait, after a wait for all but one, after one for all.
__global__ void CopyAsyncInTwoGroups(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  const int32_t* first = reinterpret_cast<int32_t*>(memory) + 8 * threadIdx.x;
  int32_t* out = a.out + 6 * threadIdx.x;
  for (int group = 0; group < 2; ++group) {
    mra::CopyAsync16(memory + 32 * threadIdx.x + 16 * group, a.in + 8 * threadIdx.x + 4 * group, true);
    mra::CopyAsyncCommit();
  }
  out[0] = first[0], out[1] = first[4];
  mra::CopyAsyncWait<1>();
  out[2] = first[0], out[3] = first[4];
  mra::CopyAsyncWait<0>();
  out[4] = first[0], out[5] = first[4];
}

// The copy is in no group when the thread waits.
__global__ void CopyAsyncWithoutCommit(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  mra::CopyAsync16(memory + 16 * threadIdx.x, a.in, true);
  mra::CopyAsyncWait<0>();
  a.out[threadIdx.x] = reinterpret_cast<int32_t*>(memory)[4 * threadIdx.x];
}

__global__ void CopyAsyncWithoutWait(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  mra::CopyAsync16(memory + 16 * threadIdx.x, a.in, true);
  mra::CopyAsyncCommit();
  a.out[threadIdx.x] = reinterpret_cast<int32_t*>(memory)[4 * threadIdx.x];
}

// The source is written between the copy's start and its wait.
__global__ void CopyAsyncFromChangingSource(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  mra::CopyAsync16(memory + 16 * threadIdx.x, a.in + 4 * threadIdx.x, true);
  mra::CopyAsyncCommit();
  a.in[4 * threadIdx.x] = -5;
  mra::CopyAsyncWait<0>();
  a.out[threadIdx.x] = reinterpret_cast<int32_t*>(memory)[4 * threadIdx.x];
}

// Thread 0 copies from byte in[0] of in[] to byte in[1] of shared memory; only if in[2] is not 0.
__global__ void CopyAsyncFromTo(Argument a) {
  MRA_DYNAMIC_SHARED(memory);
  if (threadIdx.x != 0) return;
  const bool valid = a.in[2] != 0;
  mra::CopyAsync16(memory + a.in[1], reinterpret_cast<const unsigned char*>(a.in) + a.in[0], valid);
  mra::CopyAsyncCommit();
  mra::CopyAsyncWait<0>();
  memcpy(a.out, memory + a.in[1], 16);
}

// in: a float; out: Exp2, RoundToTf32, PackPair<__half> and PackPair<__nv_bfloat16> of it and its negative.
__global__ void Convert(Argument a) {
  const float x = __uint_as_float(static_cast<uint32_t>(a.in[threadIdx.x]));
  const uint32_t results[] = {__float_as_uint(mra::Exp2(x)), mra::RoundToTf32(x), mra::PackPair<__half>(x, -x),
                              mra::PackPair<__nv_bfloat16>(x, -x)};
  memcpy(a.out + 4 * threadIdx.x, results, sizeof results);
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
                              {"Reductions", Reductions},
                              {"LoadMatrix", LoadMatrix<false>},
                              {"LoadMatrixTransposed", LoadMatrix<true>},
                              {"LoadMatrixWithoutALane", LoadMatrixWithoutALane},
                              {"MultiplyHalf", Multiply<__half>},
                              {"MultiplyBfloat16", Multiply<__nv_bfloat16>},
                              {"MultiplyTf32", Multiply<float>},
                              {"MultiplyInBranch", MultiplyInBranch},
                              {"CopyAsync", CopyAsync},
                              {"CopyAsyncInTwoGroups", CopyAsyncInTwoGroups},
                              {"CopyAsyncWithoutCommit", CopyAsyncWithoutCommit},
                              {"CopyAsyncWithoutWait", CopyAsyncWithoutWait},
                              {"CopyAsyncFromChangingSource", CopyAsyncFromChangingSource},
                              {"CopyAsyncFromTo", CopyAsyncFromTo},
                              {"Convert", Convert},
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
  const mra::Section sections[] = {l.real,     l.query_mean, l.key_mean,   l.value_sum, l.logit,
                                   l.row_key,  l.row_start,  l.column,     l.excluded,  l.work,
                                   l.arrivals, l.partial,    l.low_vector, l.low_total, l.low_largest};
  int count = 0;
  for (const mra::Section& section : sections) {
    numbers[2 * count] = section.offset;
    numbers[2 * count + 1] = section.bytes;
    ++count;
  }
  return count;
}
}
