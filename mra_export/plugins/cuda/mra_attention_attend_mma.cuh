// Launch 3, attend, for float16 and bfloat16 heads of up to 128 dimensions: step 6 of docs/operator.md on tensor cores. One CTA of
// two warps per work item; each warp has 16 of the block row's 32 query tokens and goes through all of the item's key blocks, which
// both read from a ring of tiles in shared memory that cp.async fills ahead of them.
#ifndef MRA_ATTENTION_ATTEND_MMA_CUH_
#define MRA_ATTENTION_ATTEND_MMA_CUH_

#include "mra_attention_attend.cuh"

namespace mra {

constexpr int kMmaThreads = 64;
constexpr int kMmaStages = 3;  // key blocks in the ring: one being read, two on their way

// The tensor core kernel is compiled for these widths.
constexpr int kMmaMostDims = 128;
inline int MmaDims(int head_size) { return head_size <= 32 ? 32 : head_size <= 64 ? 64 : 128; }

__host__ __device__ constexpr size_t MmaTileBytes(int dims) { return static_cast<size_t>(kBlock) * dims * 2; }
__host__ __device__ constexpr size_t MmaSharedBytes(int dims) { return kMmaStages * 2 * MmaTileBytes(dims); }

// Byte offset, in a tile of 32 tokens, of the 16 bytes that hold dimensions 8 * chunk to 8 * chunk + 7 of a token. The chunks of a
// token are permuted so that eight successive tokens' same chunk, which is what ldmatrix reads at once, lie in different banks.
template <int kDims>
__device__ __forceinline__ int TileOffset(int token, int chunk) {
  const int turn = kDims == 32 ? token / 2 % 4 : token % 8;
  return token * kDims * 2 + (chunk ^ turn) * kVectorBytes;
}

// A thread's share of every tile: chunk `chunk` (and, where a token has sixteen, chunk + 8) of tokens `token`, `token` + kStep, ...
template <int kDims>
struct TileShare {
  static constexpr int kLanes = kDims / 8 < 8 ? kDims / 8 : 8;  // threads side by side on a token
  static constexpr int kStep = kMmaThreads / kLanes;            // a multiple of 8: TileOffset moves by whole tokens
  int token = threadIdx.x / kLanes;
  int chunk = threadIdx.x % kLanes;
  int offset = TileOffset<kDims>(token, chunk);
};

// Starts filling the tiles of one key block; masked tokens and dimensions from D on become 0, and are not read. offset: of the
// block's first token in key and value.
template <typename T, int kDims, bool kVector>
__device__ __forceinline__ void FetchTiles(const Problem& p, const TileShare<kDims>& share, int64_t offset, uint32_t real,
                                           unsigned char* key_tile, unsigned char* value_tile) {
  using Share = TileShare<kDims>;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int64_t from = offset + share.token * hidden + 8 * share.chunk;
  const T* key = static_cast<const T*>(p.key) + from;
  const T* value = static_cast<const T*>(p.value) + from;
  if constexpr (kVector) {
#pragma unroll 2  // four at once cost so many registers that the widest kernel spills
    for (int n = 0; n < kBlock / Share::kStep; ++n) {
#pragma unroll
      for (int d = 0; d < kDims / 8; d += Share::kLanes) {
        const bool is_wanted = (real >> (share.token + n * Share::kStep) & 1u) && 8 * (share.chunk + d) < p.head_size;
        const int to = share.offset + n * Share::kStep * kDims * 2 + d * kVectorBytes;
        CopyAsync16(key_tile + to, is_wanted ? key + 8 * d : static_cast<const T*>(p.key), is_wanted);
        CopyAsync16(value_tile + to, is_wanted ? value + 8 * d : static_cast<const T*>(p.value), is_wanted);
      }
      key += Share::kStep * hidden, value += Share::kStep * hidden;
    }
  } else {
#pragma unroll 1
    for (int index = threadIdx.x; index < kBlock * kDims; index += kMmaThreads) {
      const int token = index / kDims, d = index % kDims;
      const bool is_wanted = (real >> token & 1u) && d < p.head_size;
      const int64_t element = offset + token * hidden + d;
      const int to = TileOffset<kDims>(token, d / 8) + d % 8 * 2;
      *reinterpret_cast<T*>(key_tile + to) = is_wanted ? static_cast<const T*>(p.key)[element] : FromFloat<T>(0.0f);
      *reinterpret_cast<T*>(value_tile + to) = is_wanted ? static_cast<const T*>(p.value)[element] : FromFloat<T>(0.0f);
    }
  }
}

// A warp's 16 query tokens as the left factor of m16n8k16 products: for each 16 dimensions, four pairs.
template <typename T, int kDims>
struct QueryFragments {
  uint32_t pair[kDims / 16][4];
};

// A lane has, of query tokens 16 * warp + lane / 4 + 8 r (r = 0, 1), what the layout of m16n8k16's result gives it: dimensions
// 8 n + 2 (lane % 4) and the next one, in output[n][2 r] and output[n][2 r + 1].
template <int kDims>
struct MmaState {
  float output[kDims / 8][4] = {};            // sum of weight * value, relative to 2^largest
  float total[2] = {};                        // sum of weights, likewise; of this lane's key tokens until the end
  float largest[2] = {-INFINITY, -INFINITY};  // largest logit, times log2(e)
};

template <typename T, int kDims, bool kVector>
__device__ __forceinline__ void LoadQuery(const Problem& p, const T* first_token, uint32_t real, QueryFragments<T, kDims>* query) {
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kDims / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = 16 * warp + lane / 4 + 8 * (e % 2);
      const int d = 16 * k + 2 * (lane % 4) + 8 * (e / 2);
      const T* from = first_token + token * hidden + d;
      const bool is_real = real >> token & 1u;
      uint32_t pair = 0;
      if constexpr (kVector) {
        if (is_real && d < p.head_size) pair = *reinterpret_cast<const uint32_t*>(from);
      } else {
        const float low = is_real && d < p.head_size ? ToFloat(from[0]) : 0.0f;
        const float high = is_real && d + 1 < p.head_size ? ToFloat(from[1]) : 0.0f;
        pair = PackPair<T>(low, high);
      }
      query->pair[k][e] = pair;
    }
  }
}

// Adds one key block to the state. real: its real tokens, not 0.
template <typename T, int kDims>
__device__ __forceinline__ void AttendTile(float factor, const QueryFragments<T, kDims>& query, uint32_t real,
                                           const unsigned char* key_tile, const unsigned char* value_tile, MmaState<kDims>* state) {
  const int lane = threadIdx.x % 32;
  float s[kBlock / 8][4];  // key tokens 8 n + 2 (lane % 4) + e % 2, query tokens as in MmaState with r = e / 2
#pragma unroll
  for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < kDims / 32; ++k) {  // 32 dimensions: two products' worth of keys in one load
      uint32_t keys[4];
      LoadMatrix4(keys, key_tile + TileOffset<kDims>(8 * n + lane % 8, 4 * k + lane / 8));
      MultiplyTile<T>(s[n], query.pair[2 * k], keys[0], keys[1]);
      MultiplyTile<T>(s[n], query.pair[2 * k + 1], keys[2], keys[3]);
    }
  }

  if (real != ~uint32_t{0}) {
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (!(real >> (8 * n + 2 * (lane % 4) + e % 2) & 1u)) s[n][e] = -INFINITY;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
    for (int n = 1; n < kBlock / 8; ++n) largest = fmaxf(largest, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kWarp, largest, 2));
    largest = fmaxf(state->largest[r], largest * factor);
    const float reference = largest == -INFINITY ? 0.0f : largest;
    const float shrink = Exp2(state->largest[r] - reference);
    state->largest[r] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) {
        s[n][e] = Exp2(__fmaf_rn(s[n][e], factor, -reference));
        sum += s[n][e];
      }
    }
    state->total[r] = state->total[r] * shrink + sum;
#pragma unroll
    for (int n = 0; n < kDims / 8; ++n) state->output[n][2 * r] *= shrink, state->output[n][2 * r + 1] *= shrink;
  }

  // The products' result has the layout of the next product's left factor.
  uint32_t weights[kBlock / 16][4];
#pragma unroll
  for (int k = 0; k < kBlock / 16; ++k) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float* from = s[2 * k + e / 2] + 2 * (e % 2);
      weights[k][e] = PackPair<T>(from[0], from[1]);
    }
  }
#pragma unroll
  for (int n = 0; n < kDims / 8; ++n) {
    uint32_t values[4];
    LoadMatrix4Transposed(values, value_tile + TileOffset<kDims>(lane, n));
    MultiplyTile<T>(state->output[n], weights[0], values[0], values[1]);
    MultiplyTile<T>(state->output[n], weights[1], values[2], values[3]);
  }
}

// MergeChunks for the layout of the products' results, and sixteen numbers at a time: with all on their way at once the widest
// kernel spills, and the others hold fewer CTAs.
template <int kDims>
__device__ __forceinline__ bool MergeMmaChunks(const Problem& p, int64_t head, const WorkItem& item, int32_t* is_last,
                                               MmaState<kDims>* state) {
  constexpr int kTotal = kDims / 2, kLargest = kTotal + 2;  // where a thread's numbers lie, kMmaThreads floats apart
  float* row_partial = p.partial + (head * p.partials + item.partial) * p.partial_floats + threadIdx.x;
  float* own = row_partial + int64_t{item.chunk} * p.partial_floats;
#pragma unroll
  for (int n = 0; n < kTotal; ++n) own[n * kMmaThreads] = state->output[n / 4][n % 4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    own[(kTotal + r) * kMmaThreads] = state->total[r];
    own[(kLargest + r) * kMmaThreads] = state->largest[r];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *is_last = atomicAdd(&p.arrivals[head * p.blocks + item.row], 1) == item.chunks - 1;
  __syncthreads();
  if (!*is_last) return false;
  __threadfence();

  // __ldcg: other CTAs wrote these, so not through this SM's L1.
  *state = MmaState<kDims>();
#pragma unroll 1
  for (int chunk = 0; chunk < item.chunks; ++chunk) {
    const float* from = row_partial + int64_t{chunk} * p.partial_floats;
#pragma unroll
    for (int r = 0; r < 2; ++r) state->largest[r] = fmaxf(state->largest[r], __ldcg(from + (kLargest + r) * kMmaThreads));
  }
  constexpr int kAtOnce = 16;  // more loads on their way than that cost more registers than there are
#pragma unroll
  for (int first = 0; first < kTotal; first += kAtOnce) {
#pragma unroll 1
    for (int chunk = 0; chunk < item.chunks; ++chunk) {
      const float* from = row_partial + int64_t{chunk} * p.partial_floats;
      float w[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        w[r] = Weight2(__ldcg(from + (kLargest + r) * kMmaThreads), state->largest[r]);
        if (first == 0) state->total[r] += w[r] * __ldcg(from + (kTotal + r) * kMmaThreads);
      }
#pragma unroll
      for (int n = first; n < first + kAtOnce; ++n) {
        state->output[n / 4][n % 4] += w[n % 4 / 2] * __ldcg(from + n * kMmaThreads);
      }
    }
  }
  return true;
}

// Adds the low-resolution part, divides, and leaves the warp's 16 rows of the context in `tile`, as TileOffset lays them out.
template <typename T, int kDims>
__device__ __forceinline__ void FinishRows(const Problem& p, int64_t block_row, uint32_t query_real, const MmaState<kDims>& state,
                                           unsigned char* tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float low_largest = p.full ? p.low_largest[block_row] * kLog2E : -INFINITY;
  const float low_total = p.full ? p.low_total[block_row] : 0.0f;
  const float* low_vector = p.low_vector + block_row * p.head_size;
  float exact[2], low[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float largest = fmaxf(state.largest[r], low_largest);
    exact[r] = Weight2(state.largest[r], largest);
    low[r] = Weight2(low_largest, largest);
    const float total = exact[r] * state.total[r] + low[r] * low_total + kEpsilon;
    exact[r] /= total, low[r] /= total;
  }
#pragma unroll
  for (int n = 0; n < kDims / 8; ++n) {
    const int d = 8 * n + 2 * (lane % 4);
    float added[2] = {};
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (p.full && d + e < p.head_size) added[e] = low_vector[d + e];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int token = 16 * warp + lane / 4 + 8 * r;
      float x[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) x[e] = exact[r] * state.output[n][2 * r + e] + low[r] * added[e];
      const bool is_real = query_real >> token & 1u;
      const uint32_t pair = is_real ? PackPair<T>(x[0], x[1]) : 0u;
      *reinterpret_cast<uint32_t*>(tile + TileOffset<kDims>(token, n) + 4 * (lane % 4)) = pair;
    }
  }
}

// Writes the warp's 16 rows of the context; tokens from N on do not exist.
template <typename T, int kDims, bool kVector>
__device__ __forceinline__ void StoreRows(const Problem& p, int64_t first_token, const unsigned char* tile, T* context) {
  constexpr int kChunks = kDims / 8;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < kBlock / 2 * kChunks / 32; ++n) {
    const int index = lane + n * 32;
    const int token = 16 * warp + index / kChunks, chunk = index % kChunks;
    if (first_token + token >= p.length || 8 * chunk >= p.head_size) continue;
    const unsigned char* from = tile + TileOffset<kDims>(token, chunk);
    T* to = context + token * hidden + 8 * chunk;
    if constexpr (kVector) {
      *reinterpret_cast<float4*>(to) = *reinterpret_cast<const float4*>(from);
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && 8 * chunk + e < p.head_size; ++e) to[e] = reinterpret_cast<const T*>(from)[e];
    }
  }
}

// No least number of CTAs: told of one, ptxas spends the registers that it allows and spills.
template <typename T, int kDims, bool kVector>
__global__ void __launch_bounds__(kMmaThreads) AttendMmaKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  constexpr size_t kTile = MmaTileBytes(kDims);

  const WorkItem item = p.work[blockIdx.x];
  if (item.row < 0) return;
  // 32 bits divide in a quarter of the time: there are fewer heads than CTAs.
  const int head_index = static_cast<int>(blockIdx.x) / p.slots;
  const int64_t head = head_index, batch = head_index / p.heads;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  const int64_t head_offset = batch * p.length * hidden + int64_t{head_index % p.heads} * p.head_size;
  const int64_t row_offset = head_offset + int64_t{item.row} * kBlock * hidden;
  const uint32_t* real = p.real + batch * p.blocks;
  const uint32_t query_real = real[item.row];
  if (query_real == 0 && item.chunk > 0) return;

  MmaState<kDims> state;
  if (query_real != 0) {
    const int32_t* row_start = p.row_start + head * (p.blocks + 1) + item.row;
    const int begin = row_start[0] + item.chunk * p.chunk;
    const int end = begin + p.chunk < row_start[1] ? begin + p.chunk : row_start[1];
    const TileShare<kDims> share;
    KeyBlocks blocks = {p.column + head * p.budget, real, begin, end};

    const auto fetch = [&](int stage) {
      int j = 0;
      const uint32_t tokens = blocks.Take(&j);
      if (tokens != 0) {
        const int64_t offset = head_offset + int64_t{j} * kBlock * hidden;
        unsigned char* tile = memory + stage * 2 * kTile;
        FetchTiles<T, kDims, kVector>(p, share, offset, tokens, tile, tile + kTile);
      }
      CopyAsyncCommit();  // also when there was nothing: the wait below counts groups
      return tokens;
    };
    QueryFragments<T, kDims> query;
    LoadQuery<T, kDims, kVector>(p, static_cast<const T*>(p.query) + row_offset, query_real, &query);

    const float factor = p.scale * kLog2E;
    uint32_t tokens[kMmaStages - 1] = {};  // real tokens of the blocks on their way, next one first; 0: none
    int next_stage = 0;                    // the one to be filled; the one after it in the ring holds the next block
    for (int step = 1 - kMmaStages; step < 0 || tokens[0] != 0; ++step) {
      if (step >= 0) {
        CopyAsyncWait<kMmaStages - 2>();
        __syncthreads();  // everyone's share of the next block is here, and nobody reads the block before it any more
      }
      const uint32_t now = tokens[0];
#pragma unroll
      for (int n = 0; n < kMmaStages - 2; ++n) tokens[n] = tokens[n + 1];
      tokens[kMmaStages - 2] = fetch(next_stage);
      next_stage = next_stage + 1 < kMmaStages ? next_stage + 1 : 0;
      if (step < 0) continue;  // the ring is being filled
      const unsigned char* tile = memory + next_stage * 2 * kTile;
      AttendTile<T, kDims>(factor, query, now, tile, tile + kTile, &state);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      state.total[r] += __shfl_xor_sync(kWarp, state.total[r], 1);
      state.total[r] += __shfl_xor_sync(kWarp, state.total[r], 2);
    }
    __syncthreads();  // the ring is free
    if (item.chunks > 1 && !MergeMmaChunks<kDims>(p, head, item, reinterpret_cast<int32_t*>(memory), &state)) return;
    if (item.chunks > 1) __syncthreads();  // is_last has been read
  }
  FinishRows<T, kDims>(p, head * p.blocks + item.row, query_real, state, memory);
  __syncwarp();
  StoreRows<T, kDims, kVector>(p, int64_t{item.row} * kBlock, memory, static_cast<T*>(p.context) + row_offset);
}

}  // namespace mra

#endif  // MRA_ATTENTION_ATTEND_MMA_CUH_
