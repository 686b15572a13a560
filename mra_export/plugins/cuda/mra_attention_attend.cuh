// Launch 3, attend: step 6 of docs/operator.md. One CTA per work item: 32 query tokens against up to `chunk` chosen key blocks,
// with online softmax in float32. The last CTA of a row to finish merges the row's chunks in order, adds the low-resolution part
// and writes the context, so results do not depend on timing.
#ifndef MRA_ATTENTION_ATTEND_CUH_
#define MRA_ATTENTION_ATTEND_CUH_

#include "mra_attention_device.cuh"

namespace mra {

constexpr int kAttendWarps = kAttendThreads / 32;
constexpr int kWeightStride = kBlock + 4;
constexpr int kTokenLanes = 8;  // threads that share a pair of query tokens

// Rows in shared memory are this many floats apart: 4 more than a multiple of 32, so that eight rows' float4 meet in no bank.
__host__ __device__ inline int TokenStride(int head_size) { return (head_size + 31) / 32 * 32 + 4; }

__host__ __device__ inline size_t AttendSharedFloats(int head_size) {
  return 2 * static_cast<size_t>(kBlock) * TokenStride(head_size) + kBlock * kWeightStride;
}

// tile (32, stride) = the block's real tokens as float; masked tokens and columns from D to the next multiple of 32 become 0.
template <typename T>
__device__ __forceinline__ void LoadTile(const T* first_token, int64_t hidden, int head_size, uint32_t real, float* tile,
                                         int stride) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = lane; d < stride - 4; d += 32) {
#pragma unroll
    for (int n = 0; n < kBlock / kAttendWarps; ++n) {
      const int token = warp + n * kAttendWarps;
      tile[token * stride + d] = d < head_size && (real >> token & 1u) ? ToFloat(first_token[token * hidden + d]) : 0.0f;
    }
  }
}

// A thread's share of the softmax state: query tokens 2 g and 2 g + 1 for g = thread / 8, dimensions 4 (thread % 8) + 32 n + (0 to
// 3).
template <int kDims>
struct RowState {
  float output[2][kDims / 32][4];  // sum of weight * value, relative to exp(largest)
  float total[2];                  // sum of weights, likewise
  float largest[2];
};

// Adds one chosen key block to the state. real: its real tokens, not 0.
template <typename T, int kDims>
__device__ __forceinline__ void AttendBlock(const Problem& p, const T* key, const T* value, uint32_t real, const float* query_tile,
                                            float* tile, float* weights, RowState<kDims>* state) {
  const int group = threadIdx.x / kTokenLanes, lane = threadIdx.x % kTokenLanes;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int stride = TokenStride(p.head_size);

  __syncthreads();  // the previous block's values have been read
  LoadTile(key, hidden, p.head_size, real, tile, stride);
  __syncthreads();

  float s[2][4] = {};  // query tokens 2 group + r, key tokens lane + 8 c
  for (int d = 0; d < p.head_size; d += 4) {
    float4 q[2];
    for (int r = 0; r < 2; ++r) q[r] = *reinterpret_cast<const float4*>(query_tile + (2 * group + r) * stride + d);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float4 k = *reinterpret_cast<const float4*>(tile + (lane + kTokenLanes * c) * stride + d);
#pragma unroll
      for (int r = 0; r < 2; ++r) s[r][c] += q[r].x * k.x + q[r].y * k.y + q[r].z * k.z + q[r].w * k.w;
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = state->largest[r];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      s[r][c] = real >> (lane + kTokenLanes * c) & 1u ? s[r][c] * p.scale : -INFINITY;
      largest = fmaxf(largest, s[r][c]);
    }
    for (int step = kTokenLanes / 2; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, step));
    const float shrink = Weight(state->largest[r], largest);
    state->largest[r] = largest;
    state->total[r] *= shrink;  // each lane sums its own key tokens
#pragma unroll
    for (int n = 0; n < kDims / 32; ++n) {
      for (int e = 0; e < 4; ++e) state->output[r][n][e] *= shrink;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const float w = Weight(s[r][c], largest);
      state->total[r] += w;
      weights[(2 * group + r) * kWeightStride + lane + kTokenLanes * c] = w;
    }
  }
  __syncthreads();  // keys have been read; weights are read by their own warp only
  LoadTile(value, hidden, p.head_size, real, tile, stride);
  __syncthreads();

  for (int first = 0; first < kBlock; first += 4) {
    float w[2][4];
    for (int r = 0; r < 2; ++r) {
      const float4 x = *reinterpret_cast<const float4*>(weights + (2 * group + r) * kWeightStride + first);
      w[r][0] = x.x, w[r][1] = x.y, w[r][2] = x.z, w[r][3] = x.w;
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int n = 0; n < kDims / 32; ++n) {
        if (32 * n >= p.head_size) break;
        const float4 v = *reinterpret_cast<const float4*>(tile + (first + t) * stride + 4 * lane + 32 * n);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          float* out = state->output[r][n];
          out[0] += w[r][t] * v.x, out[1] += w[r][t] * v.y, out[2] += w[r][t] * v.z, out[3] += w[r][t] * v.w;
        }
      }
    }
  }
}

// Stores this chunk's state; true in the CTA that is the row's last to do so, after reading all chunks back, merged in order.
template <int kDims>
__device__ __forceinline__ bool MergeChunks(const Problem& p, int64_t head, const WorkItem& item, int32_t* is_last,
                                            RowState<kDims>* state) {
  constexpr int kOutputs = kDims / 4;  // floats of state->output
  float* row_partial = p.partial + (head * p.partials + item.partial) * p.partial_floats + threadIdx.x;
  float* own = row_partial + int64_t{item.chunk} * p.partial_floats;
  const float* output = &state->output[0][0][0];
#pragma unroll
  for (int n = 0; n < kOutputs; ++n) own[n * kAttendThreads] = output[n];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own[(kOutputs + r) * kAttendThreads] = state->total[r];
    own[(kOutputs + 2 + r) * kAttendThreads] = state->largest[r];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(&p.arrivals[head * p.blocks + item.row], 1) == item.chunks - 1;
  __syncthreads();
  if (!*is_last) return false;
  __threadfence();

  // __ldcg: other CTAs wrote these, so not through this SM's L1.
  *state = RowState<kDims>{};
  state->largest[0] = state->largest[1] = -INFINITY;
  for (int chunk = 0; chunk < item.chunks; ++chunk) {
    const float* from = row_partial + int64_t{chunk} * p.partial_floats;
    for (int r = 0; r < 2; ++r) {
      state->largest[r] = fmaxf(state->largest[r], __ldcg(from + (kOutputs + 2 + r) * kAttendThreads));
    }
  }
  for (int chunk = 0; chunk < item.chunks; ++chunk) {
    const float* from = row_partial + int64_t{chunk} * p.partial_floats;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float w = Weight(__ldcg(from + (kOutputs + 2 + r) * kAttendThreads), state->largest[r]);
      state->total[r] += w * __ldcg(from + (kOutputs + r) * kAttendThreads);
#pragma unroll
      for (int n = 0; n < kOutputs / 2; ++n) {
        state->output[r][n / 4][n % 4] += w * __ldcg(from + (r * (kOutputs / 2) + n) * kAttendThreads);
      }
    }
  }
  return true;
}

// CTAs that an SM's registers must hold. Without it ptxas trades spills for occupancy on some architectures.
constexpr int AttendCtas(int dims) { return dims <= 64 ? 6 : dims <= 128 ? 3 : 2; }

template <typename T, int kDims>
__global__ void __launch_bounds__(kAttendThreads, AttendCtas(kDims)) AttendKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  const int stride = TokenStride(p.head_size);
  float* query_tile = reinterpret_cast<float*>(memory);  // (32, stride)
  float* tile = query_tile + kBlock * stride;            // (32, stride): keys, then values
  float* weights = tile + kBlock * stride;               // (32, kWeightStride)

  const WorkItem item = p.work[blockIdx.x];
  if (item.row < 0) return;
  const int64_t head = blockIdx.x / p.slots;
  const int64_t batch = head / p.heads;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int64_t head_offset = batch * p.length * hidden + head % p.heads * p.head_size;
  const int64_t row_offset = head_offset + int64_t{item.row} * kBlock * hidden;
  const uint32_t* real = p.real + batch * p.blocks;
  const uint32_t query_real = real[item.row];
  const int group = threadIdx.x / kTokenLanes, lane = threadIdx.x % kTokenLanes;

  RowState<kDims> state = {};
  state.largest[0] = state.largest[1] = -INFINITY;
  float low_total = 0.0f, low_largest = -INFINITY;
  const float* low_vector = p.low_vector + (head * p.blocks + item.row) * p.head_size;
  bool has_low = false;

  if (query_real != 0) {
    LoadTile(static_cast<const T*>(p.query) + row_offset, hidden, p.head_size, query_real, query_tile, stride);
    const int32_t* row_start = p.row_start + head * (p.blocks + 1) + item.row;
    const int begin = row_start[0] + item.chunk * p.chunk;
    const int end = begin + p.chunk < row_start[1] ? begin + p.chunk : row_start[1];
    const uint16_t* column = p.column + head * p.budget;
    for (int n = begin; n < end; ++n) {
      const int j = column[n];
      if (real[j] == 0) continue;
      const int64_t offset = head_offset + int64_t{j} * kBlock * hidden;
      AttendBlock<T, kDims>(p, static_cast<const T*>(p.key) + offset, static_cast<const T*>(p.value) + offset, real[j], query_tile,
                            tile, weights, &state);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      for (int step = kTokenLanes / 2; step > 0; step /= 2) state.total[r] += __shfl_xor_sync(kWarp, state.total[r], step);
    }
    if (item.chunks > 1 && !MergeChunks<kDims>(p, head, item, reinterpret_cast<int32_t*>(query_tile), &state)) return;
    if (p.full) {
      low_total = p.low_total[head * p.blocks + item.row];
      low_largest = p.low_largest[head * p.blocks + item.row];
      has_low = true;
    }
  } else if (item.chunk > 0) {
    return;
  }

  T* context = static_cast<T*>(p.context) + row_offset;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int token = 2 * group + r;
    if (int64_t{item.row} * kBlock + token >= p.length) continue;
    const bool is_real = query_real >> token & 1u;
    const float largest = fmaxf(state.largest[r], low_largest);
    const float exact = Weight(state.largest[r], largest), low = Weight(low_largest, largest);
    const float total = exact * state.total[r] + low * low_total + kEpsilon;
#pragma unroll
    for (int n = 0; n < kDims / 32; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = 4 * lane + 32 * n + e;
        if (d >= p.head_size) continue;
        const float sum = exact * state.output[r][n][e] + (has_low ? low * low_vector[d] : 0.0f);
        context[token * hidden + d] = FromFloat<T>(is_real ? sum / total : 0.0f);
      }
    }
  }
}

}  // namespace mra

#endif  // MRA_ATTENTION_ATTEND_CUH_
