// Third phase: the context, from the chosen blocks and the low-resolution rest. Included once per instruction set.
#if defined(MRA_ATTENTION_ATTEND_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MRA_ATTENTION_ATTEND_INL_H_
#undef MRA_ATTENTION_ATTEND_INL_H_
#else
#define MRA_ATTENTION_ATTEND_INL_H_
#endif

#include <string.h>

#include "mra_attention_problem.h"
#include "mra_attention_products-inl.h"
#include "mra_attention_select-inl.h"
#include "mra_attention_simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace mra {
namespace HWY_NAMESPACE {

// Low-resolution part of up to 8 block rows from `first`: low_output[r] = sum_j w_rj * (sum of V over block j), total[r] = sum_j
// w_rj c_j.
MRA_STAGE void LowResolution(const Problem& problem, const float* value_sum, const Head& head, int64_t first, int64_t rows,
                             const WorkerBuffers& worker, float* total) {
  const int64_t nb32 = problem.nb32;
  for (int64_t r = 0; r < 8; ++r) {
    float* weights = worker.low_weights + r * nb32;
    total[r] = 0.0f;
    if (r >= rows || head.row_max[first + r] == -kInfinity) {
      memset(weights, 0, static_cast<size_t>(nb32) * sizeof(float));
      continue;
    }
    const float* logits = head.logits + (first + r) * nb32;
    const Floats row_max = hn::Set(kFloats, head.row_max[first + r]);
    Floats sum = hn::Zero(kFloats);
    for (int64_t j = 0; j < nb32; j += kLanes) {
      const Floats w = Exp2(hn::Sub(hn::LoadU(kFloats, logits + j), row_max));
      hn::StoreU(w, kFloats, weights + j);
      sum = hn::MulAdd(w, hn::LoadU(kFloats, head.real_count + j), sum);
    }
    total[r] = hn::ReduceSum(kFloats, sum);
  }
  MultiplyPanel<false>(worker.low_weights, nb32, value_sum, problem.d32, problem.nb, problem.d32, worker.low_output, problem.d32);
}

// Running softmax of the 32 query tokens of a block row, logits in units of log2.
struct Softmax {
  Floats largest[kQueryVectors];
  Floats total[kQueryVectors];
};

// Logits of up to kChunkBlocks chosen blocks; largest: the largest logit of each query token, not yet times factor.
template <class Products>
MRA_STAGE void LogitsOfBlocks(const Problem& problem, const float* keys, const float* queries, const uint32_t* real,
                              const int32_t* columns, int64_t blocks, const WorkerBuffers& worker, Floats* largest) {
  const int64_t block_size = kBlock * problem.d16;
  for (int64_t n = 0; n < blocks; ++n) {
    const int32_t j = columns[n];
    float* logits = worker.weights + n * kBlock * kBlock;
    if (HWY_LIKELY(real[j] == 0xFFFFFFFFu)) {
      Products::Logits(problem, keys + j * block_size, queries, logits, largest);
      continue;
    }
    Floats unused[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) unused[v] = hn::Zero(kFloats);
    Products::Logits(problem, keys + j * block_size, queries, logits, unused);
    for (int t = 0; t < kBlock; ++t) {
      for (int v = 0; v < kQueryVectors; ++v) {
        float* logit = logits + t * kBlock + v * kLanes;
        if (real[j] >> t & 1u) {
          largest[v] = LargerIgnoringNan(largest[v], hn::LoadU(kFloats, logit));
        } else {
          hn::StoreU(hn::Set(kFloats, -kInfinity), kFloats, logit);
        }
      }
    }
  }
}

// Logits to weights relative to 2^largest, and the softmax brought up to date; decay: what earlier weights are worth now.
MRA_STAGE void SoftmaxOfBlocks(const WorkerBuffers& worker, int64_t blocks, const Floats* raw_largest, float scale,
                               Softmax* softmax, Floats* decay) {
  const Floats factor = hn::Set(kFloats, scale);
  for (int v = 0; v < kQueryVectors; ++v) {
    const Floats largest = LargerIgnoringNan(softmax->largest[v], hn::Mul(raw_largest[v], factor));
    decay[v] = Exp2(hn::Sub(softmax->largest[v], largest));
    Floats sum0 = hn::Zero(kFloats);
    Floats sum1 = hn::Zero(kFloats);
    float* w = worker.weights + v * kLanes;
    for (int64_t key = 0; key < blocks * kBlock; key += 2, w += 2 * kBlock) {
      const Floats w0 = Exp2(hn::MulSub(hn::LoadU(kFloats, w), factor, largest));
      const Floats w1 = Exp2(hn::MulSub(hn::LoadU(kFloats, w + kBlock), factor, largest));
      hn::StoreU(w0, kFloats, w);
      hn::StoreU(w1, kFloats, w + kBlock);
      sum0 = hn::Add(sum0, w0);
      sum1 = hn::Add(sum1, w1);
    }
    softmax->largest[v] = largest;
    softmax->total[v] = hn::MulAdd(softmax->total[v], decay[v], hn::Add(sum0, sum1));
  }
}

template <class Products>
MRA_STAGE void ValuesOfBlocks(const Problem& problem, const float* values, const int32_t* columns, int64_t blocks,
                              const WorkerBuffers& worker, const Floats* decay, bool first) {
  const int64_t block_size = kBlock * problem.d16;
  const float* chosen[kChunkBlocks];
  for (int64_t n = 0; n < blocks; ++n) chosen[n] = values + columns[n] * block_size;
  Products::Values(problem, chosen, blocks, worker, decay, first);
}

// Context of the row's tokens: output (d16 x 32) and softmax are those of the exact blocks; low_output (d32), low_total: the
// low-resolution part relative to 2^low_max.
template <class T>
MRA_STAGE void WriteContext(const Problem& problem, const Softmax& softmax, float low_max, const float* low_output, float low_total,
                            uint32_t real, int64_t tokens, const WorkerBuffers& worker, T* context) {
  const int64_t D = problem.params->head_size;
  const int64_t d16 = problem.d16;
  const int64_t hidden = problem.params->num_heads * D;
  const bool low = low_max != -kInfinity;
  const Floats nan = hn::Set(kFloats, __builtin_nanf(""));
  for (int v = 0; v < kQueryVectors; ++v) {
    const Floats low_weight = low ? Exp2(hn::Sub(hn::Set(kFloats, low_max), softmax.largest[v])) : hn::Zero(kFloats);
    const Floats total = hn::MulAdd(low_weight, hn::Set(kFloats, low_total), softmax.total[v]);
    const Floats inverse = hn::Div(hn::Set(kFloats, 1.0f), hn::Add(total, hn::Set(kFloats, kEpsilon)));
    float* out = worker.output + v * kLanes;
    for (int64_t d = 0; d < D; ++d, out += kBlock) {
      const Floats sum = hn::MulAdd(low_weight, hn::Set(kFloats, low_output[d]), hn::LoadU(kFloats, out));
      const Floats result = hn::Mul(sum, inverse);
      // One NaN for all: the sign of one depends on operand order, which the compiler may choose differently for each row of a
      // tile.
      hn::StoreU(hn::IfThenElse(hn::Eq(result, result), result, nan), kFloats, out);
    }
  }
  for (int t = 0; t < kBlock; t += 8) {
    for (int64_t d = 0; d < d16; d += 8) Transpose8x8(worker.output + d * kBlock + t, kBlock, worker.rows + t * d16 + d, d16);
  }
  for (int64_t t = 0; t < tokens; ++t, context += hidden) {
    if (!(real >> t & 1u)) {
      memset(context, 0, static_cast<size_t>(D) * sizeof(T));
      continue;
    }
    const float* row = worker.rows + t * d16;
    int64_t d = 0;
    for (; d + kLanes <= D; d += kLanes) StoreAs(hn::LoadU(kFloats, row + d), context + d);
    if (d < D) StoreFirst(hn::LoadU(kFloats, row + d), context + d, static_cast<size_t>(D - d));
  }
}

// Context of block row i. low_output, low_total: as above.
template <class T, class Products>
void AttendRow(const Problem& problem, const Bundle& bundle, int64_t head_index, const Head& head, int64_t i,
               const float* low_output, float low_total, const WorkerBuffers& worker) {
  const MraAttentionParams& params = *problem.params;
  const int64_t D = params.head_size;
  const int64_t hidden = params.num_heads * D;
  const int64_t global_head = bundle.first_head + head_index;
  const int64_t offset =
      (global_head / params.num_heads * params.length + i * kBlock) * hidden + global_head % params.num_heads * D;
  const int64_t tokens = Smaller(kBlock, params.length - i * kBlock);
  T* context = static_cast<T*>(problem.context) + offset;
  const int32_t* columns = head.columns + head.row_start[i];
  const int64_t count = head.row_start[i + 1] - head.row_start[i];
  const float low_max = head.row_max[i];
  if (count == 0 && low_max == -kInfinity) {  // no weight at all
    for (int64_t t = 0; t < tokens; ++t) memset(context + t * hidden, 0, static_cast<size_t>(D) * sizeof(T));
    return;
  }

  Softmax softmax;
  for (int v = 0; v < kQueryVectors; ++v) {
    softmax.largest[v] = hn::Set(kFloats, low_max);
    softmax.total[v] = hn::Zero(kFloats);
  }
  const int64_t block_size = kBlock * problem.d16;
  const float* queries = bundle.buffers.queries + (head_index * problem.nb + i) * block_size;
  const float* keys = bundle.buffers.keys + head_index * problem.nb * block_size;
  const float* values = bundle.buffers.values + head_index * problem.nb * block_size;
  const float factor = params.scale * kLog2E;
  if (count == 0) memset(worker.output, 0, static_cast<size_t>(problem.d16 * kBlock) * sizeof(float));
  for (int64_t start = 0; start < count; start += kChunkBlocks) {
    const int64_t blocks = Smaller(kChunkBlocks, count - start);
    Floats largest[kQueryVectors];
    for (int v = 0; v < kQueryVectors; ++v) largest[v] = hn::Set(kFloats, -kInfinity);
    LogitsOfBlocks<Products>(problem, keys, queries, head.real, columns + start, blocks, worker, largest);
    Floats decay[kQueryVectors];
    SoftmaxOfBlocks(worker, blocks, largest, factor, &softmax, decay);
    ValuesOfBlocks<Products>(problem, values, columns + start, blocks, worker, decay, start == 0);
  }
  WriteContext<T>(problem, softmax, low_max, low_output, low_total, head.real[i], tokens, worker, context);
}

// The first block row of a head at or after this share of its cost. A row's cost is counted in low-resolution blocks, of which an
// exact block pair is worth 2 * 32 * 32.
inline int64_t RowAtShare(const Problem& problem, const Head& head, int64_t numerator, int64_t denominator) {
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

template <class T, class Products>
HWY_NOINLINE void AttendPiece(const Problem& problem, const Bundle& bundle, int64_t head_index, int64_t piece,
                              int64_t worker_index) {
  const WorkerBuffers& worker = problem.workers[worker_index];
  const Head head = HeadOf(problem, bundle, head_index);
  const int64_t begin = RowAtShare(problem, head, piece, bundle.pieces);
  const int64_t end = RowAtShare(problem, head, piece + 1, bundle.pieces);
  const bool full = problem.params->approx_mode == MRA_APPROX_FULL;
  const float* value_sum = bundle.buffers.value_sum + head_index * problem.nb * problem.d32;
  Products::Begin();
  for (int64_t first = begin; first < end; first += 8) {
    const int64_t rows = Smaller(8, end - first);
    float total[8] = {};
    if (full) {
      LowResolution(problem, value_sum, head, first, rows, worker, total);
    } else {
      memset(worker.low_output, 0, static_cast<size_t>(8 * problem.d32) * sizeof(float));
    }
    for (int64_t r = 0; r < rows; ++r) {
      AttendRow<T, Products>(problem, bundle, head_index, head, first + r, worker.low_output + r * problem.d32, total[r], worker);
    }
  }
  Products::End();
}

}  // namespace HWY_NAMESPACE
}  // namespace mra
HWY_AFTER_NAMESPACE();

#endif  // include guard per target
