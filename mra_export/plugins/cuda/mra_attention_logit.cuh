// Block logits l_ij = scale * <mean of query block i, mean of key block j> as the selection contract (docs/kernels.md) has them:
// one chain of fused multiply-adds over the head's dimensions in ascending order, then one product with the scale. Up to
// kFusedSelectBlocks blocks inside the select kernel; above, in a launch of their own, which also finds the row maxima.
#ifndef MRA_ATTENTION_LOGIT_CUH_
#define MRA_ATTENTION_LOGIT_CUH_

#include "mra_attention_device.cuh"
#include "mra_attention_order.cuh"

namespace mra {

constexpr int kLogitThreads = 256;  // that multiply: 16 x 16 of kTile x kTile pairs
constexpr int kStageFloats = 4608;  // enough for every tile below
// Dimensions staged at a time. kTile 8: 128 x 128 pairs, 4: 64 x 64, 2: 32 x 32.
__host__ __device__ constexpr int LogitDepth(int tile) { return tile == 8 ? 8 : tile == 4 ? 32 : 64; }

// Row or column of a thread's r-th pair, for its place `at` of 16. Eight are two groups of four, each one 16-byte load.
template <int kTile>
__device__ __forceinline__ int TilePlace(int at, int r) {
  return kTile == 8 ? r / 4 * 64 + at * 4 + r % 4 : at * kTile + r;
}

template <int kTile>
__device__ __forceinline__ void LoadTileVector(const float* from, int at, float (&x)[kTile]) {
  if constexpr (kTile == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from + at * 2);
    x[0] = v.x, x[1] = v.y;
  } else {
#pragma unroll
    for (int n = 0; n < kTile; n += 4) {
      const float4 v = *reinterpret_cast<const float4*>(from + TilePlace<kTile>(at, n));
      x[n] = v.x, x[n + 1] = v.y, x[n + 2] = v.z, x[n + 3] = v.w;
    }
  }
}

template <int kTile>
__device__ __forceinline__ void StoreTileVector(float* to, int at, const float (&x)[kTile]) {
  if constexpr (kTile == 2) {
    *reinterpret_cast<float2*>(to + at * 2) = float2{x[0], x[1]};
  } else {
#pragma unroll
    for (int n = 0; n < kTile; n += 4) {
      *reinterpret_cast<float4*>(to + TilePlace<kTile>(at, n)) = float4{x[n], x[n + 1], x[n + 2], x[n + 3]};
    }
  }
}

// Place of this thread in the 16 x 16 that multiply: eight columns of four rows in a warp, so that its loads from shared memory
// are of few and neighbouring addresses.
__device__ __forceinline__ int LogitColumn() { return threadIdx.x / 32 % 2 * 8 + threadIdx.x % 8; }
__device__ __forceinline__ int LogitRow() { return threadIdx.x / 64 * 4 + threadIdx.x % 32 / 8; }

// Logits of the (16 kTile)^2 pairs at (row, column), by kThreads threads, of which the first kLogitThreads get kTile x kTile each:
// rows row + TilePlace(LogitRow(), r), columns column + TilePlace(LogitColumn(), c). Pairs outside the head have any value.
// stage: kStageFloats, 16-byte aligned. `stage` may be written after a barrier.
template <int kTile, int kThreads>
__device__ __forceinline__ void LogitTile(const Problem& p, int64_t head, int row, int column, float* stage,
                                          float (&logit)[kTile][kTile]) {
  constexpr int kSide = 16 * kTile;
  constexpr int kDepth = LogitDepth(kTile);
  constexpr int kStride = kSide + 4;  // a multiple of 4, not of 8: stores of 16 blocks of two vectors meet in no bank
  constexpr int kLoads = 2 * kSide * kDepth / 4 / kThreads;
  static_assert(2 * kDepth * kStride <= kStageFloats && kLoads * kThreads * 4 == 2 * kSide * kDepth, "stage");

  const float* query_mean = p.query_mean + head * p.blocks * p.head_size;
  const float* key_mean = p.key_mean + head * p.blocks * p.head_size;
  const auto load = [&](int depth, float4(&x)[kLoads]) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int index = n * kThreads + threadIdx.x;
      const int side_block = index / 2 % (2 * kSide);
      const int d = depth + 4 * (index % 2 + index / (4 * kSide) * 2);
      const bool is_query = side_block < kSide;
      const int block = is_query ? row + side_block : column + side_block - kSide;
      x[n] = LoadFour((is_query ? query_mean : key_mean) + block * p.head_size, d, block < p.blocks ? p.head_size : 0);
    }
  };
  const auto store = [&](const float4(&x)[kLoads]) {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int index = n * kThreads + threadIdx.x;
      const int side_block = index / 2 % (2 * kSide);
      const int d = 4 * (index % 2 + index / (4 * kSide) * 2);
      float* to = stage + (side_block < kSide ? d * kStride + side_block : (kDepth + d) * kStride + side_block - kSide);
      to[0] = x[n].x, to[kStride] = x[n].y, to[2 * kStride] = x[n].z, to[3 * kStride] = x[n].w;
    }
  };

  const int at_row = LogitRow(), at_column = LogitColumn();
  const bool multiplies = threadIdx.x < kLogitThreads && row + TilePlace<kTile>(at_row, 0) < p.blocks &&
                          column + TilePlace<kTile>(at_column, 0) < p.blocks;
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
#pragma unroll
    for (int c = 0; c < kTile; ++c) logit[r][c] = 0.0f;
  }
  const auto multiply = [&](int d) {
    float q[kTile], k[kTile];
    LoadTileVector<kTile>(stage + d * kStride, at_row, q);
    LoadTileVector<kTile>(stage + (kDepth + d) * kStride, at_column, k);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
#pragma unroll
      for (int c = 0; c < kTile; ++c) logit[r][c] = __fmaf_rn(q[r], k[c], logit[r][c]);
    }
  };

  float4 next[kLoads];
  load(0, next);
#pragma unroll 1
  for (int depth = 0; depth < p.head_size; depth += kDepth) {
    store(next);
    __syncthreads();
    if (depth + kDepth < p.head_size) load(depth + kDepth, next);
    if (multiplies) {
      const int count = p.head_size - depth;
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
        if (d >= count) break;  // exactly the head's dimensions
        multiply(d);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int r = 0; r < kTile; ++r) {
#pragma unroll
    for (int c = 0; c < kTile; ++c) logit[r][c] = __fmul_rn(p.scale, logit[r][c]);
  }
}

// Launch 2 above kFusedSelectBlocks: one CTA per head and 128 x 128 of its logits. Row maxima are merged as integers, so that their
// order does not matter.
__global__ void __launch_bounds__(kLogitThreads, 2) LogitKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  const int64_t head = blockIdx.x / p.logit_tiles;
  const int tile = blockIdx.x % p.logit_tiles;
  const int across = (p.blocks + kLogitTile - 1) / kLogitTile;
  const int row = tile / across * kLogitTile, column = tile % across * kLogitTile;
  float logit[8][8];
  LogitTile<8, kLogitThreads>(p, head, row, column, reinterpret_cast<float*>(memory), logit);

  const uint32_t* real = p.real + head / p.heads * p.blocks;
  uint32_t counts = 0;  // bit c: column c has a say in the row maximum
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const int j = column + TilePlace<8>(LogitColumn(), c);
    if (j < p.blocks && (!p.padding_invariant || real[j] != 0)) counts |= 1u << c;
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int i = row + TilePlace<8>(LogitRow(), r);
    float largest = -INFINITY;  // fmaxf: NaN never becomes the maximum
#pragma unroll
    for (int c = 0; c < 8; ++c) largest = fmaxf(largest, counts >> c & 1u ? logit[r][c] : -INFINITY);
    for (int step = 4; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, step));
    if (i >= p.blocks) continue;
    if (threadIdx.x % 8 == 0) atomicMax(&p.row_key[head * p.blocks + i], MaximumKey(largest));
    float* out = p.logit + (head * p.blocks + i) * p.logit_stride + column;
#pragma unroll
    for (int c = 0; c < 8; c += 4) {
      const int place = TilePlace<8>(LogitColumn(), c);
      if (column + place >= p.logit_stride) continue;
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = column + place + e < p.blocks ? logit[r][c + e] : -INFINITY;  // never the largest
      *reinterpret_cast<float4*>(out + place) = float4{x[0], x[1], x[2], x[3]};
    }
  }
}

}  // namespace mra

#endif  // MRA_ATTENTION_LOGIT_CUH_
