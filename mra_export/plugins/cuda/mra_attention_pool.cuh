// Launch 1, pool: step 1 of docs/operator.md. One CTA per (batch row, token block, tile of 128 of the H * D columns); each thread
// sums one column over the block's 32 tokens, in ascending order, so that the CPU kernel gets the same bits.
#ifndef MRA_ATTENTION_POOL_CUH_
#define MRA_ATTENTION_POOL_CUH_

#include "mra_attention_device.cuh"

namespace mra {

// Sum over the block's real tokens. Adding 0 for a masked one equals skipping it: the sum starts at +0 and so is never -0.
template <typename T>
__device__ __forceinline__ float BlockSum(const T* first_token, int64_t stride, uint32_t real) {
  float sum = 0.0f;
#pragma unroll
  for (int group = 0; group < kBlock; group += 8) {
    float x[8];
#pragma unroll
    for (int t = 0; t < 8; ++t) x[t] = (real >> (group + t)) & 1u ? ToFloat(first_token[(group + t) * stride]) : 0.0f;
#pragma unroll
    for (int t = 0; t < 8; ++t) sum = __fadd_rn(sum, x[t]);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kPoolThreads) PoolKernel(Problem p) {
  const int tile = blockIdx.x % p.pool_tiles;
  const int64_t block_of_batch = blockIdx.x / p.pool_tiles;  // b * nb + j
  const int64_t batch = block_of_batch / p.blocks;
  const int block = static_cast<int>(block_of_batch % p.blocks);

  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{block} * kBlock + lane;
  const bool is_real = token < p.length && p.mask[batch * p.length + token] != 0;
  const uint32_t real = __ballot_sync(kWarp, is_real);
  if (tile == 0 && threadIdx.x == 0) p.real[block_of_batch] = real;

  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int64_t column = int64_t{tile} * kPoolThreads + threadIdx.x;
  if (column >= hidden) return;
  const int64_t head = column / p.head_size;
  const int dim = static_cast<int>(column % p.head_size);
  const int64_t in = (batch * p.length + int64_t{block} * kBlock) * hidden + column;
  const int64_t out = ((batch * p.heads + head) * p.blocks + block) * p.head_size + dim;

  const float divisor = __fadd_rn(static_cast<float>(__popc(real)), kEpsilon);
  p.query_mean[out] = __fdiv_rn(BlockSum(static_cast<const T*>(p.query) + in, hidden, real), divisor);
  p.key_mean[out] = __fdiv_rn(BlockSum(static_cast<const T*>(p.key) + in, hidden, real), divisor);
  if (p.full) p.value_sum[out] = BlockSum(static_cast<const T*>(p.value) + in, hidden, real);
}

}  // namespace mra

#endif  // MRA_ATTENTION_POOL_CUH_
