// The low-resolution part of step 6 of docs/operator.md, mode "full": for each block row the sums of exp(l_ij) times the blocks'
// sums of value and numbers of tokens, over all j that are not excluded and have a real token. It is a matrix product, (nb x nb
// weights) by (nb x D sums): in tf32 on tensor cores for 16-bit tensors, in float32 for float32 ones. Up to kFusedSelectBlocks
// blocks inside the select kernel; above, in a launch of its own.
//
// A weight of 0 must not meet a block sum that is infinite or NaN. So a sum that is not finite goes into the product as 0, is
// noted, and added afterwards to the rows whose weight for it is not 0.
#ifndef MRA_ATTENTION_LOW_CUH_
#define MRA_ATTENTION_LOW_CUH_

#include "mra_attention_device.cuh"
#include "mra_attention_order.cuh"
#include "mra_attention_ptx.cuh"

namespace mra {

constexpr int kLowThreads = 256;
constexpr int kLowColumns = 32;                    // key blocks at a time
constexpr int kLowWeightStride = kLowColumns + 4;  // a multiple of 4, not of 8: fragments meet in no bank
__host__ __device__ constexpr int LowValueStride(int dims) { return dims + 8; }  // likewise

// A block sum as the product takes it: for tensor cores, which ignore a float's low 13 bits, rounded to nearest there. Only for one
// that IsOperand, which leaves out infinities, NaN, and what rounding would make infinite.
template <bool kTensor>
__device__ __forceinline__ bool IsOperand(float x) {
  return fabsf(x) <= (kTensor ? 0x1.ffdffep127f : 0x1.fffffep127f);
}
template <bool kTensor>
__device__ __forceinline__ float Operand(float x) {
  return kTensor ? __uint_as_float(__float_as_uint(x) + 0x1000u) : x;
}

// exp(logit - largest), 0 where largest is -infinity, as the product takes it: for tensor cores cut off where they ignore the rest.
template <bool kTensor>
__device__ __forceinline__ float LowWeight(float logit, float largest) {
  if (!kTensor) return Weight(logit, largest);
  const float exponent = __fmaf_rn(logit, kLog2E, largest == -INFINITY ? 0.0f : -kLog2E * largest);
  return __uint_as_float(__float_as_uint(Exp2(exponent)) & 0xffffe000u);
}

// Which of the columns in shared memory have a sum that is not finite. Nothing is ever cleared: a mark counts in its own turn only.
template <int kColumns>
struct InfiniteColumns {
  int32_t any;
  int32_t column[kColumns];
};

// kColumns x kDims of the block sums of value, on their way from global to shared memory.
template <bool kTensor, int kThreads, int kColumns, int kDims>
struct ValueChunk {
  static constexpr int kLoads = kColumns * kDims / 4 / kThreads;
  static_assert(kLoads * kThreads * 4 == kColumns * kDims, "every thread loads as much");
  float4 x[kLoads];

  __device__ __forceinline__ void Load(const Problem& p, int64_t head, int first_column, int first_dim) {
    const float* head_sum = p.value_sum + head * p.blocks * p.head_size;
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int index = n * kThreads + threadIdx.x;
      const int j = first_column + index / (kDims / 4), d = first_dim + index % (kDims / 4) * 4;
      x[n] = LoadFour(head_sum + j * p.head_size, d, j < p.blocks ? p.head_size : 0);
    }
  }
  __device__ __forceinline__ void Store(float* values, InfiniteColumns<kColumns>* infinite, int turn) const {
#pragma unroll
    for (int n = 0; n < kLoads; ++n) {
      const int index = n * kThreads + threadIdx.x;
      const int column = index / (kDims / 4);
      const float from[4] = {x[n].x, x[n].y, x[n].z, x[n].w};
      float y[4];
      bool all = true;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const bool is_operand = IsOperand<kTensor>(from[e]);
        y[e] = is_operand ? Operand<kTensor>(from[e]) : 0.0f;
        all = all && is_operand;
      }
      if (!all) {
        infinite->column[column] = turn;
        infinite->any = turn;
      }
      *reinterpret_cast<float4*>(values + column * LowValueStride(kDims) + index % (kDims / 4) * 4) =
          float4{y[0], y[1], y[2], y[3]};
    }
  }
};

// A thread's share of (rows x kDims) sums. Tensor cores: a warp has 16 rows and half of the dimensions, as the tiles of
// MultiplyTileTf32. Else: a thread has 4 rows and 4 neighbouring dimensions of every 64.
template <bool kTensor, int kDims>
struct LowSums {
  static constexpr int kTiles = kDims / 16;
  float sum[kTiles][4];
  int row_groups;  // of 16 rows

  __device__ __forceinline__ explicit LowSums(int rows) : row_groups(rows / 16) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
  }
  __device__ __forceinline__ bool HasShare() const {
    return kTensor ? static_cast<int>(threadIdx.x / 32) < 2 * row_groups : static_cast<int>(threadIdx.x / 16) < 4 * row_groups;
  }
  // Row and dimension of sum[n][e].
  __device__ __forceinline__ int Row(int n, int e) const {
    if (kTensor) return threadIdx.x / 32 % row_groups * 16 + threadIdx.x % 32 / 4 + e / 2 * 8;
    return threadIdx.x / 16 * 4 + n % 4;
  }
  __device__ __forceinline__ int Dim(int n, int e) const {
    if (kTensor) return threadIdx.x / 32 / row_groups * (kDims / 2) + 8 * n + threadIdx.x % 4 * 2 + e % 2;
    return n / 4 * 64 + threadIdx.x % 16 * 4 + e;
  }

  // Adds (rows x columns) weights times (columns x kDims) values, both shared; columns: a multiple of 8.
  __device__ __forceinline__ void Add(const float* weights, int weight_stride, const float* values, int columns) {
    constexpr int kStride = LowValueStride(kDims);
    if (!HasShare()) return;
    if (kTensor) {
      const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
      const float* w = weights + Row(0, 0) * weight_stride + t;
      const float* v = values + t * kStride + Dim(0, 0) - 2 * t + g;
#pragma unroll 2
      for (int k = 0; k < columns; k += 8) {
        const float* at = w + k;
        const uint32_t a[4] = {__float_as_uint(at[0]), __float_as_uint(at[8 * weight_stride]), __float_as_uint(at[4]),
                               __float_as_uint(at[8 * weight_stride + 4])};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float* b = v + k * kStride + 8 * n;
          MultiplyTileTf32(sum[n], a, __float_as_uint(b[0]), __float_as_uint(b[4 * kStride]));
        }
      }
      return;
    }
    const float* w = weights + threadIdx.x / 16 * 4 * weight_stride;
    const float* v = values + threadIdx.x % 16 * 4;
#pragma unroll 1
    for (int k = 0; k < columns; k += 4) {
      float weight[4][4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float4 x = *reinterpret_cast<const float4*>(w + r * weight_stride + k);
        weight[r][0] = x.x, weight[r][1] = x.y, weight[r][2] = x.z, weight[r][3] = x.w;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int n = 0; n < kTiles; n += 4) {
          const float4 x = *reinterpret_cast<const float4*>(v + (k + e) * kStride + n * 16);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            sum[n + r][0] += weight[r][e] * x.x, sum[n + r][1] += weight[r][e] * x.y;
            sum[n + r][2] += weight[r][e] * x.z, sum[n + r][3] += weight[r][e] * x.w;
          }
        }
      }
    }
  }

  // What the product left out: sums of value that are not finite, for the rows that give them a weight.
  template <int kColumns>
  __device__ __forceinline__ void AddInfinite(const Problem& p, int64_t head, const float* weights, int weight_stride,
                                              const InfiniteColumns<kColumns>& infinite, int turn, int first_column, int columns,
                                              int first_dim) {
    if (infinite.any != turn || !HasShare()) return;
#pragma unroll 1
    for (int c = 0; c < columns; ++c) {
      if (infinite.column[c] != turn) continue;
      const float* value = p.value_sum + (head * p.blocks + first_column + c) * p.head_size + first_dim;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float w = weights[Row(n, e) * weight_stride + c];
          if (w == 0.0f || first_dim + Dim(n, e) >= p.head_size) continue;
          const float x = value[Dim(n, e)];
          if (!IsOperand<kTensor>(x)) sum[n][e] += w * x;
        }
      }
    }
  }

  __device__ __forceinline__ void Write(const Problem& p, int64_t head, int first_row, int first_dim) const {
    if (!HasShare()) return;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      constexpr int kWidth = kTensor ? 2 : 4;
#pragma unroll
      for (int e = 0; e < 4; e += kWidth) {
        const int i = first_row + Row(n, e), d = first_dim + Dim(n, e);
        if (i >= p.blocks) continue;
        float* out = p.low_vector + (head * p.blocks + i) * p.head_size + d;
        if (p.head_size % 4 == 0) {
          if (d >= p.head_size) continue;
          if (kTensor) {
            *reinterpret_cast<float2*>(out) = float2{sum[n][e], sum[n][e + 1]};
          } else {
            *reinterpret_cast<float4*>(out) = float4{sum[n][0], sum[n][1], sum[n][2], sum[n][3]};
          }
          continue;
        }
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          if (d + k < p.head_size) out[k] = sum[n][e + k];
        }
      }
    }
  }
};

// Dynamic shared memory of the low-resolution launch.
struct LowShared {
  float weights[kLowTileRows * kLowWeightStride];
  float values[kLowColumns * LowValueStride(128)];
  InfiniteColumns<kLowColumns> infinite;
  uint32_t live[kMaxBlocks / 32];
  alignas(16) float tokens[kMaxBlocks];  // real tokens of each block; as many as there are blocks, up to a multiple of 32
};
inline size_t LowSharedBytes(int words) { return sizeof(LowShared) - sizeof(float) * (kMaxBlocks - 32 * words); }

// Launch 4 above kFusedSelectBlocks: one CTA per head, 64 block rows and kDims dimensions. The largest logit of each row is the
// select launch's.
template <bool kTensor, int kDims>
__global__ void __launch_bounds__(kLowThreads, kTensor ? 2 : 1) LowKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  LowShared& s = *reinterpret_cast<LowShared*>(memory);
  constexpr int kEach = kLowTileRows * kLowColumns / kLowThreads;  // neighbouring weights of a thread
  constexpr int kSharers = kLowColumns / kEach;                    // threads of a row
  const int64_t head = blockIdx.x / p.low_tiles;
  const int tile = blockIdx.x % p.low_tiles;
  const int dim_tiles = (p.head_size + kDims - 1) / kDims;
  const int first_row = tile / dim_tiles * kLowTileRows, first_dim = tile % dim_tiles * kDims;

  const uint32_t* real = p.real + head / p.heads * p.blocks;
  for (int j = threadIdx.x; j < 32 * p.words; j += kLowThreads) {
    const uint32_t tokens = j < p.blocks ? real[j] : 0u;
    s.tokens[j] = static_cast<float>(__popc(tokens));
    const uint32_t live = __ballot_sync(kWarp, tokens != 0u);
    if (threadIdx.x % 32 == 0) s.live[j / 32] = live;
  }
  for (int n = threadIdx.x; n < kLowColumns + 1; n += kLowThreads) (n < kLowColumns ? s.infinite.column[n] : s.infinite.any) = 0;

  const int own_row = threadIdx.x / kSharers, own_column = threadIdx.x % kSharers * kEach;
  const bool has_row = first_row + own_row < p.blocks;
  const int64_t row = head * p.blocks + first_row + own_row;
  const float* logit = p.logit + row * p.logit_stride + own_column;
  const uint32_t* excluded = p.excluded + row * p.words;
  const float largest = has_row ? p.low_largest[row] : -INFINITY;
  float total = 0.0f;

  float4 next[kEach / 4];
  uint32_t next_excluded;
  ValueChunk<kTensor, kLowThreads, kLowColumns, kDims> next_values;
  const auto load = [&](int word) {
    next_excluded = has_row ? excluded[word] : kWarp;
#pragma unroll
    for (int n = 0; n < kEach / 4; ++n) {
      next[n] = float4{0.0f, 0.0f, 0.0f, 0.0f};
      if (has_row) next[n] = *reinterpret_cast<const float4*>(logit + 32 * word + 4 * n);
    }
    next_values.Load(p, head, 32 * word, first_dim);
  };

  LowSums<kTensor, kDims> sums(kLowTileRows);
  load(0);
  __syncthreads();
#pragma unroll 1
  for (int word = 0; word < p.words; ++word) {
    next_values.Store(s.values, &s.infinite, word + 1);
    const uint32_t used = (s.live[word] & ~next_excluded) >> own_column;
#pragma unroll
    for (int n = 0; n < kEach; n += 4) {
      const float x[4] = {next[n / 4].x, next[n / 4].y, next[n / 4].z, next[n / 4].w};
      const float4 tokens = *reinterpret_cast<const float4*>(s.tokens + 32 * word + own_column + n);
      float w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = used >> (n + e) & 1u ? LowWeight<kTensor>(x[e], largest) : 0.0f;
      total += w[0] * tokens.x + w[1] * tokens.y + w[2] * tokens.z + w[3] * tokens.w;
      *reinterpret_cast<float4*>(s.weights + own_row * kLowWeightStride + own_column + n) = float4{w[0], w[1], w[2], w[3]};
    }
    __syncthreads();
    if (word + 1 < p.words) load(word + 1);
    sums.Add(s.weights, kLowWeightStride, s.values, kLowColumns);
    sums.AddInfinite(p, head, s.weights, kLowWeightStride, s.infinite, word + 1, 32 * word, kLowColumns, first_dim);
    __syncthreads();
  }
  for (int step = 1; step < kSharers; step *= 2) total += __shfl_xor_sync(kWarp, total, step);
  if (has_row && own_column == 0 && first_dim == 0) p.low_total[row] = total;
  sums.Write(p, head, first_row, first_dim);
}

}  // namespace mra

#endif  // MRA_ATTENTION_LOW_CUH_
