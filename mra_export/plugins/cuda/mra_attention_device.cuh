// What the CUDA kernels share: the problem as they see it, and conversions.
#ifndef MRA_ATTENTION_DEVICE_CUH_
#define MRA_ATTENTION_DEVICE_CUH_

#include "cuda_backend.h"
#include "mra_attention_layout.h"

namespace mra {

constexpr unsigned kWarp = 0xffffffffu;
constexpr float kEpsilon = 1e-6f;
constexpr float kLog2E = 1.44269504f;  // the float nearest to log2(e)

// One call, passed to every kernel by value. Shapes as in mra_attention_layout.h.
struct Problem {
  const void* query;    // (B, N, H * D) T
  const void* key;      // (B, N, H * D) T
  const void* value;    // (B, N, H * D) T
  const int32_t* mask;  // (B, N), nonzero = real token
  void* context;        // (B, N, H * D) T

  uint32_t* real;
  float* query_mean;
  float* key_mean;
  float* value_sum;
  float* logit;
  uint32_t* row_key;
  int32_t* row_start;
  uint16_t* column;
  uint32_t* excluded;
  WorkItem* work;
  int32_t* arrivals;
  float* partial;
  float* low_vector;
  float* low_total;
  float* low_largest;

  int64_t length;  // N
  int heads;       // H
  int head_size;   // D
  int blocks;      // nb
  int words;
  int budget;  // K
  int chunk;
  int slots;
  int partials;
  int partial_floats;
  int logit_stride;
  int pool_tiles;
  int pool_threads;
  int logit_tiles;
  int low_tiles;
  int first;     // F
  int diagonal;  // G
  float scale;
  bool full;          // approx_mode "full"
  bool vector_loads;  // every head's rows begin at multiples of 16 bytes, in every tensor
  bool keep_logits;   // the fused select kernel writes logits and row maxima to the workspace too
  bool padding_invariant;
};

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(__half x) { return __half2float(x); }
__device__ __forceinline__ float ToFloat(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T FromFloat(float x);
template <>
__device__ __forceinline__ float FromFloat<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half FromFloat<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 FromFloat<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// Four neighbouring elements of a row of `size` floats, 0 past its end. `row` is a multiple of 16 bytes if size is one of 4.
__device__ __forceinline__ float4 LoadFour(const float* row, int first, int size) {
  if (size % 4 == 0) return first < size ? *reinterpret_cast<const float4*>(row + first) : float4{0.0f, 0.0f, 0.0f, 0.0f};
  return {first < size ? row[first] : 0.0f, first + 1 < size ? row[first + 1] : 0.0f, first + 2 < size ? row[first + 2] : 0.0f,
          first + 3 < size ? row[first + 3] : 0.0f};
}

// exp(x - reference) of online softmax: a reference of -inf means "no weight yet", where x is -inf too and the weight 0.
__device__ __forceinline__ float Weight(float x, float reference) { return expf(x - (reference == -INFINITY ? 0.0f : reference)); }

}  // namespace mra

#endif  // MRA_ATTENTION_DEVICE_CUH_
