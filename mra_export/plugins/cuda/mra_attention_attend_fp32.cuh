// The attention kernels with float32 products: for float32 tensors, by fused multiply-add (exact products) or, as an option, on
// tensor cores with every float in two tf32 parts; by multiply-add also for 16-bit tensors of more than 128 dimensions per head.
//
// A CTA has two warps. Up to 64 dimensions each of them takes every other key block for all 32 query tokens, a team of its own with
// its own tiles and state, and the two states are added at the end; above, the two are one team and have 16 query tokens each. A
// team goes through tiles of 32 tokens and up to 64 dimensions, a block's keys and then its values, in two places of shared memory:
// while it works on one tile, cp.async brings the next.
#ifndef MRA_ATTENTION_ATTEND_FP32_CUH_
#define MRA_ATTENTION_ATTEND_FP32_CUH_

#include "mra_attention_attend.cuh"

namespace mra {

constexpr int kFp32Threads = 64;
constexpr int kVectorFloats = 4;  // of 16 bytes

// Sizes for heads of up to kDims dimensions.
template <int kDims>
struct Fp32Shape {
  static constexpr int kTeamWarps = kDims <= 64 ? 1 : 2;
  static constexpr int kTeamThreads = 32 * kTeamWarps;
  static constexpr int kTeams = kFp32Threads / kTeamThreads;
  static constexpr int kTokens = kBlock / kTeamWarps;  // query tokens of a warp
  static constexpr int kTileDims = kDims < 64 ? kDims : 64;
  static constexpr int kTiles = kDims / kTileDims;  // tiles of a block's keys, and as many of its values
  static constexpr int kTileFloats = kBlock * kTileDims;
};

// In shared memory the groups of four floats ("chunks") of a token's row are permuted, chunk c lies at c ^ turn, so that what a
// warp reads at once lies in different banks. This is the turn of query tokens and of weights; of keys and values, see the
// products.
__device__ __forceinline__ int QueryTurn(int token) { return (token & 1) << 2 | (token & 2); }

__device__ __forceinline__ float4 ReadChunk(const float* row, int chunk) {
  return *reinterpret_cast<const float4*>(row + kVectorFloats * chunk);
}

__device__ __forceinline__ float Dot(float4 a, float4 b, float sum) {
  sum = __fmaf_rn(a.x, b.x, sum);
  sum = __fmaf_rn(a.y, b.y, sum);
  sum = __fmaf_rn(a.z, b.z, sum);
  return __fmaf_rn(a.w, b.w, sum);
}

// Products by fused multiply-add. Lanes form a grid of 4 x 8, such that neighbours share a row or a column: row `i` has query
// tokens i + 4 r, column `j` key tokens 4 j to 4 j + 3 and dimensions 32 n + 4 j to 32 n + 4 j + 3. 4 (or, with 32 query tokens, 8)
// x 4 sums a thread for the logits, as many rows x kDims / 8 for the context.
template <int kDims>
struct FmaProduct {
  using Shape = Fp32Shape<kDims>;
  static constexpr int kRows = Shape::kTokens / 4;
  static constexpr int kScores = 4;
  static constexpr int kValues = kDims / 8;
  static constexpr int kWeightFloats = kBlock * kBlock;  // of a team: weights pass through shared memory
  using State = RowState<kRows, kValues>;

  int first;  // the warp's first query token
  int i, j;

  __device__ __forceinline__ explicit FmaProduct(int first_token) : first(first_token) {
    const int lane = threadIdx.x % 32;
    i = lane % 2 + lane / 16 * 2;
    j = lane / 2 % 8;
  }

  __device__ static __forceinline__ int TileTurn(int token) { return token / 4 % 8; }
  __device__ __forceinline__ int Row(int r) const { return first + i + 4 * r; }
  __device__ __forceinline__ int Token(int c) const { return 4 * j + c; }
  __device__ __forceinline__ int Dim(int chunk) const { return 32 * chunk + 4 * j; }  // of values 4 chunk to 4 chunk + 3

  template <typename Combine>
  __device__ static __forceinline__ float OverRow(float x, Combine combine) {
#pragma unroll
    for (int lanes = 2; lanes <= 8; lanes *= 2) x = combine(x, __shfl_xor_sync(kWarp, x, lanes));
    return x;
  }

  // score += query * key over one tile's dimensions. query: (32, kDims), from the tile's first dimension on.
  __device__ __forceinline__ void AddScores(const float* query, const float* tile, float (&score)[kRows][kScores]) const {
    const float* own_query = query + Row(0) * kDims;
    const float* own_keys = tile + Token(0) * Shape::kTileDims;
#pragma unroll(kDims <= 64 ? 2 : 1)
    for (int x = 0; x < Shape::kTileDims / 4; ++x) {
      float4 k[kScores];
#pragma unroll
      for (int c = 0; c < kScores; ++c) k[c] = ReadChunk(own_keys + c * Shape::kTileDims, x ^ j);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 q = ReadChunk(own_query + 4 * r * kDims, x ^ QueryTurn(i));
#pragma unroll
        for (int c = 0; c < kScores; ++c) score[r][c] = Dot(q, k[c], score[r][c]);
      }
    }
  }

  // weights: (32, 32) shared by the team, read by the warp that wrote it only.
  __device__ __forceinline__ void KeepWeights(const float (&w)[kRows][kScores], float* weights) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float* row = weights + Row(r) * kBlock;
      *reinterpret_cast<float4*>(row + kVectorFloats * (j ^ QueryTurn(i))) = {w[r][0], w[r][1], w[r][2], w[r][3]};
    }
  }

  // output += weights * values for one tile's dimensions, the tile'th of the head.
  __device__ __forceinline__ void AddValues(const float (&)[kRows][kScores], const float* weights, const float* values, int tile,
                                            State* state) const {
    constexpr int kChunks = Shape::kTileDims / 32;  // of a thread
    const float* own_weights = weights + Row(0) * kBlock;
#pragma unroll 1
    for (int x = 0; x < kBlock / 4; ++x) {
      float w[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 four = ReadChunk(own_weights + 4 * r * kBlock, x ^ QueryTurn(i));
        w[r][0] = four.x, w[r][1] = four.y, w[r][2] = four.z, w[r][3] = four.w;
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int n = 0; n < kChunks; ++n) {
          const float4 v = ReadChunk(values + (4 * x + t) * Shape::kTileDims, 8 * n + (x ^ j));
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float* out = state->output[r] + 4 * (tile * kChunks + n);
            out[0] = __fmaf_rn(w[r][t], v.x, out[0]);
            out[1] = __fmaf_rn(w[r][t], v.y, out[1]);
            out[2] = __fmaf_rn(w[r][t], v.z, out[2]);
            out[3] = __fmaf_rn(w[r][t], v.w, out[3]);
          }
        }
      }
    }
  }
};

// x = big + small, both tf32 as the tensor cores read them (they ignore the low 13 bits), to 2^-21 of x. NaN stays NaN in `small`.
struct Tf32Parts {
  uint32_t big, small;
};

__device__ __forceinline__ Tf32Parts SplitTf32(float x) {
  const uint32_t big = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
  return {big, __float_as_uint(__fsub_rn(x, __uint_as_float(big)))};
}

// Products on tensor cores: big * big + big * small + small * big. With g = lane / 4 and t = lane % 4, a thread has query tokens
// g + 8 r and, as m16n8k8's result is laid out, key tokens 8 n + 2 t and the next one, and dimensions 32 n + 8 t to 32 n + 8 t + 7.
// The order of the inner index and of the dimensions is free: it is chosen so that every thread reads 16 bytes at once, and that
// the logits' layout is that of the weights as a left factor.
template <int kDims>
struct Tf32Product {
  using Shape = Fp32Shape<kDims>;
  static constexpr int kRows = Shape::kTokens / 8;
  static constexpr int kScores = 8;
  static constexpr int kValues = kDims / 4;
  static constexpr int kWeightFloats = 0;
  using State = RowState<kRows, kValues>;

  int first;  // the warp's first query token
  int g, t;

  __device__ __forceinline__ explicit Tf32Product(int first_token) : first(first_token) {
    g = threadIdx.x % 32 / 4;
    t = threadIdx.x % 4;
  }

  __device__ static __forceinline__ int TileTurn(int token) { return (token & 6) ^ (token & 1) << 2; }
  __device__ __forceinline__ int Row(int r) const { return first + g + 8 * r; }
  __device__ __forceinline__ int Token(int c) const { return 8 * (c / 2) + 2 * t + c % 2; }
  __device__ __forceinline__ int Dim(int chunk) const { return 32 * (chunk / 2) + 8 * t + 4 * (chunk % 2); }

  template <typename Combine>
  __device__ static __forceinline__ float OverRow(float x, Combine combine) {
#pragma unroll
    for (int lanes = 1; lanes <= 2; lanes *= 2) x = combine(x, __shfl_xor_sync(kWarp, x, lanes));
    return x;
  }

  // One 16 x 8 x 8 product for each 16 of the warp's query tokens. a[r]: row r's elements t and t + 4 of the inner index; c[r]: its
  // columns 2 t and 2 t + 1.
  __device__ static __forceinline__ void Multiply(const Tf32Parts (&a)[kRows][2], const Tf32Parts (&b)[2], float (&c)[kRows][2]) {
    float tile[kRows / 2][4];
#pragma unroll
    for (int m = 0; m < kRows / 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) tile[m][e] = c[2 * m + e / 2][e % 2];
    }
#pragma unroll
    for (int term = 0; term < 3; ++term) {  // the small ones first
#pragma unroll
      for (int m = 0; m < kRows / 2; ++m) {
        uint32_t left[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const Tf32Parts& x = a[2 * m + e % 2][e / 2];
          left[e] = term == 0 ? x.small : x.big;
        }
        MultiplyTileTf32(tile[m], left, term == 1 ? b[0].small : b[0].big, term == 1 ? b[1].small : b[1].big);
      }
    }
#pragma unroll
    for (int m = 0; m < kRows / 2; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) c[2 * m + e / 2][e % 2] = tile[m][e];
    }
  }

  __device__ __forceinline__ void AddScores(const float* query, const float* tile, float (&score)[kRows][kScores]) const {
    const float* own_query = query + Row(0) * kDims;
    const float* own_keys = tile + g * Shape::kTileDims;
#pragma unroll 1
    for (int x = 0; x < Shape::kTileDims / 16; ++x) {
      float4 q[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) q[r] = ReadChunk(own_query + 8 * r * kDims, (4 * x + t) ^ QueryTurn(g));
      float4 k[kBlock / 8];
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) k[n] = ReadChunk(own_keys + 8 * n * Shape::kTileDims, (4 * x + t) ^ TileTurn(g));
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the thread's four dimensions
        Tf32Parts a[kRows][2];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          a[r][0] = SplitTf32(half == 0 ? q[r].x : q[r].z);
          a[r][1] = SplitTf32(half == 0 ? q[r].y : q[r].w);
        }
#pragma unroll
        for (int n = 0; n < kBlock / 8; ++n) {
          const Tf32Parts b[2] = {SplitTf32(half == 0 ? k[n].x : k[n].z), SplitTf32(half == 0 ? k[n].y : k[n].w)};
          float c[kRows][2];
#pragma unroll
          for (int r = 0; r < kRows; ++r) c[r][0] = score[r][2 * n], c[r][1] = score[r][2 * n + 1];
          Multiply(a, b, c);
#pragma unroll
          for (int r = 0; r < kRows; ++r) score[r][2 * n] = c[r][0], score[r][2 * n + 1] = c[r][1];
        }
      }
    }
  }

  __device__ __forceinline__ void KeepWeights(const float (&)[kRows][kScores], float*) const {}

  __device__ __forceinline__ void AddValues(const float (&w)[kRows][kScores], const float*, const float* values, int tile,
                                            State* state) const {
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n) {  // eight key tokens
      Tf32Parts a[kRows][2];
#pragma unroll
      for (int r = 0; r < kRows; ++r) a[r][0] = SplitTf32(w[r][2 * n]), a[r][1] = SplitTf32(w[r][2 * n + 1]);
#pragma unroll
      for (int m = 0; m < Shape::kTileDims / 32; ++m) {
        float v[2][4];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = 8 * n + 2 * t + e;
          const float4 four = ReadChunk(values + token * Shape::kTileDims, (8 * m + g) ^ TileTurn(token));
          v[e][0] = four.x, v[e][1] = four.y, v[e][2] = four.z, v[e][3] = four.w;
        }
#pragma unroll
        for (int d = 0; d < 4; ++d) {
          const Tf32Parts b[2] = {SplitTf32(v[0][d]), SplitTf32(v[1][d])};
          const int at = 8 * (tile * (Shape::kTileDims / 32) + m) + d;
          float c[kRows][2];
#pragma unroll
          for (int r = 0; r < kRows; ++r) c[r][0] = state->output[r][at], c[r][1] = state->output[r][at + 4];
          Multiply(a, b, c);
#pragma unroll
          for (int r = 0; r < kRows; ++r) state->output[r][at] = c[r][0], state->output[r][at + 4] = c[r][1];
        }
      }
    }
  }
};

// Shared memory of a CTA: the query tile, then for each team two tiles and the weights.
template <int kDims, template <int> class Product>
constexpr size_t Fp32SharedBytes() {
  using Shape = Fp32Shape<kDims>;
  return sizeof(float) * (kBlock * kDims + Shape::kTeams * (2 * Shape::kTileFloats + Product<kDims>::kWeightFloats));
}

// Starts filling a tile (32, kTileDims), rows kStride floats apart, with dimensions `dim` and up of a block's tokens; masked tokens
// and dimensions from D on become 0, and are not read. By kThreads threads, of which this is number `thread`. kVector: the tensor
// is of float and p.vector_loads holds.
template <typename T, bool kVector, int kTileDims, int kStride, int kThreads, typename Turn>
__device__ __forceinline__ void FetchTile(const Problem& p, const T* first_token, int dim, uint32_t real, float* tile, int thread,
                                          Turn turn) {
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  if constexpr (kVector) {
    constexpr int kChunks = kTileDims / kVectorFloats;
    constexpr int kStep = kThreads / kChunks;
    const int chunk = thread % kChunks, token = thread / kChunks;
    const T* from = first_token + token * hidden + dim + kVectorFloats * chunk;
    const uint32_t wanted = dim + kVectorFloats * chunk < p.head_size ? real >> token : 0u;
    tile += token * kStride;
#pragma unroll(kThreads == 32 ? 16 : 2)  // the kernels of more than 64 dimensions have no register left for more
    for (int n = 0; n < kBlock; n += kStep) {
      // turn() picks bits of the token, so turn(token + n) = turn(token) ^ turn(n).
      CopyAsync16(tile + n * kStride + kVectorFloats * (chunk ^ turn(token) ^ turn(n)), from, wanted >> n & 1u);
      from += kStep * hidden;
    }
  } else {
#pragma unroll 1
    for (int d = thread % 32; d < kTileDims; d += 32) {
#pragma unroll 4
      for (int token = thread / 32; token < kBlock; token += kThreads / 32) {
        const bool is_wanted = dim + d < p.head_size && (real >> token & 1u);
        const float x = is_wanted ? ToFloat(first_token[token * hidden + dim + d]) : 0.0f;
        tile[token * kStride + kVectorFloats * (d / kVectorFloats ^ turn(token)) + d % kVectorFloats] = x;
      }
    }
  }
}

// From a key block's logits to its weights, in place; the state is brought to the row's new largest logit.
template <typename Product>
__device__ __forceinline__ void Weigh(const Product& product, float factor, uint32_t real,
                                      float (&score)[Product::kRows][Product::kScores], typename Product::State* state) {
#pragma unroll
  for (int r = 0; r < Product::kRows && real != ~uint32_t{0}; ++r) {
#pragma unroll
    for (int c = 0; c < Product::kScores; ++c) {
      if (!(real >> product.Token(c) & 1u)) score[r][c] = -INFINITY;
    }
  }
#pragma unroll
  for (int r = 0; r < Product::kRows; ++r) {
    float largest = score[r][0];
#pragma unroll
    for (int c = 1; c < Product::kScores; ++c) largest = fmaxf(largest, score[r][c]);
    largest = Product::OverRow(largest, [](float a, float b) { return fmaxf(a, b); });
    largest = fmaxf(state->largest[r], largest * factor);
    const float reference = largest == -INFINITY ? 0.0f : largest;
    const float shrink = Exp2(state->largest[r] - reference);
    state->largest[r] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int c = 0; c < Product::kScores; ++c) {
      score[r][c] = Exp2(__fmaf_rn(score[r][c], factor, -reference));
      sum += score[r][c];
    }
    state->total[r] = __fmaf_rn(state->total[r], shrink, sum);  // each lane sums its own key tokens
#pragma unroll
    for (int n = 0; n < Product::kValues; ++n) state->output[r][n] *= shrink;
  }
}

template <int kTeamWarps>
__device__ __forceinline__ void SyncTeam() {
  if constexpr (kTeamWarps == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Adds all key blocks of the item that are this team's.
template <typename T, int kDims, bool kVector, typename Product>
__device__ __forceinline__ void AttendBlocks(const Problem& p, const Product& product, const T* query, uint32_t query_real,
                                             int64_t head_offset, KeyBlocks blocks, float* query_tile, float* tiles,
                                             typename Product::State* state) {
  using Shape = Fp32Shape<kDims>;
  constexpr int kTiles = Shape::kTiles;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  float* const weights = tiles + 2 * Shape::kTileFloats;
  const auto fetch = [&](const void* tensor, int block, int tile, uint32_t real, int place) {
    const T* first_token = static_cast<const T*>(tensor) + head_offset + int64_t{block} * kBlock * hidden;
    FetchTile<T, kVector, Shape::kTileDims, Shape::kTileDims, Shape::kTeamThreads>(
        p, first_token, tile * Shape::kTileDims, real, tiles + place % 2 * Shape::kTileFloats,
        static_cast<int>(threadIdx.x) % Shape::kTeamThreads, Product::TileTurn);
  };

  FetchTile<T, kVector, kDims, kDims, kFp32Threads>(p, query, 0, query_real, query_tile, threadIdx.x, QueryTurn);
  int block = 0;
  uint32_t real = blocks.Take(&block);
  if (real != 0) fetch(p.key, block, 0, real, 0);
  CopyAsyncCommit();
  CopyAsyncWait<0>();
  __syncthreads();  // the query tile is the whole CTA's
  const float factor = p.scale * kLog2E;
  while (real != 0) {
    float score[Product::kRows][Product::kScores] = {};
#pragma unroll 1
    for (int tile = 0; tile < kTiles; ++tile) {
      CopyAsyncWait<0>();
      SyncTeam<Shape::kTeamWarps>();  // this tile is here, and nobody reads the one before it any more
      if (tile + 1 < kTiles) {
        fetch(p.key, block, tile + 1, real, tile + 1);
      } else {
        fetch(p.value, block, 0, real, kTiles);
      }
      CopyAsyncCommit();
      product.AddScores(query_tile + tile * Shape::kTileDims, tiles + tile % 2 * Shape::kTileFloats, score);
    }
    Weigh(product, factor, real, score, state);
    product.KeepWeights(score, weights);
    int next_block = 0;
    const uint32_t next_real = blocks.Take(&next_block);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      CopyAsyncWait<0>();
      SyncTeam<Shape::kTeamWarps>();
      if (tile + 1 < kTiles) {
        fetch(p.value, block, tile + 1, real, kTiles + tile + 1);
      } else if (next_real != 0) {
        fetch(p.key, next_block, 0, next_real, 0);
      }
      CopyAsyncCommit();
      product.AddValues(score, weights, tiles + (kTiles + tile) % 2 * Shape::kTileFloats, tile, state);
    }
    block = next_block;
    real = next_real;
  }
#pragma unroll
  for (int r = 0; r < Product::kRows; ++r) {
    state->total[r] = Product::OverRow(state->total[r], [](float a, float b) { return a + b; });
  }
}

// Where a work item's tensors begin. Made anew after the loop over key blocks: registers are scarcer than instructions there.
struct ItemPlace {
  WorkItem item;
  int64_t head, batch;
  int64_t head_offset, row_offset;  // elements; of the head's token 0 and of the item's first query token
  uint32_t query_real;
};

__device__ __forceinline__ ItemPlace FindItem(const Problem& p, const WorkItem& item) {
  ItemPlace place;
  place.item = item;
  const int head = static_cast<int>(blockIdx.x) / p.slots;  // 32 bits divide in a quarter of the time
  place.head = head;
  place.batch = head / p.heads;
  const int64_t hidden = int64_t{p.heads} * p.head_size;
  place.head_offset = place.batch * p.length * hidden + int64_t{head % p.heads} * p.head_size;
  place.row_offset = place.head_offset + int64_t{item.row} * kBlock * hidden;
  place.query_real = p.real[place.batch * p.blocks + item.row];
  return place;
}

template <typename T, int kDims, bool kVector, template <int> class ProductOf>
__device__ __forceinline__ void AttendFp32(const Problem& p, float* memory) {
  using Shape = Fp32Shape<kDims>;
  using Product = ProductOf<kDims>;
  using State = typename Product::State;
  const int team = static_cast<int>(threadIdx.x) / Shape::kTeamThreads;
  const Product product(static_cast<int>(threadIdx.x) / 32 % Shape::kTeamWarps * Shape::kTokens);
  State state;
  {
    const WorkItem item = p.work[blockIdx.x];
    if (item.row < 0) return;
    const ItemPlace at = FindItem(p, item);
    if (at.query_real != 0) {
      const int32_t* row_start = p.row_start + at.head * (p.blocks + 1) + item.row;
      const int begin = row_start[0] + item.chunk * p.chunk;
      const int end = begin + p.chunk < row_start[1] ? begin + p.chunk : row_start[1];
      const KeyBlocks blocks = {p.column + at.head * p.budget, p.real + at.batch * p.blocks, begin + team, end, Shape::kTeams};
      float* const tiles = memory + kBlock * kDims + team * (2 * Shape::kTileFloats + Product::kWeightFloats);
      AttendBlocks<T, kDims, kVector>(p, product, static_cast<const T*>(p.query) + at.row_offset, at.query_real, at.head_offset,
                                      blocks, memory, tiles, &state);
    } else if (item.chunk > 0) {
      return;
    }
  }
  if constexpr (Shape::kTeams == 2) {
    __syncthreads();  // all tiles are free
    float* const given = memory + threadIdx.x % 32;
    if (team == 1) state.Store(given, 32);
    __syncthreads();
    if (team == 0) state.Add([&](int n) { return given[n * 32]; });
  }
  __syncthreads();

  const ItemPlace at = FindItem(p, p.work[blockIdx.x]);
  if (at.query_real != 0 && at.item.chunks > 1) {
    if (!MergeChunks<Shape::kTeamThreads>(p, at.head, at.item, reinterpret_cast<int32_t*>(memory), &state)) return;
  }
  if (team != 0) return;

  const int64_t hidden = int64_t{p.heads} * p.head_size;
  T* const context = static_cast<T*>(p.context) + at.row_offset;
  const int64_t block_row = at.head * p.blocks + at.item.row;
  const float low_largest = p.full ? p.low_largest[block_row] * kLog2E : -INFINITY;
  const float low_total = p.full ? p.low_total[block_row] : 0.0f;
  const float* const low_vector = p.low_vector + block_row * p.head_size;
#pragma unroll
  for (int r = 0; r < Product::kRows; ++r) {
    const int token = product.Row(r);
    if (int64_t{at.item.row} * kBlock + token >= p.length) continue;
    const bool is_real = at.query_real >> token & 1u;
    const float largest = fmaxf(state.largest[r], low_largest);
    float exact_weight = Weight2(state.largest[r], largest), low_weight = Weight2(low_largest, largest);
    const float total = exact_weight * state.total[r] + low_weight * low_total + kEpsilon;
    exact_weight /= total, low_weight /= total;
#pragma unroll
    for (int chunk = 0; chunk < Product::kValues / 4; ++chunk) {
      const int d = product.Dim(chunk);
      const float4 four = p.full ? LoadFour(low_vector, d, p.head_size) : float4{0.0f, 0.0f, 0.0f, 0.0f};
      const float added[4] = {four.x, four.y, four.z, four.w};
      float x[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) x[e] = is_real ? exact_weight * state.output[r][4 * chunk + e] + low_weight * added[e] : 0.0f;
      T* const to = context + token * hidden + d;
      if constexpr (kVector) {
        if (d < p.head_size) *reinterpret_cast<float4*>(to) = {x[0], x[1], x[2], x[3]};
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (d + e < p.head_size) to[e] = FromFloat<T>(x[e]);
        }
      }
    }
  }
}

// CTAs that an SM's registers must hold: 168 registers a thread or 255. Told of no number, ptxas spills to hold more.
constexpr int FmaCtas(int dims) { return dims == 128 ? 6 : 4; }
constexpr int kTf32Ctas = 4;

template <typename T, int kDims, bool kVector>
__global__ void __launch_bounds__(kFp32Threads, FmaCtas(kDims)) AttendFmaKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  AttendFp32<T, kDims, kVector, FmaProduct>(p, reinterpret_cast<float*>(memory));
}

// float32_mode MRA_FLOAT32_TF32X3, for heads of up to this many dimensions.
constexpr int kTf32MostDims = 128;

template <int kDims, bool kVector>
__global__ void __launch_bounds__(kFp32Threads, kTf32Ctas) AttendTfKernel(Problem p) {
  MRA_DYNAMIC_SHARED(memory);
  AttendFp32<float, kDims, kVector, Tf32Product>(p, reinterpret_cast<float*>(memory));
}

}  // namespace mra

#endif  // MRA_ATTENTION_ATTEND_FP32_CUH_
