// CUDA for the host, as much of it as the kernels use: one fiber per CUDA thread, run on one CPU thread, four CTAs at a time.
//
// Stricter than a GPU: fibers and CTAs run in an order drawn from a seed, and may be stopped at any rendezvous; shared memory
// starts as NaN and ends at a guard page; every thread of a CTA must reach the same __syncthreads, every lane of a mask the same
// warp function, or the launch fails with a report of who waits where. There is no __shared__: kernels use MRA_DYNAMIC_SHARED, so
// that all shared memory is bounded and poisoned. Not seen here: races that need a finer interleaving than from one rendezvous or
// atomic to the next, a missing memory fence, bank conflicts, the hardware's own rounding of expf.
#ifndef MRA_CUDA_EMULATION_H_
#define MRA_CUDA_EMULATION_H_

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

namespace mra_emulation {

// A cp.async that has not been waited for.
struct AsyncCopy {
  unsigned char* to;
  const void* from;
  int group;     // how many groups the thread had closed before
  bool is_read;  // `bytes` is there
  unsigned char bytes[16];
};

struct Thread {
  dim3 index;
  dim3 block;
  unsigned char* shared_memory;  // its CTA's
  std::vector<AsyncCopy> copies;
  int copy_groups;  // closed so far
};
extern Thread* current;  // the running fiber's

enum class WarpFunction { kSync, kBallot, kShuffle, kMatch, kAdd, kMaximum, kLoadMatrix, kMultiply };

void SyncThreads(const char* file, int line);
// Returns when all lanes of `mask` have called it with the same function, mask and place. kShuffle: the value of lane `source`;
// kBallot: bit n = lane n's value is not 0; kMatch: bit n = lane n's value equals this one's; kAdd and
// kMaximum: sum and maximum of the unsigned values.
uint32_t CallWarp(WarpFunction function, uint32_t mask, uint32_t value, int source, const char* file, int line);
// Returns when all 32 lanes have called it with the same function and place. The last to come computes all of their results, by
// compute(the lanes' operands).
void MeetWarp(WarpFunction function, void* operands, void (*compute)(void* const* operands), const char* file, int line);
int Lane();
size_t SharedBytes();  // the launch's shared memory per CTA
uint64_t NextRandom();
// Ends the launch with this report; the calling thread does not go on.
[[noreturn]] void Refuse(const std::string& what, const char* file, int line);
// Lets another CTA run for as long as it can, now and then: what this one had to have done before the atomic shows if it had not.
void AfterAtomic();

cudaError_t Launch(void (*entry)(const void*), const void* argument, int64_t blocks, int threads, size_t shared_bytes);

template <typename Value>
Value Shuffle(uint32_t mask, Value value, int source, const char* file, int line) {
  static_assert(sizeof(Value) == 4, "32-bit values only");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = CallWarp(WarpFunction::kShuffle, mask, bits, source, file, line);
  memcpy(&value, &bits, 4);
  return value;
}

inline int LaneOr(int lane) { return lane >= 0 && lane < 32 ? lane : Lane(); }

}  // namespace mra_emulation

#define threadIdx (::mra_emulation::current->index)
#define blockIdx (::mra_emulation::current->block)
#define MRA_DYNAMIC_SHARED(name) unsigned char* const name = ::mra_emulation::current->shared_memory

#define MRA_WARP(function, mask, value) \
  ::mra_emulation::CallWarp(::mra_emulation::WarpFunction::function, mask, value, -1, __FILE__, __LINE__)
#define MRA_SHUFFLE(mask, value, source) ::mra_emulation::Shuffle(mask, value, ::mra_emulation::LaneOr(source), __FILE__, __LINE__)
#define __syncthreads() ::mra_emulation::SyncThreads(__FILE__, __LINE__)
#define __syncwarp() MRA_WARP(kSync, 0xffffffffu, 0u)
#define __ballot_sync(mask, predicate) MRA_WARP(kBallot, mask, (predicate) ? 1u : 0u)
#define __match_any_sync(mask, value) MRA_WARP(kMatch, mask, static_cast<uint32_t>(value))
#define __reduce_add_sync(mask, value) static_cast<int>(MRA_WARP(kAdd, mask, static_cast<uint32_t>(value)))
#define __reduce_max_sync(mask, value) MRA_WARP(kMaximum, mask, static_cast<uint32_t>(value))  // of unsigned numbers
#define __shfl_sync(mask, value, lane) MRA_SHUFFLE(mask, value, (lane) % 32)
#define __shfl_xor_sync(mask, value, lanes) MRA_SHUFFLE(mask, value, ::mra_emulation::Lane() ^ (lanes))
#define __shfl_up_sync(mask, value, lanes) MRA_SHUFFLE(mask, value, ::mra_emulation::Lane() - static_cast<int>(lanes))
#define __shfl_down_sync(mask, value, lanes) MRA_SHUFFLE(mask, value, ::mra_emulation::Lane() + static_cast<int>(lanes))

inline int atomicAdd(int* address, int value) {
  const int old = *address;
  *address = old + value;
  mra_emulation::AfterAtomic();
  return old;
}
inline unsigned atomicMax(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address = value > old ? value : old;
  mra_emulation::AfterAtomic();
  return old;
}
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }

// Compiled with -ffp-contract=off: each of these rounds once, to nearest even.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fffu};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

inline float __half2float(__half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t exponent = x.bits >> 10 & 31u, fraction = x.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return __uint_as_float(sign | (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13);
}

inline __half __float2half_rn(float x) {
  const uint32_t bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fffu};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                                                 // below 2^-14: a multiple of 2^-24
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(nearbyintf(__uint_as_float(magnitude) * 0x1p24f)))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13)};
}

namespace mra {

template <typename Argument>
cudaError_t LaunchKernel(void (*kernel)(Argument), int64_t blocks, int threads, size_t shared_bytes, cudaStream_t,
                         const Argument& argument) {
  struct Call {
    void (*kernel)(Argument);
    Argument argument;
  } call = {kernel, argument};
  return mra_emulation::Launch(
      [](const void* raw) {
        const Call* c = static_cast<const Call*>(raw);
        c->kernel(c->argument);
      },
      &call, blocks, threads, shared_bytes);
}

}  // namespace mra

#endif  // MRA_CUDA_EMULATION_H_
