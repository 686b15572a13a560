// Launch 1, pool: step 1 of docs/operator.md. One CTA per (batch row, token block, tensor, tile of the H * D columns); each thread
// sums the columns of one 16-byte vector over the block's 32 tokens, in ascending order, so that the CPU kernel gets the same
// bits. Also clears what later launches count in.
#ifndef MRA_ATTENTION_POOL_CUH_
#define MRA_ATTENTION_POOL_CUH_

#include "mra_attention_device.cuh"

namespace mra {

constexpr int kPoolLoads = 16;  // tokens whose loads a thread has in flight

// Sum over the block's real tokens. Adding 0 for a masked one equals skipping it: the sum starts at +0 and so is never -0.
template <typename T>
__device__ __forceinline__ float BlockSum(const T* first_token, int64_t stride, uint32_t real) {
  float sum = 0.0f;
#pragma unroll 1
  for (int group = 0; group < kBlock; group += 8) {
    float x[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) x[t] = (real >> (group + t)) & 1u ? ToFloat(first_token[(group + t) * stride]) : 0.0f;
#pragma unroll
    for (int t = 0; t < 8; ++t) sum = __fadd_rn(sum, x[t]);
  }
  return sum;
}

// The same for the columns of one 16-byte vector.
template <typename T, int kColumns>
__device__ __forceinline__ void BlockSums(const T* first_token, int64_t stride, uint32_t real, float (&sum)[kColumns]) {
  static_assert(kColumns * sizeof(T) == sizeof(uint4), "one vector");
#pragma unroll 1
  for (int group = 0; group < kBlock; group += kPoolLoads) {
    uint4 vector[kPoolLoads];
#pragma unroll
    for (int t = 0; t < kPoolLoads; ++t) {
      vector[t] = uint4{0u, 0u, 0u, 0u};
      if ((real >> (group + t)) & 1u) vector[t] = *reinterpret_cast<const uint4*>(first_token + (group + t) * stride);
    }
#pragma unroll
    for (int t = 0; t < kPoolLoads; ++t) {
      T x[kColumns];
      memcpy(x, &vector[t], sizeof x);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[c] = __fadd_rn(sum[c], ToFloat(x[c]));
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kPoolMostThreads, 5) PoolKernel(Problem p) {
  constexpr int kColumns = kVectorBytes / sizeof(T);
  const int tensors = p.full ? 3 : 2;
  const int tile = blockIdx.x % p.pool_tiles;
  const int tensor = blockIdx.x / p.pool_tiles % tensors;
  const int64_t block_of_batch = blockIdx.x / p.pool_tiles / tensors;  // b * nb + j
  const int64_t batch = block_of_batch / p.blocks;
  const int block = static_cast<int>(block_of_batch % p.blocks);

  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{block} * kBlock + lane;
  const bool is_real = token < p.length && p.mask[batch * p.length + token] != 0;
  const uint32_t real = __ballot_sync(kWarp, is_real);
  if (tile == 0 && tensor == 0) {
    if (threadIdx.x == 0) p.real[block_of_batch] = real;
    for (int head = threadIdx.x; head < p.heads; head += p.pool_threads) {
      const int64_t row = (batch * p.heads + head) * p.blocks + block;
      p.row_key[row] = 0u;
      p.arrivals[row] = 0;
    }
  }

  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int64_t first_token = (batch * p.length + int64_t{block} * kBlock) * hidden;
  const T* in = static_cast<const T*>(tensor == 0 ? p.query : tensor == 1 ? p.key : p.value) + first_token;
  float* pooled = tensor == 0 ? p.query_mean : tensor == 1 ? p.key_mean : p.value_sum;
  const float divisor = __fadd_rn(static_cast<float>(__popc(real)), kEpsilon);
  const auto out_of = [&](int64_t column) {
    const int64_t head = column / p.head_size;
    return pooled + ((batch * p.heads + head) * p.blocks + block) * p.head_size + column % p.head_size;
  };

  if (p.vector_loads) {
    const int64_t column = (int64_t{tile} * p.pool_threads + threadIdx.x) * kColumns;
    if (column >= hidden) return;
    float sum[kColumns] = {};
    BlockSums(in + column, hidden, real, sum);
    float4* out = reinterpret_cast<float4*>(out_of(column));
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[c] = tensor == 2 ? sum[c] : __fdiv_rn(sum[c], divisor);
#pragma unroll
    for (int c = 0; c < kColumns; c += 4) out[c / 4] = float4{sum[c], sum[c + 1], sum[c + 2], sum[c + 3]};
    return;
  }
#pragma unroll 1
  for (int c = 0; c < kColumns; ++c) {
    const int64_t column = int64_t{tile} * p.pool_threads * kColumns + c * p.pool_threads + threadIdx.x;
    if (column >= hidden) return;
    const float sum = BlockSum(in + column, hidden, real);
    *out_of(column) = tensor == 2 ? sum : __fdiv_rn(sum, divisor);
  }
}

}  // namespace mra

#endif  // MRA_ATTENTION_POOL_CUH_
