// The CPU kernel of MraAttention. Meaning: docs/operator.md ("Meaning, exactly", points 1 to 6); design and the selection contract:
// docs/kernels.md. Compiled once per instruction set with MRA_TARGET naming it; everything but kKernels has internal linkage.
//
// The vector dimension is the query token throughout the exact part: logits of a block pair are K (32 x D, broadcast) times Q^T
// (D x 32), its output V^T (D x 32, broadcast) times weights (32 x 32). So softmax needs no sums across lanes and K and V no
// transposition.
#include <stdint.h>
#include <string.h>

#include "mra_attention_problem.h"
#include "simd.h"

namespace mra {
namespace MRA_TARGET {
namespace {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kEpsilon = 1e-6f;
const float kInfinity = __builtin_inff();

MRA_INLINE int64_t Smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// acc[r][c] += sum over depth of a[depth][r] * b[depth][c], one chain of (fused) multiply-adds per element, depth ascending.
template <bool kFused>
MRA_INLINE void MultiplyTile(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth,
                             Floats (&acc)[kTileRows][2]) {
  for (int64_t k = 0; k < depth; ++k) {
    const Floats b0 = Load(b);
    const Floats b1 = Load(b + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Floats x = Splat(a[r]);
      acc[r][0] = kFused ? FusedMultiplyAdd(x, b0, acc[r][0]) : MultiplyAdd(x, b0, acc[r][0]);
      acc[r][1] = kFused ? FusedMultiplyAdd(x, b1, acc[r][1]) : MultiplyAdd(x, b1, acc[r][1]);
    }
    a += a_stride;
    b += b_stride;
  }
}

// c (8 x 32) = a panel (depth x 8)^T times b (depth x 32).
template <bool kFused>
MRA_INLINE void MultiplyPanel(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t depth, float* c,
                              int64_t c_stride) {
  for (int row = 0; row < kPanel; row += kTileRows) {
    for (int column = 0; column < kBlock; column += 2 * kLanes) {
      Floats acc[kTileRows][2] = {};
      MultiplyTile<kFused>(a + row, a_stride, b + column, b_stride, depth, acc);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        Store(c + (row + r) * c_stride + column, acc[r][0]);
        Store(c + (row + r) * c_stride + column + kLanes, acc[r][1]);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Packing and pooling.

// rows (32 x stride) = the block's real tokens as float32, everything else 0. source: token 0 of the block, head's first element.
template <class T>
void LoadBlock(const T* source, int64_t token_stride, uint32_t real, int64_t head_size, float* rows, int64_t stride) {
  for (int t = 0; t < kBlock; ++t, rows += stride) {
    if (!(real >> t & 1u)) {
      memset(rows, 0, static_cast<size_t>(stride) * sizeof(float));
      continue;
    }
    const T* token = source + t * token_stride;
    int64_t d = 0;
    for (; d + kLanes <= head_size; d += kLanes) Store(rows + d, LoadAs(token + d));
    for (; d < head_size; ++d) rows[d] = ToFloat(token[d]);
    for (; d < stride; ++d) rows[d] = 0.0f;
  }
}

// sum[d] = the block's tokens in ascending order, for d < size. Masked rows are 0: adding them changes nothing.
void SumBlock(const float* rows, int64_t stride, int64_t size, float* sum) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    Floats s = {};
    for (int t = 0; t < kBlock; ++t) s += Load(rows + t * stride + d);
    Store(sum + d, s);
  }
  for (; d < size; ++d) {
    float s = 0.0f;
    for (int t = 0; t < kBlock; ++t) s += rows[t * stride + d];
    sum[d] = s;
  }
}

// to (size x to_stride) = from (32 x from_stride) transposed; size a multiple of 8.
void TransposeRows(const float* from, int64_t from_stride, int64_t size, float* to, int64_t to_stride) {
  for (int64_t d = 0; d < size; d += 8) {
    for (int t = 0; t < kBlock; t += 8) Transpose8x8(from + t * from_stride + d, from_stride, to + d * to_stride + t, to_stride);
  }
}

template <class T>
void PackHead(const Problem& problem, int64_t head, int64_t first, int64_t last) {
  const MraAttentionParams& params = *problem.params;
  const GroupBuffers& group = problem.group;
  const int64_t D = params.head_size;
  const int64_t hidden = params.num_heads * D;
  const int64_t batch_row = (problem.first_head + head) / params.num_heads;
  const int64_t offset = batch_row * params.length * hidden + (problem.first_head + head) % params.num_heads * D;
  const T* query = static_cast<const T*>(problem.query) + offset;
  const T* key = static_cast<const T*>(problem.key) + offset;
  const T* value = problem.value ? static_cast<const T*>(problem.value) + offset : nullptr;
  const int32_t* mask = problem.mask + batch_row * params.length;
  uint32_t* real = group.real + head * problem.nb;
  float* real_count = group.real_count + head * problem.nb32;
  float* key_mean = group.key_mean + head * D * problem.nb32;
  float* query_mean = group.query_mean + head * D * problem.nb8;
  alignas(64) float rows[kBlock * MRA_ATTENTION_MAX_HEAD_SIZE];
  alignas(64) float sum[MRA_ATTENTION_MAX_HEAD_SIZE];

  for (int64_t j = first; j < last; ++j) {
    const int64_t start = j * kBlock;
    const int64_t tokens = Smaller(kBlock, params.length - start);
    uint32_t bits = 0;
    for (int64_t t = 0; t < tokens; ++t) bits |= static_cast<uint32_t>(mask[start + t] != 0) << t;
    real[j] = bits;
    const float count = static_cast<float>(__builtin_popcount(bits));
    real_count[j] = count;
    const float divisor = count + kEpsilon;

    LoadBlock(query + start * hidden, hidden, bits, D, rows, problem.d8);
    SumBlock(rows, problem.d8, D, sum);
    float* panel = query_mean + j / kPanel * kPanel * D + j % kPanel;
    for (int64_t d = 0; d < D; ++d) panel[d * kPanel] = sum[d] / divisor;

    LoadBlock(key + start * hidden, hidden, bits, D, rows, problem.d8);
    SumBlock(rows, problem.d8, D, sum);
    for (int64_t d = 0; d < D; ++d) key_mean[d * problem.nb32 + j] = sum[d] / divisor;
    if (value == nullptr) continue;  // selection only

    float* panels = group.key_panels + (head * problem.nb + j) * kBlock * problem.d8;
    for (int t = 0; t < kBlock; t += kPanel) {
      for (int64_t d = 0; d < problem.d8; d += 8) {
        Transpose8x8(rows + t * problem.d8 + d, problem.d8, panels + (t * problem.d8 + d * kPanel), kPanel);
      }
    }
    float* value_rows = group.value_rows + (head * problem.nb + j) * kBlock * problem.d8;
    LoadBlock(value + start * hidden, hidden, bits, D, value_rows, problem.d8);
    float* value_sum = group.value_sum + (head * problem.nb + j) * problem.d32;
    SumBlock(value_rows, problem.d8, problem.d8, value_sum);
    for (int64_t d = problem.d8; d < problem.d32; ++d) value_sum[d] = 0.0f;
  }
  if (last < problem.nb) return;
  // The right and lower edges of the products' operands.
  for (int64_t j = problem.nb; j < problem.nb32; ++j) {
    real_count[j] = 0.0f;
    for (int64_t d = 0; d < D; ++d) key_mean[d * problem.nb32 + j] = 0.0f;
  }
  for (int64_t i = problem.nb; i < problem.nb8; ++i) {
    for (int64_t d = 0; d < D; ++d) query_mean[i / kPanel * kPanel * D + d * kPanel + i % kPanel] = 0.0f;
  }
}

void Pack(const Problem& problem, int64_t head, int64_t chunk) {
  const int64_t first = chunk * kPackBlocks;
  const int64_t last = Smaller(problem.nb, first + kPackBlocks);
  switch (problem.params->dtype) {
    case MRA_FLOAT16:
      return PackHead<Half>(problem, head, first, last);
    case MRA_BFLOAT16:
      return PackHead<BFloat>(problem, head, first, last);
    default:
      return PackHead<float>(problem, head, first, last);
  }
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Selection. Everything that decides is done in the order that docs/kernels.md fixes.

constexpr int kLowestClass = -2;  // a dead pair without priors
constexpr int kClasses = 6;       // ... to 3, a live pair with all three

// One head's view of the problem.
struct Head {
  float* logits;            // (nb8, nb32)
  float* row_max;           // (nb8)
  const uint32_t* real;     // (nb)
  const float* real_count;  // (nb32)
  int32_t* columns;
  int64_t* row_start;
};

MRA_INLINE Head HeadOf(const Problem& problem, int64_t head) {
  const GroupBuffers& group = problem.group;
  return {group.logits + head * problem.nb8 * problem.nb32,
          group.row_max + head * problem.nb8,
          group.real + head * problem.nb,
          group.real_count + head * problem.nb32,
          group.columns + head * problem.chosen,
          group.row_start + head * (problem.nb + 1)};
}

// l_ij = scale * <qm_i, km_j> and r_i. Columns from nb to nb32 become -inf.
void ComputeLogits(const Problem& problem, int64_t head_index, const Head& head) {
  const int64_t D = problem.params->head_size;
  const float* query_mean = problem.group.query_mean + head_index * D * problem.nb8;
  const float* key_mean = problem.group.key_mean + head_index * D * problem.nb32;
  const Floats scale = Splat(problem.params->scale);
  for (int64_t i = 0; i < problem.nb8; i += kPanel) {
    for (int64_t j = 0; j < problem.nb32; j += kBlock) {
      MultiplyPanel<true>(query_mean + i * D, kPanel, key_mean + j, problem.nb32, D, head.logits + i * problem.nb32 + j,
                          problem.nb32);
    }
  }
  for (int64_t i = 0; i < problem.nb; ++i) {
    float* row = head.logits + i * problem.nb32;
    for (int64_t j = 0; j < problem.nb32; j += kLanes) Store(row + j, Load(row + j) * scale);
    for (int64_t j = problem.nb; j < problem.nb32; ++j) row[j] = -kInfinity;
    Floats largest = Splat(-kInfinity);  // NaN never becomes the maximum
    if (!problem.params->padding_invariant) {
      for (int64_t j = 0; j < problem.nb32; j += kLanes) {
        const Floats l = Load(row + j);
        largest = l > largest ? l : largest;
      }
      head.row_max[i] = LargestOrNan(largest);
    } else if (head.real[i] != 0) {
      for (int64_t j = 0; j < problem.nb32; j += kLanes) {
        const Floats l = Load(row + j);
        largest = ((l > largest) & (Load(head.real_count + j) > 0.0f)) ? l : largest;
      }
      head.row_max[i] = LargestOrNan(largest);
    } else {
      head.row_max[i] = 0.0f;  // no live pair
    }
  }
}

// s = l - r and its order-preserving key: a < b as floats if and only if key(a) < key(b); -0 equals 0; NaN is 0, below everything.
MRA_INLINE Floats Score(Floats logit, Floats row_max) { return logit - row_max; }
MRA_INLINE Words Key(Floats score) {
  const Words bits = (Words)(score + Splat(0.0f));
  const Words flip = (Words)((Ints)bits >> 31) | 0x80000000u;
  return score == score ? bits ^ flip : Words{};
}

// The classes of row i: prior count - 2 * dead.
void ClassifyRow(const Problem& problem, const Head& head, int64_t i, const int32_t* column_class, int32_t* row_class) {
  const int64_t first = problem.params->initial_prior_first_n_blocks;
  const int64_t diagonal = problem.params->initial_prior_diagonal_n_blocks;
  const int32_t bonus = i < first;
  const bool dead = head.real[i] == 0;
  for (int64_t j = 0; j < problem.nb; ++j) row_class[j] = bonus + (dead ? (j < first) - 2 : column_class[j]);
  if (diagonal > 0) {
    const int64_t from = i - diagonal / 2 > 0 ? i - diagonal / 2 : 0;
    const int64_t to = Smaller(i + diagonal / 2, problem.nb - 1);
    for (int64_t j = from; j <= to; ++j) ++row_class[j];
  }
}

// The count-th largest of keys[0, size), 1 <= count <= size; *larger: how many are above it. Destroys keys. Linear: a histogram of
// the leading 8 bits finds the bucket, which alone is kept for the next 8.
uint32_t SelectKey(uint32_t* keys, int64_t size, int64_t count, int64_t* larger) {
  *larger = 0;
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int64_t histogram[256] = {};
    for (int64_t n = 0; n < size; ++n) ++histogram[keys[n] >> shift & 255u];
    uint32_t digit = 255;
    while (*larger + histogram[digit] < count) *larger += histogram[digit--];
    prefix |= digit << shift;
    int64_t kept = 0;
    for (int64_t n = 0; n < size; ++n) {
      const uint32_t key = keys[n];
      keys[kept] = key;
      kept += (key >> shift & 255u) == digit;
    }
    size = kept;
  }
  return prefix;
}

// The boundary of the selection: a pair is chosen if its class is higher, or equal and its key higher, or both equal and it is
// among the first `ties` such pairs in flat order; the remaining such pairs are excluded too.
struct Boundary {
  int32_t pair_class;
  uint32_t key;
  int64_t ties;
};

Boundary FindBoundary(const Problem& problem, const Head& head, bool one_class, const WorkerBuffers& worker) {
  const int64_t nb = problem.nb;
  int64_t counts[kClasses] = {};
  if (one_class) {
    counts[0 - kLowestClass] = nb * nb;
  } else {
    for (int64_t i = 0; i < nb; ++i) {
      ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
      for (int64_t j = 0; j < nb; ++j) ++counts[worker.row_class[j] - kLowestClass];
    }
  }
  int32_t pair_class = kLowestClass + kClasses - 1;
  int64_t higher = 0;
  while (higher + counts[pair_class - kLowestClass] < problem.chosen) higher += counts[pair_class-- - kLowestClass];

  int64_t size = 0;
  for (int64_t i = 0; i < nb; ++i) {
    const float* row = head.logits + i * problem.nb32;
    const Floats row_max = Splat(head.row_max[i]);
    if (one_class) {
      for (int64_t j = 0; j < problem.nb32; j += kLanes) {
        if (j < nb) StoreWords(worker.keys + size + j, Key(Score(Load(row + j), row_max)));
      }
      size += nb;
    } else {
      ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
      for (int64_t j = 0; j < nb; j += kLanes) {
        uint32_t keys[kLanes];
        StoreWords(keys, Key(Score(Load(row + j), row_max)));
        for (int64_t lane = 0; lane < Smaller(kLanes, nb - j); ++lane) {
          worker.keys[size] = keys[lane];
          size += worker.row_class[j + lane] == pair_class;
        }
      }
    }
  }
  const int64_t needed = problem.chosen - higher;
  int64_t larger = 0;
  const uint32_t key = SelectKey(worker.keys, size, needed, &larger);
  return {pair_class, key, needed - larger};
}

// Writes the chosen live columns row by row; turns logits into low-resolution logits in units of log2, -inf where they do not
// count, and row_max into their maximum.
void Choose(const Problem& problem, const Head& head, bool one_class, Boundary boundary, const WorkerBuffers& worker,
            uint8_t* blocks, float* score) {
  const int64_t nb = problem.nb;
  const bool full = problem.params->approx_mode == MRA_APPROX_FULL;
  const Ints boundary_class = SplatInt(boundary.pair_class);
  const Words boundary_key = (Words)SplatInt(static_cast<int32_t>(boundary.key));
  int64_t count = 0;
  for (int64_t i = 0; i < nb; ++i) {
    head.row_start[i] = count;
    if (!one_class) ClassifyRow(problem, head, i, worker.column_class, worker.row_class);
    float* row = head.logits + i * problem.nb32;
    const Floats row_max = Splat(head.row_max[i]);
    const Ints live_row = SplatInt(full && head.real[i] != 0 ? -1 : 0);
    Floats largest = Splat(-kInfinity);
    for (int64_t j = 0; j < nb; j += kLanes) {
      const Floats logit = Load(row + j);
      const Floats s = Score(logit, row_max);
      const Words key = Key(s);
      const Ints pair_class = one_class ? Ints{} : LoadInts(worker.row_class + j);
      const Ints above = (pair_class > boundary_class) | ((pair_class == boundary_class) & (Ints)(key > boundary_key));
      const Ints tied = (pair_class == boundary_class) & (Ints)(key == boundary_key);
      if (AnyLane(above | tied)) {
        for (int64_t lane = 0; lane < Smaller(kLanes, nb - j); ++lane) {
          if (!above[lane] && !tied[lane]) continue;
          const bool chosen = above[lane] || boundary.ties-- > 0;
          if (blocks) blocks[i * nb + j + lane] = chosen ? 2 : 1;
          if (chosen && head.real[i] != 0 && head.real[j + lane] != 0) head.columns[count++] = static_cast<int32_t>(j + lane);
        }
      }
      if (score) {
        for (int64_t lane = 0; lane < Smaller(kLanes, nb - j); ++lane) score[i * nb + j + lane] = s[lane];
      }
      const Ints counts_low = live_row & ~(above | tied) & (Ints)(Load(head.real_count + j) > 0.0f);
      const Floats low = counts_low ? logit * Splat(kLog2E) : Splat(-kInfinity);
      Store(row + j, low);
      largest = MaxOrNan(low, largest);  // a row with a NaN must end as NaN, not as a row without weights
    }
    head.row_max[i] = LargestOrNan(largest);
  }
  head.row_start[nb] = count;
}

void Select(const Problem& problem, int64_t head_index, int64_t worker_index) {
  const MraAttentionParams& params = *problem.params;
  const WorkerBuffers& worker = problem.workers[worker_index];
  const Head head = HeadOf(problem, head_index);
  const int64_t nb = problem.nb;
  ComputeLogits(problem, head_index, head);

  bool one_class = params.initial_prior_first_n_blocks == 0 && params.initial_prior_diagonal_n_blocks == 0;
  for (int64_t j = 0; j < nb; ++j) {
    worker.column_class[j] = (j < params.initial_prior_first_n_blocks) - (head.real[j] == 0 ? 2 : 0);
    one_class &= head.real[j] != 0;
  }
  for (int64_t j = nb; j < problem.nb32; ++j) worker.row_class[j] = kLowestClass;

  const int64_t flat = (problem.first_head + head_index) * nb * nb;
  uint8_t* blocks = problem.blocks ? problem.blocks + flat : nullptr;
  float* score = problem.score ? problem.score + flat : nullptr;
  if (blocks) memset(blocks, 0, static_cast<size_t>(nb * nb));
  Choose(problem, head, one_class, FindBoundary(problem, head, one_class, worker), worker, blocks, score);
}

// ---------------------------------------------------------------------------------------------------------------------------------
// Attention.

// Low-resolution part of up to 8 block rows from `first`: low_output[r] = sum_j w_rj * (sum of V over block j), total[r] = sum_j
// w_rj c_j.
void LowResolution(const Problem& problem, int64_t head_index, const Head& head, int64_t first, int64_t rows,
                   const WorkerBuffers& worker, float* total) {
  const int64_t nb32 = problem.nb32;
  for (int64_t r = 0; r < kPanel; ++r) {
    float* weights = worker.low_rows + r * nb32;
    total[r] = 0.0f;
    if (r >= rows || head.row_max[first + r] == -kInfinity) {
      memset(weights, 0, static_cast<size_t>(nb32) * sizeof(float));
      continue;
    }
    const float* logits = head.logits + (first + r) * nb32;
    const Floats row_max = Splat(head.row_max[first + r]);
    Floats sum = {};
    for (int64_t j = 0; j < nb32; j += kLanes) {
      const Floats w = Exp2(Load(logits + j) - row_max);
      Store(weights + j, w);
      sum = MultiplyAdd(w, Load(head.real_count + j), sum);
    }
    total[r] = Sum(sum);
  }
  for (int64_t j = 0; j < nb32; j += 8) Transpose8x8(worker.low_rows + j, nb32, worker.low_weights + j * kPanel, kPanel);
  const float* value_sum = problem.group.value_sum + head_index * problem.nb * problem.d32;
  for (int64_t d = 0; d < problem.d32; d += kBlock) {
    MultiplyPanel<false>(worker.low_weights, kPanel, value_sum + d, problem.d32, problem.nb, worker.low_output + d, problem.d32);
  }
}

constexpr int kQueryVectors = kBlock / kLanes;

// Running softmax of the 32 query tokens of a block row, logits in units of log2.
struct Softmax {
  Floats largest[kQueryVectors];
  Floats total[kQueryVectors];
};

// weights (32 x 32) = logits of one block pair, key token by query token; raises `largest`.
MRA_INLINE void BlockLogits(const Problem& problem, const float* panels, uint32_t real, const float* queries, float* weights,
                            Floats (&largest)[kQueryVectors]) {
  const int64_t D = problem.params->head_size;
  const bool whole = real == 0xFFFFFFFFu;
  for (int t = 0; t < kBlock; t += kPanel) {
    const float* panel = panels + t * problem.d8;
    for (int row = 0; row < kPanel; row += kTileRows) {
#pragma GCC unroll 4
      for (int v = 0; v < kQueryVectors; v += 2) {
        Floats acc[kTileRows][2] = {};
        MultiplyTile<false>(panel + row, kPanel, queries + v * kLanes, kBlock, D, acc);
        float* out = weights + (t + row) * kBlock + v * kLanes;
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          Store(out + r * kBlock, acc[r][0]);
          Store(out + r * kBlock + kLanes, acc[r][1]);
          if (whole) {
            largest[v] = Max(acc[r][0], largest[v]);
            largest[v + 1] = Max(acc[r][1], largest[v + 1]);
          }
        }
      }
    }
  }
  if (whole) return;
  for (int t = 0; t < kBlock; ++t) {
    for (int v = 0; v < kQueryVectors; ++v) {
      float* w = weights + t * kBlock + v * kLanes;
      if (real >> t & 1u) {
        largest[v] = Max(Load(w), largest[v]);
      } else {
        Store(w, Splat(-kInfinity));
      }
    }
  }
}

// Exact blocks of one block row: output (d8 x 32) and softmax are those of the chosen columns.
void ExactBlocks(const Problem& problem, int64_t head_index, const Head& head, const int32_t* columns, int64_t count,
                 const WorkerBuffers& worker, Softmax* softmax) {
  const int64_t d8 = problem.d8;
  const int64_t block_size = kBlock * d8;
  const float* key_panels = problem.group.key_panels + head_index * problem.nb * block_size;
  const float* value_rows = problem.group.value_rows + head_index * problem.nb * block_size;
  for (int64_t start = 0; start < count; start += kChunkBlocks) {
    const int64_t blocks = Smaller(kChunkBlocks, count - start);
    Floats largest[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) largest[v] = softmax->largest[v];
    for (int64_t n = 0; n < blocks; ++n) {
      const int32_t j = columns[start + n];
      BlockLogits(problem, key_panels + j * block_size, head.real[j], worker.queries, worker.weights + n * kBlock * kBlock,
                  largest);
    }
    Floats decay[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) {
      decay[v] = Exp2(softmax->largest[v] - largest[v]);
      Floats sum0 = {};
      Floats sum1 = {};
      float* w = worker.weights + v * kLanes;
      for (int64_t key = 0; key < blocks * kBlock; key += 2, w += 2 * kBlock) {
        const Floats w0 = Exp2(Load(w) - largest[v]);
        const Floats w1 = Exp2(Load(w + kBlock) - largest[v]);
        Store(w, w0);
        Store(w + kBlock, w1);
        sum0 += w0;
        sum1 += w1;
      }
      softmax->largest[v] = largest[v];
      softmax->total[v] = MultiplyAdd(softmax->total[v], decay[v], sum0 + sum1);
    }
    for (int64_t d = 0; d < d8; d += kTileRows) {
#pragma GCC unroll 4
      for (int v = 0; v < kQueryVectors; v += 2) {
        float* out = worker.output + d * kBlock + v * kLanes;
        Floats acc[kTileRows][2] = {};
        if (start > 0) {
#pragma GCC unroll 8
          for (int r = 0; r < kTileRows; ++r) {
            acc[r][0] = Load(out + r * kBlock) * decay[v];
            acc[r][1] = Load(out + r * kBlock + kLanes) * decay[v + 1];
          }
        }
        for (int64_t n = 0; n < blocks; ++n) {
          MultiplyTile<false>(value_rows + columns[start + n] * block_size + d, d8,
                              worker.weights + n * kBlock * kBlock + v * kLanes, kBlock, kBlock, acc);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
          Store(out + r * kBlock, acc[r][0]);
          Store(out + r * kBlock + kLanes, acc[r][1]);
        }
      }
    }
  }
}

// Context of block row i. low_output (d32), low_total: the row's low-resolution part relative to 2^row_max[i].
template <class T>
void AttendRow(const Problem& problem, int64_t head_index, const Head& head, int64_t i, const float* low_output, float low_total,
               const WorkerBuffers& worker) {
  const MraAttentionParams& params = *problem.params;
  const int64_t D = params.head_size;
  const int64_t d8 = problem.d8;
  const int64_t hidden = params.num_heads * D;
  const int64_t global_head = problem.first_head + head_index;
  const int64_t offset =
      (global_head / params.num_heads * params.length + i * kBlock) * hidden + global_head % params.num_heads * D;
  const int64_t tokens = Smaller(kBlock, params.length - i * kBlock);
  T* context = static_cast<T*>(problem.context) + offset;
  const uint32_t real = head.real[i];
  const int32_t* columns = head.columns + head.row_start[i];
  const int64_t count = head.row_start[i + 1] - head.row_start[i];
  const float low_max = head.row_max[i];
  if (count == 0 && low_max == -kInfinity) {  // no weight at all
    for (int64_t t = 0; t < tokens; ++t) memset(context + t * hidden, 0, static_cast<size_t>(D) * sizeof(T));
    return;
  }

  Softmax softmax;
  for (int v = 0; v < kQueryVectors; ++v) {
    softmax.largest[v] = Splat(low_max);
    softmax.total[v] = Floats{};
  }
  if (count > 0) {
    LoadBlock(static_cast<const T*>(problem.query) + offset, hidden, real, D, worker.rows, d8);
    TransposeRows(worker.rows, d8, d8, worker.queries, kBlock);
    const Floats factor = Splat(params.scale * kLog2E);
    for (int64_t n = 0; n < D * kBlock; n += kLanes) Store(worker.queries + n, Load(worker.queries + n) * factor);
    ExactBlocks(problem, head_index, head, columns, count, worker, &softmax);
  } else {
    memset(worker.output, 0, static_cast<size_t>(d8 * kBlock) * sizeof(float));
  }

  const bool low = low_max != -kInfinity;
  for (int v = 0; v < kQueryVectors; ++v) {
    const Floats low_weight = low ? Exp2(Splat(low_max) - softmax.largest[v]) : Floats{};
    const Floats total = MultiplyAdd(low_weight, Splat(low_total), softmax.total[v]);
    const Floats inverse = 1.0f / (total + kEpsilon);
    float* out = worker.output + v * kLanes;
    for (int64_t d = 0; d < d8; ++d) {
      const Floats result = MultiplyAdd(low_weight, Splat(low_output[d]), Load(out + d * kBlock)) * inverse;
      // One NaN for all: the sign of one depends on operand order, which the compiler may choose differently for each row of a
      // tile.
      Store(out + d * kBlock, result == result ? result : Splat(__builtin_nanf("")));
    }
  }
  for (int t = 0; t < kBlock; t += 8) {
    for (int64_t d = 0; d < d8; d += 8) Transpose8x8(worker.output + d * kBlock + t, kBlock, worker.rows + t * d8 + d, d8);
  }
  for (int64_t t = 0; t < tokens; ++t, context += hidden) {
    if (!(real >> t & 1u)) {
      memset(context, 0, static_cast<size_t>(D) * sizeof(T));
      continue;
    }
    const float* row = worker.rows + t * d8;
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) StoreAs(context + d, Load(row + d));
    for (; d < D; ++d) FromFloat(row[d], context + d);
  }
}

// The first block row of a head at or after this share of its cost. A row's cost is counted in low-resolution blocks, of which an
// exact block pair is worth 2 * 32 * 32.
int64_t RowAtShare(const Problem& problem, const Head& head, int64_t numerator, int64_t denominator) {
  const auto cost_before = [&](int64_t i) { return head.row_start[i] * 2 * kBlock * kBlock + i * (problem.nb + kRowCost); };
  const int64_t cost = cost_before(problem.nb) / denominator * numerator;
  if (numerator == denominator) return problem.nb;
  int64_t from = 0;
  int64_t to = problem.nb;  // the answer is in [from, to]
  while (from < to) {
    const int64_t middle = (from + to) / 2;
    if (cost_before(middle) < cost) {
      from = middle + 1;
    } else {
      to = middle;
    }
  }
  return from;
}

template <class T>
void AttendRows(const Problem& problem, int64_t head_index, const Head& head, int64_t begin, int64_t end,
                const WorkerBuffers& worker) {
  const bool full = problem.params->approx_mode == MRA_APPROX_FULL;
  for (int64_t first = begin; first < end; first += kPanel) {
    const int64_t rows = Smaller(kPanel, end - first);
    float total[kPanel] = {};
    if (full) {
      LowResolution(problem, head_index, head, first, rows, worker, total);
    } else {
      memset(worker.low_output, 0, static_cast<size_t>(kPanel * problem.d32) * sizeof(float));
    }
    for (int64_t r = 0; r < rows; ++r) {
      AttendRow<T>(problem, head_index, head, first + r, worker.low_output + r * problem.d32, total[r], worker);
    }
  }
}

void Attend(const Problem& problem, int64_t head_index, int64_t piece, int64_t worker_index) {
  const WorkerBuffers& worker = problem.workers[worker_index];
  const Head head = HeadOf(problem, head_index);
  const int64_t begin = RowAtShare(problem, head, piece, problem.pieces);
  const int64_t end = RowAtShare(problem, head, piece + 1, problem.pieces);
  switch (problem.params->dtype) {
    case MRA_FLOAT16:
      return AttendRows<Half>(problem, head_index, head, begin, end, worker);
    case MRA_BFLOAT16:
      return AttendRows<BFloat>(problem, head_index, head, begin, end, worker);
    default:
      return AttendRows<float>(problem, head_index, head, begin, end, worker);
  }
}

}  // namespace

const Kernels kKernels = {Pack, Select, Attend};

}  // namespace MRA_TARGET
}  // namespace mra
